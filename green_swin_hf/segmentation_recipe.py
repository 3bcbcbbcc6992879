"""The segmentation recipe: everything that decides how a fine-tuning run for semantic segmentation goes."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .configuration_green_swin import GreenSwinConfig
from .pretraining_recipe import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from .recipe_files import RecipeFile, check_finite, check_minima, checked, option

# Fields of the recipe that are fields of `GreenSwinConfig` too; a pretrained folder brings its own.
_CONFIG_FIELDS = ("patch_size", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio", "initializer_range")


@dataclass(frozen=True)
class SegmentationRecipe(RecipeFile):
    """One run. Every field is a key of a recipe file and a flag (`crop_size` is `--crop-size`)."""

    path_keys: ClassVar = ("data", "photographs", "class_names", "init_from")
    # None of these changes a weight (threads: but for the last bits).
    free_on_resume: ClassVar = (
        "data",
        "photographs",
        "class_names",
        "init_from",
        "test_split",
        "threads",
        "workers",
        "log_every",
    )

    # Data
    data: str | None = option(None, "folder with train/images and train/masks, or a data set with a column of each")
    drawn_images: int = option(400, "without data: images with drawn shapes to train on")
    photographs: str | None = option(None, "folder of photographs to draw on")
    drawn_radii: tuple[float, float] = option((0.14, 0.32), "smallest and largest radius of a shape / shorter side")
    subset: str | None = option(None, "configuration of the data set")
    split: str = option("train", "split to train on")
    validation_split: str | None = option(None, "split to choose the best weights on (default: validation, or a tenth)")
    test_split: str | None = option(None, "split to measure the best weights on, once at the end")
    image_column: str | None = option(None, "column with the images; found by itself where that is clear")
    mask_column: str | None = option(None, "column with the masks; found by itself where that is clear")
    class_names: str | None = option(None, "JSON file with the names of the classes (default: classes.json in data)")
    reduce_labels: bool = option(False, "0 in the masks is no class and 1 the first one, as in ADE20K")
    workers: int = option(0, "processes that prepare batches, for each training process; 0: none of their own")
    threads: int | None = option(None, "threads on the CPU; all cores by default")
    # Images
    crop_size: int = option(512, "rows and columns of the crops that are trained on")
    short_side: int | None = option(None, "shorter side of whole images in pixels (longer: 4 x as many at most)")
    scale_range: tuple[float, float] = option((0.5, 2.0), "smallest and largest random factor of that size")
    max_class_share: float = option(0.75, "crops that one class fills more than this are drawn anew")
    flip: bool = option(True, "mirror half of the images")
    photometric: bool = option(True, "change brightness, contrast, saturation and hue at random")
    mean: tuple[float, ...] = option(IMAGENET_DEFAULT_MEAN, "mean of each channel, of pixels in 0 … 1")
    std: tuple[float, ...] = option(IMAGENET_DEFAULT_STD, "standard deviation of each channel")
    # Model
    init_from: str | None = option(None, "folder with pretrained weights, GreenSwin or stock Swin; they set the sizes")
    variant: str | None = option(None, "named Swin to start from", ("tiny", "small", "base", "large"))
    patch_size: int | None = option(None, "side of a patch in pixels")
    embed_dim: int | None = option(None, "channels of the first stage")
    depths: tuple[int, ...] | None = option(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = option(None, "attention heads of each stage")
    window_size: int | None = option(None, "side of an attention window in tokens")
    mlp_ratio: float | None = option(None, "width of an MLP as a multiple of its block's channels")
    initializer_range: float | None = option(None, "standard deviation of new weights of the backbone (Swin: 0.02)")
    drop_path_rate: float = option(0.3, "stochastic depth of the last block")
    head_channels: int = option(512, "channels of UperNet's decode head")
    pool_scales: tuple[int, ...] = option((1, 2, 3, 6), "rows (and columns) the last feature map is pooled to")
    auxiliary_channels: int = option(256, "channels of the auxiliary head on the third stage")
    auxiliary_loss_weight: float = option(0.4, "weight of the auxiliary head's loss, 0 for none")
    # Training
    max_steps: int = option(160_000, "updates")
    warmup_steps: int = option(1500, "updates until the learning rate is at its peak; then it falls in a line to 0")
    batch_size: int = option(2, "images of one process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes for each update")
    learning_rate: float = option(6e-5, "peak of the learning rate")
    weight_decay: float = option(0.01, "decay of weight matrices (never of biases, norms and tables)")
    betas: tuple[float, float] = option((0.9, 0.999), "the two coefficients of AdamW")
    max_grad_norm: float = option(0.0, "gradients are clipped to this norm, 0 for never")
    precision: str = option("auto", "arithmetic; auto: bf16 where native", ("auto", "fp32", "bf16", "fp16"))
    seed: int = option(0, "of weights, order of images, crops and drawings")
    # What is kept
    log_every: int = option(50, "updates between two lines of the log")
    validate_every: int = option(4000, "updates between two evaluations, each with a checkpoint")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept, besides the best one")

    def __post_init__(self) -> None:
        _check_ranges(self)

    @property
    def size(self) -> dict[str, int] | None:
        """What the image processor resizes whole images to; None: they keep their size."""
        return None if self.short_side is None else {"shortest_edge": self.short_side, "longest_edge": self.long_side}

    @property
    def long_side(self) -> int:
        """Most pixels of the longer side where `short_side` is given: four times as many, 2048 for 512."""
        return 4 * (self.short_side or 0)

    def with_flags(self, flags: dict[str, Any]) -> SegmentationRecipe:
        """The recipe with flags on top.

        Pretrained weights bring sizes of their own, which replace those of the recipe. Data instead of drawn images
        drop the split to test on.

        Raises:
            ValueError: as `replace`; or a size is given beside `init_from`.
        """
        changes, sizes = checked(flags, SegmentationRecipe), ("variant", *_CONFIG_FIELDS)
        if changes.get("init_from", self.init_from):
            given = next((name for name in sizes if changes.get(name) is not None), None)
            if given:
                raise ValueError(f"{given} {changes[given]} is set by the weights of init_from; leave one of them out")
            changes.update(dict.fromkeys(sizes))
        if changes.get("data") and self.data is None:
            changes.setdefault("test_split", None)
        return dataclasses.replace(self, **changes)

    def model_config(self) -> GreenSwinConfig:
        """The configuration of a backbone without pretrained weights, all stages in its output.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        fields: dict[str, Any] = {"drop_path_rate": self.drop_path_rate, **self.given_sizes}
        config = GreenSwinConfig.from_variant(self.variant, **fields) if self.variant else GreenSwinConfig(**fields)
        config.out_features = config.stage_names[1:]
        return config

    @property
    def given_sizes(self) -> dict[str, Any]:
        """Sizes of the backbone that are set, by the names they have in `GreenSwinConfig`."""
        return {name: getattr(self, name) for name in _CONFIG_FIELDS if getattr(self, name) is not None}


def _check_ranges(recipe: SegmentationRecipe) -> None:
    check_finite(recipe)
    positive = (
        "drawn_images", "crop_size", "short_side", "head_channels", "auxiliary_channels", "max_steps", "threads",
        "gradient_accumulation_steps", "log_every", "validate_every", "keep_checkpoints",
    )  # fmt: skip
    at_least_zero = (
        "workers", "warmup_steps", "learning_rate", "weight_decay", "max_grad_norm", "seed", "auxiliary_loss_weight",
    )  # fmt: skip
    # One image in a batch leaves UperNet's norms of globally pooled features nothing to compute with.
    check_minima(recipe, {**dict.fromkeys(positive, 1), **dict.fromkeys(at_least_zero, 0), "batch_size": 2})
    if recipe.warmup_steps >= recipe.max_steps:
        raise ValueError(f"warmup_steps {recipe.warmup_steps} must be less than max_steps {recipe.max_steps}")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed {recipe.seed} must be less than 2^32")
    if not 0 < recipe.max_class_share <= 1:
        raise ValueError(f"max_class_share {recipe.max_class_share} must be greater than 0 and at most 1")
    if not 0 <= recipe.drop_path_rate < 1:
        raise ValueError(f"drop_path_rate {recipe.drop_path_rate} must be at least 0 and less than 1")
    for name in ("scale_range", "betas", "drawn_radii"):
        values = getattr(recipe, name)
        if not 0 < values[0] <= values[1]:
            raise ValueError(f"{name} {list(values)} must be greater than 0, the smaller first")
    if recipe.drawn_radii[1] > 0.5:
        raise ValueError(f"drawn_radii {list(recipe.drawn_radii)} must be at most 0.5, half of the shorter side")
    if min(recipe.pool_scales) < 1:
        raise ValueError(f"pool_scales {list(recipe.pool_scales)} must be at least 1")
    if len(recipe.mean) != 3 or len(recipe.std) != 3 or min(recipe.std) <= 0:
        raise ValueError(
            f"mean {list(recipe.mean)} and std {list(recipe.std)} must have three numbers each, std greater than 0"
        )


__all__ = ["SegmentationRecipe"]
