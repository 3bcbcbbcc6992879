"""From a mask to the index tensors of visible-only Swin: which token sits where at every stage, and in which group.

Everything here runs on the CPU with small integers, once per batch, and gives frozen values. `build_sparse_plan` is
called by the collator (in a loader's worker) or by `forward` when no plan was given.

Words: a *mask unit* is one token of the last stage. The *pool* is what one row of the hidden states holds: the tokens
of one image when the mask is shared by the batch (every image is a row), the tokens of the whole batch when each image
has a mask of its own (one row). A *group* holds whole windows; a *slot* is a place in a group.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from .configuration_green_swin import as_pair, clamp_window, stage_grid_sizes
from .window_grouping import WindowGrouping, attention_cost, choose_grouping

Record = TypeVar("Record", bound="TensorRecord")


class TensorRecord:
    """A frozen dataclass of tensors and numbers that moves as a whole; the moved copy is a new object."""

    def _map_tensors(self: Record, function: Callable[[Tensor], Tensor]) -> Record:
        changes = {field.name: _map_value(getattr(self, field.name), function) for field in dataclasses.fields(self)}  # type: ignore[arg-type]
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def to(self: Record, device: torch.device | str | int, non_blocking: bool = False) -> Record:
        """The same record with every tensor on `device`."""
        return self._map_tensors(lambda tensor: tensor.to(device=device, non_blocking=non_blocking))

    def pin_memory(self: Record, device: Any = None) -> Record:
        """The same record with every tensor in page-locked memory, as a `DataLoader` with `pin_memory=True` asks."""
        return self._map_tensors(lambda tensor: tensor.pin_memory())


def _map_value(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, TensorRecord):
        return value._map_tensors(function)
    if isinstance(value, tuple):
        return tuple(_map_value(item, function) for item in value)
    return value


@dataclass(frozen=True)
class StageGeometry:
    """Sizes of one stage, in tokens: the window is clamped to the grid, the position table may be of a larger one."""

    grid_size: tuple[int, int]
    window_size: int
    shift_size: int
    table_window_size: int
    channels: int


@dataclass(frozen=True)
class SparseGeometry:
    """All that a plan needs to know of a model and an image size: integers, cheap to send to a loader's worker."""

    unit_grid_size: tuple[int, int]
    stages: tuple[StageGeometry, ...]
    group_size: str | int

    @classmethod
    def from_config(cls, config: Any, image_size: int | tuple[int, int] | None = None) -> SparseGeometry:
        """Geometry of masked attention in a model of `config` (a `GreenSwinConfig`) on images of `image_size`.

        Args:
            config: read by its fields, so that a copy of the class in remote code serves as well.
            image_size: pixels, one number or (rows, columns); that of the config by default.

        Raises:
            ValueError: `image_size` is no multiple of the mask unit.
        """
        rows, columns = as_pair(config.image_size if image_size is None else image_size)
        unit = config.mask_unit_size
        if rows % unit or columns % unit or min(rows, columns) < unit:
            raise ValueError(
                f"image_size {rows}x{columns} must be a multiple of mask_unit_size {unit} where images are masked; "
                "resize or crop the images (without a mask, evaluation takes any size)"
            )
        grids = stage_grid_sizes((rows // config.patch_length, columns // config.patch_length), len(config.depths))
        stages = []
        for grid, table_window, channels in zip(grids, config.stage_window_sizes, config.stage_channels, strict=True):
            window, shift = clamp_window(grid, table_window)
            stages.append(StageGeometry(grid, window, shift, table_window, channels))
        return cls((rows // unit, columns // unit), tuple(stages), config.group_size)

    @property
    def num_units(self) -> int:
        return self.unit_grid_size[0] * self.unit_grid_size[1]

    @property
    def patches_per_unit_side(self) -> int:
        return 2 ** (len(self.stages) - 1)


@dataclass(frozen=True)
class GroupingPlan(TensorRecord):
    """Where each token of a pool sits during attention in one window partition (regular or shifted) of one stage.

    Attributes:
        gather_index: [G * S] int64, pool index of the token in each slot; a pad repeats token 0.
            `None`: the groups hold the pool in its own order, one after another, and nothing has to move.
        scatter_index: [T] int64, the slot (in 0 … G * S - 1) of each token; `None` with `gather_index`.
        slot_window: [G, S] int32, window of the token in each slot; negative and of its own for a pad.
        slot_position: [G, S] int32, row * (2 * w - 1) + column of that token, for the table of a window of side w: the
            difference of two counts rows of the table.
        table_window_size: w.

    Example: a 1 x 4 grid in windows of 2 tokens (the table of a 2 x 2 window has 9 rows, the relative position (0, 0)
    is row 4), tokens of columns 0, 2, 3 visible, groups of 3 slots become one group, which needs no move::

        window of each token           [0, 1, 1]
        relative_position_index[0]     [[4, 9, 9], [9, 4, 3], [9, 5, 4]]

    Were groups to have 2 slots, windows 1 and 0 would get a group each, the second one with a pad::

        gather_index   [1, 2, 0, 0]      scatter_index   [2, 0, 1]
        relative_position_index   [[[4, 3], [5, 4]], [[4, 9], [9, 4]]]
    """

    gather_index: Tensor | None
    scatter_index: Tensor | None
    slot_window: Tensor
    slot_position: Tensor
    table_window_size: int

    def __post_init__(self) -> None:
        """Tell torch.compile, where it is in use, which number changes from mask to mask: the number of groups.

        The marks do not travel between processes; each plan that is built, moved or received gets its own.
        """
        dynamo = sys.modules.get("torch._dynamo")  # not imported here: that takes a second
        if dynamo is None or torch.compiler.is_compiling() or self.gather_index is None:
            return
        for tensor in (self.gather_index, self.slot_window, self.slot_position):
            dynamo.maybe_mark_dynamic(tensor, 0)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def num_groups(self) -> int:
        """G."""
        return self.slot_window.shape[0]

    @property
    def group_size(self) -> int:
        """S, slots of a group."""
        return self.slot_window.shape[1]

    @property
    def relative_position_index(self) -> Tensor:
        """[G, S, S] int64: row of the position table for query slot i and key slot j.

        It is the row *after* the table's last one where i may not attend to j: another window, or a pad. A pad attends
        to itself. Made on the device of the plan, which carries the S times smaller tensors that it follows from.
        """
        side = 2 * self.table_window_size - 1
        query_position = self.slot_position + (side + 1) * (self.table_window_size - 1)
        index = query_position[:, :, None] - self.slot_position[:, None, :]
        index.masked_fill_(self.slot_window[:, :, None] != self.slot_window[:, None, :], side**2)
        return index.long()  # on a CPU, torch adds rows by int32 indices some twenty times more slowly


@dataclass(frozen=True)
class StagePlan(TensorRecord):
    """One stage of a plan.

    Attributes:
        grid_size: tokens (rows, columns) of a whole image at this stage.
        position: [T] int64, raster index of each visible token in its image's grid.
        regular, shifted: the two window partitions; `shifted` is `regular` where the stage has no shift.
    """

    grid_size: tuple[int, int]
    position: Tensor
    regular: GroupingPlan
    shifted: GroupingPlan


@dataclass(frozen=True)
class SparsePlan(TensorRecord):
    """Everything that visible-only Swin needs to know of the masks of one batch.

    Tokens are ordered by image, by mask unit (raster order), then inside a unit from coarse to fine with the column
    bit above the row bit, so that patch merging is `view(…, T / 4, 4 C)` in Swin's channel order.

    Attributes:
        geometry: sizes of the model and the images that the plan is for.
        bool_masked_pos: [M, units] bool, True = masked; M = 1 when the mask is shared by the batch, else one row for
            each image.
        visible_unit_index, masked_unit_index: [V] and [M * units - V] int64, raster index of the visible and of the
            masked mask units in the pool's M * units.
        image_index: [V] int64, image of each visible unit; `None` for a shared mask.
        padded_index: [V] int64, place of each visible unit in [M, longest] rows; `None` when all counts are equal.
        visible_counts: visible units of each row of `bool_masked_pos`.
        stages: one `StagePlan` for each stage.
    """

    geometry: SparseGeometry
    bool_masked_pos: Tensor
    visible_unit_index: Tensor
    masked_unit_index: Tensor
    image_index: Tensor | None
    padded_index: Tensor | None
    visible_counts: tuple[int, ...]
    stages: tuple[StagePlan, ...]

    @property
    def num_units(self) -> int:
        """Mask units of an image."""
        return self.geometry.num_units

    @property
    def is_shared(self) -> bool:
        """Whether one mask serves all images of the batch, whatever their number."""
        return self.image_index is None

    @property
    def has_equal_counts(self) -> bool:
        """Whether all images have the same number of visible units."""
        return self.padded_index is None

    @property
    def num_masked(self) -> int:
        """Masked units of the pool."""
        return len(self.visible_counts) * self.num_units - sum(self.visible_counts)

    def to_images(self, tokens: Tensor, batch_size: int) -> Tensor:
        """Hidden states of the pool as rows of images: [R, T, C] to [batch_size, longest, C], padded with zeros."""
        if self.padded_index is None:
            return tokens.reshape(batch_size, -1, tokens.shape[-1])
        units = tokens.reshape(len(self.padded_index), -1)  # all tokens of a unit in one row
        padded = units.new_zeros(batch_size * max(self.visible_counts), units.shape[1])
        return padded.index_copy(0, self.padded_index, units).view(batch_size, -1, tokens.shape[-1])

    def to_pool(self, images: Tensor) -> Tensor:
        """The inverse of `to_images` at the last stage: [B, longest, C] to [R, V, C]."""
        if self.padded_index is not None:
            images = images.flatten(0, 1).index_select(0, self.padded_index)
        return images if self.is_shared else images.reshape(1, -1, images.shape[-1])

    def token_mask(self, batch_size: int) -> Tensor:
        """[batch_size, longest] bool: which rows of `to_images` at the last stage are tokens, not padding."""
        longest = max(self.visible_counts)
        if self.padded_index is None:
            return self.bool_masked_pos.new_ones(batch_size, longest)
        flat = self.bool_masked_pos.new_zeros(batch_size * longest)
        return flat.index_fill(0, self.padded_index, True).view(batch_size, longest)

    def check_batch(self, batch_size: int, geometry: SparseGeometry) -> None:
        """Raise a `ValueError` unless the plan was built for such a batch of a model with this geometry."""
        (rows, columns), (wanted_rows, wanted_columns) = self.geometry.unit_grid_size, geometry.unit_grid_size
        if (rows, columns) != (wanted_rows, wanted_columns):
            raise ValueError(
                f"sparse_plan is for images of {rows}x{columns} mask units, pixel_values have "
                f"{wanted_rows}x{wanted_columns}; build it with SparseGeometry.from_config(config, image_size)"
            )
        if self.geometry.stages != geometry.stages:
            raise ValueError(
                f"sparse_plan was built for a model with the stages {self.geometry.stages}, this one has "
                f"{geometry.stages}; build it with SparseGeometry.from_config(model.config)"
            )
        if not self.is_shared and len(self.visible_counts) != batch_size:
            raise ValueError(
                f"sparse_plan holds masks of {len(self.visible_counts)} images, pixel_values has {batch_size}; "
                "build one plan for each batch"
            )


def num_masked_units(num_units: int, mask_ratio: float) -> int:
    """How many of `num_units` a ratio masks: rounded up as in MAE and SimMIM, leaving at least one of each kind.

    >>> num_masked_units(49, 0.75), num_masked_units(10, 0.9), num_masked_units(16, 0.99)
    (37, 9, 15)

    Raises:
        ValueError: the ratio is not in (0, 1), or there are fewer than two units.
    """
    if not 0 < mask_ratio < 1:
        raise ValueError(f"mask_ratio {mask_ratio} must be greater than 0 and less than 1")
    if num_units < 2:
        raise ValueError(
            f"num_units {num_units} must be at least 2 to mask some and see some; use larger "
            "images or smaller mask units"
        )
    # 1e-9: the product of a decimal ratio and a count can land just above the integer that is meant
    return min(max(math.ceil(mask_ratio * num_units - 1e-9), 1), num_units - 1)


def sample_masks(
    num_masks: int, grid_size: tuple[int, int], mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Uniformly random masks with exactly `num_masked_units` masked units each: [num_masks, units] bool, on the CPU.

    Args:
        num_masks: 1 for a mask that the batch shares, else one for each image.
        grid_size: mask units (rows, columns) of an image.
        mask_ratio: share of masked units, in (0, 1).
        generator: source of randomness; torch's global one by default.
    """
    num_units = grid_size[0] * grid_size[1]
    order = torch.rand(num_masks, num_units, generator=generator).argsort(dim=1)
    masked = order[:, : num_masked_units(num_units, mask_ratio)]
    return torch.zeros(num_masks, num_units, dtype=torch.bool).scatter_(1, masked, True)


def unit_masks(bool_masked_pos: Tensor, geometry: SparseGeometry) -> Tensor:
    """Masks on the grid of mask units: [M, units] bool, True = masked.

    Args:
        bool_masked_pos: bool or number (1 = masked), one row for each image or one for all: [M, units], or [M, patches]
            as transformers' scripts make it (raster order).

    Raises:
        ValueError: wrong shape or values, a mask that is not constant inside each unit, an image with nothing visible.
    """
    (rows, columns), side = geometry.unit_grid_size, geometry.patches_per_unit_side
    num_units = rows * columns
    if not isinstance(bool_masked_pos, Tensor):
        raise ValueError(f"bool_masked_pos is {type(bool_masked_pos).__name__}; it must be a tensor")
    if bool_masked_pos.layout != torch.strided or bool_masked_pos.is_meta:
        kind = "on the meta device" if bool_masked_pos.is_meta else str(bool_masked_pos.layout)
        raise ValueError(f"bool_masked_pos is {kind}; it must be a dense tensor with values")
    shape = tuple(bool_masked_pos.shape)
    if len(shape) != 2 or shape[0] == 0 or shape[1] not in (num_units, num_units * side**2):
        raise ValueError(
            f"bool_masked_pos has shape {shape}; it must be (batch, {num_units}) for mask units "
            f"or (batch, {num_units * side**2}) for patches of images with {rows}x{columns} mask units"
        )
    mask = bool_masked_pos.detach().cpu()
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask == 1)).all():
            raise ValueError("bool_masked_pos must hold 0 (visible) and 1 (masked) only")
        mask = mask.bool()
    if mask.shape[1] != num_units:
        patches = mask.view(-1, rows, side, columns, side)
        mask = patches[:, :, 0, :, 0]
        if not (patches == mask[:, :, None, :, None]).all():
            raise ValueError(
                "bool_masked_pos changes inside a mask unit: mask squares of a multiple of "
                f"{side}x{side} patches (mask_unit_size), on the grid of mask units"
            )
        mask = mask.reshape(-1, num_units)
    hidden = mask.all(dim=1).nonzero().flatten().tolist()
    if hidden:
        raise ValueError(f"bool_masked_pos masks every unit of image {hidden[0]}; leave at least one visible")
    return mask


def build_sparse_plan(bool_masked_pos: Tensor, geometry: SparseGeometry) -> SparsePlan:
    """The plan of visible-only Swin for a batch with these masks; tensors on the CPU.

    Args:
        bool_masked_pos: see `unit_masks`. One row, or rows that are all equal, make a plan that any batch size shares.
        geometry: sizes of the model and the images.

    Raises:
        ValueError: as `unit_masks`.
    """
    masks = unit_masks(bool_masked_pos, geometry).clone()  # a value of its own, whatever the caller does to the mask
    if (masks == masks[:1]).all():
        masks = masks[:1]
    visible = ~masks
    image_index, unit = visible.nonzero(as_tuple=True)
    rows, columns = _visible_coordinates(unit, geometry)
    counts = visible.sum(dim=1)
    stages: list[StagePlan] = []
    for stage in geometry.stages:
        image_of_token = image_index.repeat_interleave(len(rows) // len(unit))
        stages.append(_build_stage_plan(rows, columns, image_of_token, len(masks), stage, geometry.group_size))
        rows, columns = rows[::4] // 2, columns[::4] // 2
    return SparsePlan(
        geometry=geometry,
        bool_masked_pos=masks,
        visible_unit_index=visible.flatten().nonzero().flatten(),
        masked_unit_index=masks.flatten().nonzero().flatten(),
        image_index=image_index if len(masks) > 1 else None,
        padded_index=_padded_index(image_index, counts),
        visible_counts=tuple(counts.tolist()),
        stages=tuple(stages),
    )


def _padded_index(image_index: Tensor, counts: Tensor) -> Tensor | None:
    """Flat place of each visible unit when every image's units are padded to the longest; `None` if none is padded."""
    longest = int(counts.max())
    if int(counts.min()) == longest:
        return None
    first = counts.cumsum(0) - counts
    return image_index * longest + torch.arange(len(image_index)) - first[image_index]


def unit_patch_offsets(patches_per_side: int) -> tuple[Tensor, Tensor]:
    """(row, column) of the patches inside a mask unit in the order of the pool: each [patches_per_side²] int64.

    From coarse to fine, the column bit above the row bit, so that the four children of a merged token stand together
    in the order in which Swin concatenates them:

    >>> [offsets.tolist() for offsets in unit_patch_offsets(2)]
    [[0, 1, 0, 1], [0, 0, 1, 1]]
    """
    rows = columns = torch.zeros(1, dtype=torch.int64)
    while len(rows) < patches_per_side**2:
        rows = (2 * rows[:, None] + torch.tensor([0, 1, 0, 1])).flatten()
        columns = (2 * columns[:, None] + torch.tensor([0, 0, 1, 1])).flatten()
    return rows, columns


def _visible_coordinates(unit: Tensor, geometry: SparseGeometry) -> tuple[Tensor, Tensor]:
    """(row, column) of each visible patch in its image, in the order of the pool, for visible units in raster order."""
    side = geometry.patches_per_unit_side
    row_offsets, column_offsets = unit_patch_offsets(side)
    rows = (unit // geometry.unit_grid_size[1] * side)[:, None] + row_offsets
    columns = (unit % geometry.unit_grid_size[1] * side)[:, None] + column_offsets
    return rows.flatten(), columns.flatten()


def _build_stage_plan(
    rows: Tensor, columns: Tensor, image: Tensor, num_images: int, stage: StageGeometry, group_size: str | int
) -> StagePlan:
    position = (rows * (2 * stage.table_window_size - 1) + columns).int()
    in_order = _groups_in_order(image, num_images, stage, group_size)

    def partition(shift: int) -> GroupingPlan:
        window, num_windows = _window_of_token(rows, columns, image, num_images, stage, shift)
        if in_order is not None and group_size != "optimal":
            return _plan_in_order(*in_order, window, position, stage.table_window_size)
        sizes = torch.bincount(window, minlength=num_windows).tolist()
        grouping = choose_grouping(sizes, group_size, stage.window_size**2, stage.channels)
        if group_size != "optimal" and grouping.num_groups > 1:  # the same size for every mask, see GroupingPlan
            grouping = dataclasses.replace(grouping, group_size=_capacity(stage, group_size))
        if in_order is not None and attention_cost(*in_order, stage.channels) <= grouping.cost(stage.channels):
            return _plan_in_order(*in_order, window, position, stage.table_window_size)
        return _build_grouping_plan(position, window, sizes, grouping, stage.table_window_size)

    regular = partition(0)
    shifted = partition(stage.shift_size) if stage.shift_size else regular
    return StagePlan(stage.grid_size, rows * stage.grid_size[1] + columns, regular, shifted)


def _capacity(stage: StageGeometry, group_size: str | int) -> int:
    return group_size if isinstance(group_size, int) else stage.window_size**2


def _groups_in_order(
    image: Tensor, num_images: int, stage: StageGeometry, group_size: str | int
) -> tuple[int, int] | None:
    """(groups, slots) where whole images, as they stand in the pool, make groups without any padding, else `None`.

    So it is at the later stages, whose images have no more visible tokens than a group has slots: no solver is needed
    and no token moves.
    """
    capacity = _capacity(stage, group_size)
    counts = torch.bincount(image, minlength=num_images)
    tokens = int(counts[0])
    if tokens > capacity or not bool((counts == tokens).all()):
        return None
    fitting = min(capacity // tokens, num_images)  # a group_size may be any number
    images = next(images for images in range(fitting, 0, -1) if num_images % images == 0)
    return num_images // images, images * tokens


def _window_of_token(
    rows: Tensor, columns: Tensor, image: Tensor, num_images: int, stage: StageGeometry, shift: int
) -> tuple[Tensor, int]:
    """Window of each token, [T] int64, and the number of windows.

    A cyclic shift with Swin's region mask equals windows cut at the border:
    `(row + window_size - shift) // window_size`.
    """
    window, offset = stage.window_size, stage.window_size - shift if shift else 0
    across = (stage.grid_size[1] + offset - 1) // window + 1
    per_image = ((stage.grid_size[0] + offset - 1) // window + 1) * across
    index = image * per_image + (rows + offset) // window * across + (columns + offset) // window
    return index, num_images * per_image


def _plan_in_order(
    num_groups: int, group_size: int, window: Tensor, position: Tensor, table_window: int
) -> GroupingPlan:
    slots = window.int().view(num_groups, group_size), position.view(num_groups, group_size)
    return GroupingPlan(None, None, *slots, table_window)


def _build_grouping_plan(
    position: Tensor, window: Tensor, sizes: list[int], grouping: WindowGrouping, table_window: int
) -> GroupingPlan:
    if grouping.num_groups == 1:
        return _plan_in_order(1, grouping.group_size, window, position, table_window)
    order, slot = _assign_slots(window, sizes, grouping)
    gather_index = torch.zeros(grouping.num_slots, dtype=torch.int64)
    gather_index[slot] = order
    slot_window = -1 - torch.arange(grouping.num_slots, dtype=torch.int32)  # a pad is a window of its own
    slot_window[slot] = window[order].int()
    shape = (grouping.num_groups, grouping.group_size)
    scatter_index = torch.empty_like(slot)
    scatter_index[order] = slot
    slot_position = position[gather_index].view(shape)
    return GroupingPlan(gather_index, scatter_index, slot_window.view(shape), slot_position, table_window)


def _assign_slots(window: Tensor, sizes: list[int], grouping: WindowGrouping) -> tuple[Tensor, Tensor]:
    """Tokens sorted by window, and the slot of each: both [T] int64. Windows of a group stand one after another."""
    first_slot = [0] * len(sizes)
    for group, windows in enumerate(grouping.groups):
        slot = group * grouping.group_size
        for member in windows:
            first_slot[member] = slot
            slot += sizes[member]
    order = torch.argsort(window, stable=True)
    first_token = [0, *accumulate(sizes[:-1])]
    shift = torch.tensor([slot - token for slot, token in zip(first_slot, first_token, strict=True)])
    return order, torch.arange(len(window)) + shift[window[order]]


__all__ = [
    "GroupingPlan",
    "SparseGeometry",
    "SparsePlan",
    "StageGeometry",
    "StagePlan",
    "TensorRecord",
    "build_sparse_plan",
    "num_masked_units",
    "sample_masks",
    "unit_masks",
    "unit_patch_offsets",
]
