"""Pictures of a model and its pretraining: reconstructions, windows and groups, curves. Matplotlib is needed."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .grouping_figure import grouping_figure
from .masked_pictures import masked_images, paste_reconstruction, to_display

# Okabe and Ito's colours, distinct to colour-blind readers; pictures are white-backed, for dark pages too.
_BLUE, _ORANGE, _GREEN, _INK = "#0072B2", "#D55E00", "#009E73", "#222222"


def reconstruction_figure(
    originals: Tensor, masked: Tensor, reconstructions: Tensor, *, triples_per_row: int = 3, title: str = ""
) -> Figure:
    """Triples original | masked | reconstruction, `triples_per_row` of them side by side.

    Args:
        originals, masked, reconstructions: `[N, C, H, W]` in 0 … 1. One channel is drawn in grey, the first three of
            more in colour; of two, the first.
        triples_per_row: at most this many triples beside each other.
        title: one line above the picture.
    """
    count, _, height, width = originals.shape
    per_row = min(triples_per_row, count)
    rows = -(-count // per_row)
    # All lengths in inches: cells touch inside a triple but for a hairline, triples stand apart.
    cell_width, gap, between, margin = 1.05, 0.04, 0.22, 0.12
    cell_height = cell_width * height / width
    top = margin + 0.24 + (0.26 if title else 0.0)
    triple = 3 * cell_width + 2 * gap
    total_width = 2 * margin + per_row * triple + (per_row - 1) * between
    total_height = top + margin + rows * cell_height + (rows - 1) * gap
    figure = Figure(figsize=(total_width, total_height), facecolor="white")
    FigureCanvasAgg(figure)
    for index in range(count):
        row, place = divmod(index, per_row)
        for column, batch in enumerate((originals, masked, reconstructions)):
            left = margin + place * (triple + between) + column * (cell_width + gap)
            bottom = total_height - top - row * (cell_height + gap) - cell_height
            box = (
                left / total_width,
                bottom / total_height,
                cell_width / total_width,
                cell_height / total_height,
            )
            axes = figure.add_axes(box)
            _draw_image(axes, batch[index])
            if row == 0:
                axes.set_title(("original", "masked", "reconstruction")[column], fontsize=9, pad=3, color=_INK)
    if title:
        figure.text(margin / total_width, 1 - margin / total_height, title, fontsize=10, va="top", color=_INK)
    return figure


def loss_figure(
    log: Sequence[dict[str, Any]],
    *,
    mean_prediction_loss: float | None = None,
    validation: Sequence[tuple[float, float | None]] = (),
    validated_on: str = "held-out images",
    probes: Sequence[tuple[float, float, float]] = (),
    title: str = "",
    x: str = "epoch",
) -> Figure:
    """The loss over epochs, as logged and smoothed, above small panels with the probes, if any, and the learning rate.

    Args:
        log: entries with `x`, `loss` and `learning_rate`, oldest first; entries whose loss is None are left out.
        mean_prediction_loss: loss of predicting each unit's mean of the images of `validation`, drawn as a dashed line.
        validation: pairs of `x` and loss on whole images with fixed masks; pairs without a loss are left out.
        validated_on: what these images are.
        probes: `x`, accuracy and its standard error of every k-NN probe on frozen features.
        title: one line above the picture.
        x: what the horizontal axis counts, `"epoch"` or `"step"`.
    """
    entries = [entry for entry in log if entry.get("loss") is not None]
    epochs = [entry[x] for entry in entries]
    losses = [entry["loss"] for entry in entries]
    figure = Figure(figsize=(7.2, 5.8 if probes else 4.4), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    heights = (4, 1.7, 1) if probes else (4, 1)
    upper, *middle, lower = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    upper.plot(epochs, losses, color=_BLUE, alpha=0.35, linewidth=0.8, label="training (random crops), logged")
    upper.plot(epochs, _smoothed(losses), color=_BLUE, linewidth=2, label="training (random crops), smoothed")
    measured = [(place, loss) for place, loss in validation if loss is not None and math.isfinite(loss)]
    if measured:
        upper.plot(*zip(*measured, strict=True), "o", color=_ORANGE, markersize=4, label=f"{validated_on} (whole)")
    if mean_prediction_loss is not None and not math.isfinite(mean_prediction_loss):
        mean_prediction_loss = None
    if mean_prediction_loss is not None:
        text = f"{validated_on}, predicting each unit's mean ({mean_prediction_loss:.3f})"
        upper.axhline(mean_prediction_loss, color=_ORANGE, linestyle="--", linewidth=1.4, label=text)
    _limit_to_most(upper, [*losses, *(loss for _, loss in measured)], mean_prediction_loss)
    upper.set_ylabel("loss")
    # Above the axes, so that neither curve nor reference line runs through it.
    figure.legend(fontsize=8, frameon=False, ncols=2, loc="outside upper left")
    for axes in middle:
        _draw_probes(axes, probes)
    lower.plot(epochs, [entry["learning_rate"] for entry in entries], color=_GREEN, linewidth=1.5)
    lower.set_ylabel("learning\nrate")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("update" if x == "step" else x)
    lower.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2), useMathText=True)
    for axes in (upper, *middle, lower):
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.01)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_INK)
    return figure


def accuracy_figure(
    names: Sequence[str],
    bars: Mapping[str, Sequence[tuple[float, float]]],
    *,
    chance: float | None = None,
    title: str = "",
) -> Figure:
    """Horizontal bars with their values written beside them, the first name on top.

    Args:
        names: of the groups of bars.
        bars: by series, (accuracy, standard error) for each name. At most three series.
        chance: drawn as a dashed line, what the most frequent class alone would score.
        title: one line above the picture.
    """
    height = 0.9 + len(names) * (0.16 + 0.2 * len(bars))
    figure = Figure(figsize=(7.2, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    thickness = 0.8 / len(bars)
    for index, (series, values) in enumerate(bars.items()):
        places = [row + (index - (len(bars) - 1) / 2) * thickness for row in range(len(names))]
        widths, errors = zip(*values, strict=True)
        axes.barh(
            places, widths, 0.92 * thickness, xerr=errors, label=series, color=(_BLUE, _ORANGE, _GREEN)[index],
            error_kw={"ecolor": _INK, "elinewidth": 1, "capsize": 2},
        )  # fmt: skip
        for place, width, error in zip(places, widths, errors, strict=True):
            axes.text(width + error + 0.008, place, f"{width:.3f}", va="center", fontsize=8, color=_INK)
    if chance is not None:
        axes.axvline(chance, color=_INK, linestyle="--", linewidth=1, label="always the most frequent class")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.09)  # room for what is written beside a full bar
    axes.set_xticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.set_xlabel("accuracy")
    axes.spines[["top", "right"]].set_visible(False)
    if len(bars) > 1 or chance is not None:
        figure.legend(fontsize=8, frameon=False, ncols=4, loc="outside lower left")
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_INK)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write a figure as PNG, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.partial")
    try:
        figure.savefig(temporary, format="png", dpi=dpi)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _draw_probes(axes: Axes, probes: Sequence[tuple[float, float, float]]) -> None:
    places, accuracies, errors = zip(*probes, strict=True)
    axes.errorbar(places, accuracies, errors, fmt="o-", color=_ORANGE, markersize=4, linewidth=1.5, capsize=3)
    axes.set_ylabel("accuracy")
    title = "weighted k-NN on frozen features of held-out images, ± standard error"
    axes.set_title(title, fontsize=8, loc="left", color=_INK)


def _draw_image(axes: Axes, image: Tensor) -> None:
    """Draw `[C, H, W]` in 0 … 1 without axes."""
    if image.shape[0] >= 3:
        axes.imshow(image[:3].permute(1, 2, 0).numpy(), interpolation="nearest", aspect="auto")
    else:
        axes.imshow(image[0].numpy(), cmap="gray", vmin=0, vmax=1, interpolation="nearest", aspect="auto")
    axes.axis("off")


def _smoothed(values: Sequence[float], share: float = 0.03) -> list[float]:
    """Centred running mean over `share` of the curve; the window shrinks towards both ends."""
    reach = max(1, round(len(values) * share))
    sums = [0.0, *accumulate(values)]
    averages = []
    for index in range(len(values)):
        half = min(reach, index, len(values) - 1 - index)
        averages.append((sums[index + half + 1] - sums[index - half]) / (2 * half + 1))
    return averages


def _limit_to_most(axes: Axes, values: Sequence[float], reference: float | None) -> None:
    """Limit the y axis so that a few losses of the first steps do not flatten the rest of the curve."""
    if values:
        shown = sorted(values)[: max(1, round(0.99 * len(values)))]
        shown += [] if reference is None else [reference]
        margin = 0.06 * (max(shown) - min(shown)) or 0.05 * abs(shown[0]) or 1.0
        axes.set_ylim(min(shown) - margin, max(shown) + margin)


__all__ = [
    "accuracy_figure",
    "grouping_figure",
    "loss_figure",
    "masked_images",
    "paste_reconstruction",
    "reconstruction_figure",
    "save_figure",
    "to_display",
]
