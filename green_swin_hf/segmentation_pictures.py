"""Pictures of a segmentation run: predictions beside the truth, and its curve. Matplotlib is needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from .segmentation_data import IGNORED_LABEL

# Okabe and Ito's colours, distinct to colour-blind readers; the first class, often the background, is light grey.
_FEW_COLORS = ("#D9D9D9", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_BLUE, _ORANGE, _INK, _IGNORED = "#0072B2", "#D55E00", "#222222", "#000000"
_COLUMNS = ("image", "truth", "prediction")
_LEGEND_ENTRIES = 24


def class_colors(num_classes: int) -> Tensor:
    """[num_classes, 3] colours in 0 … 1; more than eight classes take steps of a map of growing lightness."""
    if num_classes <= len(_FEW_COLORS):
        return torch.tensor([to_rgb(color) for color in _FEW_COLORS[:num_classes]])
    steps = torch.arange(num_classes) * 0.618034 % 1  # neighbouring numbers far apart
    return torch.tensor(colormaps["viridis"](steps.numpy())[:, :3], dtype=torch.float32)


def paint_labels(labels: Tensor, colors: Tensor) -> Tensor:
    """[H, W, 3] in 0 … 1: every pixel in the colour of its class, black where it has none."""
    table = torch.zeros(IGNORED_LABEL + 1, 3)
    table[: len(colors)] = colors
    return table[labels.long()]


def prediction_figure(
    triples: Sequence[tuple[Tensor, Tensor, Tensor]],
    class_names: Sequence[str],
    *,
    per_row: int = 2,
    title: str = "",
) -> Figure:
    """Rows of image | truth | prediction, and a legend of the classes that occur (the most frequent ones of many).

    Args:
        triples: image [3, H, W] uint8, truth and prediction [H, W] of class numbers, of any sizes; 255 in a truth is
            black.
        class_names: of all classes.
        per_row: triples beside each other.
        title: one line above.
    """
    per_row = min(per_row, len(triples))
    rows = -(-len(triples) // per_row)
    figure = Figure(figsize=(4.9 * per_row, 1.62 * rows + 0.75), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    widths = ([1.0] * len(_COLUMNS) + [0.1]) * per_row  # triples stand apart
    grid = figure.subplots(rows, len(widths) - 1, squeeze=False, width_ratios=widths[:-1])
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")  # titles in one line above pictures of any shape
    colors = class_colors(len(class_names))
    for index, (image, truth, predicted) in enumerate(triples):
        row, place = divmod(index, per_row)
        panels = (image.permute(1, 2, 0), paint_labels(truth, colors), paint_labels(predicted, colors))
        for axes, panel, name in zip(grid[row, 4 * place : 4 * place + 3], panels, _COLUMNS, strict=True):
            axes.imshow(panel.numpy(), interpolation="nearest")
            if row == 0:
                axes.set_title(name, fontsize=10, color=_INK)
    handles = _legend([label for _, *pair in triples for label in pair], class_names, colors)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), fontsize=9, frameon=False)
    if title:
        figure.suptitle(title, fontsize=11, color=_INK)
    return figure


def _legend(labels: Sequence[Tensor], class_names: Sequence[str], colors: Tensor) -> list[Patch]:
    counts = sum(label.long().flatten().bincount(minlength=IGNORED_LABEL + 1) for label in labels)
    assert isinstance(counts, Tensor)
    most = [number for number in counts[: len(class_names)].argsort(descending=True).tolist() if counts[number]]
    shown = sorted(most[:_LEGEND_ENTRIES])
    handles = [Patch(facecolor=tuple(colors[n].tolist()), edgecolor="#888888", label=class_names[n]) for n in shown]
    if counts[IGNORED_LABEL]:
        handles.append(Patch(facecolor=_IGNORED, edgecolor="#888888", label="no class"))
    return handles


def segmentation_curve(log: Sequence[dict[str, Any]], *, baseline: float | None = None) -> Figure:
    """Training loss above mean IoU on the validation images, over the updates.

    Args:
        log: `Trainer`'s entries with `step` and `loss` or `eval_mean_iou`.
        baseline: mean IoU of predicting the commonest class everywhere, as a dashed line.
    """
    figure = Figure(figsize=(7.2, 4.6), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    losses = [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]
    scores = [(entry["step"], entry["eval_mean_iou"]) for entry in log if "eval_mean_iou" in entry]
    if losses:
        upper.plot(*zip(*losses, strict=True), color=_BLUE, linewidth=1.5)
    if scores:
        lower.plot(*zip(*scores, strict=True), "o-", color=_ORANGE, linewidth=1.5, markersize=4, label="whole images")
    if baseline is not None:
        lower.axhline(baseline, color=_INK, linestyle="--", linewidth=1.2, label=f"commonest class ({baseline:.3f})")
    upper.set_ylabel("training loss (crops)")
    lower.set_ylabel("validation mean IoU")
    lower.set_xlabel("update")
    upper.set_ylim(bottom=0)
    lower.set_ylim(0, 1)
    if scores or baseline is not None:
        lower.legend(fontsize=8, frameon=False, loc="lower right")
    for axes in (upper, lower):
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.02)
    return figure


__all__ = ["class_colors", "paint_labels", "prediction_figure", "segmentation_curve"]
