"""Fuzz targets of masks, plans and groupings, each beside a simple computation of its own."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import torch
from fuzz_case import ACCEPTED, Choices, Target, attempt, refused

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForMaskedImageModeling,
    SparseGeometry,
    build_sparse_plan,
    choose_grouping,
    solve_grouping,
)
from green_swin_hf.sparse_plan import unit_masks
from green_swin_hf.window_grouping import attention_cost

HUGE = 10**12


def small_config(
    unit_grid: tuple[int, ...], num_stages: int, window: int, group_size: Any = "window"
) -> GreenSwinConfig:
    """Patches of one pixel."""
    return GreenSwinConfig(
        image_size=[side * 2 ** (num_stages - 1) for side in unit_grid],
        patch_size=1,
        embed_dim=4,
        depths=[2] * num_stages,
        num_heads=[2] * num_stages,
        window_size=window,
        group_size=group_size,
        decoder_hidden_size=8,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=8,
        norm_pix_loss=num_stages > 1,
        drop_path_rate=0.0,
    )


# Masks: what `bool_masked_pos` may hold

DTYPES = (
    *("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    *("complex64", "float8_e4m3fn", "uint32"),
)


STRANGE_VALUES = (2, -1, 0.5, 1.0, -0.0, math.nan, math.inf, 1e30)


def mask_inputs(draw: Choices) -> dict[str, Any]:
    """Bits come as one number, which draws much faster than a list; `changes` are single values on top of them."""
    grid, num_stages = [draw.integer(1, 4), draw.integer(1, 4)], draw.integer(1, 3)
    units, rows = grid[0] * grid[1], draw.integer(0, 4)
    patches = units * 4 ** (num_stages - 1)
    lengths = [units] * 6 + [patches] * 4 + [units + 1, 0]
    shape = [rows, draw.of(lengths)]
    if draw.one_in(10):
        shape = draw.of([shape[1:], [rows, *grid], [rows, 1, units], []])
    count = math.prod(shape)
    changes = []
    if count and draw.one_in(2):
        changes = [[draw.integer(0, count - 1), draw.of((0, 1, *STRANGE_VALUES))] for _ in range(draw.integer(1, 2))]
    return {
        "grid": grid,
        "stages": num_stages,
        "shape": shape,
        "bits": draw.integer(0, 2**count - 1),
        "whole_units": shape == [rows, patches] and draw.one_in(2),
        "changes": changes,
        "kind": draw.of(["tensor"] * 12 + ["list", "array", "none", "sparse", "meta", "view"]),
        "plan": draw.one_in(8),
        "dtype": draw.of(DTYPES),
    }


def bits(number: int, count: int) -> list[int]:
    return [number >> place & 1 for place in range(count)]


def as_input(case: dict[str, Any]) -> Any:
    shape, scale = case["shape"], 2 ** (case["stages"] - 1)
    if case["whole_units"]:
        rows = shape[0]
        units = np.array(bits(case["bits"], rows * math.prod(case["grid"]))).reshape(rows, *case["grid"])
        flat = units.repeat(scale, 1).repeat(scale, 2).flatten().tolist()
    else:
        flat = bits(case["bits"], math.prod(shape))
    for place, value in case["changes"]:
        flat[place] = value
    wide = torch.tensor(flat, dtype=torch.float64)
    if case["dtype"] == "bool":
        wide = wide != 0
    elif not case["dtype"].startswith(("float", "bfloat", "complex")):
        wide = wide.nan_to_num(3, 3, 3).clamp(0 if case["dtype"].startswith("u") else -100, 100)
    tensor = wide.to(getattr(torch, case["dtype"])).reshape(shape)
    as_kind = {
        "tensor": lambda: tensor,
        "list": lambda: wide.tolist(),
        "array": lambda: wide.numpy(),
        "none": lambda: None,
        "sparse": lambda: tensor.float().to_sparse() if "complex" not in case["dtype"] else tensor.to_sparse(),
        "meta": lambda: tensor.to("meta"),
        "view": lambda: tensor.expand(2, *tensor.shape)[0] if tensor.ndim != 2 else tensor.t().contiguous().t(),
    }
    return as_kind[case["kind"]]()


def expected_masks(mask: Any, grid: list[int], side: int) -> list[list[bool]] | None:
    """The masks on the grid of units; None where the input is wrong."""
    if not isinstance(mask, torch.Tensor) or mask.layout != torch.strided or mask.is_meta or mask.ndim != 2:
        return None
    units, patches_across = grid[0] * grid[1], grid[1] * side
    if len(mask) == 0 or mask.shape[1] not in (units, units * side**2):
        return None
    values = mask.to(torch.complex128).tolist()
    if any(value not in (0, 1) for row in values for value in row):
        return None
    if mask.shape[1] != units:
        merged = []
        for row in values:
            found: dict[int, set[complex]] = {}
            for patch, value in enumerate(row):
                unit = patch // patches_across // side * grid[1] + patch % patches_across // side
                found.setdefault(unit, set()).add(value)
            if any(len(of_unit) > 1 for of_unit in found.values()):
                return None
            merged.append([found[unit].pop() for unit in range(units)])
        values = merged
    masks = [[value == 1 for value in row] for row in values]
    return None if any(all(row) for row in masks) else masks


@functools.cache
def mask_geometry(rows: int, columns: int, num_stages: int) -> SparseGeometry:
    return SparseGeometry.from_config(small_config((rows, columns), num_stages, 2))


def check_mask(case: dict[str, Any]) -> str:
    geometry, given = mask_geometry(*case["grid"], case["stages"]), as_input(case)
    wanted = expected_masks(given, case["grid"], 2 ** (case["stages"] - 1))
    masks, error = attempt(unit_masks, given, geometry)
    if error:
        assert wanted is None, f"a good mask is refused: {error}"
        return refused(error, ["bool_masked_pos"])
    assert wanted is not None, "a wrong mask is accepted"
    assert masks.dtype == torch.bool
    assert masks.tolist() == wanted
    if not case["plan"]:
        return ACCEPTED
    plan = build_sparse_plan(given, geometry)
    shared = wanted[:1] if all(row == wanted[0] for row in wanted) else wanted
    assert plan.bool_masked_pos.tolist() == shared
    return ACCEPTED


# Plans: every visible token once, windows as Swin cuts them, capacities kept


def plan_inputs(draw: Choices) -> dict[str, Any]:
    num_stages = draw.integer(1, 3)
    longest = {1: 8, 2: 5, 3: 3}[num_stages]
    grid = [draw.integer(1, longest), draw.integer(1, longest)]
    units, rows = grid[0] * grid[1], draw.integer(1, 4)
    everything = 2**units - 1
    style = draw.of(["any", "any", "all visible", "one visible"])
    masks = []
    for _ in range(rows):
        visible = 1 << draw.integer(0, units - 1)
        row = {"any": draw.integer(0, everything), "all visible": 0, "one visible": everything}[style]
        masks.append(row & ~visible)
    own = [draw.integer(1, longest), draw.integer(1, longest)] if draw.one_in(2) else None
    group_size = draw.of(["window", "window", "optimal", 0, 3, 50, HUGE])
    return {
        "grid": grid, "own": own, "stages": num_stages, "window": draw.integer(1, 6),
        "masks": masks, "group": group_size,
    }  # fmt: skip


def mask_rows(case: dict[str, Any]) -> list[list[bool]]:
    """True = masked."""
    return [list(map(bool, bits(row, math.prod(case["grid"])))) for row in case["masks"]]


def check_plan(case: dict[str, Any]) -> str:
    """`own` is the grid of the configuration's image, which sets the position tables; `group` what goes on top."""
    scale = 2 ** (case["stages"] - 1)
    config = small_config(case["own"] or case["grid"], case["stages"], case["window"])
    area = max(config.stage_window_sizes) ** 2
    config.group_size = case["group"] if isinstance(case["group"], str) else area + case["group"]
    geometry = SparseGeometry.from_config(config, tuple(side * scale for side in case["grid"]))
    masks = mask_rows(case)
    plan = build_sparse_plan(torch.tensor(masks), geometry)
    rows = masks[:1] if plan.is_shared else masks
    assert plan.visible_counts == tuple(row.count(False) for row in rows)
    check_order(plan, rows)
    for stage, channels in zip(range(case["stages"]), config.stage_channels, strict=True):
        tables = config.stage_window_sizes[stage]
        for shifted in (False, True):
            check_partition(plan, stage, shifted, tables, config.group_size, channels, rows)
    return ACCEPTED


def check_order(plan: Any, masks: list[list[bool]]) -> None:
    """Positions go from the units down: the children of a token stand together, in Swin's order 00, 10, 01, 11."""
    visible = [unit for row in masks for unit, is_masked in enumerate(row) if not is_masked]
    assert plan.stages[-1].position.tolist() == visible
    for fine, coarse in itertools.pairwise(plan.stages):
        (_, fine_columns), (_, columns) = fine.grid_size, coarse.grid_size
        wanted = [
            (2 * (place // columns) + down) * fine_columns + 2 * (place % columns) + right
            for place in coarse.position.tolist()
            for down, right in ((0, 0), (1, 0), (0, 1), (1, 1))
        ]
        assert fine.position.tolist() == wanted


def swin_cells(grid: tuple[int, int], table: int, shifted: bool) -> tuple[int, list[list[tuple[int, int]]]]:
    """The window's side, and of each axis the (window, region) of every place: padded, rolled, cut, as stock Swin."""
    side = min(*grid, table)
    shift = side // 2 if shifted and min(grid) > table else 0
    cells = []
    for length in grid:
        padded = length + -length % side
        rolled = [(place - shift) % padded for place in range(length)]
        regions = [0 if not shift or p < padded - side else 1 if p < padded - shift else 2 for p in rolled]
        cells.append(list(zip((p // side for p in rolled), regions, strict=True)))
    return side, cells


def check_partition(
    plan: Any, stage: int, shifted: bool, table: int, group_size: Any, channels: int, masks: list[list[bool]]
) -> None:
    grid, part = plan.stages[stage].grid_size, plan.stages[stage].shifted if shifted else plan.stages[stage].regular
    side, (down, across) = swin_cells(grid, table, shifted)
    positions = plan.stages[stage].position.numpy()
    of_unit = 4 ** (len(plan.stages) - 1 - stage)
    image = np.repeat(np.arange(len(masks)), [row.count(False) * of_unit for row in masks])
    tokens = len(positions)
    slots = part.num_groups * part.group_size
    gather = np.arange(slots) if part.gather_index is None else part.gather_index.numpy()
    scatter = np.arange(tokens) if part.scatter_index is None else part.scatter_index.numpy()
    assert len(scatter) == tokens == len(set(scatter.tolist()))  # every visible token exactly once
    assert (gather[scatter] == np.arange(tokens)).all()
    # The window of each token, and of each pad none
    row, column = positions // grid[1], positions % grid[1]
    cells = [(i, down[r], across[c]) for i, r, c in zip(image, row, column, strict=True)]
    numbers = {cell: number for number, cell in enumerate(dict.fromkeys(cells))}
    window = np.full(slots, -1)
    window[scatter] = [numbers[cell] for cell in cells]
    pads = window < 0
    window[pads] = -1 - np.arange(pads.sum())
    window = window.reshape(part.num_groups, part.group_size)
    same = window[:, :, None] == window[:, None, :]
    assert (same == (part.slot_window.numpy()[:, :, None] == part.slot_window.numpy()[:, None, :])).all()
    # Windows whole, groups within their capacity
    groups_of: dict[int, set[int]] = {}
    for group, members in enumerate(window.tolist()):
        for member in members:
            groups_of.setdefault(member, set()).add(group)
    assert all(len(groups) == 1 for groups in groups_of.values())
    capacity = group_size if isinstance(group_size, int) else side**2
    if group_size == "optimal":
        assert attention_cost(part.num_groups, part.group_size, channels) <= attention_cost(1, tokens, channels)
    else:
        assert part.group_size <= capacity
    # Relative positions, by coordinates
    place = np.zeros((2, slots), dtype=np.int64)
    place[:, scatter] = row, column
    place = place.reshape(2, part.num_groups, part.group_size)
    difference = place[:, :, :, None] - place[:, :, None, :] + table - 1
    index = difference[0] * (2 * table - 1) + difference[1]
    index = np.where(same, index, (2 * table - 1) ** 2)
    found = part.relative_position_index.numpy()
    assert (found == index).all()


# Groupings


def grouping_inputs(draw: Choices) -> dict[str, Any]:
    largest, count = draw.of([4, 16, 49, 196]), draw.of([0, 1, 3, 5, 7, 30])
    digits, sizes = draw.integer(0, (largest + 1) ** count - 1), []
    for _ in range(count):
        digits, size = divmod(digits, largest + 1)
        sizes.append(size)
    if sizes and draw.one_in(10):
        sizes[0] = -1
    limits = [0, -1, 7, 49, 196, 196, 10**6, HUGE, *[max([1, *sizes])] * 3]
    group = draw.of(["window", "optimal", "optimal", "other", None, 7.5, True, 0, -5, 16, 60, 4000, HUGE])
    return {
        "sizes": sizes, "capacity": draw.of(limits), "area": draw.of(limits), "group": group,
        "channels": draw.of([1, 8, 96, 1024]),
    }  # fmt: skip


def check_grouping(case: dict[str, Any]) -> str:
    sizes = case["sizes"]
    good = min(sizes, default=0) >= 0
    outcomes = [check_solved(sizes, case["capacity"], good)]
    group, area = case["group"], case["area"]
    is_count = isinstance(group, int) and not isinstance(group, bool)
    allowed = group in ("window", "optimal") or (is_count and group >= area)
    is_good = good and allowed and area >= max([1, *sizes])
    grouping, error = attempt(choose_grouping, sizes, group, area, case["channels"])
    if error:
        assert not is_good, f"a good grouping is refused: {error}"
        return refused(error, ["sizes", "window_area", "window area", "group_size"])
    assert is_good, "a wrong grouping is accepted"
    check_packed(
        grouping, sizes, max([1, *sizes, sum(sizes)]) if group == "optimal" else area if group == "window" else group
    )
    if group == "optimal" and sum(sizes):
        plain = choose_grouping(sizes, "window", area, case["channels"])
        assert grouping.cost(case["channels"]) <= min(
            plain.cost(case["channels"]), attention_cost(1, sum(sizes), case["channels"])
        )
    return outcomes[0]


def check_solved(sizes: list[int], capacity: int, good: bool) -> str:
    is_good = good and capacity >= max([1, *sizes])
    grouping, error = attempt(solve_grouping, sizes, capacity)
    if error:
        assert not is_good, f"a good capacity is refused: {error}"
        return refused(error, ["sizes", "capacity"])
    assert is_good, "a wrong capacity is accepted"
    check_packed(grouping, sizes, capacity)
    if 0 < len([size for size in sizes if size]) <= 7:
        fewest = fewest_groups(sorted(filter(None, sizes), reverse=True), capacity)
        assert fewest <= grouping.num_groups <= fewest + 1
    return ACCEPTED


def check_packed(grouping: Any, sizes: list[int], capacity: int) -> None:
    members = sorted(window for group in grouping.groups for window in group)
    assert members == [window for window, size in enumerate(sizes) if size]
    loads = [sum(sizes[window] for window in group) for group in grouping.groups]
    assert max(loads, default=0) == grouping.group_size <= capacity
    assert grouping.num_tokens == sum(sizes)


def fewest_groups(sizes: list[int], capacity: int) -> int:
    """Exact bin packing by trying every place for every size."""

    def place(index: int, loads: tuple[int, ...]) -> int:
        if index == len(sizes):
            return len(loads)
        size = sizes[index]
        choices = [
            (*loads[:i], load + size, *loads[i + 1 :]) for i, load in enumerate(loads) if load + size <= capacity
        ]
        tried = {tuple(sorted(choice)) for choice in [*choices, (*loads, size)]}
        return min(place(index + 1, choice) for choice in tried)

    return place(0, ())


# Models: a mask through the whole model gives finite numbers, and other pixels of masked units change nothing


def model_inputs(draw: Choices) -> dict[str, Any]:
    case = plan_inputs(draw)
    extreme = draw.of(["normal", "zeros", "constant units", "huge", "tiny"])
    return {**case, "own": None, "group": draw.of(["window", "optimal"]), "pixels": extreme}


def check_model(case: dict[str, Any]) -> str:
    torch.manual_seed(0)
    config = small_config(case["grid"], case["stages"], case["window"], case["group"])
    model = GreenSwinForMaskedImageModeling(config).train()
    masks = torch.tensor(mask_rows(case))
    shape = (len(masks), 3, *config.image_size)
    pixels = torch.randn(shape)
    unit = config.mask_unit_size
    constant = torch.randn(len(masks), 3, *case["grid"]).repeat_interleave(unit, 2).repeat_interleave(unit, 3)
    scale = {"zeros": 0.0, "huge": 1e4, "tiny": 1e-20}.get(case["pixels"], 1.0)
    pixels = constant if case["pixels"] == "constant units" else pixels * scale
    output = model(pixel_values=pixels, bool_masked_pos=masks)
    output.loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert torch.isfinite(output.loss)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    hidden = masks.view(-1, 1, *case["grid"]).repeat_interleave(unit, 2).repeat_interleave(unit, 3)
    other = torch.where(hidden, torch.randn(shape) * 3 + 1, pixels)
    with torch.no_grad():
        model.eval()
        first, second = (model(pixel_values=seen, bool_masked_pos=masks).reconstruction for seen in (pixels, other))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    return ACCEPTED


TARGETS = (
    Target("masks", mask_inputs, check_mask),
    Target("plans", plan_inputs, check_plan),
    Target("groupings", grouping_inputs, check_grouping),
    Target("models", model_inputs, check_model),
)
