"""Tiny configurations and inputs that the tests share."""

from typing import Any

import torch
from torch import Tensor

from green_swin_hf import GreenSwinConfig, sample_masks


def tiny_config(**changes: Any) -> GreenSwinConfig:
    """Three stages of 16x16, 8x8 and 4x4 tokens on 32 px, windows of 4 (the last stage has one), 4x4 mask units."""
    fields: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": (2, 2, 2),
        "num_heads": (1, 2, 4),
        "window_size": 4,
        "drop_path_rate": 0.0,
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "num_labels": 5,
    }
    return GreenSwinConfig(**{**fields, **changes})


def backbone_config(**changes: Any) -> GreenSwinConfig:
    """Four stages of strides 4, 8, 16 and 32, as what consumes a backbone expects, all of them in the output."""
    fields: dict[str, Any] = {
        "image_size": 64,
        "patch_size": 4,
        "depths": (1, 2, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "out_features": ["stage1", "stage2", "stage3", "stage4"],
    }
    return tiny_config(**{**fields, **changes})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(batch_size: int, channels: int = 3, rows: int = 32, columns: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(batch_size, channels, rows, columns, generator=seeded(seed))


def masks(kind: str, batch_size: int, grid_size: tuple[int, int] = (4, 4), seed: int = 0) -> Tensor:
    """`"shared"`: one row; `"per_image"`: one row for each image; `"unequal"`: rows with different counts."""
    if kind == "shared":
        return sample_masks(1, grid_size, 0.75, seeded(seed))
    rows = sample_masks(batch_size, grid_size, 0.75, seeded(seed))
    if kind == "unequal":
        for image in range(batch_size):
            rows[image, : image + 1] = False
    return rows


def randomised(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """The model in eval mode with parameters large enough that every one of them shows in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=seeded(seed)) * 0.2
            parameter.copy_(noise + (1.0 if parameter.ndim == 1 and bool((parameter == 1).all()) else 0.0))
            seed += 1
    return model.eval()
