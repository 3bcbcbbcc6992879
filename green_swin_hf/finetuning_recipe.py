"""The fine-tuning recipe: everything that decides how an image classifier is trained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from .configuration_green_swin import GreenSwinConfig
from .recipe_files import MOST_CHANNELS, RecipeFile, check_finite, check_minima, checked, option

NO_MODEL = "none"  # as --model: random weights

# Fields of the recipe that are fields of `GreenSwinConfig` too; None leaves the value of the model or variant.
GEOMETRY_FIELDS = (
    "image_size",
    "num_channels",
    "patch_size",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "layer_norm_eps",
)


@dataclass(frozen=True)
class FinetuningRecipe(RecipeFile):
    """One fine-tuning run. Every field is a key of a recipe file and a flag (`image_size` is `--image-size`)."""

    path_keys: ClassVar = ("data", "model")
    # None of these changes a weight (threads: but for the last bits; model: its weights are in the checkpoint).
    free_on_resume: ClassVar = ("data", "model", "threads", "workers", "log_every", "keep_checkpoints")

    # Model
    model: str = option(NO_MODEL, "folder of a GreenSwin or stock Swin, or its name on the Hub; none: random weights")
    # Data
    data: str = option("", "folder with a sub-folder for each class, Parquet file, or name of a data set on the Hub")
    subset: str | None = option(None, "configuration of the data set")
    split: str = option("train", "split to train on")
    validation_split: str | None = option(None, "split to choose the best model on; without one, images are held out")
    validation_share: float = option(0.1, "share of the split that is held out where there is no validation split")
    test_split: str | None = option(None, "split that the finished model is measured on")
    image_column: str | None = option(None, "column with the images; found by itself where there is only one")
    label_column: str | None = option(None, "column with the classes; found by itself where there is only one")
    labels_share: float | None = option(None, "train on this share of the images only, classes balanced")
    label_budget: int | None = option(None, "train on so many images only, classes balanced")
    cache_megabytes: int = option(0, "memory for decoded images, for each worker")
    workers: int = option(0, "processes that prepare batches, for each training process; 0: none of their own")
    threads: int | None = option(None, "threads of each process on the CPU; an equal share of all cores by default")
    # Images: size, channels, mean and std are by default those of the model and of its preprocessor_config.json
    image_size: int | tuple[int, ...] | None = option(None, "pixels, one number or rows and columns")
    num_channels: int | None = option(None, "channels of the images: 1 grey, 3 colour")
    mean: tuple[float, ...] | None = option(None, "mean of each channel, of pixels in 0 … 1")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel")
    evaluation_crop: float | None = option(
        None, "share of the shorter side in the central crop that is evaluated, such as 0.875; the whole image without"
    )
    # Augmentation
    crop_scale: tuple[float, float] = option((0.08, 1.0), "smallest and largest share of the area in a random crop")
    crop_ratio: tuple[float, float] = option((3 / 4, 4 / 3), "smallest and largest ratio of width to height of a crop")
    flip: bool = option(True, "mirror half of the images")
    rand_augment: float = option(0.0, "magnitude of RandAugment from 0 to 10, 0 for none")
    rand_augment_std: float = option(0.0, "standard deviation of an image's magnitude")
    rand_augment_ops: int = option(2, "operations of RandAugment drawn for each image")
    rand_augment_probability: float = option(1.0, "probability that each of them is applied")
    color_jitter: float = option(0.0, "strength of colour jitter, 0 for none; RandAugment takes its place")
    random_erasing: float = option(0.0, "probability that a rectangle is filled with noise")
    mixup: float = option(0.0, "parameter of MixUp, 0 for none; with CutMix too, each takes half of the batches")
    cutmix: float = option(0.0, "parameter of CutMix, 0 for none")
    label_smoothing: float = option(0.0, "share of a target that is spread over all classes")
    # Geometry of a model with random weights
    variant: str | None = option(None, "named Swin to start from", ("tiny", "small", "base", "large"))
    patch_size: int | None = option(None, "side of a patch in pixels")
    embed_dim: int | None = option(None, "channels of the first stage")
    depths: tuple[int, ...] | None = option(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = option(None, "attention heads of each stage")
    window_size: int | None = option(None, "side of an attention window in tokens")
    mlp_ratio: float | None = option(None, "width of an MLP as a multiple of its block's channels")
    layer_norm_eps: float | None = option(None, "epsilon of the norms")
    # Training
    drop_path_rate: float = option(0.1, "stochastic depth of the last block")
    epochs: float = option(100.0, "passes over the data")
    max_steps: int | None = option(None, "updates in all, instead of epochs")
    warmup_epochs: float = option(20.0, "epochs until the learning rate is at its peak")
    batch_size: int = option(128, "images of one process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes for each update")
    learning_rate: float = option(1.25e-3, "base learning rate, multiplied by images per update / base_batch_size")
    base_batch_size: int = option(512, "images per update that learning_rate is given for")
    layer_decay: float = option(1.0, "factor of the learning rate from each block to the one before it")
    min_lr_ratio: float = option(0.0, "learning rate at the end as a share of the peak")
    weight_decay: float = option(0.05, "decay of weight matrices (never of biases, norms and tables)")
    betas: tuple[float, float] = option((0.9, 0.999), "the two coefficients of AdamW")
    max_grad_norm: float = option(5.0, "gradients are clipped to this norm, 0 for never")
    precision: str = option("auto", "arithmetic; auto: bf16 where native", ("auto", "fp32", "bf16", "fp16"))
    seed: int = option(0, "of new weights, order of images, augmentation and subsets")
    # What is kept
    log_every: int = option(10, "updates between two lines of the log")
    validate_every: int = option(1, "epochs between two measurements, each with a checkpoint")
    keep_checkpoints: int = option(1, "newest checkpoints that are kept, beside the best")

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def from_scratch(self) -> bool:
        return self.model == NO_MODEL

    @property
    def label_limit(self) -> float | int | None:
        """Share (float) or number (int) of images to train on; None for all."""
        return self.labels_share if self.label_budget is None else self.label_budget

    def existing_paths(self, folder: Path = Path()) -> dict[str, Path]:
        """As of every recipe; `none` as the model is no path."""
        found = super().existing_paths(folder)
        return {key: path for key, path in found.items() if key != "model" or not self.from_scratch}

    def with_flags(self, flags: dict[str, Any]) -> FinetuningRecipe:
        """The recipe with flags on top.

        Flags for other data, another model or channels drop what was said about the former ones; with other epochs
        alone the warm-up keeps its share of the run.

        Raises:
            ValueError: as `replace`.
        """
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        about: dict[str, tuple[str, ...]] = {
            "data": ("subset", "split", "validation_split", "test_split", "image_column", "label_column"),
            "num_channels": ("mean", "std"),
        }
        if flags.get("model", NO_MODEL) != NO_MODEL:
            about["model"] = ("variant", *GEOMETRY_FIELDS, "mean", "std")
        dropped = [name for key, names in about.items() if key in flags for name in names]
        changes = {**{name: defaults[name] for name in dropped}, **checked(flags, FinetuningRecipe)}
        if "epochs" in flags:
            changes.setdefault("warmup_epochs", self.warmup_epochs * changes["epochs"] / self.epochs)
        return dataclasses.replace(self, **changes)

    def config_changes(self) -> dict[str, Any]:
        """Fields of `GreenSwinConfig` that the recipe sets."""
        names = (*GEOMETRY_FIELDS, "drop_path_rate")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def model_config(self, **more: Any) -> GreenSwinConfig:
        """The configuration of a model with random weights, with `more` of its fields.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        fields = {**self.config_changes(), **more}
        return (
            GreenSwinConfig(**fields) if self.variant is None else GreenSwinConfig.from_variant(self.variant, **fields)
        )


def _check_ranges(recipe: FinetuningRecipe) -> None:
    counts = ("batch_size", "gradient_accumulation_steps", "base_batch_size", "log_every", "validate_every")
    not_negative = ("workers", "cache_megabytes", "warmup_epochs", "seed", "weight_decay", "max_grad_norm", "mixup")
    also = ("min_lr_ratio", "learning_rate", "cutmix", "rand_augment_std", "rand_augment_probability")
    at_least = {
        **dict.fromkeys((*counts, "keep_checkpoints", "label_budget", "num_channels", "rand_augment_ops"), 1),
        **dict.fromkeys((*not_negative, *also), 0),
    }
    check_finite(recipe)
    check_minima(recipe, at_least)
    for name in ("epochs", "max_steps", "threads", "labels_share", "evaluation_crop", "layer_decay"):
        value = getattr(recipe, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name} {value} must be greater than 0")
    at_most = {
        **dict.fromkeys(("labels_share", "evaluation_crop", "layer_decay", "min_lr_ratio"), 1),
        **dict.fromkeys(("color_jitter", "random_erasing", "rand_augment_probability"), 1),
        "rand_augment": 10,
        "num_channels": MOST_CHANNELS,
    }
    for name, maximum in at_most.items():
        value = getattr(recipe, name)
        if value is not None and value > maximum:
            raise ValueError(f"{name} {value} must be at most {maximum}")
    for name in ("validation_share", "label_smoothing", "drop_path_rate"):
        if not 0 <= getattr(recipe, name) < 1:
            raise ValueError(f"{name} {getattr(recipe, name)} must be at least 0 and less than 1")
    if recipe.labels_share is not None and recipe.label_budget is not None:
        raise ValueError("labels_share and label_budget both limit the images to train on; give one of them")
    if recipe.warmup_epochs >= recipe.epochs:
        raise ValueError(f"warmup_epochs {recipe.warmup_epochs} must be less than epochs {recipe.epochs}")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed {recipe.seed} must be less than 2^32")
    for name in ("crop_scale", "crop_ratio", "betas"):
        values = getattr(recipe, name)
        if not 0 < values[0] <= values[1]:
            raise ValueError(f"{name} {list(values)} must be greater than 0, the smaller first")


__all__ = ["GEOMETRY_FIELDS", "NO_MODEL", "FinetuningRecipe"]
