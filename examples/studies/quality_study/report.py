"""Tables, differences and pictures of the quality studies, made from their cells."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evidence_study.cells import Cell, Cells
from evidence_study.report import markdown_table, percent
from scipy.stats import t as student_t

from .settings import PIXELS, SCRATCH, Study

# Measure: (kind of cell, title). All are shares of the test images.
MEASURES = {
    "knn": ("probe", "k-NN"),
    "linear": ("probe", "linear probe"),
    "test": ("finetune", "fine-tuned"),
}
BASELINES = {PIXELS: "raw pixels", SCRATCH: "random weights"}
SEEDS_FOR_AN_INTERVAL = 3
NARROWEST_AXIS = 4.0  # points; less would make noise look like a finding
# Okabe and Ito, told apart by any eye, and markers for who sees no colour; a seed each.
SEED_STYLES = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"))


def by_seed(cells: Cells, name: str, measure: str) -> dict[int, float]:
    """A measure of a setting for each seed that has it."""
    kind, _ = MEASURES[measure]
    found = {cell["seed"]: cell[measure] for cell in cells.of_kind(kind) if cell["arm"] == name}
    return dict(sorted(found.items()))


def difference(cells: Cells, name: str, reference: str, measure: str) -> dict[str, Any] | None:
    """Points of accuracy of one setting above another with the same seed; None where no seed has both.

    Returns:
        `points` of each seed, their `mean`, and with three seeds or more the 95 % `interval` of the mean (Student's
        t; over seeds, for this test set).
    """
    mine, theirs = by_seed(cells, name, measure), by_seed(cells, reference, measure)
    points = [100 * (mine[seed] - theirs[seed]) for seed in mine if seed in theirs]
    if not points:
        return None
    found: dict[str, Any] = {"points": [round(value, 2) for value in points], "mean": statistics.mean(points)}
    if len(points) >= SEEDS_FOR_AN_INTERVAL:
        half = student_t.ppf(0.975, len(points) - 1) * statistics.stdev(points) / math.sqrt(len(points))
        found["interval"] = [round(found["mean"] - half, 2), round(found["mean"] + half, 2)]
    found["mean"] = round(found["mean"], 2)
    return found


def excludes_zero(found: dict[str, Any]) -> bool:
    low, high = found.get("interval", (0, 0))
    return low > 0 or high < 0


def said(found: dict[str, Any] | None) -> str:
    """A difference as a table shows it; bold where the interval excludes zero.

    >>> said({"points": [-1.0, -1.2, -1.1], "mean": -1.1, "interval": [-1.35, -0.85]})
    '**-1.1** (-1.0, -1.2, -1.1) [-1.4, -0.8]'
    """
    if found is None:
        return "-"
    each = ", ".join(f"{value:+.1f}" for value in found["points"])
    mean = f"**{found['mean']:+.1f}**" if excludes_zero(found) else f"{found['mean']:+.1f}"
    low_high = " [{:+.1f}, {:+.1f}]".format(*found["interval"]) if "interval" in found else ""
    return f"{mean} ({each}){low_high}"


def differences(cells: Cells, study: Study) -> list[dict[str, Any]]:
    """Every comparison of a study, for each measure that has cells."""
    return [
        {"setting": name, "against": reference, "measure": measure, **found}
        for name, reference in study.comparisons()
        for measure in MEASURES
        if (found := difference(cells, name, reference, measure))
    ]


def table(cells: Cells, study: Study) -> str:
    """Accuracies of a study's settings and what they cost, then their differences: Markdown."""
    rows = [_row(cells, name, label) for name, label in {**BASELINES, **study.labels}.items()]
    costs = ["decoder, parameters", "pretraining, minutes of computing", "last loss"]
    accuracies = markdown_table(["setting", *_titles(cells), *costs], rows)
    found = [
        [
            f"{study.labels[name]}, against: {study.labels[reference]}",
            *(said(difference(cells, name, reference, measure)) for measure in MEASURES),
        ]
        for name, reference in study.comparisons()
    ]
    return f"## {study.title}\n\n{accuracies}\n\n{markdown_table(['points above', *_titles(cells)], found)}\n"


def _titles(cells: Cells) -> list[str]:
    titles = []
    for kind, title in MEASURES.values():
        counts = sorted({cell["labels"] for cell in cells.of_kind(kind)})
        titles.append(f"{title}, {counts[0]:,} labels" if counts else title)
    return titles


def _row(cells: Cells, name: str, label: str) -> list[str]:
    trained = [cell for cell in cells.of_kind("pretraining") if cell["arm"] == name]
    costs = ["-"] * 3
    if trained:
        minutes = statistics.mean(cell["cpu_seconds"] for cell in trained) / 60
        loss = statistics.mean(cell["losses"][-1] for cell in trained)
        costs = [f"{trained[0]['parameters']['decoder']:,}", f"{minutes:.1f}", f"{loss:.3f}"]
    return [label, *(percent(list(by_seed(cells, name, measure).values())) for measure in MEASURES), *costs]


def tables(cells: Cells, studies: Sequence[Study], heading: str) -> str:
    """All studies as Markdown, with what the numbers mean."""
    note = (
        "Test accuracy in %, mean ± standard deviation over seeds. Differences in points with the same seed: mean "
        f"(each seed), and from {SEEDS_FOR_AN_INTERVAL} seeds on [95 % interval of the mean over seeds]; bold where "
        "it excludes zero. Of many comparisons about one in twenty is bold by chance. Losses compare only where mask "
        "ratio and unit are the same."
    )
    return "\n".join([f"# Quality under a fixed budget\n\n{heading}\n\n{note}\n", *(table(cells, s) for s in studies)])


def draw(cells: Cells, study: Study, path: Path, heading: str) -> None:
    """Accuracy of each setting, a panel for each measure: every seed as a marker, their mean as a bar."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from green_swin_hf.visualization import save_figure

    figure = Figure(figsize=(11, 1.9 + 0.42 * len(study.labels)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{study.title}\n{heading}", fontsize=10)
    seeds = sorted({cell["seed"] for cell in cells.of_kind("probe") if cell["arm"] in study.labels})
    row = figure.subplots(1, len(MEASURES), sharey=True)
    for axes, measure, title in zip(row, MEASURES, _titles(cells), strict=True):
        _draw_measure(axes, cells, study, measure, seeds)
        axes.set_title(title + _baselines(cells, measure), fontsize=9)
        axes.set_xlabel("test accuracy, %")
        low, high = axes.get_xlim()
        room = max(0.0, NARROWEST_AXIS - (high - low)) / 2
        axes.set_xlim(low - room, high + room)
        axes.grid(axis="x", alpha=0.3)
    row[0].set_yticks(range(len(study.labels)), study.labels.values())
    row[0].set_ylim(len(study.labels) - 0.4, -0.6)  # the first on top
    handles, labels = row[0].get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
    save_figure(figure, path)


def _draw_measure(axes: Any, cells: Cells, study: Study, measure: str, seeds: Sequence[int]) -> None:
    for place, name in enumerate(study.labels):
        values = {seed: 100 * value for seed, value in by_seed(cells, name, measure).items()}
        if not values:
            continue
        mean = statistics.mean(values.values())
        axes.plot([mean, mean], [place - 0.32, place + 0.32], color="black", linewidth=2, label="mean")
        for order, seed in enumerate(seeds):
            if seed in values:
                colour, marker = SEED_STYLES[order % len(SEED_STYLES)]
                height = place + 0.16 * (order - (len(seeds) - 1) / 2)
                style = {"color": colour, "marker": marker, "markersize": 5, "linestyle": "none"}
                axes.plot(values[seed], height, label=f"seed {seed}", **style)


def _baselines(cells: Cells, measure: str) -> str:
    means = {
        title: 100 * statistics.mean(values)
        for name, title in BASELINES.items()
        if (values := by_seed(cells, name, measure).values())
    }
    return "".join(f"\n{title} {mean:.1f} %" for title, mean in means.items())


def one_line(cell: Cell) -> str:
    """A new cell as the terminal shows it."""
    measured = [f"{title} {100 * cell[key]:.1f} %" for key, (_, title) in MEASURES.items() if key in cell]
    loss = [f"loss {cell['losses'][-1]:.3f}"] if "losses" in cell else []
    seconds = [f"{cell['cpu_seconds']:.0f} s of computing"] if "cpu_seconds" in cell else []
    return f"  {cell['kind']:<12} {cell['arm']:<17} seed {cell['seed']}  {', '.join([*measured, *loss, *seconds])}"
