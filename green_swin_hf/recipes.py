"""Recipes: everything that decides how a pretraining run goes, as a YAML file, as command-line flags, as one value."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .configuration_green_swin import GreenSwinConfig, as_pair

# The usual statistics of photographs, pixels in 0 … 1.
IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)

# Fields of `Recipe` that are fields of `GreenSwinConfig` too; None leaves the variant's (or the class's) value.
_CONFIG_FIELDS = (
    "image_size",
    "num_channels",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "drop_path_rate",
    "layer_norm_eps",
    "mask_ratio",
    "norm_pix_loss",
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
    "group_size",
)
# What may differ between a run and its continuation: none of it changes a weight (threads: but for the last bits).
_FREE_ON_RESUME = ("data", "threads", "workers", "log_every", "save_every", "keep_checkpoints", "stop_after_skipped")


def _option(default: Any, description: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": description, "choices": choices})


@dataclass(frozen=True)
class Recipe:
    """One pretraining run. Every field is a key of a recipe file and a flag (`image_size` is `--image-size`)."""

    # Data
    data: str = _option("", "folder of images, Parquet file, or name of a data set on the Hub")
    subset: str | None = _option(None, "configuration of the data set")
    split: str = _option("train", "split to pretrain on")
    validation_split: str | None = _option(None, "split for validation; without one, images are held out of the split")
    validation_images: int = _option(256, "images for validation and reconstructions, 0 for none")
    image_column: str | None = _option(None, "column with the images; found by itself where there is only one")
    streaming: bool = _option(False, "read the data set while training instead of loading it first")
    workers: int = _option(0, "processes that prepare batches, for each training process; 0: none of their own")
    threads: int | None = _option(None, "threads of each process on the CPU; an equal share of all cores by default")
    # Images
    image_size: int | tuple[int, ...] = _option(224, "pixels, one number or rows and columns")
    num_channels: int = _option(3, "channels of the images: 1 grey, 3 colour")
    pad: int = _option(0, "pixels of zeros around each image before it is cropped")
    crop_scale: tuple[float, float] = _option((0.2, 1.0), "smallest and largest share of the area in a random crop")
    crop_ratio: tuple[float, float] = _option((3 / 4, 4 / 3), "smallest and largest ratio of width to height of a crop")
    flip: bool = _option(True, "mirror half of the images")
    mean: tuple[float, ...] | None = _option(None, "mean of each channel, of pixels in 0 … 1")
    std: tuple[float, ...] | None = _option(None, "standard deviation of each channel")
    # Masks
    mask_ratio: float = _option(0.75, "share of each image that is masked, between 0 and 1")
    mask_unit_size: int | None = _option(None, "side of a masked square in pixels, a multiple of the model's unit")
    mask_sharing: str = _option("image", "a mask for each image, or one for the batch", ("image", "batch"))
    # Model
    variant: str | None = _option(None, "named Swin to start from", ("tiny", "small", "base", "large"))
    patch_size: int | None = _option(None, "side of a patch in pixels")
    embed_dim: int | None = _option(None, "channels of the first stage")
    depths: tuple[int, ...] | None = _option(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = _option(None, "attention heads of each stage")
    window_size: int | None = _option(None, "side of an attention window in tokens")
    mlp_ratio: float | None = _option(None, "width of an MLP as a multiple of its block's channels")
    drop_path_rate: float = _option(0.0, "stochastic depth of the last block")
    layer_norm_eps: float = _option(1e-6, "epsilon of the encoder's norms")
    norm_pix_loss: bool = _option(True, "normalise the target of each mask unit")
    decoder_hidden_size: int | None = _option(None, "width of the decoder")
    decoder_num_hidden_layers: int | None = _option(None, "blocks of the decoder")
    decoder_num_attention_heads: int | None = _option(None, "attention heads of the decoder")
    decoder_intermediate_size: int | None = _option(None, "width of the decoder's MLP")
    group_size: str | None = _option(None, "slots of a group of windows: window, optimal or a number")
    # Training
    epochs: float = _option(100.0, "passes over the data")
    max_steps: int | None = _option(None, "updates in all, instead of epochs")
    warmup_epochs: float = _option(10.0, "epochs until the learning rate is at its peak")
    batch_size: int = _option(64, "images of one process in one forward pass")
    gradient_accumulation_steps: int = _option(1, "forward passes for each update")
    learning_rate: float = _option(1.5e-4, "base learning rate, multiplied by images per update / 256")
    min_lr_ratio: float = _option(0.0, "learning rate at the end as a share of the peak")
    weight_decay: float = _option(0.05, "decay of weight matrices (never of biases, norms and tables)")
    betas: tuple[float, float] = _option((0.9, 0.95), "the two coefficients of AdamW")
    max_grad_norm: float = _option(5.0, "gradients are clipped to this norm, 0 for never")
    precision: str = _option("auto", "arithmetic; auto: bf16 where native", ("auto", "fp32", "bf16", "fp16"))
    seed: int = _option(0, "of weights, order of images, crops and masks")
    stop_after_skipped: int = _option(20, "stop when so many updates in a row were not finite")
    # What is kept
    log_every: int = _option(10, "updates between two lines of the log")
    validate_every: int = _option(0, "updates between two measurements on held-out images, 0: only at the end")
    save_every: int = _option(500, "updates between two checkpoints, 0 for none")
    keep_checkpoints: int = _option(2, "newest checkpoints that are kept")

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def pixel_mean(self) -> tuple[float, ...]:
        """Mean of each channel; where none is given, ImageNet's for colour and 0.5 for other images."""
        return self.mean or (IMAGENET_DEFAULT_MEAN if self.num_channels == 3 else (0.5,) * self.num_channels)

    @property
    def pixel_std(self) -> tuple[float, ...]:
        """Standard deviation of each channel; where none is given, ImageNet's for colour and 0.5 for other images."""
        return self.std or (IMAGENET_DEFAULT_STD if self.num_channels == 3 else (0.5,) * self.num_channels)

    def replace(self, **changes: Any) -> Recipe:
        """The same recipe with some keys changed; values are checked as those of a file are.

        Raises:
            ValueError: a key is unknown, or a value has the wrong type or is out of range.
        """
        return dataclasses.replace(self, **_checked(changes))

    def with_flags(self, flags: dict[str, Any]) -> Recipe:
        """The recipe with flags on top.

        Flags for other data or channels drop what was said about the former ones; with other epochs alone the warm-up
        keeps its share of the run.

        Raises:
            ValueError: as `replace`.
        """
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        about = {
            "data": ("subset", "split", "validation_split", "image_column"),
            "num_channels": ("mean", "std"),
        }
        dropped = [name for key, names in about.items() if key in flags for name in names]
        changes = {**{name: defaults[name] for name in dropped}, **_checked(flags)}
        if "epochs" in flags:
            changes.setdefault("warmup_epochs", self.warmup_epochs * changes["epochs"] / self.epochs)
        return dataclasses.replace(self, **changes)

    def model_config(self) -> GreenSwinConfig:
        """The model's configuration.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        fields = {name: getattr(self, name) for name in _CONFIG_FIELDS if getattr(self, name) is not None}
        if str(fields.get("group_size", "")).isdigit():
            fields["group_size"] = int(fields["group_size"])
        if self.variant is None:
            return GreenSwinConfig(**fields)
        return GreenSwinConfig.from_variant(self.variant, **fields)

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Keys that change what is trained and differ, each with both values (this recipe's first)."""
        names = (item.name for item in dataclasses.fields(self) if item.name not in _FREE_ON_RESUME)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, Any]:
        """Keys and values in the order of the class, sequences as lists, without what is not set."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose mappings name no key twice: the standard loader takes the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((name for index, name in enumerate(names) if name in names[:index]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"key {twice!r} is given twice")
        return super().construct_mapping(node, deep)


def load_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe file. A relative `data` path that exists beside the file is meant from there.

    Raises:
        ValueError: the file is missing or no YAML mapping, a key is unknown (the closest known one is named), or a
            value has the wrong type or is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path} is not a file; give the path of a YAML file")
    try:
        entries = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if entries is None:
        raise ValueError(f"recipe {path} is empty; give one with the keys of a run")
    if not isinstance(entries, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, not {type(entries).__name__}")
    try:
        recipe = Recipe().with_flags(entries)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {error}") from None
    beside = path.parent / recipe.data
    return recipe.replace(data=str(beside.resolve())) if recipe.data and beside.exists() else recipe


def save_recipe(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Write a recipe that `load_recipe` reads back as the same one, whole or not at all.

    Local data, given by an absolute path, is named relative to the file.
    """
    entries = recipe.to_dict()
    if Path(recipe.data).is_absolute():
        entries["data"] = os.path.relpath(recipe.data, Path(path).resolve().parent)
    text = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, allow_unicode=True)
    partial = Path(f"{os.fspath(path)}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def add_recipe_flags(parser: argparse._ActionsContainer) -> None:
    """Add a flag for every key of a recipe; a flag that is not given leaves no entry in the parsed arguments."""
    for item in dataclasses.fields(Recipe):
        kinds = _kinds(item.name)
        options: dict[str, Any] = {
            "help": item.metadata["help"],
            "default": argparse.SUPPRESS,
            "dest": item.name,
        }
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = item.metadata["choices"]
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else "VALUE"
        if any(typing.get_origin(kind) is tuple for kind in kinds):
            options["nargs"] = "+"
        parser.add_argument("--" + item.name.replace("_", "-"), **options)


def flag_overrides(arguments: argparse.Namespace) -> dict[str, Any]:
    """The recipe keys among parsed arguments, with values as typed (text); `Recipe.replace` checks them."""
    names = [item.name for item in dataclasses.fields(Recipe) if hasattr(arguments, item.name)]
    values = {name: getattr(arguments, name) for name in names}
    # A flag that takes several values gives a list; a field that takes one or several wants one as such.
    single = {name for name, value in values.items() if isinstance(value, list) and len(value) == 1}
    return {name: value[0] if name in single and int in _kinds(name) else value for name, value in values.items()}


def _kinds(name: str) -> tuple[Any, ...]:
    """Types that a field accepts: `int | None` is `(int, NoneType)`."""
    hint = typing.get_type_hints(Recipe)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _checked(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries with every value in its field's type."""
    known = {item.name: item for item in dataclasses.fields(Recipe)}
    for name in entries:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {str(name)!r}; the closest valid key is {close!r}")
    checked = {name: _typed(name, value) for name, value in entries.items()}
    for name, value in checked.items():
        choices = known[name].metadata["choices"]
        if choices and value is not None and value not in choices:
            raise ValueError(f"{name} {value!r} must be one of {', '.join(choices)}")
    return checked


def _typed(name: str, value: Any) -> Any:
    """`value` in the type of field `name`; numbers may come as text, from flags and from YAML's `1e-4`."""
    for kind in _kinds(name):
        converted = _convert(value, kind)
        if converted is not _NO_MATCH:
            return converted
    names = [_KIND_NAMES[kind] for kind in _kinds(name)]
    raise ValueError(f"{name} {value!r} must be {' or '.join(names)}")


_NO_MATCH = object()
_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    types.NoneType: "null",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[float, float]: "two numbers",
}


def _convert(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            return _NO_MATCH
        kinds = typing.get_args(kind)
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            return _NO_MATCH
        items = tuple(_convert(item, kinds[0]) for item in value)
        return _NO_MATCH if _NO_MATCH in items else items
    if kind is types.NoneType:
        return None if value is None else _NO_MATCH
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else _NO_MATCH
    if kind is str:
        return str(value) if isinstance(value, str | int) else _NO_MATCH
    return _number(value, kind)


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if isinstance(value, str):
        try:
            return kind(value)
        except ValueError:
            return _NO_MATCH
    if isinstance(value, int) or (isinstance(value, float) and (kind is float or value.is_integer())):
        return kind(value)
    return _NO_MATCH


def _check_ranges(recipe: Recipe) -> None:
    at_least = {
        **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "log_every", "num_channels"), 1),
        **dict.fromkeys(("keep_checkpoints", "stop_after_skipped"), 1),
        **dict.fromkeys(
            ("workers", "pad", "save_every", "validate_every", "validation_images", "warmup_epochs", "seed"),
            0,
        ),
        **dict.fromkeys(("weight_decay", "max_grad_norm", "min_lr_ratio", "learning_rate"), 0),
    }
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{item.name} {value} must be finite")
    for name, minimum in at_least.items():
        value = getattr(recipe, name)
        if not value >= minimum:
            raise ValueError(f"{name} {value} must be at least {minimum}")
    for name in ("epochs", "max_steps", "threads"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value} must be greater than 0")
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(f"warmup_epochs {recipe.warmup_epochs} must be less than epochs {recipe.epochs}")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed {recipe.seed} must be less than 2^32")
    if recipe.pad > max(as_pair(recipe.image_size)):
        raise ValueError(f"pad {recipe.pad} must be at most image_size {recipe.image_size}")
    if not 0 < recipe.mask_ratio < 1:
        raise ValueError(f"mask_ratio {recipe.mask_ratio} must be greater than 0 and less than 1")
    for name in ("mean", "std"):
        values = getattr(recipe, name)
        if values is not None and len(values) != recipe.num_channels:
            values = list(values)
            raise ValueError(f"{name} {values} must have one number for each of the {recipe.num_channels} channels")
    if min(recipe.pixel_std) <= 0:
        raise ValueError(f"std {list(recipe.pixel_std)} must be greater than 0")
    for name in ("crop_scale", "crop_ratio", "betas"):
        values = getattr(recipe, name)
        if not 0 < values[0] <= values[1]:
            raise ValueError(f"{name} {list(values)} must be greater than 0, the smaller first")


__all__ = ["Recipe", "add_recipe_flags", "flag_overrides", "load_recipe", "save_recipe"]
