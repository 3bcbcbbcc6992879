"""Pictures of a detector's training: what it finds beside what is there, its losses and its precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from torch import Tensor

from .coco_data import CocoImages
from .detection_metrics import Detections

# Okabe and Ito's colours, distinct to colour-blind readers; classes beyond them start over, their names tell.
_CLASS_COLORS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#CC79A7", "#D55E00", "#0072B2")
_BLUE, _ORANGE, _GREEN, _INK = "#0072B2", "#D55E00", "#009E73", "#222222"


def detection_figure(
    images: CocoImages, found: Sequence[Detections], *, score_threshold: float = 0.5, pairs_per_row: int = 2
) -> Figure:
    """Pairs annotated | detected: boxes, masks and class names, of detections also the scores.

    Args:
        images: the data set.
        found: detections on the images to draw.
        score_threshold: least score of a detection that is drawn.
        pairs_per_row: at most this many pairs beside each other.
    """
    per_row = min(pairs_per_row, len(found))
    rows = -(-len(found) // per_row)
    figure = Figure(figsize=(5.2 * per_row, 2.35 * rows + 0.3), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, 2 * per_row, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for place, detections in enumerate(found):
        row, column = divmod(place, per_row)
        pair = grid[row, 2 * column : 2 * column + 2]
        if row == 0:
            pair[0].set_title("annotated", fontsize=9, color=_INK)
            pair[1].set_title(f"detected (score ≥ {score_threshold:g})", fontsize=9, color=_INK)
        _draw_pair(pair, images, detections, score_threshold)
    return figure


def _draw_pair(pair: Any, images: CocoImages, detections: Detections, score_threshold: float) -> None:
    sample = images[detections.index]
    target, picture, names = sample["target"], sample["image"], images.data.class_names
    texts = [names[label - 1] for label in target["labels"].tolist()]
    _draw_objects(pair[0], picture, target["boxes"], target["labels"], target["masks"].bool(), texts)
    kept = detections.scores >= score_threshold
    masks = detections.dense_masks(picture.shape[1], picture.shape[2])[kept]
    labels, scores = detections.labels[kept], detections.scores[kept].tolist()
    texts = [f"{names[label - 1]} {score:.2f}" for label, score in zip(labels.tolist(), scores, strict=True)]
    _draw_objects(pair[1], picture, detections.boxes[kept], labels, masks, texts)


def _draw_objects(
    axes: Axes, picture: Tensor, boxes: Tensor, labels: Tensor, masks: Tensor, texts: Sequence[str]
) -> None:
    """One picture [C, H, W] in 0 … 1, in pale greys, with objects in the colours of their classes."""
    height, width = picture.shape[1:]
    canvas = (0.3 + 0.6 * picture[:3].mean(0)).expand(3, -1, -1).clone()
    colors = [_CLASS_COLORS[(label - 1) % len(_CLASS_COLORS)] for label in labels.tolist()]
    for mask, color in zip(masks, colors, strict=True):
        paint = torch.tensor([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])[:, None]
        canvas[:, mask] = 0.4 * canvas[:, mask] + 0.6 * paint
    axes.imshow(canvas.permute(1, 2, 0).numpy(), interpolation="nearest")
    places: list[tuple[float, float]] = []
    for (left, top, right, bottom), color, text in zip(boxes.tolist(), colors, texts, strict=True):
        box = Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, edgecolor=color, linewidth=1.6)
        axes.add_patch(box)
        places.append(_label_place((left, top, bottom), places, height, width))
        label = axes.text(*places[-1], text, fontsize=7, color="white", va="center", clip_on=True)
        label.set_path_effects([withStroke(linewidth=1.8, foreground=_INK)])
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _label_place(
    box: tuple[float, float, float], taken: Sequence[tuple[float, float]], height: int, width: int
) -> tuple[float, float]:
    """Where the name of a box (left, top, bottom) goes: above it, below, or inside, the first that is free."""
    left, top, bottom = box
    line = 0.07 * height
    x = max(0.0, min(left, 0.68 * width))
    wanted = (top - line / 2, bottom + line / 2, top + line / 2, bottom - line / 2)
    tries = [y for y in wanted if line / 2 <= y <= height - line / 2] or [height / 2]
    free = [y for y in tries if all(abs(y - other) > line or abs(x - at) > 0.3 * width for at, other in taken)]
    return x, (free or tries)[0]


def training_figure(log: Sequence[dict[str, Any]], title: str = "") -> Figure:
    """The losses above, the mean average precision on held-out images below, over epochs.

    Args:
        log: entries with `epoch` and either `loss` and its parts (`loss_…`) or `box_map` and `mask_map`.
        title: one line above the picture.
    """
    losses = [entry for entry in log if entry.get("loss") is not None]
    measured = [entry for entry in log if entry.get("box_map") is not None]
    figure = Figure(figsize=(7.2, 5.0), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, 1, sharex=True)
    epochs = [entry["epoch"] for entry in losses]
    upper.plot(epochs, [entry["loss"] for entry in losses], color=_INK, linewidth=1.8, label="all losses")
    parts = {"loss_mask": _GREEN, "loss_classifier": _BLUE, "loss_box_reg": _ORANGE}
    for (name, color), style in zip(parts.items(), ("-", "--", ":"), strict=True):
        values = [entry.get(name) if entry.get(name) is not None else math.nan for entry in losses]
        upper.plot(
            epochs, values, style, color=color, linewidth=1.3, label=name.removeprefix("loss_").replace("_", " ")
        )
    upper.set_ylabel("training loss")
    upper.set_ylim(bottom=0)
    upper.legend(fontsize=8, frameon=False, ncols=4)
    for name, color, marker in (("box_map", _BLUE, "o"), ("mask_map", _ORANGE, "s")):
        points = [(entry["epoch"], entry[name]) for entry in measured]
        label = f"{name.removesuffix('_map')}es" if name == "box_map" else "masks"
        lower.plot(*(zip(*points, strict=True) if points else ((), ())), f"-{marker}", color=color, ms=4, label=label)
    lower.set_ylabel("mAP, held-out images")
    lower.set_ylim(0, 1)
    lower.set_xlabel("epoch")
    lower.legend(fontsize=8, frameon=False)
    for axes in (upper, lower):
        axes.grid(True, color="#DDDDDD", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=10, x=0.01, ha="left", color=_INK)
    return figure


__all__ = ["detection_figure", "training_figure"]
