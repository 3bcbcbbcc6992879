"""A picture of what grouping does: windows and groups over an image, and how uneven windows fill equal groups.

Everything drawn is read from a plan as the model uses it; nothing is grouped here. Matplotlib is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from .masked_pictures import masked_images
from .sparse_plan import SparsePlan, StageGeometry
from .window_grouping import attention_cost

# Okabe and Ito's colours, distinct to colour-blind readers. More groups repeat them; their numbers tell them apart.
_GROUP_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_INK, _FAINT = "#222222", "#666666"
_MASKED = 0.88  # brightness
_TINT = 0.45  # share of a group's colour over what is visible

# Lengths in inches; the picture is meant to be shown about 900 pixels wide.
_WIDTH, _MARGIN, _TOP, _BOTTOM = 9.4, 0.12, 0.62, 0.8
_PHOTO, _BARS, _GAP = 3.7, 2.1, 0.36
_BARS_LEFT = (_MARGIN + _PHOTO + _GAP, _WIDTH - _MARGIN - _BARS)
_THICKEST_BAR, _LEAST_HEIGHT, _SMALLEST_LABELLED = 0.23, 2.3, 0.105


@dataclass(frozen=True)
class PartitionGroups:
    """Where the visible tokens of one image are in one window partition of one stage, in the order of the slots.

    Attributes:
        stage: sizes of the stage.
        shift: tokens by which the windows are shifted, 0 in the regular partition.
        rows, columns, window, group: [T] int64, of each visible token.
        group_size: slots of a group.
    """

    stage: StageGeometry
    shift: int
    rows: Tensor
    columns: Tensor
    window: Tensor
    group: Tensor
    group_size: int

    @property
    def num_groups(self) -> int:
        return int(self.group.max()) + 1

    @property
    def num_windows(self) -> int:
        """Windows that hold a visible token."""
        return len(self.window.unique())

    @property
    def window_area(self) -> int:
        """Slots of a window that is padded to its full size."""
        return self.stage.window_size**2

    @property
    def group_windows(self) -> list[dict[int, int]]:
        """For each group the number of tokens by window."""
        groups: list[dict[int, int]] = [{} for _ in range(self.num_groups)]
        for group, window in zip(self.group.tolist(), self.window.tolist(), strict=True):
            groups[group][window] = groups[group].get(window, 0) + 1
        return groups

    @property
    def padding_shares(self) -> tuple[float, float]:
        """Share of the slots that hold no token: of windows padded one by one, and of the groups."""
        padded, grouped = self.num_windows * self.window_area, self.num_groups * self.group_size
        return 1 - len(self.window) / padded, 1 - len(self.window) / grouped

    @property
    def relative_cost(self) -> float:
        """Ω of the groups by Ω of windows padded one by one."""
        padded = attention_cost(self.num_windows, self.window_area, self.stage.channels)
        return attention_cost(self.num_groups, self.group_size, self.stage.channels) / padded


def read_groups(plan: SparsePlan, stage: int, shifted: bool = False) -> PartitionGroups:
    """What `plan` does with the windows of one stage.

    Args:
        plan: of one image, or of a batch that shares its mask.
        stage: 1 for the first one.
        shifted: the windows of every second block; those of the others where the stage has no shift.

    Raises:
        ValueError: no such stage, or the plan packs windows of several images together.
    """
    if not plan.is_shared:
        raise ValueError(
            f"plan holds masks of {len(plan.visible_counts)} images, whose windows share groups; "
            "build one with the mask of one image: build_sparse_plan(masks[:1], geometry)"
        )
    if not 1 <= stage <= len(plan.stages):
        raise ValueError(f"stage {stage} must be 1 to {len(plan.stages)}, the stages of the plan")
    geometry, stage_plan = plan.geometry.stages[stage - 1], plan.stages[stage - 1]
    grouping = stage_plan.shifted if shifted else stage_plan.regular
    slot = grouping.scatter_index  # none where the groups hold the tokens as they stand
    slots, order = (torch.arange(len(stage_plan.position)) if slot is None else slot).sort()
    position = stage_plan.position[order]
    return PartitionGroups(
        stage=geometry,
        shift=geometry.shift_size if shifted else 0,
        rows=position // stage_plan.grid_size[1],
        columns=position % stage_plan.grid_size[1],
        window=grouping.slot_window.flatten()[slots].long(),
        group=slots // grouping.group_size,
        group_size=grouping.group_size,
    )


def grouping_figure(image: Tensor, plan: SparsePlan, *, stage: int = 1, shifted: bool = False) -> Figure:
    """Windows and groups over an image, beside the same windows padded one by one and packed, and what that saves.

    A window carries the number and the colour of its group; a bar is what attention computes at once, a segment of it
    one window with its number of tokens.

    Args:
        image: [C, H, W] in 0 … 1, of as many mask units as the plan. One channel is drawn in grey.
        plan: of this image, or of a batch that shares its mask.
        stage: 1 for the first one.
        shifted: the windows of every second block; those of the others where the stage has no shift.

    Raises:
        ValueError: the image does not fit the plan, no such stage, or the plan packs windows of several images.
    """
    groups = read_groups(plan, stage, shifted)
    shown = _masked_image(image, plan)
    scale = _PHOTO / max(shown.shape[:2])
    photo_height, photo_width = shown.shape[0] * scale, shown.shape[1] * scale
    middle = max(photo_height, _LEAST_HEIGHT)
    height = _TOP + middle + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), facecolor="white")
    FigureCanvasAgg(figure)

    def add_panel(left: float, width: float, panel_height: float) -> Axes:
        """Axes whose top is that of the middle part."""
        bottom = _BOTTOM + middle - panel_height
        return figure.add_axes((left / _WIDTH, bottom / height, width / _WIDTH, panel_height / height))

    photo = add_panel(_MARGIN + (_PHOTO - photo_width) / 2, photo_width, photo_height)
    _draw_photo(photo, shown, groups, photo_width)
    packed = [(group, list(windows.values())) for group, windows in enumerate(groups.group_windows)]
    alone = sorted(((group, [tokens]) for group, counts in packed for tokens in counts), key=lambda bar: -bar[1][0])
    most_slots = max(groups.window_area, groups.group_size)
    for left, bars, slots in zip(_BARS_LEFT, (alone, packed), (groups.window_area, groups.group_size), strict=True):
        _draw_bars(add_panel(left, _BARS, middle), bars, slots, most_slots, middle)
    _write_titles(figure, groups, stage, height)
    _write_numbers(figure, groups, height)
    return figure


def _masked_image(image: Tensor, plan: SparsePlan) -> Tensor:
    """[H, W, 3] with masked units in light grey."""
    rows, columns = plan.geometry.unit_grid_size
    unit = image.shape[-1] // columns if image.ndim == 3 else 0
    if unit < 1 or image.shape[1:] != (rows * unit, columns * unit):
        raise ValueError(
            f"image has shape {tuple(image.shape)}; it must be [C, H, W] of {rows}x{columns} square mask units, "
            "as the plan is"
        )
    shown = masked_images(image[None].float(), plan.bool_masked_pos, unit, fill=_MASKED)[0]
    colored = shown[:3] if len(shown) >= 3 else shown[:1].expand(3, -1, -1)
    return colored.permute(1, 2, 0).clamp(0, 1)


def _draw_photo(axes: Axes, shown: Tensor, groups: PartitionGroups, width: float) -> None:
    """The image in coordinates of tokens, each visible one tinted, with the borders of the windows."""
    rows, columns = groups.stage.grid_size
    extent = (0, columns, rows, 0)
    axes.imshow(shown.numpy(), extent=extent, interpolation="nearest", aspect="auto")
    tint = torch.zeros(rows, columns, 4)
    colors = torch.tensor([to_rgb(_color(group)) for group in range(groups.num_groups)])
    tint[groups.rows, groups.columns, :3] = colors[groups.group]
    tint[groups.rows, groups.columns, 3] = _TINT
    axes.imshow(tint.numpy(), extent=extent, interpolation="nearest", aspect="auto")
    window = groups.stage.window_size
    for color, line in (("white", 2.8), (_INK, 1.0)):
        axes.hlines(range(groups.shift or window, rows, window), 0, columns, colors=color, linewidths=line)
        axes.vlines(range(groups.shift or window, columns, window), 0, rows, colors=color, linewidths=line)
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    if window * width / columns > 2.2 * _SMALLEST_LABELLED:
        _number_windows(axes, groups, window * width / columns)


def _number_windows(axes: Axes, groups: PartitionGroups, width: float) -> None:
    """The number of its group on each window, at the visible token next to their middle."""
    box = {"boxstyle": "circle,pad=0.2", "facecolor": "white", "edgecolor": _INK, "linewidth": 0.7}
    for window in groups.window.unique():
        own = groups.window == window
        places = torch.stack([groups.columns[own], groups.rows[own]], dim=1) + 0.5
        column, row = places[(places - places.mean(dim=0)).square().sum(dim=1).argmin()].tolist()
        number = int(groups.group[own][0]) + 1
        axes.text(
            column, row, str(number), fontsize=min(8.5, 14 * width), ha="center", va="center", color=_INK, bbox=box
        )


def _draw_bars(axes: Axes, bars: list[tuple[int, list[int]]], slots: int, most_slots: int, height: float) -> None:
    """A bar of `slots` for each (group, tokens of its windows); what they leave free is hatched."""
    thickness = min(_THICKEST_BAR, height / len(bars))
    has_text = thickness > _SMALLEST_LABELLED
    text: dict[str, Any] = {"fontsize": min(8.0, 48 * thickness), "va": "center", "color": _INK}
    border = min(1.0, 5 * thickness)
    for row, (group, counts) in enumerate(bars):
        start = 0
        for tokens in counts:
            axes.add_patch(_slots(start, row, tokens, facecolor=_lightened(group), edgecolor="white", linewidth=border))
            if has_text and tokens * _BARS / most_slots > 0.085 * len(str(tokens)):
                axes.text(start + tokens / 2, row + 0.53, str(tokens), ha="center", **text)
            start += tokens
        free = _slots(start, row, slots - start, facecolor="#F4F4F4", edgecolor="#BBBBBB", linewidth=0, hatch="//////")
        axes.add_patch(free)
        if has_text:
            axes.text(-0.03 * most_slots, row + 0.53, str(group + 1), ha="right", **text)
    axes.set(xlim=(0, most_slots), ylim=(height / thickness, 0))
    axes.axis("off")


def _slots(start: int, row: int, count: int, **style: Any) -> Rectangle:
    return Rectangle((start, row + 0.07), count, 0.86, **style)


def _write_titles(figure: Figure, groups: PartitionGroups, stage: int, height: float) -> None:
    side = groups.stage.window_size
    windows = f"Stage {stage}: windows of {side}×{side} tokens"
    titles = (
        (
            _MARGIN,
            windows + (", shifted" if groups.shift else ""),
            "masked units in grey; number and colour: the group",
        ),
        (_BARS_LEFT[0], "Without grouping", f"every window padded to {groups.window_area} slots"),
        (_BARS_LEFT[1], "With grouping", f"whole windows fill groups of {groups.group_size}"),
    )
    for left, title, explanation in titles:
        figure.text(left / _WIDTH, 1 - 0.1 / height, title, fontsize=10.5, weight="bold", va="top", color=_INK)
        figure.text(left / _WIDTH, 1 - 0.33 / height, explanation, fontsize=9, va="top", color=_FAINT)


def _write_numbers(figure: Figure, groups: PartitionGroups, height: float) -> None:
    """What grouping saves, as large figures with a few words each."""
    rows, columns = groups.stage.grid_size
    padded, grouped = groups.padding_shares
    numbers = (
        (0.0, f"{len(groups.window)} of {rows * columns}", "tokens are visible"),
        (0.21, f"{groups.num_windows}", "windows hold some"),
        (0.37, f"{groups.num_groups} × {groups.group_size}", "groups × slots"),
        (0.54, f"{padded:.0%} → {grouped:.0%}", "padding"),
        (0.75, f"{groups.relative_cost:.2f} ×", "attention cost without grouping"),
    )
    for share, number, words in numbers:
        left = (_MARGIN + share * (_WIDTH - 2 * _MARGIN)) / _WIDTH
        figure.text(left, 0.36 / height, number, fontsize=15, weight="bold", va="bottom", color=_GROUP_COLORS[0])
        figure.text(left, 0.3 / height, words, fontsize=9, va="top", color=_FAINT)


def _color(group: int) -> str:
    return _GROUP_COLORS[group % len(_GROUP_COLORS)]


def _lightened(group: int) -> tuple[float, ...]:
    """Its colour, light enough for dark text and near what the tint makes of an image."""
    return tuple(0.6 * value + 0.4 for value in to_rgb(_color(group)))


__all__ = ["PartitionGroups", "grouping_figure", "read_groups"]
