"""When arithmetic fails in training: what is counted, when a run stops, and what its message says."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

# The scaler starts at 65,536 and halves with every update that overflows. Below 1 it makes gradients smaller instead of
# larger: whatever overflows then does so in the computation itself, and no scale helps.
COLLAPSED_LOSS_SCALE = 1.0


class _LossScaler(Protocol):
    """Of torch's `GradScaler`, what is read here."""

    def get_scale(self) -> float: ...


def loss_scale(scaler: _LossScaler | None) -> float | None:
    """The factor of the loss in fp16; None in other precisions, which need none. Waits for the device."""
    return None if scaler is None else float(scaler.get_scale())


def explain_skips(skipped: int, update: int, loss: Tensor | None, scale: float | None) -> str:
    """What is known of updates in a row that were skipped, and what helps, in one line.

    Args:
        skipped: updates in a row.
        update: the last of them.
        loss: of that one.
        scale: see `loss_scale`.
    """
    many = f"{skipped} updates in a row, up to update {update}, had"
    if loss is not None and not bool(torch.isfinite(loss)):
        cause = f"{many} a loss of {float(loss.detach())} and gradients that are not finite"
    else:
        cause = f"{many} gradients that are not finite"
    return f"{cause}; {remedy(scale)}"


def explain_collapse(skipped: int, update: int, scale: float) -> str:
    """As `explain_skips`, for a loss scale below `COLLAPSED_LOSS_SCALE`."""
    return (
        f"the loss scale of fp16 has collapsed to {scale:g} (below {COLLAPSED_LOSS_SCALE:g}) at update {update}, after "
        f"{skipped} skipped updates: activations or gradients overflow whatever the scale; {remedy(scale)}"
    )


def remedy(scale: float | None) -> str:
    precision = "--precision bf16 or fp32" if scale is not None else "--precision fp32 if it is another"
    return (
        f"lower --learning-rate or use {precision} in a run of its own from the last checkpoint (--init-from), "
        "and look for broken images"
    )


__all__ = ["COLLAPSED_LOSS_SCALE", "explain_collapse", "explain_skips", "loss_scale", "remedy"]
