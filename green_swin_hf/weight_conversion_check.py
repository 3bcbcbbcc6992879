"""Swin computed once more, apart from our models: what the outputs of converted weights are compared with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear

from .configuration_green_swin import GreenSwinConfig

# Largest difference of outputs, relative to the largest output (or 1), that rounding in float32 explains.
TOLERANCE = 1e-4
SWIN_MERGE_ORDER = ((0, 0), (1, 0), (0, 1), (1, 1))  # (row, column) of the four siblings
LEGACY_MERGE_ORDER = ((0, 0), (0, 1), (1, 0), (1, 1))


@dataclass(frozen=True)
class Comparison:
    """How far the outputs of two computations on the same picture are from each other.

    Attributes:
        against: what ours was compared with, in words.
        difference: largest absolute difference.
        scale: largest absolute value of the other's outputs.
        variation: largest absolute difference of the other's outputs for two pictures.
    """

    against: str
    difference: float
    scale: float
    variation: float

    @property
    def agrees(self) -> bool:
        finite = math.isfinite(self.scale)
        return finite and self.difference <= TOLERANCE * max(self.scale, 1.0)  # False also for NaN

    @property
    def depends_on_the_picture(self) -> bool:
        """Whether the outputs tell more than rounding: those of zeros, or of a huge epsilon, agree with anything."""
        return self.variation > TOLERANCE * max(self.scale, 1.0)

    def __str__(self) -> str:
        return f"largest difference of outputs {self.difference:.1e} (largest output {self.scale:.3g}) {self.against}"


def compare_outputs(ours: Sequence[Tensor], theirs: Sequence[Tensor], against: str) -> Comparison:
    """Compare outputs pair by pair, each [2, ...]: of two pictures.

    Raises:
        ValueError: they have different shapes.
    """
    for left, right in zip(ours, theirs, strict=True):
        if left.shape != right.shape:
            raise ValueError(f"outputs have shape {tuple(left.shape)}, {against} {tuple(right.shape)}")
    pairs = [(left.float(), right.float()) for left, right in zip(ours, theirs, strict=True)]
    difference = torch.stack([(left - right).abs().max() for left, right in pairs]).max()
    scale = torch.stack([right.abs().max() for _, right in pairs]).max()
    variation = torch.stack([(right[0] - right[1]).abs().max() for _, right in pairs]).max()
    return Comparison(against, difference.item(), scale.item(), variation.item())


@torch.no_grad()
def outputs_of(model: nn.Module, pixel_values: Tensor) -> list[Tensor]:
    """What is compared of a model of ours or of transformers: feature maps, or last hidden state and logits."""
    outputs: Any = model(pixel_values)
    if outputs.get("feature_maps") is not None:
        return list(outputs.feature_maps)
    if outputs.get("last_hidden_state") is not None:
        return [outputs.last_hidden_state]
    encoder: Any = model.swin
    return [encoder(pixel_values).last_hidden_state, outputs.logits]


def photo_pixels(photo: Path, size: tuple[int, int], num_channels: int) -> Tensor:
    """A photograph and its half turn, for a comparison: [2, num_channels, rows, columns], zero mean, unit variance.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(photo) as image:
        resized = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    colours = torch.from_numpy(np.asarray(resized, dtype=np.float32) / 255).permute(2, 0, 1)
    channels = colours.mean(dim=0, keepdim=True) if num_channels == 1 else colours
    pixels = channels.repeat(-(-num_channels // len(channels)), 1, 1)[:num_channels]
    pixels = (pixels - pixels.mean()) / pixels.std().clamp(min=1e-6)
    return torch.stack([pixels, pixels.flip(1, 2)])


@torch.no_grad()
def published_outputs(
    tensors: Mapping[str, Tensor],
    config: GreenSwinConfig,
    pixel_values: Tensor,
    *,
    merging_offset: int = 0,
    merge_order: Sequence[tuple[int, int]] = SWIN_MERGE_ORDER,
    epsilon: float | None = None,
) -> dict[str, Tensor]:
    """Swin by its definition, on the tensors of a published file under their own names.

    Windows are cut from a rolled grid and shifted ones masked, as the Swin paper says; nothing of our models, layouts
    or names takes part. Sizes that windows do not divide are padded with zeros after the norm.

    Args:
        tensors: names of Microsoft's Swin, SimMIM, timm or the published GreenMIM.
        config: sizes, as read from the file.
        pixel_values: [B, channels, height, width].
        merging_offset: 1 where a stage begins with the patch merging of the one before (timm).
        merge_order: order of the four siblings in patch merging.
        epsilon: of every LayerNorm; `None` for the configuration's.

    Returns:
        `last_hidden_state` [B, tokens, channels]; `logits` [B, labels] of a classifier; `predictions`
        [B, units, pixels] of a GreenMIM decoder that sees every unit.
    """
    encoder = {name.removeprefix("encoder."): tensor.float() for name, tensor in tensors.items()}
    swin = _PublishedSwin(encoder, config, epsilon or config.layer_norm_eps)
    tokens = swin.embed(pixel_values)
    for stage, depth in enumerate(config.depths):
        for block in range(depth):
            tokens = swin.block(tokens, f"layers.{stage}.blocks.{block}", config.num_heads[stage], block % 2 == 1)
        if stage < len(config.depths) - 1:
            tokens = swin.merge(tokens, f"layers.{stage + merging_offset}.downsample", merge_order)
    outputs = {"last_hidden_state": swin.norm(tokens, "norm").flatten(1, 2)}
    head = next((name for name in ("head.fc", "head") if f"{name}.weight" in encoder), None)
    if head is not None:
        outputs["logits"] = swin.linear(outputs["last_hidden_state"].mean(dim=1), head)
    if "decoder_pred.weight" in encoder:
        outputs["predictions"] = swin.decode(outputs["last_hidden_state"])
    return outputs


class _PublishedSwin:
    """The parts of Swin as functions of named tensors; grids are [B, rows, columns, C]."""

    def __init__(self, tensors: Mapping[str, Tensor], config: GreenSwinConfig, epsilon: float):
        self.tensors, self.config, self.epsilon = tensors, config, epsilon

    def linear(self, inputs: Tensor, name: str) -> Tensor:
        return linear(inputs, self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias"))

    def norm(self, inputs: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return layer_norm(inputs, inputs.shape[-1:], weight, bias, self.epsilon)

    def embed(self, pixel_values: Tensor) -> Tensor:
        weight, bias = self.tensors["patch_embed.proj.weight"], self.tensors["patch_embed.proj.bias"]
        grid = nn.functional.conv2d(pixel_values, weight, bias, stride=weight.shape[-1]).permute(0, 2, 3, 1)
        grid = self.norm(grid, "patch_embed.norm")
        positions = self.tensors.get("absolute_pos_embed")
        return grid if positions is None else grid + positions.unflatten(1, tuple(grid.shape[1:3]))

    def mlp(self, inputs: Tensor, name: str) -> Tensor:
        return self.linear(gelu(self.linear(inputs, f"{name}.fc1")), f"{name}.fc2")

    def attention(self, tokens: Tensor, name: str, heads: int, bias: Tensor | float = 0.0) -> Tensor:
        """Attention among the tokens of each row, [rows, tokens, C]."""
        qkv = self.linear(tokens, f"{name}.qkv").unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + bias
        return self.linear((scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2), f"{name}.proj")

    def block(self, grid: Tensor, name: str, heads: int, shifted: bool) -> Tensor:
        table = self.tensors[f"{name}.attn.relative_position_bias_table"]
        window = (round(table.shape[0] ** 0.5) + 1) // 2
        shift = window // 2 if shifted and min(grid.shape[1:3]) > window else 0
        attended = self.window_attention(self.norm(grid, f"{name}.norm1"), f"{name}.attn", heads, window, shift)
        grid = grid + attended
        return grid + self.mlp(self.norm(grid, f"{name}.norm2"), f"{name}.mlp")

    def window_attention(self, grid: Tensor, name: str, heads: int, window: int, shift: int) -> Tensor:
        batch, rows, columns, _ = grid.shape
        padded = nn.functional.pad(grid, (0, 0, 0, -columns % window, 0, -rows % window))
        rolled = padded.roll((-shift, -shift), dims=(1, 2))
        height, width = rolled.shape[1:3]
        table = self.tensors[f"{name}.relative_position_bias_table"]
        bias = table[position_index(window)].permute(2, 0, 1)  # [heads, w², w²]
        mask = _shift_mask(height, width, window, shift)[:, None]  # [windows, 1, w², w²]
        bias = (bias + mask).repeat(batch, 1, 1, 1)
        attended = self.attention(_windows(rolled, window), name, heads, bias)
        attended = attended.unflatten(0, (batch, height // window, width // window)).unflatten(3, (window, window))
        attended = attended.transpose(2, 3).flatten(1, 2).flatten(2, 3)  # [B, height, width, C]
        return attended.roll((shift, shift), dims=(1, 2))[:, :rows, :columns]

    def merge(self, grid: Tensor, name: str, order: Sequence[tuple[int, int]]) -> Tensor:
        grid = nn.functional.pad(grid, (0, 0, 0, grid.shape[2] % 2, 0, grid.shape[1] % 2))
        siblings = torch.cat([grid[:, row::2, column::2] for row, column in order], dim=-1)
        return self.linear(self.norm(siblings, f"{name}.norm"), f"{name}.reduction")

    def decode(self, latents: Tensor) -> Tensor:
        units = self.linear(latents, "decoder_embed") + self.tensors["decoder_pos_embed"]
        for block in range(self.config.decoder_num_hidden_layers):
            name, heads = f"decoder_blocks.{block}", self.config.decoder_num_attention_heads
            units = units + self.attention(self.norm(units, f"{name}.norm1"), f"{name}.attn", heads)
            units = units + self.mlp(self.norm(units, f"{name}.norm2"), f"{name}.mlp")
        return self.linear(self.norm(units, "decoder_norm"), "decoder_pred")


def _windows(grid: Tensor, window: int) -> Tensor:
    """[B, rows, columns, C] to [B windows, window², C]."""
    grid = grid.unflatten(2, (-1, window)).unflatten(1, (-1, window))
    return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)


def position_index(window: int) -> Tensor:
    """Row of the position table for each pair of tokens of a window, [window², window²] int64, in raster order."""
    row, column = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    row, column = row.flatten(), column.flatten()
    down = row[:, None] - row[None] + window - 1
    right = column[:, None] - column[None] + window - 1
    return down * (2 * window - 1) + right


def _shift_mask(height: int, width: int, window: int, shift: int) -> Tensor:
    """-inf between tokens that only the roll brought into one window: [windows, window², window²]."""

    def region(length: int) -> Tensor:
        position = torch.arange(length)
        return (position >= length - window).long() + (position >= length - shift).long() * (shift > 0)

    regions = region(height)[:, None] * 3 + region(width)[None]
    regions = (regions if shift else torch.zeros_like(regions))[None, ..., None]
    regions = _windows(regions, window).squeeze(-1)  # [windows, window²]
    apart = regions[:, :, None] != regions[:, None]
    return torch.zeros(apart.shape).masked_fill(apart, float("-inf"))


__all__ = [
    "LEGACY_MERGE_ORDER",
    "SWIN_MERGE_ORDER",
    "TOLERANCE",
    "Comparison",
    "compare_outputs",
    "outputs_of",
    "photo_pixels",
    "position_index",
    "published_outputs",
]
