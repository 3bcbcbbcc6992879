"""Weighted k-NN on frozen features while a model is pretrained: how good its features are, beside its loss."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch

from .data import EvaluationTransform
from .feature_probes import Accuracy, extract_features, frozen_features, is_among_top, weighted_knn
from .labelled_images import LabelledDataset, LabelledImages, label_budget, load_labelled_images
from .modeling_green_swin import GreenSwinModel
from .pretraining_recipe import PretrainingRecipe
from .training import hold_out

# Decoded images that are kept between probes, where no worker processes read them.
CACHE_BYTES = 64 << 20


class OnlineProbe:
    """Accuracy of weighted k-NN on frozen features of held-out images, the same images at every call.

    Nothing is drawn from a global random state, and the encoder is left as it was: a run with probes ends in the same
    weights as one without.

    Args:
        bank: labelled images whose features vote.
        held_out: labelled images to classify, none of which is in the bank.
        transform: prepares images of both.
        kind: of features, a key of `FEATURE_KINDS`.
        batch_size: images of a batch.
        workers: processes that read images.
    """

    def __init__(
        self,
        bank: LabelledImages,
        held_out: LabelledImages,
        transform: EvaluationTransform,
        *,
        kind: str = "pooled",
        batch_size: int = 64,
        workers: int = 0,
    ):
        cache = 0 if workers else CACHE_BYTES // 2
        self.bank, self.held_out = (LabelledDataset(part, transform, cache_bytes=cache) for part in (bank, held_out))
        self.num_classes = len(bank.class_names)
        self.kind = kind
        self.batch_size = batch_size
        self.workers = workers

    def __call__(self, encoder: GreenSwinModel, device: torch.device) -> Accuracy:
        was_training = encoder.training
        encoder.eval()
        compute = partial(frozen_features, encoder, kinds=[self.kind])
        try:
            bank, held_out = (
                extract_features(images, [compute], batch_size=self.batch_size, workers=self.workers, device=device)
                for images in (self.bank, self.held_out)
            )
        finally:
            encoder.train(was_training)
        shares = weighted_knn(bank.features[self.kind], bank.labels, held_out.features[self.kind], self.num_classes)
        return Accuracy.of(is_among_top(shares, held_out.labels))

    def __str__(self) -> str:
        return f"{len(self.held_out):,} held-out images against {len(self.bank):,} labelled training images"


def open_probe(recipe: PretrainingRecipe, transform: EvaluationTransform) -> OnlineProbe | None:
    """The probe of a recipe; None where it asks for none.

    The bank are training images, of which the model is pretrained without their labels; what is classified is the
    validation split, or what `hold_out` keeps from training. Of more images than `probe_bank_images` and
    `probe_images`, a class-balanced subset is used.

    Raises:
        ValueError: the data have no labels, are streamed, or leave nothing held out.
    """
    if recipe.probe_every == 0:
        return None
    asked = f"probe_every {recipe.probe_every}"
    if recipe.streaming:
        raise ValueError(f"{asked} needs images by number, a stream has none; give --no-streaming or --probe-every 0")
    if recipe.split == recipe.validation_split:
        raise ValueError(f"{asked} needs a validation_split other than the training split {recipe.split!r}")
    try:
        bank, held_out = _open_labelled(recipe)
    except ValueError as error:
        raise ValueError(f"{asked} needs images with classes: {error} (or give --probe-every 0)") from None
    if held_out is None:
        raise ValueError(
            f"{asked} needs held-out images; give --validation-split, or --validation-images of at least 1 (at most a "
            "tenth of the images are taken)"
        )
    bank, held_out = (
        images.select(label_budget(images.labels, count, recipe.seed))
        for images, count in ((bank, recipe.probe_bank_images), (held_out, recipe.probe_images))
    )
    return OnlineProbe(bank, held_out, transform, batch_size=recipe.batch_size, workers=recipe.workers)


def _open_labelled(recipe: PretrainingRecipe) -> tuple[LabelledImages, LabelledImages | None]:
    """(images that are trained on, held-out images), as the training run has them, with their classes."""
    open_split = partial(
        load_labelled_images,
        recipe.data,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        subset=recipe.subset,
    )
    training = open_split(split=recipe.split)
    if recipe.validation_split:
        return training, open_split(split=recipe.validation_split, class_names=training.class_names)
    bank, held_out = hold_out(training.source, recipe.validation_images, recipe.seed)
    return replace(training, source=bank), replace(training, source=held_out) if held_out else None


__all__ = ["OnlineProbe", "open_probe"]
