"""One name for every way to compute the attention of visible tokens, for tests and benchmarks."""

from __future__ import annotations

from torch import Tensor

from .gpu_attention import flex_window_attention
from .modeling_green_swin import attend
from .token_layout import VisibleLayout

IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention", "triton_window")


def window_attention(
    implementation: str, query: Tensor, key: Tensor, value: Tensor, table: Tensor, layout: VisibleLayout
) -> Tensor:
    """Multi-head attention of visible tokens inside their windows, [R, T, C], by one implementation.

    On a CPU "sdpa" is "eager" where the table needs a gradient, see `attend`; the other two are never replaced, whereas
    the model falls back to the plain path where a kernel does not run.

    Args:
        implementation: one of `IMPLEMENTATIONS`.
        query, key, value: [R, T, C] in the order of the tokens.
        table: [P, h], the learned `relative_position_bias_table` for the plan's table window.
        layout: of the window partition, on the device of the queries.

    Raises:
        ValueError: an unknown implementation, or tensors that its kernel does not take.
        ImportError: "triton_window" without Triton.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation {implementation!r} must be one of {IMPLEMENTATIONS}")
    if implementation == "triton_window":
        from .triton_attention import triton_window_attention

        return triton_window_attention(query, key, value, table, layout.plan)
    if implementation == "flex_attention":
        return flex_window_attention(query, key, value, table, layout.plan)
    query, key, value = (layout.gather(tokens, table.shape[1]) for tokens in (query, key, value))
    attended, _ = attend(query, key, value, layout.position_bias(table), 0.0, implementation)
    return layout.scatter(attended)


__all__ = ["IMPLEMENTATIONS", "window_attention"]
