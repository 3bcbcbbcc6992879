"""Naive twins of masked Swin and of its pretraining head: slow, obvious, and written without the package.

Every image is a whole grid of tokens. Masked tokens are computed like all others but are never a key, so visible
tokens cannot see them; what masked tokens come out as means nothing. Weights are read from a state dict with the names
of published Swin files, sizes from the plain fields of a config (nothing derived is read). Autograd works throughout.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, interpolate, layer_norm, linear

Window = list[tuple[int, int]]
State = dict[str, Tensor]


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def windows_of_grid(grid_size: tuple[int, int], window_size: int, shift_size: int) -> list[Window]:
    """(row, column) of the tokens of each window: pad, roll, partition, and cut where the roll wrapped around.

    A 1 x 4 grid, window 2, shift 1: [[(0, 0)], [(0, 1), (0, 2)], [(0, 3)]] in some order.
    """
    padded_rows, padded_columns = (-(-side // window_size) * window_size for side in grid_size)
    windows: dict[tuple[int, int, bool, bool], Window] = {}
    for row in range(grid_size[0]):
        for column in range(grid_size[1]):
            rolled_row, rolled_column = (row - shift_size) % padded_rows, (column - shift_size) % padded_columns
            wrapped = rolled_row > row, rolled_column > column
            windows.setdefault((rolled_row // window_size, rolled_column // window_size, *wrapped), []).append(
                (row, column)
            )
    return list(windows.values())


def stage_windows(config, image_size: tuple[int, int]) -> list[tuple[tuple[int, int], int, int]]:
    """Grid, window and shift of each stage: windows shrink to the grids of the config's images, then to these grids."""
    stages = []
    for stage in range(len(config.depths)):
        side = config.patch_size * 2**stage
        window = min(config.window_size, *(pixels // side for pixels in pair(config.image_size)))
        grid_size = (image_size[0] // side, image_size[1] // side)
        fits_more_than_one = min(grid_size) > window
        stages.append((grid_size, min(window, *grid_size), window // 2 if fits_more_than_one else 0))
    return stages


def position_rows(queries: Window, keys: Window, table_length: int) -> Tensor:
    """[queries, keys]: row of a position table of (2 w - 1)² rows for the offset between two tokens."""
    side = math.isqrt(table_length)
    zero = side // 2  # of a row or column, where the offset is 0
    return torch.tensor([[(r - s + zero) * side + (c - d + zero) for s, d in keys] for r, c in queries])


class _Weights:
    """The layers of a state dict, by name."""

    def __init__(self, state: State, prefix: str, epsilon: float):
        self.state, self.prefix, self.epsilon = state, prefix, epsilon

    def __getitem__(self, name: str) -> Tensor:
        return self.state[self.prefix + name]

    def linear(self, name: str, tokens: Tensor) -> Tensor:
        return linear(tokens, self[f"{name}.weight"], self.state.get(f"{self.prefix}{name}.bias"))

    def norm(self, name: str, tokens: Tensor) -> Tensor:
        return layer_norm(tokens, tokens.shape[-1:], self[f"{name}.weight"], self[f"{name}.bias"], self.epsilon)


def _embed(weights: _Weights, config, images: Tensor, interpolate_positions: bool) -> Tensor:
    """[B, rows, columns, C]"""
    side = config.patch_size
    rows, columns = images.shape[2] // side, images.shape[3] // side
    patches = [
        images[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side].flatten(1)
        for row in range(rows)
        for column in range(columns)
    ]
    kernel = weights["embeddings.patch_embeddings.projection.weight"].flatten(1)
    tokens = linear(torch.stack(patches, 1), kernel, weights["embeddings.patch_embeddings.projection.bias"])
    tokens = weights.norm("embeddings.norm", tokens).view(len(images), rows, columns, -1)
    if config.use_absolute_embeddings:
        own_rows, own_columns = (pixels // side for pixels in pair(config.image_size))
        positions = weights["embeddings.position_embeddings"].view(1, own_rows, own_columns, -1)
        if interpolate_positions:
            positions = interpolate(positions.permute(0, 3, 1, 2), (rows, columns), mode="bicubic").permute(0, 2, 3, 1)
        tokens = tokens + positions
    return tokens


def _attend(
    weights: _Weights, block: str, tokens: Tensor, visible: Tensor, windows: list[Window], heads: int
) -> Tensor:
    """Attention of each token to the visible tokens of its window, image by image and window by window."""
    shape = tokens.shape
    query, key, value = (
        weights.linear(f"{block}.attention.self.{name}", tokens).unflatten(-1, (heads, -1))
        for name in ("query", "key", "value")
    )
    table = weights[f"{block}.attention.self.relative_position_bias_table"]
    images = []
    for image in range(shape[0]):
        attended = {}
        for window in windows:
            keys = [(row, column) for row, column in window if visible[image, row, column]]
            if not keys:  # nothing to see
                attended |= {token: tokens.new_zeros(shape[-1]) for token in window}
                continue
            rows, columns = (list(side) for side in zip(*window, strict=True))
            key_rows, key_columns = (list(side) for side in zip(*keys, strict=True))
            q, k, v = (
                query[image, rows, columns],
                key[image, key_rows, key_columns],
                value[image, key_rows, key_columns],
            )
            scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
            scores = scores + table[position_rows(window, keys, len(table))].permute(2, 0, 1)
            values = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
            attended |= dict(zip(window, values.unbind(), strict=True))
        images.append(torch.stack([attended[row, column] for row in range(shape[1]) for column in range(shape[2])]))
    return weights.linear(f"{block}.attention.output.dense", torch.stack(images).view(shape))


def encode(
    state: State,
    config,
    images: Tensor,
    masks: Tensor,
    prefix: str = "",
    interpolate_positions: bool = False,
    branch_scale: Callable[[int, str], float] | None = None,
) -> list[Tensor]:
    """Masked Swin: token grids [B, rows, columns, C] of the embeddings, of each stage, and of the final norm.

    Args:
        state: weights by published name, behind `prefix`.
        images: [B, channels, height, width].
        masks: [B, units] bool, True = masked.
        branch_scale: what a residual branch is multiplied by, given the number of its block and "attention" or "mlp".
            Stochastic depth, with the randomness outside.
    """
    weights = _Weights(state, prefix, config.layer_norm_eps)
    scale = branch_scale or (lambda block, branch: 1.0)
    num_stages = len(config.depths)
    unit = config.patch_size * 2 ** (num_stages - 1)
    visible_units = ~masks.view(len(images), images.shape[2] // unit, images.shape[3] // unit)
    grids, number = [_embed(weights, config, images, interpolate_positions)], 0
    for stage, (grid_size, window_size, shift_size) in enumerate(stage_windows(config, tuple(images.shape[2:]))):
        tokens = grids[-1]
        assert tuple(tokens.shape[1:3]) == grid_size
        copies = 2 ** (num_stages - 1 - stage)
        visible = visible_units.repeat_interleave(copies, 1).repeat_interleave(copies, 2)
        for index in range(config.depths[stage]):
            block = f"encoder.layers.{stage}.blocks.{index}"
            windows = windows_of_grid(grid_size, window_size, shift_size if index % 2 else 0)
            normed = weights.norm(f"{block}.layernorm_before", tokens)
            attended = _attend(weights, block, normed, visible, windows, config.num_heads[stage])
            tokens = tokens + scale(number, "attention") * attended
            normed = weights.norm(f"{block}.layernorm_after", tokens)
            inner = gelu(weights.linear(f"{block}.intermediate.dense", normed))
            tokens = tokens + scale(number, "mlp") * weights.linear(f"{block}.output.dense", inner)
            number += 1
        if stage < num_stages - 1:
            top, bottom = tokens[:, ::2], tokens[:, 1::2]
            siblings = [top[:, :, ::2], bottom[:, :, ::2], top[:, :, 1::2], bottom[:, :, 1::2]]  # 00, 10, 01, 11
            merge = f"encoder.layers.{stage}.downsample"
            tokens = weights.linear(f"{merge}.reduction", weights.norm(f"{merge}.norm", torch.cat(siblings, -1)))
        grids.append(tokens)
    return [*grids, weights.norm("layernorm", grids[-1])]


def visible_latents(latents: Tensor, masks: Tensor) -> list[Tensor]:
    """Of a grid [B, rows, columns, C], the tokens of each image's visible units in raster order: B times [V, C]."""
    flat = latents.flatten(1, 2)
    return [
        torch.stack([flat[image, unit] for unit in range(masks.shape[1]) if not masks[image, unit]])
        for image in range(len(masks))
    ]


def sine_cosine_position(row: int, column: int, width: int) -> list[float]:
    """Code of one place as MAE lays it out: sines and cosines of the column, then those of the row."""
    frequencies = [1 / 10000 ** (4 * index / width) for index in range(width // 4)]
    code: list[float] = []
    for coordinate in (column, row):
        code += [math.sin(coordinate * frequency) for frequency in frequencies]
        code += [math.cos(coordinate * frequency) for frequency in frequencies]
    return code


def decode(state: State, config, latents: Tensor, masks: Tensor) -> Tensor:
    """Predictions for all units, [B, units, pixels of a unit], from the visible entries of [B, rows, columns, C]."""
    weights = _Weights(state, "decoder.", config.layer_norm_eps)
    rows, columns = latents.shape[1:3]
    images = []
    for image in range(len(latents)):
        units = []
        for row in range(rows):
            for column in range(columns):
                if masks[image, row * columns + column]:
                    unit = weights["mask_token"].flatten()
                else:
                    unit = weights.linear("embed", latents[image, row, column])
                code = sine_cosine_position(row, column, config.decoder_hidden_size)
                units.append(unit + torch.tensor(code, dtype=unit.dtype))
        images.append(torch.stack(units))
    tokens, heads = torch.stack(images), config.decoder_num_attention_heads
    for index in range(config.decoder_num_hidden_layers):
        layer = f"layers.{index}"
        normed = weights.norm(f"{layer}.layernorm_before", tokens)
        q, k, v = (
            weights.linear(f"{layer}.{name}", normed).unflatten(2, (heads, -1)) for name in ("query", "key", "value")
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.shape[-1])
        attended = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)
        tokens = tokens + weights.linear(f"{layer}.output", attended)
        inner = gelu(weights.linear(f"{layer}.up", weights.norm(f"{layer}.layernorm_after", tokens)))
        tokens = tokens + weights.linear(f"{layer}.down", inner)
    return weights.linear("predictor", weights.norm("layernorm", tokens))


def unit_pixels(images: Tensor, image: int, unit: int, unit_size: int) -> Tensor:
    """The pixels of one unit in the order (row, column, channel): [unit_size² * channels]."""
    columns = images.shape[3] // unit_size
    top, left = unit // columns * unit_size, unit % columns * unit_size
    return images[image, :, top : top + unit_size, left : left + unit_size].permute(1, 2, 0).flatten()


def reconstruction_loss(config, predictions: Tensor, images: Tensor, masks: Tensor) -> Tensor:
    """Mean squared error over all pixels of all masked units of the batch, against (normalised) pixels."""
    unit_size = config.patch_size * 2 ** (len(config.depths) - 1)
    squared_errors = []
    for image, unit in masks.nonzero().tolist():
        target = unit_pixels(images, image, unit, unit_size)
        if config.norm_pix_loss:
            variance = (target - target.mean()).square().sum() / (len(target) - 1)
            target = (target - target.mean()) / torch.sqrt(variance + 1e-6)
        squared_errors.append((predictions[image, unit] - target).square())
    return torch.cat(squared_errors).mean()
