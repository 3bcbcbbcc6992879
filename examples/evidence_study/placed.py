"""Garments at random places, sizes and angles over crops of photographs: position and background carry no class."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate, max_pool2d

from green_swin_hf.data import seeded_generator

BACKGROUND_SIDE = 160  # pixels of a photograph's shorter side before it is cropped
BATCH = 512
_DRAWS = 11


@dataclass(frozen=True)
class Placement:
    """Ranges that placements are drawn from, each uniformly.

    Attributes:
        size: pixels of a side of the result.
        scale: side of the garment's own image as a share of `size`.
        degrees: largest rotation to either side.
        gain: factor of the garment's brightness.
        background: factor of the photograph's brightness.
        crop: side of the background's crop, as a share of the photograph's shorter side.
    """

    size: int = 48
    scale: tuple[float, float] = (0.45, 0.85)
    degrees: float = 20.0
    gain: tuple[float, float] = (0.5, 1.0)
    background: tuple[float, float] = (1.0, 1.0)
    crop: tuple[float, float] = (0.2, 0.8)


def place_garments(
    garments: Tensor, photos: Sequence[Tensor], placement: Placement, seed: int, first_index: int = 0
) -> Tensor:
    """[N, 1, size, size] uint8: image `i` depends on garment `i`, the photographs, `seed` and `first_index + i` alone.

    Args:
        garments: [N, 1, H, W] uint8, bright on black.
        photos: grey photographs [1, rows, columns] uint8, see `prepare_photo`.
        placement: what is drawn.
        seed, first_index: of the draws; other numbers are other placements.
    """
    parts = []
    for start in range(0, len(garments), BATCH):
        part = garments[start : start + BATCH]
        draws = torch.stack([_draws(seed, first_index + start + row) for row in range(len(part))])
        parts.append(_compose(part, _backgrounds(photos, placement, draws), placement, draws))
    return torch.cat(parts)


def prepare_photo(photo: Tensor) -> Tensor:
    """[1, H, W] uint8 with its shorter side reduced to `BACKGROUND_SIDE`, so that cropping is cheap."""
    rows, columns = photo.shape[-2:]
    factor = BACKGROUND_SIDE / min(rows, columns)
    size = (round(rows * factor), round(columns * factor))
    return interpolate(photo[None], size, mode="bicubic", antialias=True)[0]


def _draws(seed: int, index: int) -> Tensor:
    return torch.rand(_DRAWS, generator=seeded_generator(seed, index), dtype=torch.float64)


def _within(draw: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    return low + (high - low) * draw


def _backgrounds(photos: Sequence[Tensor], placement: Placement, draws: Tensor) -> Tensor:
    """[B, 1, size, size] float32 in 0 … 255: a crop of a photograph for each row of draws, half of them mirrored."""
    crops = []
    for photo_draw, side_draw, top_draw, left_draw, flip_draw in draws[:, :5].tolist():
        photo = photos[int(photo_draw * len(photos))]
        rows, columns = photo.shape[-2:]
        low, high = placement.crop
        side = max(1, round(min(rows, columns) * (low + (high - low) * side_draw)))
        top, left = int(top_draw * (rows - side + 1)), int(left_draw * (columns - side + 1))
        crop = photo[None, :, top : top + side, left : left + side]
        crop = interpolate(crop, (placement.size, placement.size), mode="bilinear", antialias=True)
        crops.append(crop.flip(-1) if flip_draw < 0.5 else crop)
    return torch.cat(crops).float()


def _compose(garments: Tensor, backgrounds: Tensor, placement: Placement, draws: Tensor) -> Tensor:
    scale_draw, angle_draw, row_draw, column_draw, gain_draw, background_draw = draws[:, 5:].unbind(1)
    scale = _within(scale_draw, *placement.scale)
    angle = _within(angle_draw, -1.0, 1.0) * math.radians(placement.degrees)
    row, column = (_within(draw, scale - 1, 1 - scale) for draw in (row_draw, column_draw))  # centre, in -1 … 1
    cosine, sine = torch.cos(angle) / scale, torch.sin(angle) / scale
    top = torch.stack([cosine, sine, -(cosine * column + sine * row)], 1)
    bottom = torch.stack([-sine, cosine, sine * column - cosine * row], 1)
    theta = torch.stack([top, bottom], 1).float()  # [B, 2, 3], from the result's coordinates to the garment's
    grid = affine_grid(theta, [len(garments), 1, placement.size, placement.size], align_corners=False)
    layers = torch.cat([garments.float(), silhouettes(garments)], 1)
    garment, alpha = grid_sample(layers, grid, mode="bilinear", align_corners=False).split(1, 1)
    gain = _within(gain_draw, *placement.gain).float()[:, None, None, None]
    dimmed = backgrounds * _within(background_draw, *placement.background).float()[:, None, None, None]
    # Where alpha is partial, the sampled garment is partial too, blended with the black around it.
    return (garment * gain + dimmed * (1 - alpha)).round().clamp(0, 255).byte()


def silhouettes(garments: Tensor) -> Tensor:
    """[N, 1, H, W] float32, 1 on the garment and inside it: its pixels above black, with small dark gaps closed."""
    inside = max_pool2d((garments > 12).float(), 3, stride=1, padding=1)
    return 1 - max_pool2d(1 - inside, 3, stride=1, padding=1)
