"""The evaluation recipe: which model is judged, on which images, and how."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from .feature_probes import FEATURE_KINDS, NEIGHBOURS, TEMPERATURE
from .recipe_files import RecipeFile, check_finite, check_minima, checked, option

JUDGED = ("auto", "classifier", "features", "both")


@dataclass(frozen=True)
class EvaluationRecipe(RecipeFile):
    """One evaluation. Every field is a key of a recipe file and a flag (`train_split` is `--train-split`)."""

    path_keys: ClassVar = ("model", "data")

    # What is judged
    model: str = option("outputs/pretrain", "folder of a GreenSwin or a stock Swin, or its name on the Hub")
    judge: str = option("auto", "its predictions, its frozen features, or both; auto: what the folder is for", JUDGED)
    # Data
    data: str = option("", "folder of images, Parquet file, or name of a data set on the Hub")
    subset: str | None = option(None, "configuration of the data set")
    split: str = option("test", "split that is judged on")
    image_column: str | None = option(None, "column with the images; found by itself where there is only one")
    label_column: str | None = option(None, "column with the classes; found by itself where it can be")
    images: int | None = option(None, "images judged on, a class-balanced subset; all by default")
    batch_size: int = option(128, "images of one forward pass")
    workers: int = option(0, "processes that read images; 0: none of their own")
    threads: int | None = option(None, "threads on the CPU; torch's choice by default")
    # Frozen features
    train_split: str = option("train", "split whose labelled images teach the probes")
    train_images: int | None = option(None, "labelled images of it, a class-balanced subset; all by default")
    validation_split: str | None = option(None, "split that chooses the linear probe's regularisation")
    validation_share: float = option(0.1, "share of the train_images for that where there is no validation_split")
    features: tuple[str, ...] = option(
        ("pooled", "stages"),
        "pooled: mean of the last stage's tokens; map: all of them; stages: mean of every stage",
        tuple(FEATURE_KINDS),
    )
    neighbours: int = option(NEIGHBOURS, "images that vote in weighted k-NN")
    temperature: float = option(TEMPERATURE, "of the votes exp(cosine / temperature)")
    seed: int = option(0, "of the random encoder and of subsets")

    def __post_init__(self) -> None:
        check_finite(self)
        check_minima(self, dict.fromkeys(("images", "batch_size", "threads", "train_images", "neighbours"), 1))
        check_minima(self, dict.fromkeys(("workers", "seed"), 0))
        if self.seed >= 2**32:
            raise ValueError(f"seed {self.seed} must be less than 2^32")
        if self.temperature <= 0:
            raise ValueError(f"temperature {self.temperature} must be greater than 0")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share {self.validation_share} must be greater than 0 and less than 1")
        for name in ("train_split", "validation_split"):
            if getattr(self, name) == self.split and self.judge != "classifier":
                raise ValueError(f"{name} {self.split!r} must not be the split that is judged on; give another --split")

    def with_flags(self, flags: dict[str, Any]) -> EvaluationRecipe:
        """The recipe with flags on top; a flag for other data drops what was said about the former ones.

        Raises:
            ValueError: as `replace`.
        """
        dropped = ("subset", "split", "train_split", "validation_split", "image_column", "label_column")
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        changes = {name: defaults[name] for name in dropped if "data" in flags}
        return dataclasses.replace(self, **{**changes, **checked(flags, EvaluationRecipe)})


__all__ = ["EvaluationRecipe"]
