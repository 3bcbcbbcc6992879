"""Pictures of a fine-tuning run: its curves, and images with what was predicted for them. Needs Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from .visualization import _BLUE, _GREEN, _INK, _ORANGE, _draw_image


def finetuning_figure(log: Sequence[dict[str, Any]], *, best_epoch: float | None = None, title: str = "") -> Figure:
    """Loss and accuracy over epochs, in two panels above each other.

    Args:
        log: `log_history` of a `Trainer` with `top_k_accuracy` metrics.
        best_epoch: marked as the model that is kept.
        title: one line above the picture.
    """
    training = [(entry["epoch"], entry["loss"]) for entry in log if "loss" in entry]
    measured = [entry for entry in log if "eval_loss" in entry]
    figure = Figure(figsize=(7.2, 5.2), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = [entry["epoch"] for entry in measured]
    if training:
        upper.plot(*zip(*training, strict=True), color=_BLUE, linewidth=1.2, label="training (augmented, its targets)")
    if measured:
        losses = [entry["eval_loss"] for entry in measured]
        upper.plot(epochs, losses, "o-", color=_ORANGE, markersize=4, label="validation (plain)")
        for name, color, style in (("top_1", _ORANGE, "o-"), ("top_5", _GREEN, "s--")):
            values = [100 * entry[f"eval_{name}_accuracy"] for entry in measured if f"eval_{name}_accuracy" in entry]
            if values:
                label = f"validation, {name.replace('_', '-')}"
                lower.plot(epochs, values, style, color=color, markersize=4, label=label)
    if best_epoch is not None:
        for axes in (upper, lower):
            axes.axvline(best_epoch, color=_INK, linewidth=0.9, linestyle=":", label="the model that is kept")
    upper.set_ylabel("cross entropy")
    lower.set_ylabel("accuracy, %")
    lower.set_xlabel("epoch")
    for axes in (upper, lower):
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_INK)
    return figure


def prediction_figure(
    images: Tensor,
    predicted: Sequence[str],
    true: Sequence[str],
    scores: Sequence[float],
    *,
    per_row: int = 6,
    title: str = "",
) -> Figure:
    """Images in a grid, each above what was predicted for it; a wrong one also says what it is.

    Args:
        images: `[N, C, H, W]` in 0 … 1.
        predicted, true: names of the classes.
        scores: probability of each predicted class, in 0 … 1.
        per_row: images beside each other.
        title: one line above the picture.
    """
    per_row = min(per_row, len(images))
    rows = -(-len(images) // per_row)
    figure = Figure(figsize=(1.5 * per_row, 1.95 * rows + 0.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, per_row, squeeze=False)
    for axes in grid.flat[len(images) :]:
        axes.axis("off")
    for axes, image, guess, name, score in zip(grid.flat, images, predicted, true, scores, strict=False):
        _draw_image(axes, image)
        axes.axis("on")  # for the line below, without ticks and frame
        axes.set(xticks=[], yticks=[], aspect="equal")
        axes.spines[:].set_visible(False)
        right = guess == name
        text = f"{_short(guess)} {score:.0%}" if right else f"✗ {_short(guess)} {score:.0%}\nis {_short(name)}"
        axes.set_xlabel(text, fontsize=8, labelpad=3, color=_INK if right else _ORANGE)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_INK)
    return figure


def _short(name: str, limit: int = 18) -> str:
    name = name.split(",")[0]  # synonyms
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


__all__ = ["finetuning_figure", "prediction_figure"]
