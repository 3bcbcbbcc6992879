"""Judging a folder with a model: its predictions on labelled images, and its frozen features beside baselines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoImageProcessor, PretrainedConfig

from .feature_probes import (
    Accuracy,
    FeatureFunction,
    Judgement,
    LabelledFeatures,
    count_shared_images,
    extract_features,
    frozen_features,
    judge_features,
    paired_difference,
    pixel_features,
    random_encoder,
)
from .image_decoding import ColorMode
from .image_sources import looks_local
from .modeling_green_swin import GreenSwinForImageClassification, GreenSwinModel
from .pretrained_start import check_model_type, quiet_transformers

RAW_PIXELS, RANDOM_ENCODER, MODEL = "raw pixels", "random encoder", "model"


# The folder


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers as a transform of data sets.

    Attributes:
        processor: of a folder's `preprocessor_config.json`.
    """

    processor: Any

    @property
    def color_mode(self) -> ColorMode:
        """How to decode images: grey where the processor normalises one channel."""
        return "L" if len(self.processor.image_mean) == 1 else "RGB"

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[C, H, W] uint8 of any size → [C, rows, columns] float32; `generator` is not used."""
        pixel_values: Tensor = self.processor(image, return_tensors="pt")["pixel_values"]
        return pixel_values[0]


def read_config(folder: str) -> PretrainedConfig:
    """The configuration of a folder, or a repository on the Hub, with a GreenSwin or a stock Swin.

    Raises:
        ValueError: there is none, or it is of another kind of model.
    """
    if looks_local(folder) and not Path(folder).exists():
        raise ValueError(f"model folder {folder} does not exist; give one with a model, or a name on the Hub")
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of files, of the network, and of configurations that contradict themselves
        raise ValueError(f"model {folder} cannot be read: {_one_line(error)}") from None
    check_model_type(config.model_type, f"model {folder}")
    return config


def is_classifier(config: PretrainedConfig) -> bool:
    """Whether a folder's configuration is that of an image classifier."""
    return any(name.endswith("ForImageClassification") for name in config.architectures or ())


def load_processor(folder: str) -> ProcessorTransform:
    """What prepares images for a folder's model: its `preprocessor_config.json`.

    Raises:
        ValueError: there is none.
    """
    if Path(folder).is_dir() and not (Path(folder) / "preprocessor_config.json").is_file():
        raise ValueError(
            f"model folder {folder} has no preprocessor_config.json, so how its images were prepared is not known; "
            f"save its image processor there: processor.save_pretrained({folder!r})"
        )
    try:
        return ProcessorTransform(AutoImageProcessor.from_pretrained(folder, trust_remote_code=False))
    except Exception as error:
        raise ValueError(f"the image processor of {folder} cannot be read: {_one_line(error)}") from None


def load_encoder(folder: str, device: torch.device | str = "cpu") -> GreenSwinModel:
    """The encoder of a folder, pretrained or a classifier, GreenSwin or stock Swin, in eval mode on a device.

    Raises:
        ValueError: the weights cannot be read, or some of the encoder's are missing.
    """
    return _load(GreenSwinModel, folder, device)


def load_classifier(folder: str, device: torch.device | str = "cpu") -> GreenSwinForImageClassification:
    """The classifier of a folder, GreenSwin or stock Swin, in eval mode on a device.

    Raises:
        ValueError: the weights cannot be read, or some are missing, such as the classifier's of a pretrained folder.
    """
    return _load(GreenSwinForImageClassification, folder, device)


def _load(kind: Any, folder: str, device: torch.device | str) -> Any:
    try:
        with quiet_transformers():
            model, report = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:  # readers of files that are no weights raise what they like
        raise ValueError(f"model {folder} cannot be loaded: {_one_line(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"model {folder} lacks {len(missing)} weights of a {kind.__name__}, such as {missing[0]}; "
            "give a folder with all of them"
        )
    return model.eval().to(device)


def model_class_names(config: PretrainedConfig) -> tuple[str, ...] | None:
    """Names of a classifier's classes in the order of its outputs; None where nobody named them (LABEL_0, …)."""
    id2label: Any = config.id2label
    names = tuple(str(id2label[index]) for index in range(len(id2label)))
    return None if names == tuple(f"LABEL_{index}" for index in range(len(names))) else names


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# Predictions


@torch.no_grad()
def predict(model: GreenSwinForImageClassification, images: Dataset[Any], **options: Any) -> LabelledFeatures:
    """Scores `[N, classes]` of all images as "logits", and their labels; options are those of `extract_features`."""
    return extract_features(images, [lambda pixel_values: {"logits": model(pixel_values).logits.float()}], **options)


def mean_loss(scores: Tensor, labels: Tensor) -> tuple[float, float]:
    """Mean cross-entropy of scores `[N, classes]` and its standard error."""
    losses = cross_entropy(scores.double(), labels, reduction="none")
    return losses.mean().item(), losses.std(correction=0).item() / math.sqrt(len(losses))


@dataclass(frozen=True)
class ClassAccuracy:
    """How the images of one class were classified.

    Attributes:
        name: of the class.
        accuracy: share of its images with the right prediction; None where there are no images.
        mistaken_for: the wrong class that was predicted most often; None where all are right.
        mistakes: how often it was.
    """

    name: str
    accuracy: Accuracy | None
    mistaken_for: str | None
    mistakes: int


def class_accuracies(scores: Tensor, labels: Tensor, class_names: Sequence[str]) -> list[ClassAccuracy]:
    """Accuracy of every class and what it was taken for.

    Args:
        scores: [N, classes].
        labels: [N] int64.
        class_names: in the order of the scores.
    """
    predictions = scores.argmax(dim=1)
    rows = []
    for index, name in enumerate(class_names):
        predicted = predictions[labels == index]
        wrong = predicted[predicted != index].bincount(minlength=len(class_names))
        mistakes, most = wrong.max(dim=0)
        mistaken_for = class_names[int(most)] if mistakes else None
        accuracy = Accuracy.of(predicted == index) if len(predicted) else None
        rows.append(ClassAccuracy(name, accuracy, mistaken_for, int(mistakes)))
    return rows


# Frozen features


@dataclass(frozen=True)
class FeatureReport:
    """What the probes say of a model's frozen features.

    Attributes:
        judgements: by (source, kind): `RAW_PIXELS`, then `RANDOM_ENCODER` and `MODEL` with each kind of features.
        most_frequent: accuracy of always predicting the bank's most frequent class.
        shared_images: images judged on that are in the bank as well, pixel for pixel.
        bank_images, validation_images: how many taught the probes and chose the regularisation.
    """

    judgements: dict[tuple[str, str], Judgement]
    most_frequent: Accuracy
    shared_images: int
    bank_images: int
    validation_images: int

    def difference(self, kind: str, baseline: tuple[str, str], probe: str) -> tuple[float, float]:
        """The model's gain over a baseline and its standard error, image by image; `probe` is "knn" or "linear"."""
        ours, theirs = (getattr(self.judgements[key], f"{probe}_is_right") for key in ((MODEL, kind), baseline))
        return paired_difference(ours, theirs)


def judge_encoder(
    encoder: GreenSwinModel,
    bank: Dataset[Any],
    validation: Dataset[Any],
    test: Dataset[Any],
    num_classes: int,
    *,
    kinds: Sequence[str],
    seed: int,
    neighbours: int,
    temperature: float,
    progress: bool = False,
    **options: Any,
) -> FeatureReport:
    """Both probes on features of an encoder, of an untrained one of the same configuration, and on the pixels.

    Args:
        encoder: in eval mode, on its device.
        bank, validation, test: images that teach the probes, that choose the regularisation, and that are judged on.
        num_classes: classes there are.
        kinds: of features, keys of `FEATURE_KINDS`.
        seed: of the untrained encoder.
        neighbours, temperature: of weighted k-NN.
        progress: whether to show progress bars.
        options: `batch_size`, `workers` and `device` of `extract_features`.
    """
    untrained: Any = random_encoder(encoder.config, seed)
    untrained.to(encoder.device)
    functions: list[FeatureFunction] = [
        lambda pixel_values: {RAW_PIXELS: pixel_features(pixel_values)},
        partial(_named_features, RANDOM_ENCODER, untrained, kinds),
        partial(_named_features, MODEL, encoder, kinds),
    ]
    sets = {"bank": bank, "validation": validation, "test": test}
    features = {
        name: extract_features(images, functions, progress=f"features, {name}" if progress else None, **options)
        for name, images in sets.items()
    }
    keys = [(RAW_PIXELS, ""), *((source, kind) for source in (RANDOM_ENCODER, MODEL) for kind in kinds)]
    judgements = {
        key: judge_features(
            features["bank"], features["validation"], features["test"], num_classes, name=_name(*key),
            neighbours=neighbours, temperature=temperature, progress=progress,
        )
        for key in keys
    }  # fmt: skip
    most_frequent = features["bank"].labels.mode().values
    return FeatureReport(
        judgements,
        Accuracy.of(features["test"].labels == most_frequent),
        count_shared_images(features["bank"].features[RAW_PIXELS], features["test"].features[RAW_PIXELS]),
        len(features["bank"].labels),
        len(features["validation"].labels),
    )


def _named_features(source: str, encoder: GreenSwinModel, kinds: Sequence[str], pixel_values: Tensor) -> dict[str, Any]:
    features = frozen_features(encoder, pixel_values, kinds)
    return {_name(source, kind): values for kind, values in features.items()}


def _name(source: str, kind: str) -> str:
    return f"{source}, {kind}" if kind else source


__all__ = [
    "MODEL",
    "RANDOM_ENCODER",
    "RAW_PIXELS",
    "ClassAccuracy",
    "FeatureReport",
    "ProcessorTransform",
    "class_accuracies",
    "is_classifier",
    "judge_encoder",
    "load_classifier",
    "load_encoder",
    "load_processor",
    "mean_loss",
    "model_class_names",
    "predict",
    "read_config",
]
