"""The pretraining recipe: everything that decides how a pretraining run goes."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

from .configuration_green_swin import GreenSwinConfig, as_pair
from .recipe_files import MOST_CHANNELS, RecipeFile, check_finite, check_minima, checked, option

# The usual statistics of photographs, pixels in 0 … 1.
IMAGENET_DEFAULT_MEAN = (0.485, 0.456, 0.406)
IMAGENET_DEFAULT_STD = (0.229, 0.224, 0.225)

# Fields of the recipe that are fields of `GreenSwinConfig` too; None leaves the variant's (or the class's) value.
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


@dataclass(frozen=True)
class PretrainingRecipe(RecipeFile):
    """One pretraining run. Every field is a key of a recipe file and a flag (`image_size` is `--image-size`)."""

    path_keys: ClassVar = ("data",)
    # None of these changes a weight (threads: but for the last bits).
    free_on_resume: ClassVar = (
        "data", "threads", "workers", "log_every", "save_every", "keep_checkpoints", "stop_after_skipped",
        "label_column", "probe_every", "probe_bank_images", "probe_images", "max_bad_share", "worker_timeout",
    )  # fmt: skip

    # Data
    data: str = option("", "folder of images, Parquet file, or name of a data set on the Hub")
    subset: str | None = option(None, "configuration of the data set")
    split: str = option("train", "split to pretrain on")
    validation_split: str | None = option(None, "split for validation; without one, images are held out of the split")
    validation_images: int = option(256, "images for validation and reconstructions, 0 for none")
    image_column: str | None = option(None, "column with the images; found by itself where there is only one")
    streaming: bool = option(False, "read the data set while training instead of loading it first")
    workers: int = option(0, "processes that prepare batches, for each training process; 0: none of their own")
    worker_timeout: float = option(300.0, "seconds on one image after which such a process counts as hung; 0: never")
    max_bad_share: float = option(0.01, "stop when more of an epoch's images cannot be decoded: a share, 1 for never")
    threads: int | None = option(None, "threads of each process on the CPU; an equal share of all cores by default")
    # Images
    image_size: int | tuple[int, ...] = option(224, "pixels, one number or rows and columns")
    num_channels: int = option(3, "channels of the images: 1 grey, 3 colour")
    pad: int = option(0, "pixels of zeros around each image before it is cropped")
    crop_scale: tuple[float, float] = option((0.2, 1.0), "smallest and largest share of the area in a random crop")
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "smallest and largest ratio of width to height of a crop")
    flip: bool = option(True, "mirror half of the images")
    mean: tuple[float, ...] | None = option(None, "mean of each channel, of pixels in 0 … 1")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel")
    # Masks
    mask_ratio: float = option(0.75, "share of each image that is masked, between 0 and 1")
    mask_unit_size: int | None = option(None, "side of a masked square in pixels, a multiple of the model's unit")
    mask_sharing: str = option("image", "a mask for each image, or one for the batch", ("image", "batch"))
    # Model
    variant: str | None = option(None, "named Swin to start from", ("tiny", "small", "base", "large"))
    patch_size: int | None = option(None, "side of a patch in pixels")
    embed_dim: int | None = option(None, "channels of the first stage")
    depths: tuple[int, ...] | None = option(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = option(None, "attention heads of each stage")
    window_size: int | None = option(None, "side of an attention window in tokens")
    mlp_ratio: float | None = option(None, "width of an MLP as a multiple of its block's channels")
    drop_path_rate: float = option(0.0, "stochastic depth of the last block")
    layer_norm_eps: float = option(1e-6, "epsilon of the encoder's norms")
    norm_pix_loss: bool = option(True, "normalise the target of each mask unit")
    decoder_hidden_size: int | None = option(None, "width of the decoder")
    decoder_num_hidden_layers: int | None = option(None, "blocks of the decoder")
    decoder_num_attention_heads: int | None = option(None, "attention heads of the decoder")
    decoder_intermediate_size: int | None = option(None, "width of the decoder's MLP")
    group_size: str | None = option(None, "slots of a group of windows: window, optimal or a number")
    # Training
    epochs: float = option(100.0, "passes over the data")
    max_steps: int | None = option(None, "updates in all, instead of epochs")
    warmup_epochs: float = option(10.0, "epochs until the learning rate is at its peak")
    batch_size: int = option(64, "images of one process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes for each update")
    learning_rate: float = option(1.5e-4, "base learning rate, multiplied by images per update / 256")
    min_lr_ratio: float = option(0.0, "learning rate at the end as a share of the peak")
    weight_decay: float = option(0.05, "decay of weight matrices (never of biases, norms and tables)")
    betas: tuple[float, float] = option((0.9, 0.95), "the two coefficients of AdamW")
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm, 0 for never")
    precision: str = option("auto", "arithmetic; auto: bf16 where native", ("auto", "fp32", "bf16", "fp16"))
    seed: int = option(0, "of weights, order of images, crops and masks")
    stop_after_skipped: int = option(20, "stop when so many updates in a row were not finite")
    # What is kept
    log_every: int = option(10, "updates between two lines of the log")
    validate_every: int = option(0, "updates between two measurements on held-out images, 0: only at the end")
    probe_every: int = option(0, "epochs between two k-NN probes of the features on held-out images, 0 for none")
    probe_bank_images: int = option(10000, "labelled training images of such a probe, at most")
    probe_images: int = option(1000, "held-out images that it classifies, at most")
    label_column: str | None = option(None, "column with the classes, for the probe; found by itself where it can be")
    save_every: int = option(500, "updates between two checkpoints, 0 for none")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept")

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

    def with_flags(self, flags: dict[str, Any]) -> PretrainingRecipe:
        """The recipe with flags on top.

        Flags for other data or channels drop what was said about the former ones, and the probe, as other data may have
        no labels and a stream cannot be probed; with other epochs alone the warm-up keeps its share of the run.

        Raises:
            ValueError: as `replace`.
        """
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        about = {
            "data": ("subset", "split", "validation_split", "image_column", "label_column", "probe_every"),
            "streaming": ("probe_every",),
            "num_channels": ("mean", "std"),
        }
        dropped = [name for key, names in about.items() if key in flags for name in names]
        changes = {**{name: defaults[name] for name in dropped}, **checked(flags, PretrainingRecipe)}
        if "epochs" in flags:
            changes.setdefault("warmup_epochs", self.warmup_epochs * changes["epochs"] / self.epochs)
        return dataclasses.replace(self, **changes)

    def model_config(self) -> GreenSwinConfig:
        """The model's configuration.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        fields = {name: getattr(self, name) for name in _CONFIG_FIELDS if getattr(self, name) is not None}
        if re.fullmatch(r"\d{1,15}", str(fields.get("group_size", ""))):
            fields["group_size"] = int(fields["group_size"])
        if self.variant is None:
            return GreenSwinConfig(**fields)
        return GreenSwinConfig.from_variant(self.variant, **fields)


def _check_ranges(recipe: PretrainingRecipe) -> None:
    at_least = {
        **dict.fromkeys(("batch_size", "gradient_accumulation_steps", "log_every", "num_channels"), 1),
        **dict.fromkeys(("keep_checkpoints", "stop_after_skipped", "probe_bank_images", "probe_images"), 1),
        **dict.fromkeys(("workers", "pad", "save_every", "validate_every", "validation_images"), 0),
        **dict.fromkeys(("probe_every", "warmup_epochs", "seed", "worker_timeout", "max_bad_share"), 0),
        **dict.fromkeys(("weight_decay", "max_grad_norm", "min_lr_ratio", "learning_rate"), 0),
    }
    check_finite(recipe)
    check_minima(recipe, at_least)
    if recipe.num_channels > MOST_CHANNELS:
        raise ValueError(f"num_channels {recipe.num_channels} must be at most {MOST_CHANNELS}")
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
    if recipe.max_bad_share > 1:
        raise ValueError(f"max_bad_share {recipe.max_bad_share} must be a share of all images: at most 1")
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


__all__ = ["IMAGENET_DEFAULT_MEAN", "IMAGENET_DEFAULT_STD", "PretrainingRecipe"]
