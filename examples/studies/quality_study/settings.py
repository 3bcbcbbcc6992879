"""Ways to pretrain, each by what it changes, and the studies that compare them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from green_swin_hf import GreenSwinConfig, sample_masks

DEFAULT = "default"
SCRATCH, PIXELS = "scratch", "pixels"


@dataclass(frozen=True)
class Setting:
    """One way to pretrain.

    Attributes:
        changes: keys of the recipe with other values.
        shares_mask: one random mask for a batch, not one for each image.
        units_per_side: what is masked or visible as one, in mask units of the model to each side.
        published_placement: latents go where the published decoder puts them, see `placement`.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    shares_mask: bool = False
    units_per_side: int = 1
    published_placement: bool = False

    def draw_masks(self, config: GreenSwinConfig, count: int, generator: torch.Generator) -> Tensor:
        """Masks [count, units] bool of a batch, True = masked.

        Raises:
            ValueError: the grid of mask units cannot be divided into squares of `units_per_side`.
        """
        side = self.units_per_side
        if any(length % side for length in config.mask_grid_size):
            raise ValueError(f"units_per_side {side} must divide the {config.mask_grid_size} mask units of an image")
        rows, columns = (length // side for length in config.mask_grid_size)
        masks = sample_masks(1 if self.shares_mask else count, (rows, columns), config.mask_ratio, generator)
        squares = masks.view(-1, rows, columns).repeat_interleave(side, 1).repeat_interleave(side, 2)
        return squares.flatten(1).expand(count, -1)

    def described(self) -> dict[str, Any]:
        """What is kept with its cells, in types of JSON."""
        return {**vars(self), "changes": dict(self.changes)}


def _wide(width: int) -> Setting:
    return Setting({"decoder_hidden_size": width, "decoder_intermediate_size": 4 * width})


# In the order in which they are run: what matters most comes first.
SETTINGS = {
    DEFAULT: Setting(),
    "published": Setting(published_placement=True),
    "shared": Setting(shares_mask=True),
    "shared_published": Setting(shares_mask=True, published_placement=True),
    "ratio_500": Setting({"mask_ratio": 0.5}),
    "ratio_625": Setting({"mask_ratio": 0.625}),
    "ratio_875": Setting({"mask_ratio": 0.875}),
    "unit_16": Setting(units_per_side=2),
    "depth_2": Setting({"decoder_num_hidden_layers": 2}),
    "depth_4": Setting({"decoder_num_hidden_layers": 4}),
    "depth_8": Setting({"decoder_num_hidden_layers": 8}),
    "width_32": _wide(32),
    "width_128": _wide(128),
    "window_2": Setting({"window_size": 2}),
}


@dataclass(frozen=True)
class Study:
    """Settings side by side.

    Attributes:
        title: what is compared.
        labels: of the settings, in the order shown; those of the default say what the recipes of the studies hold.
        against: the setting that another one is compared with, where it is not the default.
    """

    title: str
    labels: Mapping[str, str]
    against: Mapping[str, str] = field(default_factory=dict)

    def comparisons(self) -> list[tuple[str, str]]:
        """Pairs (setting, what it is compared with)."""
        references = {DEFAULT, *self.against.values()}
        return [(name, self.against.get(name, DEFAULT)) for name in self.labels if name not in references]


STUDIES = {
    "placement": Study(
        "Correct against published placement of latents",
        {
            DEFAULT: "correct, a mask per image",
            "published": "published, a mask per image",
            "shared": "correct, one mask per batch",
            "shared_published": "published, one mask per batch",
        },
        against={"shared_published": "shared"},
    ),
    "masks": Study(
        "Mask ratio, mask unit, one mask per batch",
        {
            "ratio_500": "ratio 0.5",
            "ratio_625": "ratio 0.625",
            DEFAULT: "ratio 0.75, unit 8 px, a mask per image",
            "ratio_875": "ratio 0.875",
            "unit_16": "unit 16 px",
            "shared": "one mask per batch",
        },
    ),
    "decoder": Study(
        "Depth and width of the decoder",
        {
            DEFAULT: "1 block, width 64",
            "depth_2": "2 blocks",
            "depth_4": "4 blocks",
            "depth_8": "8 blocks",
            "width_32": "width 32",
            "width_128": "width 128",
        },
    ),
    "windows": Study("Window size", {DEFAULT: "window 4", "window_2": "window 2"}),
}


def settings_of(studies: list[str]) -> list[str]:
    """The settings of these studies, each once, in the order in which they are run."""
    named = {name for study in studies for name in STUDIES[study].labels}
    return [name for name in SETTINGS if name in named]
