"""The image processor that belongs to converted weights, and what timm calls the same things."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers import ViTImageProcessor

from .configuration_green_swin import GreenSwinConfig, as_pair
from .image_processing_green_swin import GreenSwinImageProcessor
from .weight_conversion_files import Checkpoint

_IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_RESAMPLING = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
_KEPT = ("do_resize", "do_rescale", "rescale_factor", "do_normalize", "resample", "image_mean", "image_std")
_GEOMETRY = ("size", "do_center_crop", "crop_size")


def processor_options(checkpoint: Checkpoint, config: GreenSwinConfig) -> dict[str, Any]:
    """Arguments of an image processor for a model with this configuration.

    As the source's own says (`preprocessor_config.json`, timm's `pretrained_cfg`); without one, ImageNet's mean and
    deviation and a bicubic resize. Where the image size became another one, a plain resize to it. Mean and deviation
    for one channel are the averages of the source's, for more they are taken in turn.
    """
    height, width = as_pair(config.image_size)
    plain = {"size": {"height": height, "width": width}, "resample": 3, **_IMAGENET}
    if checkpoint.processor:
        given = {key: value for key, value in checkpoint.processor.items() if key in (*_KEPT, *_GEOMETRY)}
    else:
        given = _from_timm(checkpoint.config.get("pretrained_cfg", {}))
    _check_entries(checkpoint, given)
    given |= {key: {"height": given[key], "width": given[key]} for key in _GEOMETRY if type(given.get(key)) is int}
    if given.get("crop_size" if given.get("do_center_crop") else "size") != plain["size"]:
        given = {key: value for key, value in given.items() if key not in _GEOMETRY}
    options = {**plain, **given}
    for name in ("image_mean", "image_std"):
        values = options[name] if isinstance(options[name], list) else [options[name]]  # one number: for all channels
        options[name] = _for_channels(values, config.num_channels)
    return {**options, "do_convert_rgb": config.num_channels == 3 or None}


def _check_entries(checkpoint: Checkpoint, given: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless the entries of somebody's image processor have the types that processors expect."""
    for key, value in given.items():
        values = value if isinstance(value, list) else [value]
        if key in ("image_mean", "image_std"):
            holds = bool(values) and all(map(_is_number, values)) and (key == "image_mean" or 0 not in values)
        elif key in ("size", "crop_size"):
            sides = value.values() if isinstance(value, dict) else [value]
            holds = all(type(side) is int and side > 0 for side in sides)
        elif key.startswith("do_"):
            holds = value is None or isinstance(value, bool)
        else:
            holds = _is_number(value) and (key != "resample" or value in range(6))
        if not holds:
            raise ValueError(f"{checkpoint.path}: its image processor says {key} {value!r}, which no processor takes")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _from_timm(described: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if "mean" in described and "std" in described:
        options |= {"image_mean": described["mean"], "image_std": described["std"]}
    if str(described.get("interpolation")) in _RESAMPLING:
        options["resample"] = _RESAMPLING[described["interpolation"]]
    size: Any = described.get("input_size")
    share: Any = described.get("crop_pct")
    is_square = isinstance(size, list) and len(size) == 3 and type(size[1]) is int and size[1] == size[2]
    is_crop = described.get("crop_mode", "center") == "center" and _is_number(share) and 0.01 < share < 1
    if is_square and is_crop:
        crop = {"height": size[1], "width": size[2]}
        edge = {"shortest_edge": math.floor(size[1] / share)}
        options |= {"size": edge, "do_center_crop": True, "crop_size": crop}
    return options


def _for_channels(values: list[float], num_channels: int) -> list[float]:
    if len(values) == num_channels:
        return values
    if num_channels == 1:
        return [sum(values) / len(values)]
    return [values[channel % len(values)] for channel in range(num_channels)]


def build_processor(options: Mapping[str, Any]) -> ViTImageProcessor:
    """The processor with these options; colour needs nothing of ours, so its file names the class everybody has."""
    kind = ViTImageProcessor if len(options["image_mean"]) == 3 else GreenSwinImageProcessor
    return kind(**options)


def timm_description(options: Mapping[str, Any], config: GreenSwinConfig) -> dict[str, Any]:
    """Entries of timm's `pretrained_cfg` for images prepared with the options of a processor."""
    height, width = as_pair(config.image_size)
    described = {
        "input_size": [config.num_channels, height, width],
        "fixed_input_size": True,
        "mean": list(options["image_mean"]),
        "std": list(options["image_std"]),
        "interpolation": {number: name for name, number in _RESAMPLING.items()}.get(options["resample"], "bicubic"),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }
    edge = options["size"].get("shortest_edge")
    if options.get("do_center_crop") and edge:
        described |= {"crop_pct": height / edge, "crop_mode": "center"}
    return described


__all__ = ["build_processor", "processor_options", "timm_description"]
