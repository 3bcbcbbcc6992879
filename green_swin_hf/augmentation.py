"""Augmentation for fine-tuning by torchvision's transforms, with randomness that belongs to the sample.

torchvision draws from torch's global generator. Here it is seeded for each sample (each batch, for mixing) and put back
afterwards, so that a sample does not depend on workers or on what was read before it, and a resumed run sees the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from .data import PretrainingTransform, mix_seed
from .labelled_images import LabelledDataset

# Magnitudes are 0 … 10 as in the papers; torchvision counts bins. Tenths, so that noise on the magnitude shows.
_BINS = 101


@contextlib.contextmanager
def torch_seed(seed: int) -> Iterator[None]:
    """Let torch's global CPU generator start from `seed` inside, and go on afterwards as if nothing had been drawn."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


@dataclass(frozen=True)
class FinetuningTransform(PretrainingTransform):
    """Random resized crop and flip as in pretraining, RandAugment or colour jitter, normalisation, random erasing.

    Attributes:
        rand_augment: magnitude of RandAugment from 0 to 10; 0 for none. torchvision's operations, at 10 in full.
        rand_augment_std: standard deviation of an image's magnitude around it.
        rand_augment_ops: operations drawn for each image.
        rand_augment_probability: that each of them is applied; timm, which the paper's recipe comes from, takes 0.5.
        color_jitter: strength of changes of brightness, contrast and saturation (1 channel: not the last), only
            without RandAugment, which has them among its operations (as in timm).
        random_erasing: probability that a rectangle is filled with noise.
    """

    rand_augment: float = 0.0
    rand_augment_std: float = 0.0
    rand_augment_ops: int = 2
    rand_augment_probability: float = 1.0
    color_jitter: float = 0.0
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(0 <= self.rand_augment <= 10, "rand_augment", "a magnitude from 0 to 10")
        self._require(self.rand_augment_std >= 0, "rand_augment_std", "at least 0")
        self._require(self.rand_augment_ops >= 1, "rand_augment_ops", "at least 1")
        is_probability = 0 <= self.rand_augment_probability <= 1
        self._require(is_probability, "rand_augment_probability", "a probability in [0, 1]")
        self._require(0 <= self.color_jitter <= 1, "color_jitter", "from 0 to 1")
        self._require(0 <= self.random_erasing <= 1, "random_erasing", "a probability in [0, 1]")

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """[C, H, W] uint8 of any size → [C, rows, columns] float32; all randomness from `generator`."""
        image = self._random_view(image, generator)
        if not (self.rand_augment or self.color_jitter or self.random_erasing):
            return self._normalized(image)
        with torch_seed(int(torch.randint(2**62, (), generator=generator))):
            image = self._normalized(self._recoloured(image))
            return _random_erasing(self.random_erasing)(image) if self.random_erasing else image

    def _recoloured(self, image: Tensor) -> Tensor:
        if self.rand_augment:
            operations = int((torch.rand(self.rand_augment_ops) < self.rand_augment_probability).sum())
            drawn = self.rand_augment + self.rand_augment_std * float(torch.randn(()))
            step = round((_BINS - 1) * min(10.0, max(0.0, drawn)) / 10)
            fill = tuple(round(255 * value) for value in self.mean or ())
            return _rand_augment(operations, step, fill)(image)
        return _color_jitter(self.color_jitter, self.num_channels)(image) if self.color_jitter else image


@lru_cache(maxsize=256)
def _rand_augment(operations: int, step: int, fill: tuple[int, ...]) -> v2.RandAugment:
    return v2.RandAugment(operations, step, _BINS, v2.InterpolationMode.BILINEAR, list(fill))


@lru_cache
def _color_jitter(strength: float, num_channels: int) -> v2.ColorJitter:
    return v2.ColorJitter(strength, strength, strength if num_channels == 3 else None)


@lru_cache
def _random_erasing(probability: float) -> v2.RandomErasing:
    return v2.RandomErasing(probability, value="random")


class FinetuningImages(LabelledDataset):
    """Samples of a `LabelledDataset` that also bring the seed of what is drawn for a batch that they lead."""

    def __getitem__(self, key: int) -> dict[str, Any]:
        return {**super().__getitem__(key), "batch_seed": mix_seed(self.seed, key, 1)}


class MixingCollator:
    """Makes a training batch: images mixed by MixUp or CutMix (one of them for the batch), and their soft targets.

    Args:
        num_classes: length of a target.
        mixup, cutmix: parameter of the Beta distribution that the share of the second image is drawn from; 0 for none.
            With both, each is used for half of the batches.
        label_smoothing: share of a target that is spread evenly over all classes. Nothing behind the collator smooths
            again.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(self, num_classes: int, *, mixup: float = 0.0, cutmix: float = 0.0, label_smoothing: float = 0.0):
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup {mixup} and cutmix {cutmix} must be at least 0")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing {label_smoothing} must be at least 0 and less than 1")
        self.num_classes = num_classes
        self.label_smoothing = label_smoothing
        kinds = [(v2.MixUp, mixup), (v2.CutMix, cutmix)]
        self._mixers = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha]

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """A batch of B samples of `FinetuningImages`.

        Returns:
            pixel_values: [B, C, H, W] float32.
            labels: [B, num_classes] float32, each row a distribution.
        """
        batch = stack_samples(samples)
        images, labels = batch["pixel_values"], batch["labels"]
        if self._mixers:
            with torch_seed(samples[0]["batch_seed"]):
                mixer = self._mixers[int(torch.randint(len(self._mixers), ()))]
                images, targets = mixer(images, labels)
        else:
            targets = torch.nn.functional.one_hot(labels, self.num_classes)
        smooth = self.label_smoothing
        return {"pixel_values": images, "labels": targets.float() * (1 - smooth) + smooth / self.num_classes}


def stack_samples(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """A batch as it is: `pixel_values` [B, C, H, W] and `labels` [B] int64."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }


__all__ = ["FinetuningImages", "FinetuningTransform", "MixingCollator", "stack_samples", "torch_seed"]
