"""How tokens move between their own order and windows: for whole images and for visible tokens only.

A layout belongs to one window partition of one stage and to one batch. Both kinds offer the same methods, so that the
blocks of the encoder do not know whether the images they see are masked:

    prepare          tokens as the projections of attention take them          [R, T, C] -> [R, T', C]
    gather           tokens to windows, heads apart                            [R, T', C] -> [R, h, G, S, d]
    scatter          the inverse, to the tokens' own order                     [R, h, G, S, d] -> [R, T, C]
    position_bias    what attention adds to the scores, -inf where forbidden   [P, h] -> [h, G or 1, S, S]
    merge_siblings   the four children of each merged token side by side       [R, T, C] -> [R, T / 4, 4 C]
    scale_images     tokens times one number for each image                    [R, T, C], [B] -> [R, T, C]

R rows of hidden states, T tokens of a row, C channels, h heads, d channels of a head, G windows or groups of windows,
S slots of each, P rows of the position table, B images. Dense rows are images; the rows of visible tokens are images
when the mask is shared and one single row when every image has its own (see `sparse_plan`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_green_swin import clamp_window
from .sparse_plan import GroupingPlan, SparsePlan, TensorRecord


def gather_position_bias(table: Tensor, relative_position_index: Tensor) -> Tensor:
    """Relative position bias of each pair of slots: [h, G, S, S], -inf where the index is one past the table.

    Args:
        table: [P, h], the learned `relative_position_bias_table`.
        relative_position_index: [G, S, S] int64 in 0 … P.
    """
    # -inf, not -100: exp(-100) is subnormal in float32 and many times slower on a CPU. `index_select` along the last
    # dimension because the backward of `table[index]` costs several times more there.
    rows = nn.functional.pad(table.t(), (0, 1), value=float("-inf"))  # [h, P + 1]
    return rows.index_select(1, relative_position_index.flatten()).unflatten(1, relative_position_index.shape)


class _Reorder(torch.autograd.Function):
    """Tokens to slots of groups, or back: [R, N, C] to [R, M, C] by index.

    The backward of `index_select` adds rows one by one; here it is the inverse move. That is the same, up to rounding,
    although pads are never cleared: a pad attends to itself alone, so its softmax has no gradient, and what it computes
    is not read.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        return rows.index_select(1, index)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.index_select(1, *ctx.saved_tensors), None, None


@dataclass(frozen=True)
class DenseLayout(TensorRecord):
    """Tokens of whole images in raster order, windows by padding, cyclic shift and partition as in stock Swin.

    Attributes:
        grid_size: tokens (rows, columns).
        window_size, shift_size: of this partition, clamped to the grid.
        relative_position_index: [1 or G, S, S] int64, row of the position table for each pair of tokens of a window;
            the row after its last one where one may not attend to the other.
    """

    grid_size: tuple[int, int]
    window_size: int
    shift_size: int
    relative_position_index: Tensor

    @classmethod
    def build(
        cls, grid_size: tuple[int, int], window_size: int, shift_size: int, table_window_size: int, device: torch.device
    ) -> DenseLayout:
        index = _window_position_index(window_size, table_window_size, device)[None]
        if shift_size:
            padded = tuple(side + -side % window_size for side in grid_size)
            region = _shifted_regions(padded, window_size, shift_size, device)
            forbidden = region[:, :, None] != region[:, None, :]
            index = index.masked_fill(forbidden, (2 * table_window_size - 1) ** 2)
        return cls(grid_size, window_size, shift_size, index)

    @property
    def padding(self) -> tuple[int, int]:
        """Rows and columns of zeros that complete the last windows."""
        return -self.grid_size[0] % self.window_size, -self.grid_size[1] % self.window_size

    @property
    def windows(self) -> tuple[int, int]:
        """Windows (down, across)."""
        rows, columns = self.grid_size
        return -(-rows // self.window_size), -(-columns // self.window_size)

    def prepare(self, tokens: Tensor) -> Tensor:
        if not self.shift_size and self.padding == (0, 0):
            return tokens
        grid = tokens.unflatten(1, self.grid_size)
        grid = nn.functional.pad(grid, (0, 0, 0, self.padding[1], 0, self.padding[0]))
        if self.shift_size:
            grid = grid.roll((-self.shift_size, -self.shift_size), dims=(1, 2))
        return grid.flatten(1, 2)

    def gather(self, tokens: Tensor, heads: int) -> Tensor:
        (down, across), side = self.windows, self.window_size
        windows = tokens.reshape(tokens.shape[0], down, side, across, side, heads, -1).permute(0, 5, 1, 3, 2, 4, 6)
        return windows.reshape(tokens.shape[0], heads, down * across, side * side, -1)

    def scatter(self, windows: Tensor) -> Tensor:
        (down, across), side = self.windows, self.window_size
        grid = windows.unflatten(3, (side, side)).unflatten(2, (down, across))  # [B, h, down, across, side, side, d]
        grid = grid.permute(0, 2, 4, 3, 5, 1, 6).reshape(windows.shape[0], down * side, across * side, -1)
        if self.shift_size:
            grid = grid.roll((self.shift_size, self.shift_size), dims=(1, 2))
        return grid[:, : self.grid_size[0], : self.grid_size[1]].reshape(windows.shape[0], -1, grid.shape[-1])

    def position_bias(self, table: Tensor) -> Tensor:
        return gather_position_bias(table, self.relative_position_index)

    def merge_siblings(self, tokens: Tensor) -> Tensor:
        rows, columns = self.grid_size
        grid = nn.functional.pad(tokens.unflatten(1, self.grid_size), (0, 0, 0, columns % 2, 0, rows % 2))
        siblings = [grid[:, row::2, column::2] for column in range(2) for row in range(2)]
        return torch.cat(siblings, dim=-1).flatten(1, 2)

    def scale_images(self, tokens: Tensor, factors: Tensor) -> Tensor:
        return tokens * factors[:, None, None]


@dataclass(frozen=True)
class VisibleLayout(TensorRecord):
    """Visible tokens in the order of the pool, whole windows packed into groups of equal size (paper, sec. 3).

    Attributes:
        plan: the window partition.
        image_index: [V] image of each visible mask unit; `None` when all images share a mask.
        relative_position_index: [G, S, S] int64, that of the plan, made once for all blocks; `None` to make it where it
            is asked for, since kernels that read coordinates do not.
    """

    plan: GroupingPlan
    image_index: Tensor | None
    relative_position_index: Tensor | None = None

    def prepare(self, tokens: Tensor) -> Tensor:
        return tokens

    def gather(self, tokens: Tensor, heads: int) -> Tensor:
        if self.plan.gather_index is not None:
            tokens = _Reorder.apply(tokens, self.plan.gather_index, self.plan.scatter_index)  # [R, G S, C]
        by_head = tokens.unflatten(2, (heads, -1)).transpose(1, 2)  # [R, h, G S, d]
        return by_head.unflatten(2, (self.plan.num_groups, self.plan.group_size))

    def scatter(self, windows: Tensor) -> Tensor:
        tokens = windows.flatten(2, 3).transpose(1, 2).flatten(2)  # [R, G S, C]
        if self.plan.scatter_index is None:
            return tokens
        return _Reorder.apply(tokens, self.plan.scatter_index, self.plan.gather_index)

    def position_bias(self, table: Tensor) -> Tensor:
        index = self.relative_position_index
        return gather_position_bias(table, self.plan.relative_position_index if index is None else index)

    def merge_siblings(self, tokens: Tensor) -> Tensor:
        return tokens.reshape(tokens.shape[0], -1, 4 * tokens.shape[-1])

    def scale_images(self, tokens: Tensor, factors: Tensor) -> Tensor:
        if self.image_index is None:
            return tokens * factors[:, None, None]
        units = tokens.unflatten(1, (len(self.image_index), -1))  # [1, V, tokens of a unit, C]
        return (units * factors[self.image_index, None, None]).flatten(1, 2)


Layout = DenseLayout | VisibleLayout


def dense_layouts(
    grid_size: tuple[int, int], table_window_size: int, always_partition: bool, device: torch.device
) -> tuple[DenseLayout, DenseLayout]:
    """Regular and shifted layout of one stage for whole images.

    Args:
        always_partition: keep window and shift where the grid is no larger than the window, as stock Swin's backbone
            does (the grid is padded instead).
    """
    window, shift = clamp_window(grid_size, table_window_size)
    if always_partition:
        window, shift = table_window_size, table_window_size // 2
    regular = DenseLayout.build(grid_size, window, 0, table_window_size, device)
    if not shift:
        return regular, regular
    return regular, DenseLayout.build(grid_size, window, shift, table_window_size, device)


def visible_layouts(plan: SparsePlan, stage: int, with_index: bool = True) -> tuple[VisibleLayout, VisibleLayout]:
    """Regular and shifted layout of one stage for visible tokens.

    Args:
        with_index: make the index of the position table for all pairs of slots now, once for all blocks.
    """

    def layout(partition: GroupingPlan) -> VisibleLayout:
        return VisibleLayout(partition, plan.image_index, partition.relative_position_index if with_index else None)

    regular = layout(plan.stages[stage].regular)
    return regular, layout(plan.stages[stage].shifted) if plan.geometry.stages[stage].shift_size else regular


def _window_position_index(window_size: int, table_window_size: int, device: torch.device) -> Tensor:
    """[S, S]: row of the position table for each pair of tokens in a window; smaller windows index by offset."""
    side = torch.arange(window_size, device=device)
    position = (side[:, None] * (2 * table_window_size - 1) + side).flatten()
    return position[:, None] - position[None, :] + 2 * table_window_size * (table_window_size - 1)


def _shifted_regions(padded_grid: tuple[int, ...], window_size: int, shift_size: int, device: torch.device) -> Tensor:
    """[G, S]: a number for each token of the shifted windows; equal: the two stand in one window of the image."""
    rows, columns = (
        (torch.arange(side, device=device) + window_size - shift_size).div(window_size, rounding_mode="floor")
        for side in padded_grid
    )
    region = (rows[:, None] * (padded_grid[1] // window_size + 1) + columns).roll((-shift_size, -shift_size), (0, 1))
    down, across = padded_grid[0] // window_size, padded_grid[1] // window_size
    windows = region.view(down, window_size, across, window_size).transpose(1, 2)
    return windows.reshape(down * across, window_size**2)


__all__ = ["DenseLayout", "Layout", "VisibleLayout", "dense_layouts", "gather_position_bias", "visible_layouts"]
