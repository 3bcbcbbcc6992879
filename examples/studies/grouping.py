"""Grouping: how windows with different numbers of visible tokens are packed, by seven rules on the same masks.

    python examples/studies/grouping.py --quick     # does it run? under a minute
    python examples/studies/grouping.py             # the study; goes on where it was stopped

Rules: every window padded to its area (no grouping), one group for all, the greedy dynamic programme of the paper by a
table in plain Python, the same by a bit set, best-fit decreasing, the package's own, and exact bin packing (CP-SAT,
where ortools is installed). Groups, padding, Ω and solve time, for one image and for pools of up to 256 images with a
mask each, up to 1024 px. Exit codes: 0 done, 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib.util
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.grouping import count_groups_exactly, count_visible_tokens, sample_visible_units, timed
from benchmarking.options import MASK_UNIT_SIZE, positive_int

from green_swin_hf.training import one_line_errors
from green_swin_hf.window_grouping import (
    attention_cost,
    solve_best_fit_grouping,
    solve_grouping,
    solve_subset_sum_grouping,
)
from studies import study_kit as kit
from studies.group_size import partitions_of, swin
from studies.study_kit import Row, Study

NAME, TITLE = "grouping", "Grouping windows: rules against each other"
KEYS = ("window", "size", "images", "stage")
PADDED, ONE, TABLE, BITS, BEST_FIT, OURS, EXACT = METHODS = (
    "padded windows",
    "one group",
    "table DP",
    "bit-set DP",
    "best fit",
    "ours",
    "exact",
)
PACKED = METHODS[2:]


@dataclass(frozen=True)
class Settings:
    """`most_steps` limits the table's work on one pool, `exact_s` the exact solver's seconds; beyond: not measured."""

    windows: tuple[int, ...] = (7, 14)
    sizes: tuple[int, ...] = (224, 448, 1024)
    images: tuple[int, ...] = (1, 16, 64, 256)
    stages: tuple[int, ...] = (1, 2, 3, 4)
    ratio: float = 0.75
    masks: int = 20
    most_steps: float = 1e7
    exact_s: float = 5
    threads: int = 1
    seed: int = 0
    variant: str = "base"


FULL = Settings()
QUICK = Settings(sizes=(224, 1024), images=(1, 16), stages=(1, 2), masks=3, most_steps=2e6, exact_s=1)


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors(f"{NAME}.py"):
        parser = kit.build_parser(__doc__, NAME)
        parser.add_argument("--masks", type=positive_int, help=f"of one image (default: {FULL.masks})")
        arguments: Namespace = parser.parse_args(argv)
        settings = kit.choose_settings(arguments, QUICK, FULL)
        study = kit.open_study(NAME, TITLE, arguments, settings, KEYS, ("windows", "sizes", "images", "stages"))
    next_step = "python examples/benchmark.py plans times whole plans, tensors included, as a training builds them."
    return kit.run_study(study, build_cells(settings), lambda: write(study, settings), next_step)


def build_cells(settings: Settings) -> list[tuple[Row, Callable[[], Row]]]:
    cells: list[tuple[Row, Callable[[], Row]]] = []
    for images, size, window, stage in product(settings.images, settings.sizes, settings.windows, settings.stages):
        name = {"window": window, "size": size, "images": images, "stage": stage}
        cells.append((name, functools.partial(measure, settings, window, size, images, stage)))
    return cells


# Measuring


def fill_group_by_table(sizes: Sequence[int], capacity: int) -> list[int]:
    """Positions of the windows that fill one group best: the 0/1 knapsack with weight = value, with its whole table.

    Example: sizes (5, 4, 3, 3) at capacity 9 give [1, 0]: 4 + 5.
    """
    best = [[0] * (capacity + 1)]  # best[i][c]: most tokens of the first i windows in c slots
    for size in sizes:
        above = best[-1]
        row = above[:size]
        for room in range(size, capacity + 1):
            row.append(max(above[room], above[room - size] + size))
        best.append(row)
    chosen, room = [], capacity
    for position in range(len(sizes) - 1, -1, -1):
        if best[position + 1][room] != best[position][room]:
            chosen.append(position)
            room -= sizes[position]
    return chosen


def count_groups_by_table(sizes: Sequence[int], capacity: int) -> int:
    """Groups when each in turn is filled best from the windows that are left.

    Source: the description in arXiv 2205.13515, section on optimal grouping.
    """
    left, groups = list(sizes), 0
    while left:
        chosen = set(fill_group_by_table(left, capacity))
        left = [size for position, size in enumerate(left) if position not in chosen]
        groups += 1
    return groups


def pack(method: str, sizes: Sequence[int], capacity: int, settings: Settings) -> tuple[int, float | None] | None:
    """Groups of `capacity` slots and milliseconds of the solve; None where it would take too long.

    The exact solver has no time where another rule meets the bound: there was nothing to solve.
    """
    if method == EXACT:
        return pack_exactly(sizes, capacity, settings)
    expected_groups = -(-sum(sizes) // capacity)
    if method == TABLE and len(sizes) * (capacity + 1) * expected_groups / 2 > settings.most_steps:
        return None
    solve: dict[str, Callable[[], int]] = {
        TABLE: lambda: count_groups_by_table(sizes, capacity),
        BITS: lambda: len(solve_subset_sum_grouping(sizes, capacity)),
        BEST_FIT: lambda: len(solve_best_fit_grouping(sizes, capacity)),
        OURS: lambda: solve_grouping(sizes, capacity).num_groups,
    }
    return timed(solve[method])


def pack_exactly(sizes: Sequence[int], capacity: int, settings: Settings) -> tuple[int, float | None] | None:
    if importlib.util.find_spec("ortools") is None:
        return None
    known = solve_grouping(sizes, capacity).num_groups
    if known == -(-sum(sizes) // capacity):
        return known, None
    try:
        return timed(lambda: count_groups_exactly(sizes, capacity, known, settings.exact_s))
    except RuntimeError:
        return None


def measure(settings: Settings, window: int, size: int, images: int, stage: int) -> Row:
    """Every rule on the same pools, in regular and shifted windows."""
    generator = random.Random(settings.seed)
    pools = max(1, min(settings.masks, settings.masks // images))
    masks = [sample_visible_units(size, settings.ratio, generator) for _ in range(pools * images)]
    channels = swin(settings.variant).stage_channels[stage - 1]
    partitions = partitions_of(size, window, stage)
    area, side = partitions[0].window_area, size // MASK_UNIT_SIZE
    problems = []
    for partition in partitions:
        counts = [count_visible_tokens(mask, side, partition) for mask in masks]
        problems += [list(chain(*counts[at : at + images])) for at in range(0, len(counts), images)]
    tokens = sum(problems[0])
    return {
        "area": area,
        "tokens": tokens,
        "windows": mean(map(len, problems)),
        "bound": mean(-(-sum(sizes) // min(area, tokens)) for sizes in problems),
        "methods": {method: describe(method, problems, area, channels, settings) for method in METHODS},
    }


def describe(
    method: str, problems: Sequence[Sequence[int]], area: int, channels: int, settings: Settings
) -> Row | None:
    """Means of one rule over all problems; None where one of them was too long for it."""
    groups, times, slots = [], [], []
    for sizes in problems:
        slots.append({PADDED: area, ONE: sum(sizes)}.get(method, min(area, sum(sizes))))
        if method not in PACKED:
            groups.append(len(sizes) if method == PADDED else 1)
        else:
            found = pack(method, sizes, slots[-1], settings)
            if found is None:
                return None
            groups.append(found[0])
            times += [found[1]] if found[1] is not None else []
    all_slots = [count * size for count, size in zip(groups, slots, strict=True)]
    tokens = sum(map(sum, problems))
    return {
        "groups": mean(groups),
        "padding_%": 100 * (1 - tokens / sum(all_slots)),
        "omega": mean(attention_cost(*pair, channels) for pair in zip(groups, slots, strict=True)),
        "ms": median(times) if times else None,
    }


# Results


def write(study: Study, settings: Settings) -> None:
    rows = study.rows.all()
    tables = {
        "Groups (mean over masks, regular and shifted windows)": [wide(row, "groups", PACKED) for row in rows],
        "Padding, % of the slots": [wide(row, "padding_%", METHODS) for row in rows],
        "Ω over that of ours": [wide(row, "omega", METHODS, relative=True) for row in rows],
        "Solve time, ms (median)": [wide(row, "ms", PACKED) for row in rows],
    }
    notes = [
        "groups have min(window area, visible tokens) slots; with padded windows each window has a group of its area",
        f"-: not measured (table: more than {settings.most_steps:g} steps; exact: no proof in {settings.exact_s:g} s, "
        "or ortools is not installed: pip install green-swin-hf[studies])",
        "bound: ceil(tokens / slots); exact has no time where ours meets it, for then there is nothing to solve",
    ]
    figures = {"groups": draw_groups(rows, settings), "time": draw_time(rows), "cost": draw_cost(rows, settings)}
    kit.write_results(study, tables, figures, notes)


def wide(row: Row, key: str, methods: Sequence[str], relative: bool = False) -> Row:
    """A line with a column for each rule."""
    found = {name: row["methods"][name] for name in methods}
    scale = row["methods"][OURS][key] if relative else 1
    values = {name: each[key] / scale if each and each[key] is not None else None for name, each in found.items()}
    bound = {"bound": row["bound"]} if key == "groups" else {}
    return {**{name: row[name] for name in KEYS}, "windows": round(row["windows"]), **bound, **values}


def draw_groups(rows: Sequence[Row], settings: Settings) -> Any:
    """Groups above the lower bound in per cent, all stages together, against the images of a pool."""
    figure, panels = kit.new_figure(len(settings.windows), len(settings.sizes), 3.8, 2.9)
    for line, window in zip(panels, settings.windows, strict=True):
        for axes, size in zip(line, settings.sizes, strict=True):
            for index, method in enumerate(PACKED):
                points = [
                    (images, excess)
                    for images in settings.images
                    if (excess := excess_of(rows, window, size, images, method)) is not None
                ]
                x, y = zip(*points, strict=True) if points else ((), ())
                kit.draw_line(axes, x, y, index, method, markersize=10 - 1.7 * index)
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            kit.plain_ticks(axes, settings.images)
            ylabel = "groups above the bound, %" if size == settings.sizes[0] else ""
            is_first = (window, size) == (settings.windows[0], settings.sizes[-1])
            kit.finish(axes, "images in the pool", ylabel, f"window {window}, {size} px", is_first)
    return figure


def excess_of(rows: Sequence[Row], window: int, size: int, images: int, method: str) -> float | None:
    found = [row for row in rows if (row["window"], row["size"], row["images"]) == (window, size, images)]
    if any(row["methods"][method] is None for row in found):
        return None
    return 100 * (sum(row["methods"][method]["groups"] for row in found) / sum(row["bound"] for row in found) - 1)


def draw_time(rows: Sequence[Row]) -> Any:
    figure, panels = kit.new_figure(1, 1, 7.0, 4.4)
    axes = panels[0][0]
    for index, method in enumerate(PACKED):
        points = [
            (row["windows"], row["methods"][method]["ms"])
            for row in rows
            if row["methods"][method] and row["methods"][method]["ms"] is not None
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        kit.draw_line(axes, x, y, index, method, linestyle="none", alpha=0.75)
    axes.set_xscale("log")
    axes.set_yscale("log")
    kit.finish(axes, "windows with a visible token", "solve time, ms", "one solve of a pool, every setting")
    return figure


def draw_cost(rows: Sequence[Row], settings: Settings) -> Any:
    """Ω over that of ours, for the whole encoder on one image: bars by rule and image size."""
    methods = (PADDED, ONE, TABLE, OURS)
    figure, panels = kit.new_figure(1, len(settings.windows), 5.2, 3.6)
    for axes, window in zip(panels[0], settings.windows, strict=True):
        for index, method in enumerate(methods):
            values = [relative_cost(rows, window, size, method, settings) for size in settings.sizes]
            places = [at + 0.2 * (index - 1.5) for at, value in enumerate(values) if value is not None]
            heights = [value for value in values if value is not None]
            style = {"color": kit.COLOURS[index], "hatch": kit.HATCHES[index], "edgecolor": "white"}
            axes.bar(places, heights, width=0.2, label=method, **style)
            for place, height in zip(places, heights, strict=True):
                axes.text(place, height * 1.04, f"{height:.2g}", ha="center", fontsize=7)
        axes.set_xticks(range(len(settings.sizes)), [f"{size} px" for size in settings.sizes])
        axes.set_yscale("log")
        axes.margins(y=0.12)
        kit.plain_ticks(axes, [0.5, 1, 2, 4, 8, 16], "y")
        axes.axhline(1, color="#000000", linewidth=0.8, linestyle=":")
        kit.finish(axes, "", "Ω of all blocks over ours", f"window {window}, one image", window == settings.windows[0])
    return figure


def relative_cost(rows: Sequence[Row], window: int, size: int, method: str, settings: Settings) -> float | None:
    """Ω of all blocks by one rule over ours, for one image; None where a stage was not measured."""
    found = [row for row in rows if (row["window"], row["size"], row["images"]) == (window, size, 1)]
    if not found or any(row["methods"][method] is None for row in found):
        return None
    depths = swin(settings.variant).depths
    mine, ours = (
        sum(depths[row["stage"] - 1] * row["methods"][name]["omega"] for row in found) for name in (method, OURS)
    )
    return mine / ours


if __name__ == "__main__":
    sys.exit(main())
