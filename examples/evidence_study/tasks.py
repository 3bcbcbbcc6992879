"""The images of a study in memory, and how they vary in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from green_swin_hf.data import decode_image, load_images, seeded_generator
from green_swin_hf.labelled_images import LabelledImages, load_labelled_images

from .placed import Placement, place_garments, prepare_photo
from .recipe import StudyRecipe

# Each split's placements are drawn apart; they do not change with the seed of a run.
_SPLITS = {"train": 0, "validation": 1, "test": 2}
_MORE_TEST = 1000  # further placements of the test split are drawn from here on, those of the training split below


@dataclass(frozen=True)
class Split:
    """Images [N, 1, S, S] uint8 and their classes [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, index: Tensor | list[int] | slice) -> Split:
        return Split(self.images[index], self.labels[index])


def concatenated(splits: Sequence[Split]) -> Split:
    return Split(torch.cat([split.images for split in splits]), torch.cat([split.labels for split in splits]))


@dataclass(frozen=True)
class Task:
    """What a study trains on.

    Attributes:
        unlabelled: [N, 1, S, S] uint8, what encoders are pretrained on; those of `train` come first.
        train: what labelled images are drawn from.
        validation, test: what chooses, and what counts.
        mean, std, shift, flip: as in the recipe.
    """

    unlabelled: Tensor
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: float
    std: float
    shift: int
    flip: bool

    def pixels(self, images: Tensor) -> Tensor:
        """[B, 1, S, S] float32, normalised."""
        return (images.float() / 255 - self.mean) / self.std

    def varied(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """As `pixels`, mirrored and shifted at random: the same mild variation for every training of every arm."""
        return self.pixels(vary(images, generator, self.shift, self.flip))


def vary(images: Tensor, generator: torch.Generator, shift: int, flip: bool) -> Tensor:
    """Images [B, C, H, W], half of them mirrored, each shifted by up to `shift` pixels; borders are repeated."""
    count, _, height, width = images.shape
    mirrored = (torch.rand(count, generator=generator) < 0.5) & flip
    offsets = torch.randint(2 * shift + 1, (2, count, 1), generator=generator)
    rows = (torch.arange(height) + offsets[0] - shift).clamp(0, height - 1)
    columns = (torch.arange(width) + offsets[1] - shift).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    batch = torch.arange(count)[:, None, None]
    return images.transpose(0, 1)[:, batch, rows[:, :, None], columns[:, None, :]].transpose(0, 1)


def load_task(recipe: StudyRecipe) -> Task:
    """Read the data set and make the images of the recipe's task.

    A data set without a validation split lends the last `validation_images` of its training split.

    Raises:
        ValueError: the data cannot be read, are not grey squares of one size, or are too few.
    """
    if not recipe.data:
        raise ValueError("data is missing; give a labelled data set with --data")
    train = load_labelled_images(recipe.data, split="train")
    test = load_labelled_images(recipe.data, split="test", class_names=train.class_names)
    count = recipe.validation_images
    try:
        validation = load_labelled_images(recipe.data, split="validation", class_names=train.class_names)
    except ValueError as error:
        if "no split" not in str(error):
            raise
        if count >= len(train):
            raise ValueError(f"validation_images {count} must be fewer than the {len(train)} training images") from None
        validation = train.select(range(len(train) - count, len(train)))
        train = train.select(range(len(train) - count))
    limits = {"train": recipe.train_images, "validation": count, "test": recipe.test_images}
    splits = {"train": train, "validation": validation, "test": test}
    read = {name: _read(splits[name], limits[name]) for name in splits}
    photos = _read_photos(recipe.photos) if recipe.task == "placed" else []
    done = {name: _as_task(split, recipe, photos, _SPLITS[name]) for name, split in read.items()}
    again = [
        _as_task(read["train"], recipe, photos, len(_SPLITS) + number).images for number in range(recipe.placements - 1)
    ]
    more = [_as_task(read["test"], recipe, photos, _MORE_TEST + number) for number in range(recipe.test_placements - 1)]
    done["test"] = concatenated([done["test"], *more])
    return Task(
        unlabelled=torch.cat([done["train"].images, *again]),
        **done,
        class_names=train.class_names,
        mean=recipe.mean,
        std=recipe.std,
        shift=recipe.shift,
        flip=recipe.flip,
    )


def _read(images: LabelledImages, limit: int | None) -> Split:
    if limit is not None:
        images = images.select(range(min(limit, len(images))))
    records = images.source.dataset[images.source.image_column]
    pixels = [decode_image(record, "L", f"row {row}") for row, record in enumerate(records)]
    sizes = {tuple(image.shape) for image in pixels}
    if len(sizes) > 1:
        raise ValueError(f"data set {images.source.name!r} has images of {len(sizes)} sizes; a study takes one size")
    return Split(torch.stack(pixels), images.labels)


def _read_photos(folder: str) -> list[Tensor]:
    if not folder:
        raise ValueError("task placed needs photographs for backgrounds; give a folder with --photos")
    source = load_images(folder)
    records = source.dataset[source.image_column]
    return [prepare_photo(decode_image(record, "L", f"photo {row}")) for row, record in enumerate(records)]


def _as_task(split: Split, recipe: StudyRecipe, photos: list[Tensor], number: int) -> Split:
    if recipe.task == "placed":
        placement = Placement(
            size=recipe.image_size,
            scale=recipe.placed_scale,
            degrees=recipe.placed_degrees,
            gain=recipe.placed_gain,
            background=recipe.background_gain,
        )
        return replace(split, images=place_garments(split.images, photos, placement, seed=number))
    return replace(split, images=with_margin(split.images, recipe.image_size))


def with_margin(images: Tensor, size: int) -> Tensor:
    """Images in the middle of black squares of `size` pixels.

    Raises:
        ValueError: they are larger.
    """
    height, width = images.shape[-2:]
    if max(height, width) > size:
        raise ValueError(f"image_size {size} must be at least the {height}x{width} pixels of the images")
    top, left = (size - height) // 2, (size - width) // 2
    return pad(images, [left, size - width - left, top, size - height - top])


def shuffled(count: int, seed: int, epoch: int) -> Tensor:
    """Order of `count` images in an epoch."""
    return torch.randperm(count, generator=seeded_generator(seed, epoch))
