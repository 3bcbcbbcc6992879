"""Pictures as tensors: with their masked units painted over, completed by predictions, back from normalisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modeling_green_swin import patchify, unit_statistics, unpatchify

_GREY = 0.75


def masked_images(images: Tensor, bool_masked_pos: Tensor, unit: int, fill: float | Tensor = _GREY) -> Tensor:
    """Images `[B, C, H, W]` with their masked units painted over.

    Args:
        images: `[B, C, H, W]`.
        bool_masked_pos: `[B, units]`, True = masked.
        unit: side of a mask unit in pixels.
        fill: value of masked pixels.
    """
    return torch.where(_pixel_mask(images, bool_masked_pos, unit), torch.as_tensor(fill, dtype=images.dtype), images)


def paste_reconstruction(
    pixel_values: Tensor, reconstruction: Tensor, bool_masked_pos: Tensor, unit: int, *, norm_pix_loss: bool
) -> Tensor:
    """What the model saw, completed by what it predicted: `[B, C, H, W]` in the scale of `pixel_values`.

    Visible pixels are those of `pixel_values` exactly. With `norm_pix_loss` the predictions of each unit are scaled
    back by the mean and standard deviation of the unit's true pixels, which the model was never asked for.

    Args:
        pixel_values: `[B, C, H, W]`, normalised as the model got them.
        reconstruction: `[B, C, H, W]`, the model's output of that name.
        bool_masked_pos: `[B, units]`, True = masked.
        unit: side of a mask unit in pixels.
        norm_pix_loss: the model's setting of that name.
    """
    height, width = pixel_values.shape[2:]
    predicted = reconstruction.to(pixel_values.dtype)
    if norm_pix_loss:
        mean, std = unit_statistics(patchify(pixel_values, unit))
        units = patchify(predicted, unit) * std + mean
        predicted = unpatchify(units, (height // unit, width // unit), unit)
    return torch.where(_pixel_mask(pixel_values, bool_masked_pos, unit), predicted, pixel_values)


def to_display(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Undo the normalisation by channel and clip: `[B, C, H, W]` in 0 … 1."""
    shape = (1, -1, 1, 1)
    return (images * torch.tensor(std).view(shape) + torch.tensor(mean).view(shape)).clamp(0, 1)


def _pixel_mask(images: Tensor, bool_masked_pos: Tensor, unit: int) -> Tensor:
    """`[B, 1, H, W]`, True = masked."""
    rows, columns = images.shape[2] // unit, images.shape[3] // unit
    grid = bool_masked_pos.bool().view(-1, 1, rows, columns)
    return grid.repeat_interleave(unit, dim=2).repeat_interleave(unit, dim=3)


__all__ = ["masked_images", "paste_reconstruction", "to_display"]
