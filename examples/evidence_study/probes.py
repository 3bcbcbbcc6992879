"""Frozen features of a study's encoders, and what the probes say of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from green_swin_hf import GreenSwinModel
from green_swin_hf.feature_probes import (
    FeatureFunction,
    LabelledFeatures,
    extract_features,
    frozen_features,
    judge_features,
    pixel_features,
)

from .finetuning import build_classifier
from .recipe import StudyRecipe
from .tasks import Split, Task


class _Samples(Dataset[dict[str, Any]]):
    """A split as `extract_features` reads it."""

    def __init__(self, task: Task, split: Split):
        self.task, self.split = task, split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {
            "pixel_values": self.task.pixels(self.split.images[index]),
            "labels": int(self.split.labels[index]),
        }


def feature_function(
    arm: str, recipe: StudyRecipe, seed: int, pretrained: Path | None, device: torch.device
) -> FeatureFunction:
    """Features of images by name: pixels for arm "pixels", else of a pretrained folder or of random weights."""
    if arm == "pixels":
        return lambda pixels: {"features": pixel_features(pixels)}
    if pretrained is None:
        encoder = build_classifier(recipe, 2, seed, None).swin
    else:
        encoder = GreenSwinModel.from_pretrained(pretrained)
    encoder.eval().to(device)

    def features(pixels: Tensor) -> dict[str, Tensor]:
        return {"features": frozen_features(encoder, pixels, [recipe.features])[recipe.features]}

    return features


def probe(
    function: FeatureFunction, task: Task, subsets: Sequence[list[int]], device: torch.device, title: str
) -> list[dict[str, float]]:
    """Test accuracy of weighted k-NN and of the linear probe for each subset of labelled training images.

    Args:
        function: see `feature_function`.
        task: for its images.
        subsets: rows of the training split; the largest holds all others.
        device: where the function computes.
        title: of the progress bars.
    """
    largest = max(subsets, key=len)
    splits = {"bank": task.train.rows(largest), "validation": task.validation, "test": task.test}
    found = {
        name: extract_features(_Samples(task, split), [function], device=device, progress=f"{title}: {name}")
        for name, split in splits.items()
    }
    place_of = {row: place for place, row in enumerate(largest)}
    results = []
    for subset in subsets:
        bank = _rows(found["bank"], [place_of[row] for row in subset])
        judged = judge_features(
            name="features",
            bank=bank,
            validation=found["validation"],
            test=found["test"],
            num_classes=len(task.class_names),
        )
        results.append({"knn": judged.knn.value, "linear": judged.linear.value, "dimension": judged.dimension})
    return results


def _rows(features: LabelledFeatures, rows: list[int]) -> LabelledFeatures:
    selected = {name: values[rows] for name, values in features.features.items()}
    return LabelledFeatures(selected, features.labels[rows])
