"""What fine-tuning an image classifier needs beside `Trainer`: its start, its loss, its images, its checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Sampler
from torchvision.transforms import v2
from transformers import AutoImageProcessor, ViTImageProcessor

from .augmentation import FinetuningTransform, stack_samples
from .configuration_green_swin import GreenSwinConfig, as_pair
from .data import EpochSampler, EvaluationTransform
from .finetuning_recipe import NO_MODEL, FinetuningRecipe
from .image_decoding import BrokenDataError
from .image_processing_green_swin import GreenSwinImageProcessor
from .labelled_images import LabelledDataset, LabelledImages, label_budget
from .modeling_green_swin import GreenSwinForImageClassification
from .pretrained_start import class_entries, load_for_finetuning, quiet_transformers
from .trainer_runs import ResumableTrainer


def build_classifier(recipe: FinetuningRecipe, class_names: Sequence[str]) -> GreenSwinForImageClassification:
    """The model that a recipe starts from.

    Raises:
        ValueError: as `load_for_finetuning`; fields of the recipe contradict each other, or the model's.
    """
    if recipe.from_scratch:
        return GreenSwinForImageClassification(recipe.model_config(**class_entries(class_names)))
    model = load_for_finetuning(
        recipe.model, class_names, drop_path_rate=recipe.drop_path_rate, **_image_changes(recipe)
    )
    for name, wanted in recipe.config_changes().items():
        found = getattr(model.config, name)
        if _comparable(found) != _comparable(wanted):
            raise ValueError(
                f"{name} {_plain(wanted)} is not that of the model {recipe.model}, {_plain(found)}; leave it out "
                f"(the flag --model takes all sizes from the model), or give --model {NO_MODEL} for random weights"
            )
    return model


def _image_changes(recipe: FinetuningRecipe) -> dict[str, Any]:
    changes = {"image_size": recipe.image_size, "num_channels": recipe.num_channels}
    return {name: value for name, value in changes.items() if value is not None}


def _comparable(value: Any) -> Any:
    """A value of a configuration; a list as a tuple, a pair of equal sizes as one number."""
    if isinstance(value, list | tuple):
        return value[0] if len(value) == 2 and value[0] == value[1] and isinstance(value[0], int) else tuple(value)
    return value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


# Images


@dataclass(frozen=True)
class CentralCropTransform(EvaluationTransform):
    """Resizes the shorter side to `shortest_edge` and takes the centre of `image_size`, as an image processor does.

    Attributes:
        shortest_edge: pixels.
    """

    shortest_edge: int = 256

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[C, H, W] uint8 of any size → [C, rows, columns] float32; `generator` is not used."""
        resized = v2.functional.resize(image, [self.shortest_edge], v2.InterpolationMode.BICUBIC, antialias=True)
        rows, columns = as_pair(self.image_size)
        # Half a pixel goes to the top and left, as in transformers (torchvision rounds it to even).
        top, left = (resized.shape[-2] - rows) // 2, (resized.shape[-1] - columns) // 2
        return self._normalized(resized[:, top : top + rows, left : left + columns])


def complete_recipe(recipe: FinetuningRecipe, config: GreenSwinConfig) -> FinetuningRecipe:
    """The recipe with what it leaves to the model: size and channels of images, and their normalisation.

    Raises:
        ValueError: mean or std do not fit the channels, or images can be neither grey nor colour.
    """
    channels = config.num_channels
    if channels not in (1, 3):
        raise ValueError(f"num_channels {channels} of the model must be 1 (grey) or 3 (colour)")
    mean, std = recipe.mean, recipe.std
    if (mean is None or std is None) and not recipe.from_scratch:
        processor = _processor_of(recipe.model)
        if processor is not None and len(processor.image_mean) == channels:
            mean, std = mean or tuple(processor.image_mean), std or tuple(processor.image_std)
    defaults = EvaluationTransform(as_pair(config.image_size), channels, mean=mean, std=std)  # raises where they misfit
    size = config.image_size if isinstance(config.image_size, int) else tuple(config.image_size)
    return recipe.replace(image_size=size, num_channels=channels, mean=defaults.mean, std=defaults.std)


def _processor_of(folder: str) -> Any:
    with contextlib.suppress(OSError, ValueError), quiet_transformers():
        return AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    return None


def build_transforms(recipe: FinetuningRecipe) -> tuple[FinetuningTransform, EvaluationTransform]:
    """(for training, for evaluation) of a complete recipe."""
    size = as_pair(_known(recipe.image_size))
    shared: dict[str, Any] = {"num_channels": recipe.num_channels, "mean": recipe.mean, "std": recipe.std}
    names = ("crop_scale", "crop_ratio", "rand_augment", "rand_augment_std", "rand_augment_ops")
    more = ("rand_augment_probability", "color_jitter", "random_erasing")
    augmentation = {name: getattr(recipe, name) for name in (*names, *more)}
    training = FinetuningTransform(size, flip=0.5 if recipe.flip else 0.0, **augmentation, **shared)
    if recipe.evaluation_crop is None:
        return training, EvaluationTransform(size, **shared)
    return training, CentralCropTransform(size, shortest_edge=_shortest_edge(recipe), **shared)


def build_processor(recipe: FinetuningRecipe) -> ViTImageProcessor:
    """What prepares images for the finished model as evaluation does, of a complete recipe."""
    rows, columns = as_pair(_known(recipe.image_size))
    size = {"height": rows, "width": columns}
    crop: dict[str, Any] = {}
    if recipe.evaluation_crop is not None:
        crop = {"do_center_crop": True, "crop_size": size}
        size = {"shortest_edge": _shortest_edge(recipe)}
    # Colour needs nothing of ours, so its file names the class that everybody has.
    kind = ViTImageProcessor if recipe.num_channels == 3 else GreenSwinImageProcessor
    return kind(
        size=size,
        resample=3,  # bicubic
        image_mean=list(_known(recipe.mean)),
        image_std=list(_known(recipe.std)),
        do_convert_rgb=recipe.num_channels == 3 or None,
        **crop,
    )


def _shortest_edge(recipe: FinetuningRecipe) -> int:
    return round(max(as_pair(_known(recipe.image_size))) / _known(recipe.evaluation_crop))


def _known(value: Any) -> Any:
    if value is None:
        raise TypeError("the recipe is not complete: see complete_recipe")
    return value


def split_off(images: LabelledImages, share: float, seed: int) -> tuple[LabelledImages, LabelledImages | None]:
    """(images to train on, a class-balanced share of the images to measure on; None with a share of 0).

    Raises:
        ValueError: nothing would be left to train on of some class.
    """
    if not share:
        return images, None
    held = label_budget(images.labels, share, seed)
    rest = sorted(set(range(len(images))) - set(held))
    train = images.select(rest)
    without = [images.class_names[i] for i in sorted(set(images.labels.tolist()) - set(train.labels.tolist()))]
    if without:
        raise ValueError(
            f"data set {images.source.name!r} has too few images of class {without[0]!r} to hold out {share:.0%} for "
            "validation; give --validation-split, or --validation-share 0"
        )
    return train, images.select(held)


def check_readable(parts: Mapping[str, LabelledDataset | None]) -> None:
    """Decode the first image of each part of the data, or the first after it that can be, to see that one can.

    Args:
        parts: by their names; None for one that there is not.

    Raises:
        ValueError: no image of a part can be decoded, or too many in a row.
    """
    for name, part in parts.items():
        try:
            if part is not None:
                part[0]
        except BrokenDataError as error:
            raise ValueError(f"{name} images: {error}") from None


# Training


class ClassificationTrainer(ResumableTrainer):
    """`Trainer` whose loss takes classes and distributions over them, and whose order of images is its own.

    Labels never reach the model: it would take a distribution for several labels at once. Loss and gradients are means
    over a batch, as the training batches are all of one size. Evaluation, with classes as labels, measures the plain
    cross entropy.

    Args:
        evaluation_collator: makes batches for `evaluate` and `predict`.
    """

    def __init__(self, *args: Any, evaluation_collator: Any = stack_samples, **options: Any):
        super().__init__(*args, **options)
        self.evaluation_collator = evaluation_collator
        self.model_accepts_loss_kwargs = False  # the mean is taken here

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Cross entropy in float32 with `labels` [B] (classes) or [B, classes] (distributions)."""
        outputs = model(pixel_values=inputs["pixel_values"])
        loss = cross_entropy(outputs.logits.float(), inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    def _get_learning_rate(self) -> float:
        """That of the head for the log, the highest: with layer-wise decay the first group has the lowest."""
        scheduler: Any = self.lr_scheduler
        return max(scheduler.get_last_lr())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        return EpochSampler(dataset, seed=self.args.seed)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        with self._evaluating():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        with self._evaluating():
            return super().get_test_dataloader(test_dataset)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Nothing is mixed or left out in evaluation."""
        training, drop_last = self.data_collator, self.args.dataloader_drop_last
        self.data_collator, self.args.dataloader_drop_last = self.evaluation_collator, False
        try:
            yield
        finally:
            self.data_collator, self.args.dataloader_drop_last = training, drop_last


__all__ = [
    "CentralCropTransform",
    "ClassificationTrainer",
    "build_classifier",
    "build_processor",
    "build_transforms",
    "check_readable",
    "complete_recipe",
    "split_off",
]
