"""Fused attention of visible tokens on GPUs, and when to use it instead of the plain path of `attend`.

Values of `attn_implementation` of a GreenSwin model: "eager" and "sdpa" gather windows and hand the bias of every pair
to torch (`modeling_green_swin.attend`); "flex_attention" and "triton_window" compute bias and window mask from the
coordinates of the slots inside one kernel. What these two do not take (a CPU, whole images, wanted probabilities,
dropout, float64, `torch.use_deterministic_algorithms`) goes the way of "sdpa", with the same result.

Letters as in `modeling_green_swin`: R rows, T tokens of a row, C channels, h heads, d channels of a head, G groups,
S slots of each, P rows of the position table.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from .sparse_plan import GroupingPlan

KERNELS = ("flex_attention", "triton_window")


def reads_coordinates(implementation: str | None, device: torch.device) -> bool:
    """Whether attention on this device goes to kernels that need no index of the position table for each pair."""
    return implementation in KERNELS and device.type == "cuda"


def fused_attention(
    implementation: str | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    plan: GroupingPlan,
    dropout: float,
) -> Tensor | None:
    """Attention of visible tokens by the kernels of `implementation`, [R, T, C]; `None` where the plain path is due.

    Args:
        implementation: one of `KERNELS`; all others are the plain path's.
        query, key, value: [R, T, C] in the order of the tokens.
        table: [P, h], the learned `relative_position_bias_table`.
        plan: the window partition, on the device of the queries.
        dropout: probability of dropping an attention weight.
    """
    if implementation not in KERNELS or dropout:
        return None
    if torch.are_deterministic_algorithms_enabled():
        return None  # both sum the table's gradient by atomic additions
    if implementation == "triton_window":
        from .triton_attention import is_supported, triton_window_attention

        takes = is_supported(query, table.shape[1])
        return triton_window_attention(query, key, value, table, plan) if takes else None
    takes = query.is_cuda and query.dtype != torch.float64 and query.shape[2] >= 16 * table.shape[1]
    return flex_window_attention(query, key, value, table, plan) if takes else None


def require_triton() -> None:
    """Import the Triton kernels, which takes some time and is left to those who ask for them.

    Raises:
        ImportError: Triton is not installed.
    """
    from .triton_attention import triton_window_attention  # noqa: F401


def flex_window_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, plan: GroupingPlan) -> Tensor:
    """Multi-head attention of visible tokens inside their windows by FlexAttention: [R, T, C].

    Compiled on CUDA; on a CPU torch's own reference of it runs, which has no gradients. The gradient of the table is
    not reproducible to the last bit.

    Args:
        query, key, value: [R, T, C] in the order of the tokens; on CUDA not float64, and d = C / h at least 16.
        table: [P, h], the learned `relative_position_bias_table` for the plan's table window.
        plan: the window partition, on the device of the queries.
    """
    groups_of_a_row = (plan.num_groups, plan.group_size, table.shape[1], -1)

    def by_group(tokens: Tensor) -> Tensor:
        """[R, T, C] to [R G, h, S, d]."""
        if plan.gather_index is not None:
            tokens = tokens.index_select(1, plan.gather_index)
        return tokens.unflatten(1, groups_of_a_row[:2]).unflatten(3, groups_of_a_row[2:]).flatten(0, 1).transpose(1, 2)

    query, key, value = by_group(query), by_group(key), by_group(value)
    attend: Callable[..., Any] = flex_attention
    if query.is_cuda and not torch.compiler.is_compiling():
        attend = _compiled_flex_attention()
    attended = attend(query, key, value, score_mod=_window_scores(table, plan, len(query)))
    tokens = attended.transpose(1, 2).flatten(2).unflatten(0, (-1, plan.num_groups)).flatten(1, 2)  # [R, G S, C]
    return tokens if plan.scatter_index is None else tokens.index_select(1, plan.scatter_index)


def _window_scores(table: Tensor, plan: GroupingPlan, batch_size: int) -> Callable[..., Tensor]:
    """FlexAttention's `score_mod`: adds the relative position bias, -inf for pairs of different windows.

    A block mask would not spare work: a group has about as many slots as a block of the kernel.
    """
    group_of = torch.arange(plan.num_groups, device=table.device).repeat(batch_size // plan.num_groups)
    window, key_position = plan.slot_window, plan.slot_position
    query_position = key_position + 2 * plan.table_window_size * (plan.table_window_size - 1)
    table_rows = len(table)

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        group = group_of[batch]
        # The remainder concerns pairs of different windows only: any row will do for them, the same one for all would
        # be a place that all additions to its gradient wait for.
        row = (query_position[group, i] - key_position[group, j]) % table_rows
        return torch.where(window[group, i] == window[group, j], score + table[row, head], -float("inf"))

    return score_mod


@lru_cache(maxsize=1)  # compiling imports much; only those pay who use it
def _compiled_flex_attention() -> Callable[..., Any]:
    return torch.compile(flex_attention)


__all__ = ["KERNELS", "flex_window_attention", "fused_attention", "reads_coordinates", "require_triton"]
