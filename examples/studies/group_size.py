"""Group size: cost Ω and measured attention time, from the largest window count to all tokens in one group.

    python examples/studies/group_size.py --quick     # does it run? under two minutes
    python examples/studies/group_size.py             # the study; goes on where it was stopped

For every stage, windows 7 and 14, 224 and 448 px, and several mask ratios: Ω = n · (4 g C² + 2 g² C) for n groups of g
slots (arXiv 2205.13515), where it is least against the window area p × p, and what a sweep over g gains over p × p.
Then the attention layer itself (projections, gathers, attention, output; forward and backward) is timed at some of the
group sizes. Exit codes: 0 done, 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import functools
import random
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, product
from pathlib import Path
from statistics import mean
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.attention import time_in_turns
from benchmarking.grouping import Partition, build_partitions, count_visible_tokens, sample_visible_units
from benchmarking.options import MASK_UNIT_SIZE, positive_int
from benchmarking.statistics_of_rounds import summarize, summarize_ratios

from green_swin_hf import VARIANTS, GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks
from green_swin_hf.modeling_green_swin import GreenSwinAttention
from green_swin_hf.sparse_plan import GroupingPlan
from green_swin_hf.token_layout import VisibleLayout
from green_swin_hf.training import one_line_errors
from green_swin_hf.window_grouping import WindowGrouping, attention_cost, solve_grouping
from studies import study_kit as kit
from studies.study_kit import Row, Study

NAME, TITLE = "group_size", "Group size: cost Ω and attention time"
KEYS = ("kind", "window", "size", "ratio", "stage")
MOST_SCORES = 6e7  # numbers of one attention's scores: with more, the largest groups are not timed
LEAST_SPAN = (0.65, 2.2)  # of Ω or time over p × p in a plot; less would make noise look like a finding
PIXELS = 4 * 224**2  # of the images of a timed step


@dataclass(frozen=True)
class Settings:
    """Swin-B's widths; `timed_ratios` are those at which time is measured, too."""

    windows: tuple[int, ...] = (7, 14)
    sizes: tuple[int, ...] = (224, 448)
    ratios: tuple[float, ...] = (0.5, 0.6, 0.7, 0.75, 0.8, 0.9)
    timed_ratios: tuple[float, ...] = (0.5, 0.7, 0.75, 0.9)
    masks: int = 5
    rounds: int = 5
    threads: int = 1
    seed: int = 0
    variant: str = "base"
    precision: str = "fp32"


FULL = Settings()
QUICK = Settings(ratios=(0.5, 0.75, 0.9), timed_ratios=(0.75,), masks=1, rounds=1)


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors(f"{NAME}.py"):
        parser = kit.build_parser(__doc__, NAME)
        parser.add_argument("--masks", type=positive_int, help=f"random masks (default: {FULL.masks})")
        parser.add_argument("--rounds", type=positive_int, help=f"timed steps (default: {FULL.rounds})")
        arguments: Namespace = parser.parse_args(argv)
        settings = kit.choose_settings(arguments, QUICK, FULL)
        free = ("windows", "sizes", "ratios", "timed_ratios")
        study = kit.open_study(NAME, TITLE, arguments, settings, KEYS, free)
    torch.set_num_threads(settings.threads)
    next_step = "group_size='optimal' in a GreenSwinConfig lets the model sweep; 'window', the default, takes p × p."
    return kit.run_study(study, build_cells(settings), lambda: write(study, settings), next_step)


def build_cells(settings: Settings) -> list[tuple[Row, Callable[[], Row]]]:
    cells: list[tuple[Row, Callable[[], Row]]] = []
    for kind, measure, ratios in (
        ("cost", measure_cost, settings.ratios),
        ("time", measure_time, settings.timed_ratios),
    ):
        for window, size, ratio, stage in product(settings.windows, settings.sizes, ratios, range(1, 5)):
            name = {"kind": kind, "window": window, "size": size, "ratio": ratio, "stage": stage}
            cells.append((name, functools.partial(measure, settings, window, size, ratio, stage)))
    return cells


# Cost


def candidate_sizes(largest: int, area: int, tokens: int) -> list[int]:
    """Group sizes from the largest window to all tokens: each up to twice the window area, then in steps of 5 %.

    >>> candidate_sizes(3, 4, 9), candidate_sizes(4, 4, 6)
    ([3, 4, 5, 6, 7, 8, 9], [4, 5, 6])
    """
    sizes = [size for size in range(largest, 2 * area + 1) if size <= tokens]
    while sizes[-1] < tokens:
        sizes.append(min(tokens, max(sizes[-1] + 1, round(1.05 * sizes[-1]))))
    return sizes


def cost_curve(sizes: Sequence[int], area: int, channels: int) -> dict[int, int]:
    """Ω of every candidate group size g, each group charged with g slots."""
    candidates = candidate_sizes(max(sizes), area, sum(sizes))
    return {size: attention_cost(solve_grouping(sizes, size).num_groups, size, channels) for size in candidates}


@functools.cache
def swin(variant: str) -> GreenSwinConfig:
    return GreenSwinConfig(**VARIANTS[variant])


def partitions_of(size: int, window: int, stage: int) -> list[Partition]:
    return [partition for partition in build_partitions(size, window) if partition.stage == stage]


def measure_cost(settings: Settings, window: int, size: int, ratio: float, stage: int) -> Row:
    """Means over masks and over the regular and the shifted windows of a stage."""
    generator = random.Random(settings.seed)
    units = [sample_visible_units(size, ratio, generator) for _ in range(settings.masks)]
    channels = swin(settings.variant).stage_channels[stage - 1]
    partitions = partitions_of(size, window, stage)
    area = partitions[0].window_area
    side = size // MASK_UNIT_SIZE
    all_sizes = [count_visible_tokens(visible, side, each) for each in partitions for visible in units]
    return summarize_curves([cost_curve(sizes, area, channels) for sizes in all_sizes], area)


def summarize_curves(curves: Sequence[Mapping[int, int]], area: int) -> Row:
    """What the curves of one setting say, relative to groups of the window area.

    A pool that holds fewer tokens than a window makes one group of them: that is its p × p.
    """
    tokens = max(curves[0])
    at_window = min(area, tokens)
    reference = mean(curve[at_window] for curve in curves)
    best = [min(curve, key=curve.__getitem__) for curve in curves]
    least = mean(min(curve.values()) for curve in curves)
    shared = sorted(set.intersection(*(set(curve) for curve in curves)))
    return {
        "area": area,
        "tokens": tokens,
        "largest_window": mean(min(curve) for curve in curves),
        "optimum": mean(best),
        "optimum_min": min(best),
        "optimum_max": max(best),
        "cost_at_area": reference,
        "least_cost": least,
        "gain_%": 100 * (1 - least / reference),
        "one_group_over_area": mean(curve[tokens] for curve in curves) / reference,
        "curve": [[size, mean(curve[size] for curve in curves) / reference] for size in shared],
    }


# Time


def windows_of(plan: GroupingPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Window (0 … windows - 1) and position of each token of the pool: each [T] int64."""
    slots = plan.scatter_index
    window, position = plan.slot_window.flatten(), plan.slot_position.flatten()
    if slots is not None:
        window, position = window[slots], position[slots]
    return window.unique(return_inverse=True)[1], position


def regroup(plan: GroupingPlan, group_size: int) -> GroupingPlan:
    """The same windows in groups of another size, at least the largest window."""
    window, position = windows_of(plan)
    sizes = window.bincount().tolist()
    grouping = solve_grouping(sizes, group_size)
    order = window.argsort(stable=True)
    first_token = torch.tensor([0, *accumulate(sizes[:-1])])
    slot = torch.tensor(first_slots(grouping, sizes, group_size))[window[order]]
    slot += torch.arange(len(window)) - first_token[window[order]]
    gather = torch.zeros(grouping.num_groups * group_size, dtype=torch.int64)
    gather[slot] = order
    scatter = torch.empty_like(slot)
    scatter[order] = slot
    slot_window = -1 - torch.arange(len(gather), dtype=torch.int32)  # a pad is a window of its own
    slot_window[slot] = window[order].int()
    shape = (grouping.num_groups, group_size)
    return GroupingPlan(gather, scatter, slot_window.view(shape), position[gather].view(shape), plan.table_window_size)


def first_slots(grouping: WindowGrouping, sizes: Sequence[int], group_size: int) -> list[int]:
    """The slot where each window begins."""
    first = [0] * len(sizes)
    for group, windows in enumerate(grouping.groups):
        slot = group * group_size
        for window in windows:
            first[window] = slot
            slot += sizes[window]
    return first


def timed_sizes(curve: Mapping[int, int], area: int, scores_per_pair: int) -> list[int]:
    """A few group sizes over the whole range: ends, window area, optimum of Ω, multiples of the area."""
    tokens = max(curve)
    wanted = {min(curve), min(area, tokens), min(curve, key=curve.__getitem__), tokens}
    wanted |= {round(area * factor) for factor in (1.25, 1.5, 2, 3, 4, 8, 16)}
    groups = {size: -(-tokens // size) for size in wanted}
    possible = [size for size in wanted if scores_per_pair * groups[size] * size**2 <= MOST_SCORES]
    return sorted(size for size in possible if min(curve) <= size <= tokens)


def measure_time(settings: Settings, window: int, size: int, ratio: float, stage: int) -> Row:
    """The attention layer of a stage in shifted windows under one mask, its group sizes in turn."""
    config = GreenSwinConfig(**{**VARIANTS[settings.variant], "image_size": size, "window_size": window})
    geometry = SparseGeometry.from_config(config)
    mask = sample_masks(1, geometry.unit_grid_size, ratio, torch.Generator().manual_seed(settings.seed))
    plan = build_sparse_plan(mask, geometry).stages[stage - 1].shifted
    channels, heads = config.stage_channels[stage - 1], config.num_heads[stage - 1]
    area, batch = geometry.stages[stage - 1].window_size ** 2, max(1, PIXELS // size**2)
    curve = cost_curve(windows_of(plan)[0].bincount().tolist(), area, channels)
    sizes = timed_sizes(curve, area, batch * heads)
    torch.manual_seed(settings.seed)
    layer, tokens = GreenSwinAttention(config, stage - 1), torch.randn(batch, max(curve), channels)
    steps = {str(each): build_step(layer, tokens, regroup(plan, each)) for each in sizes}
    seconds = time_in_turns(steps, 1, settings.rounds, kit.clock_for(settings.threads))
    at_area = min(area, max(curve))
    points = []
    for each in sizes:
        figures = summarize([1e3 * value for value in seconds[str(each)]])
        ratios = summarize_ratios(seconds[str(each)], seconds[str(at_area)])
        points.append(
            {"group_size": each, "ms": figures["median"], "relative": ratios["median"]}
            | {"q1": ratios["q1"], "q3": ratios["q3"], "omega": curve.get(each, 0) / curve[at_area]}
        )
    best = min(curve, key=curve.__getitem__)
    return {"area": area, "tokens": max(curve), "batch": batch, "optimum_of_omega": best, "points": points}


def build_step(layer: GreenSwinAttention, tokens: torch.Tensor, plan: GroupingPlan) -> Callable[[], None]:
    """Forward and backward of the layer; what depends on the plan alone is made before, as a model does per stage."""
    layout = VisibleLayout(plan, None, plan.relative_position_index)
    tokens = tokens.clone().requires_grad_()
    inputs = [tokens, *layer.parameters()]

    def step() -> None:
        output, _ = layer(tokens, layout, False)
        torch.autograd.grad(output, inputs, output.detach())

    return step


# Results


def write(study: Study, settings: Settings) -> None:
    costs, times = study.rows.of_kind("cost"), study.rows.of_kind("time")
    tables = {
        "Attention of the whole encoder: Ω of the sweep against groups of p × p": network_rows(costs, settings),
        "Ω by stage (means over masks, regular and shifted windows)": [cost_row(row) for row in costs],
        "Attention of the whole encoder: measured time, each stage's layer times its blocks": time_totals(
            times, settings
        ),
        "Measured time of the attention layer, forward and backward": [time_row(row) for row in times],
    }
    notes = [
        "optimum/p²: the group size of least Ω over the window area; window areas are clamped to the grid of the stage",
        "gain: Ω (or time) saved by the best group size, in per cent of that at p × p; where fewer tokens are visible "
        "than a window holds, p × p is one group of all",
        "fastest: of some group sizes, after the fact; least Ω is what a sweep can know before",
        "measured: shifted windows, one mask for the batch; sizes whose scores would not fit were left out",
    ]
    figures = {"curves": draw_curves(costs, times, settings), "optimum": draw_optimum(costs, settings)}
    kit.write_results(study, tables, figures, notes)


def network_rows(costs: Sequence[Row], settings: Settings) -> list[Row]:
    """Ω summed over the blocks of all stages, without and with the sweep."""
    depths = swin(settings.variant).depths
    rows = []
    for window, size, ratio in product(settings.windows, settings.sizes, settings.ratios):
        found = [row for row in costs if (row["window"], row["size"], row["ratio"]) == (window, size, ratio)]
        at_area, least = (
            sum(depths[row["stage"] - 1] * row[key] for row in found) for key in ("cost_at_area", "least_cost")
        )
        rows.append(
            {"window": window, "image px": size, "mask ratio": ratio, "Ω at p × p, G": at_area / 1e9}
            | {"Ω of the sweep, G": least / 1e9, "gain %": 100 * (1 - least / at_area)}
        )
    return rows


def time_totals(times: Sequence[Row], settings: Settings) -> list[Row]:
    """Milliseconds over the blocks of all stages, and what the fastest and the sizes of least Ω save."""
    depths, rows = swin(settings.variant).depths, []
    for window, size, ratio in product(settings.windows, settings.sizes, settings.timed_ratios):
        stages = [time_row(row) for row in times if matches(row, {"window": window, "size": size, "ratio": ratio})]
        weights = [depths[row["stage"] - 1] * row["ms at p²"] for row in stages]
        fastest, chosen = (
            sum(weight * (row[key] or 0) for weight, row in zip(weights, stages, strict=True)) / sum(weights)
            for key in ("gain %", "its gain %")
        )
        line: Row = {"window": window, "image px": size, "mask ratio": ratio, "batch": stages[0]["batch"]}
        rows.append(line | {"ms at p × p": sum(weights), "gain of the fastest %": fastest, "of least Ω %": chosen})
    return rows


def cost_row(row: Row) -> Row:
    return {
        **{key: row[key] for key in ("window", "size", "ratio", "stage", "area", "tokens")},
        "optimum": row["optimum"],
        "from - to": f"{row['optimum_min']} - {row['optimum_max']}",
        "optimum/p²": row["optimum"] / row["area"],
        "gain %": row["gain_%"],
        "one group/p²": row["one_group_over_area"],
    }


def time_row(row: Row) -> Row:
    points = {point["group_size"]: point for point in row["points"]}
    at_area = points[min(row["area"], row["tokens"])]
    best = min(row["points"], key=lambda point: point["relative"])
    chosen = points.get(row["optimum_of_omega"])
    return {
        **{key: row[key] for key in ("window", "size", "ratio", "stage", "batch")},
        "p²": at_area["group_size"],
        "ms at p²": at_area["ms"],
        "fastest": best["group_size"],
        "gain %": 100 * (1 - best["relative"]),
        "Ω's choice": row["optimum_of_omega"],
        "its gain %": 100 * (1 - chosen["relative"]) if chosen else None,
    }


def draw_curves(costs: Sequence[Row], times: Sequence[Row], settings: Settings) -> Any:
    """Ω (lines) and measured time (points) over those at p × p, a panel for each stage of each setting."""
    settings_of_rows = list(product(settings.windows, settings.sizes))
    figure, panels = kit.new_figure(len(settings_of_rows), 4, 3.3, 2.6)
    drawn = settings.timed_ratios
    for line, (window, size) in zip(panels, settings_of_rows, strict=True):
        for stage, axes in enumerate(line, start=1):
            for index, ratio in enumerate(drawn):
                here = {"window": window, "size": size, "ratio": ratio, "stage": stage}
                draw_panel(axes, select(costs, here), select(times, here), index)
            if all(len(row["curve"]) == 1 for row in costs if matches(row, {**here, "ratio": row["ratio"]})):
                axes.text(0.5, 0.8, "one window holds all", transform=axes.transAxes, ha="center", fontsize=9)
            axes.axvline(1, color="#000000", linewidth=0.8, linestyle=":")
            axes.axhline(1, color="#000000", linewidth=0.8, linestyle=":")
            axes.set_xscale("log")
            axes.set_yscale("log")
            show_all(axes)
            title = f"window {window}, {size} px, stage {stage}"
            is_last = (window, size) == settings_of_rows[-1]
            kit.finish(
                axes, "group size / p²" if is_last else "", "Ω or time over p × p" if stage == 1 else "", title, False
            )
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(drawn), fontsize=9)
    return figure


def show_all(axes: Any) -> None:
    """Limits and ticks of logarithmic axes that leave out nothing that is drawn; y shows `LEAST_SPAN` at least."""
    least, most = axes.dataLim.intervaly
    low, high = min(least / 1.1, LEAST_SPAN[0]), max(most * 1.1, LEAST_SPAN[1])
    axes.set_ylim(low, high)
    kit.plain_ticks(axes, [value for value in (0.5, 0.7, 1, 2, 4, 8, 16, 32, 64) if low <= value <= high], "y")
    low, high = axes.get_xlim()
    kit.plain_ticks(axes, [value for value in (0.25, 0.5, 1, 2, 4, 8, 16, 64) if low <= value <= high])


def select(rows: Sequence[Row], wanted: Row) -> Row | None:
    return next((row for row in rows if matches(row, wanted)), None)


def matches(row: Row, wanted: Row) -> bool:
    return all(row[key] == value for key, value in wanted.items())


def draw_panel(axes: Any, cost: Row | None, time: Row | None, index: int) -> None:
    if cost is not None:
        x, y = zip(*cost["curve"], strict=True)
        label = f"Ω, mask ratio {cost['ratio']:g}"
        kit.draw_line(axes, [value / cost["area"] for value in x], y, index, label, marker="", linewidth=1.3)
    if time is not None:
        places = [point["group_size"] / time["area"] for point in time["points"]]
        label = f"time, mask ratio {time['ratio']:g}"
        style = {"linestyle": "none", "markeredgecolor": "#000000", "markeredgewidth": 0.5}
        kit.draw_line(axes, places, [point["relative"] for point in time["points"]], index, label, **style)


def draw_optimum(costs: Sequence[Row], settings: Settings) -> Any:
    """The best group size over p × p, and what it gains in Ω, against the mask ratio."""
    columns = list(product(settings.windows, settings.sizes))
    figure, panels = kit.new_figure(2, len(columns), 3.3, 2.8)
    for column, (window, size) in enumerate(columns):
        for stage in range(1, 5):
            rows = [row for row in costs if (row["window"], row["size"], row["stage"]) == (window, size, stage)]
            rows.sort(key=lambda row: row["ratio"])
            ratios, label = [row["ratio"] for row in rows], f"stage {stage}"
            optima = [row["optimum"] / row["area"] for row in rows]
            kit.draw_line(panels[0][column], ratios, optima, stage - 1, label)
            kit.draw_line(panels[1][column], ratios, [row["gain_%"] for row in rows], stage - 1, label)
        panels[0][column].axhline(1, color="#000000", linewidth=0.8, linestyle=":")
        panels[0][column].set_ylim(0, None)
        panels[1][column].set_ylim(0, None)
        title = f"window {window}, {size} px"
        kit.finish(panels[0][column], "", "" if column else "best group size / p²", title, False)
        kit.finish(panels[1][column], "mask ratio", "" if column else "gain in Ω over p × p, %", "", False)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return figure


if __name__ == "__main__":
    sys.exit(main())
