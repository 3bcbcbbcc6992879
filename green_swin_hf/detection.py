"""Mask R-CNN with a feature pyramid on a GreenSwin backbone: torchvision's detector, built, saved and loaded."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .configuration_green_swin import GreenSwinConfig
from .modeling_green_swin import GreenSwinBackbone

_SETTINGS, _WEIGHTS = "detector.json", "model.safetensors"
_BOX_RESOLUTION, _MASK_RESOLUTION = 7, 14


@dataclass(frozen=True)
class DetectorSettings:
    """Everything about a detector but its backbone. The defaults are those of Mask R-CNN with FPN on COCO.

    Attributes:
        class_names: names of the classes; label `i + 1` is the name `i`, 0 the background.
        short_sides: an image is resized so that its short side is one of these, drawn in training, the last one else.
        long_side: but its long side is at most this.
        image_mean, image_std: of each channel, pixels in 0 … 1.
        pyramid_channels: width of every level of the pyramid.
        anchor_sizes: side of the anchors of each level in pixels, one more than there are stages: the last level is a
            maximum over the one before it.
        aspect_ratios: height to width of the anchors.
        box_head_width: of the two layers that classify a region.
        mask_head_widths: of the convolutions that make a mask, one entry for each.
        proposals: regions kept of an image, before and after suppression of overlaps (before: for each level).
        samples: anchors, and regions, of an image that the losses are computed on.
        score_threshold: least score of a detection.
        max_detections: of an image.
    """

    class_names: tuple[str, ...]
    short_sides: tuple[int, ...] = (800,)
    long_side: int = 1333
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)
    pyramid_channels: int = 256
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    box_head_width: int = 1024
    mask_head_widths: tuple[int, ...] = (256, 256, 256, 256)
    proposals: tuple[int, int] = (2000, 1000)
    samples: tuple[int, int] = (256, 512)
    score_threshold: float = 0.05
    max_detections: int = 100

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, list):  # as JSON gives it
                object.__setattr__(self, item.name, tuple(value))
        for name in ("class_names", "short_sides", "aspect_ratios", "mask_head_widths"):
            _require(len(getattr(self, name)) > 0, self, name, "must not be empty")
        for name in ("short_sides", "anchor_sizes", "aspect_ratios", "mask_head_widths", "proposals", "samples"):
            _require(min(getattr(self, name)) > 0, self, name, "must be greater than 0")
        for name in ("pyramid_channels", "box_head_width", "max_detections"):
            _require(getattr(self, name) > 0, self, name, "must be greater than 0")
        _require(len(set(self.class_names)) == len(self.class_names), self, "class_names", "must differ")
        _require(
            max(self.short_sides) <= self.long_side, self, "long_side", f"must be at least {max(self.short_sides)}"
        )
        _require(min(self.image_std) > 0, self, "image_std", "must be greater than 0")
        _require(0 <= self.score_threshold < 1, self, "score_threshold", "must be at least 0 and less than 1")

    def check_fits(self, config: GreenSwinConfig, num_maps: int) -> None:
        """Raise a `ValueError` unless these settings fit a backbone with `num_maps` feature maps."""
        levels = num_maps + 1
        rule = f"must have {levels} sizes, one for each of the {num_maps} stages and one for the level above"
        _require(len(self.anchor_sizes) == levels, self, "anchor_sizes", rule)
        for name in ("image_mean", "image_std"):
            rule = f"must have one number for each of the {config.num_channels} channels"
            _require(len(getattr(self, name)) == config.num_channels, self, name, rule)


def _require(holds: bool, settings: DetectorSettings, name: str, rule: str) -> None:
    if not holds:
        value = getattr(settings, name)
        raise ValueError(f"{name} {list(value) if isinstance(value, tuple) else value} {rule}")


class PyramidBackbone(nn.Module):
    """Images `[B, C, H, W]` to maps of equal width, as torchvision's detectors take them.

    The levels are those of the backbone's stages, "0", "1", …, and "pool" above them, with half the last one's side.
    """

    def __init__(self, body: GreenSwinBackbone, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.body = body
        self.pyramid = FeaturePyramidNetwork(list(body.channels), out_channels, LastLevelMaxPool())

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        maps = self.body(pixel_values).feature_maps
        return self.pyramid({str(level): feature_map for level, feature_map in enumerate(maps)})


class GreenSwinMaskRCNN(MaskRCNN):
    """torchvision's `MaskRCNN` on a GreenSwin backbone.

    In training, `model(images, targets)` returns the losses; in eval `model(images)` one dictionary for each image:
    `boxes` [n, 4] (x1, y1, x2, y2), `labels` [n], `scores` [n] and `masks` [n, 1, H, W] in 0 … 1. Images are
    [C, H, W] in 0 … 1, of any sizes; normalising and resizing are part of the model.

    Args:
        backbone: all of its feature maps are used.
        settings: of everything else.

    Raises:
        ValueError: the settings do not fit the backbone.
    """

    def __init__(self, backbone: GreenSwinBackbone, settings: DetectorSettings):
        settings.check_fits(backbone.config, len(backbone.channels))
        channels, num_classes = settings.pyramid_channels, len(settings.class_names) + 1
        levels = [str(level) for level in range(len(backbone.channels))]
        ratios = (settings.aspect_ratios,) * len(settings.anchor_sizes)
        before_nms, after_nms = settings.proposals
        super().__init__(
            PyramidBackbone(backbone, channels),
            min_size=settings.short_sides,
            max_size=settings.long_side,
            image_mean=settings.image_mean,
            image_std=settings.image_std,
            size_divisible=backbone.config.mask_unit_size,
            rpn_anchor_generator=AnchorGenerator(tuple((size,) for size in settings.anchor_sizes), ratios),
            rpn_pre_nms_top_n_train=before_nms,
            rpn_pre_nms_top_n_test=before_nms,
            rpn_post_nms_top_n_train=after_nms,
            rpn_post_nms_top_n_test=after_nms,
            rpn_batch_size_per_image=settings.samples[0],
            box_batch_size_per_image=settings.samples[1],
            box_roi_pool=MultiScaleRoIAlign(levels, _BOX_RESOLUTION, sampling_ratio=2),
            box_head=TwoMLPHead(channels * _BOX_RESOLUTION**2, settings.box_head_width),
            box_predictor=FastRCNNPredictor(settings.box_head_width, num_classes),
            box_score_thresh=settings.score_threshold,
            box_detections_per_img=settings.max_detections,
            mask_roi_pool=MultiScaleRoIAlign(levels, _MASK_RESOLUTION, sampling_ratio=2),
            mask_head=MaskRCNNHeads(channels, settings.mask_head_widths, 1),
            mask_predictor=MaskRCNNPredictor(settings.mask_head_widths[-1], settings.mask_head_widths[-1], num_classes),
        )
        self.settings = settings

    @property
    def config(self) -> GreenSwinConfig:
        """The backbone's; `parameter_groups` counts its blocks."""
        return self.backbone.body.config

    def save_pretrained(self, folder: str | os.PathLike[str], state_dict: dict[str, Tensor] | None = None) -> None:
        """Write `detector.json` (settings and the backbone's configuration) and `model.safetensors`.

        Args:
            folder: made if it does not exist.
            state_dict: weights to write in place of the model's own.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": dataclasses.asdict(self.settings), "backbone": self.config.to_dict()}
        weights = self.state_dict() if state_dict is None else state_dict
        save_file({name: value.contiguous() for name, value in weights.items()}, folder / _WEIGHTS)
        (folder / _SETTINGS).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_detector(folder: str | os.PathLike[str]) -> GreenSwinMaskRCNN:
    """The detector that `save_pretrained` wrote, in eval mode.

    Raises:
        ValueError: the folder holds no detector, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / _SETTINGS).is_file():
        raise ValueError(f"{folder} holds no detector ({_SETTINGS}); give a folder that finetune_detection.py wrote")
    try:
        content = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
        config = GreenSwinConfig.from_dict(content["backbone"])
        model = GreenSwinMaskRCNN(GreenSwinBackbone(config), DetectorSettings(**content["settings"]))
        model.load_state_dict(load_file(folder / _WEIGHTS))
    except Exception as error:  # readers of damaged files raise what they like
        raise ValueError(f"the detector in {folder} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model.eval()


def new_backbone(config: GreenSwinConfig) -> GreenSwinBackbone:
    """A backbone with new weights and all stages in its output."""
    config.out_features = config.stage_names[1:]
    return GreenSwinBackbone(config)


def total_loss(losses: dict[str, Tensor]) -> Tensor:
    """The sum of the losses that a detector in training returns."""
    return sum(losses.values(), start=next(iter(losses.values())).new_zeros(()))


__all__ = [
    "DetectorSettings",
    "GreenSwinMaskRCNN",
    "PyramidBackbone",
    "load_detector",
    "new_backbone",
    "total_loss",
]
