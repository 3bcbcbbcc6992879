"""The detection recipe: everything that decides how fine-tuning a detector goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .configuration_green_swin import GreenSwinConfig
from .detection import DetectorSettings
from .pretraining_recipe import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from .recipe_files import RecipeFile, check_finite, check_minima, option

_CONFIG_FIELDS = ("num_channels", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")
_SETTINGS_FIELDS = (
    "short_sides", "long_side", "pyramid_channels", "anchor_sizes", "aspect_ratios", "box_head_width",
    "mask_head_widths", "proposals", "samples", "score_threshold", "max_detections",
)  # fmt: skip


@dataclass(frozen=True)
class DetectionRecipe(RecipeFile):
    """One fine-tuning of a detector. Every field is a key of a recipe file and a flag."""

    path_keys: ClassVar = (
        "photographs", "train_annotations", "train_images", "validation_annotations", "validation_images",
    )  # fmt: skip
    # None of these changes a weight (threads: but for the last bits).
    free_on_resume: ClassVar = (
        *path_keys, "threads", "workers", "log_every", "validate_every", "keep_checkpoints", "stop_after_skipped",
        "pictures", "max_bad_share", "worker_timeout",
    )  # fmt: skip

    # Data
    photographs: str | None = option(None, "folder of photographs to draw shapes on, where no annotations are given")
    drawn_images: int = option(200, "images to draw for training")
    drawn_validation_images: int = option(60, "images to draw for validation")
    drawn_sides: tuple[int, ...] = option((96, 160), "smallest and largest rows and columns of drawn images")
    drawn_shapes: int = option(3, "most shapes of a drawn image")
    drawn_radii: tuple[float, float] = option((0.14, 0.32), "least and largest radius, as a share of the short side")
    train_annotations: str | None = option(None, "COCO-format JSON file to train on")
    train_images: str | None = option(None, "folder of its images (default: images beside the file, or its folder)")
    validation_annotations: str | None = option(None, "COCO-format JSON file to measure on")
    validation_images: str | None = option(None, "folder of its images")
    skip_empty: bool = option(True, "leave images without objects out of training")
    workers: int = option(0, "processes that prepare batches, for each training process; 0: none of their own")
    worker_timeout: float = option(300.0, "seconds on one image after which such a process counts as hung; 0: never")
    max_bad_share: float = option(0.01, "stop when more of an epoch's images cannot be decoded: a share, 1 for never")
    threads: int | None = option(None, "threads of each process on the CPU; an equal share of all cores by default")
    # Images
    num_channels: int = option(
        3,
        "channels of the images: 1 grey, 3 colour",
    )
    short_sides: tuple[int, ...] = option((800,), "pixels of the short side: one is drawn in training, the last in use")
    long_side: int = option(1333, "most pixels of the long side")
    mean: tuple[float, ...] | None = option(None, "mean of each channel, of pixels in 0 … 1 (default: the start's)")
    std: tuple[float, ...] | None = option(None, "standard deviation of each channel (default: the start's)")
    # Model; weights to start from bring their own sizes of the backbone
    variant: str | None = option(None, "named Swin to start from", ("tiny", "small", "base", "large"))
    patch_size: int | None = option(None, "side of a patch in pixels")
    embed_dim: int | None = option(None, "channels of the first stage")
    depths: tuple[int, ...] | None = option(None, "blocks of each stage")
    num_heads: tuple[int, ...] | None = option(None, "attention heads of each stage")
    window_size: int | None = option(None, "side of an attention window in tokens")
    drop_path_rate: float = option(0.0, "stochastic depth of the last block")
    pyramid_channels: int = option(256, "width of every level of the feature pyramid")
    anchor_sizes: tuple[int, ...] = option((32, 64, 128, 256, 512), "side of the anchors of each level in pixels")
    aspect_ratios: tuple[float, ...] = option((0.5, 1.0, 2.0), "height to width of the anchors")
    box_head_width: int = option(1024, "width of the layers that classify a region")
    mask_head_widths: tuple[int, ...] = option((256, 256, 256, 256), "widths of the convolutions that make a mask")
    proposals: tuple[int, ...] = option((2000, 1000), "regions kept of an image, before and after suppression")
    samples: tuple[int, ...] = option((256, 512), "anchors, and regions, of an image that the losses are computed on")
    score_threshold: float = option(0.05, "least score of a detection")
    max_detections: int = option(100, "most detections of an image")
    # Optimization
    epochs: int = option(36, "passes over the images")
    milestones: tuple[int, ...] = option((27, 33), "epochs after which the learning rate falls to a tenth")
    warmup_updates: int = option(1000, "updates until the learning rate is at its peak")
    batch_size: int = option(16, "images of one process in one forward pass")
    gradient_accumulation_steps: int = option(1, "forward passes for each update")
    learning_rate: float = option(1e-4, "peak learning rate; not scaled with the batch")
    layer_decay: float = option(1.0, "factor of the learning rate from each block to the one before it")
    weight_decay: float = option(0.05, "decay of weight matrices (never of biases, norms and tables)")
    betas: tuple[float, float] = option((0.9, 0.999), "the two coefficients of AdamW")
    max_grad_norm: float = option(0.0, "gradients are clipped to this norm, 0 for never")
    precision: str = option("auto", "arithmetic; auto: bf16 where native", ("auto", "fp32", "bf16", "fp16"))
    seed: int = option(0, "of drawn images, weights, order of images, flips and sizes")
    stop_after_skipped: int = option(20, "stop when so many updates in a row were not finite")
    # What is kept
    log_every: int = option(50, "updates between two lines of the log")
    validate_every: int = option(1, "epochs between two measurements on held-out images, 0: only at the end")
    keep_checkpoints: int = option(2, "newest checkpoints that are kept; one is written after every epoch")
    pictures: int = option(8, "images in the picture of detections")

    def __post_init__(self) -> None:
        _check_ranges(self)

    def model_config(self) -> GreenSwinConfig:
        """Configuration of a backbone that starts from scratch.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        fields = {name: getattr(self, name) for name in _CONFIG_FIELDS if getattr(self, name) is not None}
        return (
            GreenSwinConfig(**fields) if self.variant is None else GreenSwinConfig.from_variant(self.variant, **fields)
        )

    def with_backbone(self, config: GreenSwinConfig) -> DetectionRecipe:
        """The recipe with the sizes of a backbone that was loaded, in place of what it would have built."""
        names = [name for name in _CONFIG_FIELDS if name not in ("patch_size", "drop_path_rate")]
        sizes = {name: getattr(config, name) for name in names}
        return self.replace(variant=None, patch_size=config.patch_length, **sizes)

    def detector_settings(
        self, class_names: tuple[str, ...], mean: tuple[float, ...] | None = None, std: tuple[float, ...] | None = None
    ) -> DetectorSettings:
        """Everything about the detector but its backbone.

        Args:
            class_names: of the data.
            mean, std: of the weights to start from; the recipe's go before them.
        """
        is_colour = self.num_channels == 3
        values = {name: getattr(self, name) for name in _SETTINGS_FIELDS}
        return DetectorSettings(
            class_names,
            image_mean=self.mean or mean or (IMAGENET_DEFAULT_MEAN if is_colour else (0.5,) * self.num_channels),
            image_std=self.std or std or (IMAGENET_DEFAULT_STD if is_colour else (0.5,) * self.num_channels),
            **values,
        )


def _check_ranges(recipe: DetectionRecipe) -> None:
    positive = (
        "drawn_images", "drawn_validation_images", "epochs", "batch_size", "gradient_accumulation_steps", "log_every",
        "keep_checkpoints", "stop_after_skipped", "pictures", "threads",
    )  # fmt: skip
    others = (
        "workers", "warmup_updates", "validate_every", "seed", "weight_decay", "max_grad_norm", "learning_rate",
        "max_bad_share", "worker_timeout",
    )  # fmt: skip
    check_finite(recipe)
    check_minima(recipe, {**dict.fromkeys(positive, 1), **dict.fromkeys(others, 0)})
    for name in ("drawn_sides", "proposals", "samples"):
        values = getattr(recipe, name)
        if len(values) != 2:
            raise ValueError(f"{name} {list(values)} must be two numbers")
    smallest, largest = recipe.drawn_sides
    if not 32 <= smallest <= largest:
        raise ValueError(f"drawn_sides {[smallest, largest]} must be at least 32, the smaller first")
    if not 0.02 <= recipe.drawn_radii[0] <= recipe.drawn_radii[1] <= 0.5:
        raise ValueError(f"drawn_radii {list(recipe.drawn_radii)} must be 0.02 to 0.5, the smaller first")
    if recipe.num_channels not in (1, 3):
        raise ValueError(f"num_channels {recipe.num_channels} must be 1 (grey) or 3 (colour)")
    if recipe.max_bad_share > 1:
        raise ValueError(f"max_bad_share {recipe.max_bad_share} must be a share of all images: at most 1")
    if not 0 < recipe.layer_decay <= 1:
        raise ValueError(f"layer_decay {recipe.layer_decay} must be greater than 0 and at most 1")
    if recipe.seed >= 2**32:
        raise ValueError(f"seed {recipe.seed} must be less than 2^32")
    if recipe.train_annotations is None and recipe.validation_annotations is not None:
        raise ValueError("validation_annotations without train_annotations; give --train-annotations too")
    recipe.detector_settings(("any",))  # raises for what the detector cannot be


__all__ = ["DetectionRecipe"]
