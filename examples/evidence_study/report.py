"""Tables and the picture of a study, made from its cells."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .arms import ARMS
from .cells import Cell, Cells

PROBES = {"knn": "k-NN", "linear": "linear probe"}
STAR = "*"
STAR_NOTE = (
    "\n\n\\* a fine-tuning behind this number ended at the limit of updates, before its validation curve was flat"
)
NOT_FLAT_LABEL = "hollow: ended at the limit of updates, not flat"
ENCODER_TITLES = {"pixels": "raw pixels", "scratch": "random encoder"}
# Okabe and Ito, told apart by any eye, and markers for who sees no colour.
STYLES = {
    "scratch": ("#000000", "o"),
    "green": ("#009E73", "s"),
    "dense": ("#D55E00", "^"),
    "green_third": ("#56B4E9", "D"),
    "green_equal": ("#0072B2", "v"),
}
HOLLOW: dict[str, Any] = {"markerfacecolor": "white", "markeredgewidth": 1.5}


def encoder_title(arm: str) -> str:
    """What a probe looked at; an encoder of arm "scratch" is one with random weights."""
    return ENCODER_TITLES.get(arm) or ARMS[arm].title


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in percent; a single seed has no deviation.

    >>> percent([0.5, 0.52]), percent([0.5]), percent([])
    ('51.0 ± 1.4', '50.0', '-')
    """
    if not values:
        return "-"
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def label_counts(cells: Cells) -> dict[float, int]:
    """How many labels each budget has."""
    found = {cell["budget"]: cell["labels"] for cell in cells.of_kind("probe") + cells.of_kind("finetune")}
    return dict(sorted(found.items()))


def _select(cells: Sequence[Cell], arm: str, budget: float) -> list[Cell]:
    return [cell for cell in cells if cell["arm"] == arm and cell["budget"] == budget]


def _arms_of(cells: Sequence[Cell]) -> list[str]:
    order = ["pixels", *ARMS]
    return sorted({cell["arm"] for cell in cells}, key=order.index)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(cells: Cells) -> str:
    """All tables as Markdown: fine-tuning, frozen features, pretraining, gains."""
    parts = [_finetuning_table(cells), _gain_table(cells), _probe_table(cells), _pretraining_table(cells)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _headings(counts: dict[float, int]) -> list[str]:
    return [f"{count:,} labels ({100 * budget:g} %)" for budget, count in counts.items()]


def _finetuning_table(cells: Cells) -> str:
    done, counts = cells.chosen_finetunings(), label_counts(cells)
    rows = []
    for arm in _arms_of(done):
        of_arm = [_select(done, arm, budget) for budget in counts]
        accuracies = [percent([cell["test"] for cell in part]) + _star(part) for part in of_arm]
        rows.append([ARMS[arm].title, "test accuracy", *accuracies])
        rows.append(["", "updates (all, best at)", *map(_updates, of_arm)])
        rows.append(["", "learning rate", *(", ".join(_rates(part)) or "-" for part in of_arm)])
    title = "**Fine-tuning until the validation curve is flat**: test accuracy in %, mean ± deviation over seeds\n\n"
    return title + _starred_table(["arm", "", *_headings(counts)], rows) if rows else ""


def _star(part: Sequence[Cell]) -> str:
    """What marks numbers of fine-tunings of which one was ended by the limit."""
    return "" if all(cell["is_flat"] for cell in part) else STAR


def _starred_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`markdown_table`, and below it what the star means where there is one."""
    note = STAR_NOTE if any(STAR in text for row in rows for text in row) else ""
    return markdown_table(header, rows) + note


def _rates(part: Sequence[Cell]) -> list[str]:
    return [f"{rate:g}" for rate in sorted({cell["learning_rate"] for cell in part})]


def _updates(part: Sequence[Cell]) -> str:
    """Mean updates in all and at the best point."""
    if not part:
        return "-"
    all_steps, best = (statistics.mean(cell[key] for cell in part) for key in ("steps", "best_step"))
    return f"{all_steps:,.0f}{_star(part)}, {best:,.0f}"


def gains(cells: Cells) -> list[dict[str, Any]]:
    """Points of test accuracy above scratch with the same seed and labels, for each arm and budget."""
    done, found = cells.chosen_finetunings(), []
    for arm in _arms_of(done):
        for budget, count in label_counts(cells).items():
            pairs = _pairs(cells, arm, budget)
            if arm != "scratch" and pairs:
                points = [round(100 * (mine["test"] - theirs["test"]), 2) for mine, theirs in pairs]
                found.append({"arm": arm, "budget": budget, "labels": count, "points": points})
    return found


def _pairs(cells: Cells, arm: str, budget: float) -> list[tuple[Cell, Cell]]:
    """Fine-tunings of an arm, each with that of scratch with the same seed, where there is one."""
    mine = _select(cells.chosen_finetunings(), arm, budget)
    return [(cell, theirs) for cell in mine if (theirs := cells.best_finetuning("scratch", cell["seed"], budget))]


def _gain_table(cells: Cells) -> str:
    counts, found = label_counts(cells), gains(cells)
    rows = []
    for arm in dict.fromkeys(gain["arm"] for gain in found):
        points = {gain["budget"]: gain["points"] for gain in found if gain["arm"] == arm}
        stars = {budget: _star([cell for pair in _pairs(cells, arm, budget) for cell in pair]) for budget in counts}
        rows.append([ARMS[arm].title, *(_signed(points.get(budget, [])) + stars[budget] for budget in counts)])
    title = "**Gain over scratch** with the same seed and labels, in points: mean (each seed)\n\n"
    return title + _starred_table(["arm", *_headings(counts)], rows) if rows else ""


def _signed(points: Sequence[float]) -> str:
    if not points:
        return "-"
    each = ", ".join(f"{value:+.1f}" for value in points)
    return f"{statistics.mean(points):+.1f} ({each})"


def _probe_table(cells: Cells) -> str:
    done, counts = cells.of_kind("probe"), label_counts(cells)
    rows = [
        [encoder_title(arm), title, *(percent([cell[probe] for cell in _select(done, arm, b)]) for b in counts)]
        for arm in _arms_of(done)
        for probe, title in PROBES.items()
    ]
    title = "**Frozen features**: test accuracy in %, mean ± deviation over seeds\n\n"
    return title + markdown_table(["encoder", "probe", *_headings(counts)], rows) if rows else ""


def _pretraining_table(cells: Cells) -> str:
    done, rows = cells.of_kind("pretraining"), []
    for arm in _arms_of(done):
        part = [cell for cell in done if cell["arm"] == arm]
        epochs, steps = (statistics.mean(cell[key] for cell in part) for key in ("epochs", "steps"))
        minutes = [statistics.mean(cell[key] for cell in part) / 60 for key in ("seconds", "cpu_seconds")]
        rows.append([ARMS[arm].title, str(len(part)), f"{epochs:.3g}", f"{steps:,.0f}", *(f"{m:.1f}" for m in minutes)])
    header = ["arm", "seeds", "epochs", "updates", "minutes by the clock", "minutes of computing"]
    return "**Pretraining**, mean over seeds\n\n" + markdown_table(header, rows) if rows else ""


def draw(cells: Cells, path: Path, title: str = "") -> None:
    """Accuracy against labels: a panel for fine-tuning and one for frozen features, where there are any."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from green_swin_hf.visualization import save_figure

    parts = {"finetune": _draw_finetuning, "probe": _draw_probes}
    panels = {kind: draw_part for kind, draw_part in parts.items() if cells.of_kind(kind)}
    figure = Figure(figsize=(5.5 * len(panels), 5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11)
    row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (kind, draw_part) in zip(row, panels.items(), strict=True):
        draw_part(axes, cells)
        counts = sorted({cell["labels"] for cell in cells.of_kind(kind)})
        axes.set_xscale("log")
        axes.set_xlim(counts[0] / 1.3, counts[-1] * 1.3)
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("labelled images")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)  # below, clear of all curves
    row[0].set_ylabel("test accuracy, %")
    save_figure(figure, path)


def _draw_finetuning(axes: Any, cells: Cells) -> None:
    axes.set_title("fine-tuning until flat", fontsize=10)
    done = cells.chosen_finetunings()
    for arm in _arms_of(done):
        colour, marker = STYLES[arm]
        _draw_line(axes, done, arm, "test", cells, label=ARMS[arm].title, color=colour, marker=marker)
    for arm in _arms_of(done):
        _mark_not_flat(axes, done, arm, cells)
    if not all(cell["is_flat"] for cell in done):
        axes.plot([], [], label=NOT_FLAT_LABEL, color="#666666", linestyle="none", **HOLLOW, marker="o")


def _mark_not_flat(axes: Any, done: Sequence[Cell], arm: str, cells: Cells) -> None:
    """The means of an arm once more as hollow markers where a fine-tuning was ended by the limit of updates."""
    colour, marker = STYLES[arm]
    for budget, count in label_counts(cells).items():
        part = _select(done, arm, budget)
        if _star(part):
            mean = 100 * statistics.mean(cell["test"] for cell in part)
            axes.plot(count, mean, color=colour, linestyle="none", **HOLLOW, marker=marker)


def _draw_probes(axes: Any, cells: Cells) -> None:
    axes.set_title("frozen features: linear probe (lines), k-NN (dashes)", fontsize=10)
    done = cells.of_kind("probe")
    for arm in _arms_of(done):
        colour, marker = STYLES.get(arm, ("#CC79A7", "x"))
        style = {"color": colour, "marker": marker, "markersize": 5}
        _draw_line(axes, done, arm, "linear", cells, label=encoder_title(arm), **style)
        _draw_line(axes, done, arm, "knn", cells, linestyle="--", alpha=0.7, **style)


def _draw_line(axes: Any, done: Sequence[Cell], arm: str, key: str, cells: Cells, **style: Any) -> None:
    """Mean over seeds, with every seed as a thin dot and the range between them shaded."""
    parts = {count: [c[key] for c in _select(done, arm, budget)] for budget, count in label_counts(cells).items()}
    parts = {count: [100 * value for value in values] for count, values in parts.items() if values}
    counts = list(parts)
    axes.plot(counts, [statistics.mean(values) for values in parts.values()], **style)
    low, high = [min(values) for values in parts.values()], [max(values) for values in parts.values()]
    axes.fill_between(counts, low, high, color=style["color"], alpha=0.12, linewidth=0)
    if max(map(len, parts.values()), default=0) > 1:
        for count, values in parts.items():
            axes.plot([count] * len(values), values, ".", color=style["color"], markersize=3, alpha=0.6)
