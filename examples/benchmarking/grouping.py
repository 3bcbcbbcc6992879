"""Quality and time of the window grouping solver.

Packs the windows of random masks and reports the number of groups against the lower bound ceil(tokens / capacity) and
against exact bin packing, the padding and the time of one solve; then pools of many images, and what the sweep over
group sizes saves.
"""

import argparse
import functools
import importlib.util
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import mean, median
from typing import TypeVar

from tqdm import tqdm

from benchmarking.options import MASK_UNIT_SIZE, WrongInput, add_output, image_size, positive_int, ratio
from benchmarking.part import Part
from benchmarking.report import Row, print_table
from green_swin_hf.window_grouping import WindowGrouping, choose_grouping, solve_grouping

PATCH_SIZE = 4
NUM_STAGES = 4
WINDOW_SIZES = (7, 14)
NUM_POOLS = 5

Result = TypeVar("Result")


@dataclass(frozen=True)
class Partition:
    """The windows of one stage: the grid's side in tokens, the window's side, and the offset of the first."""

    stage: int
    grid_size: int
    window_size: int
    offset: int

    @property
    def window_area(self) -> int:
        return self.window_size**2

    @property
    def labels(self) -> Row:
        return {"stage": self.stage, "grid": self.grid_size, "shifted": "yes" if self.offset else "no"}


def build_partitions(image_size: int, window_size: int) -> list[Partition]:
    """Every partition of a square image: each stage, and shifted too where the window is not clamped."""
    partitions = []
    for stage in range(NUM_STAGES):
        grid_size = image_size // (PATCH_SIZE * 2**stage)
        window = min(window_size, grid_size)
        partitions.append(Partition(stage + 1, grid_size, window, offset=0))
        if grid_size > window_size:
            partitions.append(Partition(stage + 1, grid_size, window, offset=window - window // 2))
    return partitions


def sample_visible_units(image_size: int, mask_ratio: float, generator: random.Random) -> list[int]:
    """Raster positions of the visible mask units of one random mask, at least one."""
    num_units = (image_size // MASK_UNIT_SIZE) ** 2
    num_visible = int(round(num_units * (1 - mask_ratio), 6))
    return generator.sample(range(num_units), max(1, num_visible))


def count_visible_tokens(visible_units: Sequence[int], units_per_side: int, partition: Partition) -> list[int]:
    """Visible tokens in each window that has any.

    Example: one visible unit at position 0 of 2 x 2 units, a grid of 4 x 4 tokens, windows of 3: 2 x 2
    tokens, all in the first window: [4]; with offset 2 they straddle four windows: [1, 1, 1, 1].
    """
    side = partition.grid_size // units_per_side
    windows: Counter[tuple[int, int]] = Counter()
    for unit in visible_units:
        unit_row, unit_column = divmod(unit, units_per_side)
        rows = [(unit_row * side + i + partition.offset) // partition.window_size for i in range(side)]
        columns = [(unit_column * side + i + partition.offset) // partition.window_size for i in range(side)]
        windows.update((row, column) for row in rows for column in columns)
    return list(windows.values())


def count_groups_exactly(sizes: Sequence[int], capacity: int, upper_bound: int, seconds: float = 60) -> int:
    """The fewest groups of any packing, by CP-SAT on the arc-flow model of bin packing.

    A node is a load of a group, an arc from load to load + size a window of that size put on top; a group is
    a path from load 0, so the flow out of 0 is the number of groups.

    Args:
        sizes: tokens in each window.
        capacity: most tokens that a group may hold.
        upper_bound: groups of a packing that is known; returned at once where it meets the lower bound.
        seconds: given to the solver.

    Raises:
        RuntimeError: no proof within that time.
    """
    lower_bound = -(-sum(sizes) // capacity)
    if upper_bound == lower_bound:
        return upper_bound
    from ortools.sat.python import cp_model

    histogram = Counter(size for size in sizes if size)
    model = cp_model.CpModel()
    num_groups = model.new_int_var(lower_bound, upper_bound, "num_groups")
    arcs = {arc: model.new_int_var(0, histogram[arc[1]], "") for arc in _build_arcs(histogram, capacity)}
    for size, count in histogram.items():
        model.add(sum(flow for arc, flow in arcs.items() if arc[1] == size) == count)
    for node in {load for load, _ in arcs}:
        entering = sum(flow for (load, size), flow in arcs.items() if load + size == node)
        leaving = sum(flow for (load, _), flow in arcs.items() if load == node)
        model.add(leaving <= entering if node else leaving == num_groups)
    model.minimize(num_groups)
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.linearization_level = 2
    solver.parameters.max_time_in_seconds = seconds
    if solver.solve(model) != cp_model.OPTIMAL:
        raise RuntimeError(f"CP-SAT gave no proof within {seconds:g} s: sizes {sorted(sizes)}, capacity {capacity}")
    return round(solver.objective_value)


def _build_arcs(histogram: Counter[int], capacity: int) -> set[tuple[int, int]]:
    """(load, size) for every load that windows of this size or larger can reach, largest size first."""
    loads = {0}
    arcs: set[tuple[int, int]] = set()
    for size, count in sorted(histogram.items(), reverse=True):
        tops = loads
        for _ in range(count):
            arcs |= {(load, size) for load in tops if load + size <= capacity}
            tops = {load + size for load in tops if load + size <= capacity}
            loads = loads | tops
    return arcs


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """The function's result and the processor time of this thread in milliseconds.

    The solver is one thread of pure Python, so this is its wall time on a machine that does nothing else.
    """
    start = time.thread_time()
    result = function()
    return result, 1000 * (time.thread_time() - start)


def summarize_times(times: Sequence[float]) -> Row:
    p95 = sorted(times)[int(0.95 * (len(times) - 1))]
    return {"mean_ms": mean(times), "median_ms": median(times), "p95_ms": p95}


def measure_partition(all_sizes: Sequence[Sequence[int]], partition: Partition, capacity_rule: str, exact: bool) -> Row:
    """One row of the quality table: means over all masks of one partition at one capacity."""
    groupings: list[WindowGrouping] = []
    times, bounds, optima = [], [], []
    for sizes in tqdm(all_sizes, desc=f"stage {partition.stage}", leave=False, disable=not exact):
        limit = partition.window_area if capacity_rule == "window area" else max(sizes)
        capacity = min(limit, sum(sizes))
        grouping, milliseconds = timed(functools.partial(solve_grouping, sizes, capacity))
        groupings.append(grouping)
        times.append(milliseconds)
        bounds.append(-(-sum(sizes) // capacity))
        if exact:
            optima.append(count_groups_exactly(sizes, capacity, grouping.num_groups))
    ours = mean(grouping.num_groups for grouping in groupings)
    return {
        "bound": mean(bounds),
        "exact": mean(optima) if exact else None,
        "groups": ours,
        "excess": ours - mean(optima) if exact else None,
        "padding_%": 100 * mean(grouping.padding_ratio for grouping in groupings),
        **summarize_times(times),
    }


def measure_grouping(arguments: argparse.Namespace) -> list[Row]:
    """Quality and time of one solve for one image, for every partition and both capacities."""
    rows = []
    for window_size, partition, all_sizes in draw_sizes(arguments, arguments.masks):
        for capacity_rule in ("window area", "largest count"):
            row = {"window": window_size, "capacity": capacity_rule, **partition.labels}
            rows.append(row | measure_partition(all_sizes, partition, capacity_rule, arguments.exact))
    return rows


def measure_pools(arguments: argparse.Namespace) -> list[Row]:
    """The windows of many images packed together, each image under its own mask; means over a few pools."""
    rows = []
    images = arguments.images_in_pool
    for window_size, partition, all_sizes in draw_sizes(arguments, NUM_POOLS * images):
        pools = [list(chain(*all_sizes[i * images : (i + 1) * images])) for i in range(NUM_POOLS)]
        solved = [timed(functools.partial(solve_grouping, pool, partition.window_area)) for pool in pools]
        channels = arguments.embed_dim * 2 ** (partition.stage - 1)
        swept = [timed(functools.partial(sweep, pool, partition, channels)) for pool in pools]
        rows.append(
            {"window": window_size, **partition.labels, "windows": mean(len(pool) for pool in pools)}
            | {"bound": mean(-(-sum(pool) // partition.window_area) for pool in pools)}
            | {"groups": mean(grouping.num_groups for grouping, _ in solved)}
            | {"padding_%": 100 * mean(grouping.padding_ratio for grouping, _ in solved)}
            | {"median_ms": median(milliseconds for _, milliseconds in solved)}
            | {"sweep_median_ms": median(milliseconds for _, milliseconds in swept)}
        )
    return rows


def measure_sweep(arguments: argparse.Namespace) -> list[Row]:
    """What the sweep over group sizes saves in Ω for one image, against groups of one window area."""
    rows = []
    for window_size, partition, all_sizes in draw_sizes(arguments, arguments.masks):
        channels = arguments.embed_dim * 2 ** (partition.stage - 1)
        fixed = [choose_grouping(sizes, "window", partition.window_area, channels) for sizes in all_sizes]
        swept = [timed(functools.partial(sweep, sizes, partition, channels)) for sizes in all_sizes]
        fixed_cost = mean(grouping.cost(channels) for grouping in fixed)
        swept_cost = mean(grouping.cost(channels) for grouping, _ in swept)
        rows.append(
            {"window": window_size, **partition.labels, "channels": channels}
            | {"window_Mcost": fixed_cost / 1e6, "optimal_Mcost": swept_cost / 1e6}
            | {"gain_%": 100 * (1 - swept_cost / fixed_cost)}
            | {"groups": mean(grouping.num_groups for grouping, _ in swept)}
            | {"group_size": mean(grouping.group_size for grouping, _ in swept)}
            | summarize_times([milliseconds for _, milliseconds in swept])
        )
    return rows


def sweep(sizes: Sequence[int], partition: Partition, channels: int) -> WindowGrouping:
    return choose_grouping(sizes, "optimal", partition.window_area, channels)


def draw_sizes(arguments: argparse.Namespace, num_masks: int) -> list[tuple[int, Partition, list[list[int]]]]:
    """(window size, partition, tokens per window for each mask); every partition sees the same masks."""
    generator = random.Random(arguments.seed)
    masks = [sample_visible_units(arguments.image_size, arguments.mask_ratio, generator) for _ in range(num_masks)]
    units_per_side = arguments.image_size // MASK_UNIT_SIZE
    return [
        (window_size, partition, [count_visible_tokens(mask, units_per_side, partition) for mask in masks])
        for window_size in WINDOW_SIZES
        for partition in build_partitions(arguments.image_size, window_size)
    ]


def measure(arguments: argparse.Namespace) -> dict[str, list[Row]]:
    """Every table of the part, printed as it is ready."""
    if arguments.exact and importlib.util.find_spec("ortools") is None:
        raise WrongInput(
            "ortools, the exact solver to compare with, is not installed: "
            "pip install green-swin-hf[studies], or pass --no-exact"
        )
    parts = {
        "one image": measure_grouping,
        f"pool of {arguments.images_in_pool} images, capacity = window area": measure_pools,
        "sweep over group sizes, one image": measure_sweep,
    }
    results = {}
    for title, measure_part in parts.items():
        rows = results[measure_part.__name__.removeprefix("measure_")] = measure_part(arguments)
        print_table(title, rows)
    return results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--masks", type=positive_int, default=200, help="random masks (default: 200)")
    parser.add_argument("--image-size", type=image_size, default=224, help="pixels (default: 224)")
    parser.add_argument(
        "--mask-ratio", type=functools.partial(ratio, with_zero=True), default=0.75, help="default: 0.75"
    )
    parser.add_argument("--images-in-pool", type=positive_int, default=64, help="default: 64")
    parser.add_argument("--embed-dim", type=positive_int, default=128, help="channels of stage 1")
    parser.add_argument("--seed", type=int, default=0, help="of the masks (default: 0)")
    parser.add_argument(
        "--exact",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with exact bin packing by CP-SAT (needs ortools)",
    )
    add_output(parser)


PART = Part("grouping", "quality and time of the window grouping solver", add_arguments, measure)
