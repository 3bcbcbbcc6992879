"""Images with classes: opening a labelled data set of any layout, subsets of its labels, and samples from it."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from .data import EvaluationTransform, PretrainingImages, PretrainingTransform, mix_seed, seeded_generator
from .image_sources import SPLIT_FOLDERS, ImageSource, load_images, sample_fingerprint

logger = logging.getLogger(__name__)

LABEL_COLUMN_NAMES = ("label", "labels", "class", "class_label", "category", "target", "y", "cls")
FOLDER_LABEL_COLUMN = "label"


@dataclass(frozen=True)
class LabelledImages:
    """An opened data set whose images have a class each.

    Attributes:
        source: the images, as `load_images` gives them: undecoded records, map-style.
        label_column: column of `source.dataset` with integers 0 … `len(class_names) - 1`.
        class_names: a name for each class.
    """

    source: ImageSource
    label_column: str
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.source.dataset)

    @property
    def labels(self) -> Tensor:
        """[N] int64, the class of each image; no image is read."""
        return torch.from_numpy(_read_column(self.source.dataset, self.label_column).to_numpy().astype(np.int64))

    def select(self, rows: Sequence[int]) -> LabelledImages:
        """These rows alone, in this order, with the same classes."""
        return replace(self, source=self.source.select(rows))

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that other images, or the same with other labels, hardly share."""
        return sample_fingerprint(self.source.dataset, [self.source.image_column], self.labels.numpy().tobytes())


def load_labelled_images(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    label_column: str | None = None,
    subset: str | None = None,
    class_names: Sequence[str] | None = None,
) -> LabelledImages:
    """Open one split of a data set of images with a class each, without decoding any.

    Args:
        source: as for `load_images`. In a folder of images the class is the first folder below the split's (below the
            top where there are no split folders); elsewhere it is a column of class labels, integers or text.
        split, image_column, subset: as for `load_images`.
        label_column: column with the classes; found by its type, then by its name, when not given.
        class_names: the classes to use, such as those of the training split or of a model. Classes are matched by name,
            plain integers count in this order, and some may have no image. By default the data's own: in the order of
            its class labels, else sorted; each must have an image.

    Raises:
        ValueError: as `load_images`; no labels or several columns of them, images without a label, a class without
            images, or a class that is not among `class_names`: one line that names the value and the remedy.
    """
    images = load_images(source, split=split, image_column=image_column, subset=subset)
    place = f"data set {images.name!r}, split {split!r}"
    if _is_image_folder(images):
        if label_column:
            raise ValueError(
                f"{place} is a folder of images, which has no column {label_column!r}: its sub-folders are the classes"
            )
        images, label_column = _with_folder_classes(images, split, place), FOLDER_LABEL_COLUMN
    else:
        label_column = _find_label_column(images.dataset.features, images.image_column, label_column, images.name)
    values = _read_column(images.dataset, label_column)
    given = None if class_names is None else tuple(class_names)
    labels, names = _as_classes(values, images.dataset.features[label_column], given, f"{place}: column {label_column}")
    if given is None:
        _check_all_present(labels, names, place)
    dataset = images.dataset.remove_columns(label_column)
    dataset = dataset.add_column(label_column, pa.array(labels), feature=datasets.ClassLabel(names=list(names)))
    return LabelledImages(replace(images, dataset=dataset), label_column, names)


def label_budget(labels: Tensor, share_or_count: float | int, seed: int) -> list[int]:
    """Rows of a random subset in which the classes have equally many images, as far as they have them.

    Every class that occurs has at least one. With one seed a smaller subset is part of every larger one.

    >>> label_budget(torch.tensor([0, 0, 0, 0, 1, 2, 2, 2]), 5, seed=0)
    [2, 3, 4, 5, 6]

    Args:
        labels: [N] integers.
        share_or_count: images in the subset: a share of all in (0, 1] as a `float`, or how many as an `int`; more than
            N are all.
        seed: of the draw.

    Raises:
        ValueError: a share outside (0, 1], or a count below 1.
    """
    is_share = isinstance(share_or_count, float)
    if is_share and not 0 < share_or_count <= 1:
        raise ValueError(f"share {share_or_count} of the labels must be greater than 0 and at most 1")
    if not is_share and share_or_count < 1:
        raise ValueError(f"count {share_or_count} of labels must be at least 1")
    order = torch.randperm(len(labels), generator=seeded_generator(seed, 0))
    classes, inverse = torch.unique(labels[order], return_inverse=True)
    turn = torch.randperm(len(classes), generator=seeded_generator(seed, 1))  # of classes, where not all get one more
    by_class = torch.argsort(inverse, stable=True)
    sizes = torch.bincount(inverse)
    first = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    rank = torch.empty_like(inverse)  # of each image among those of its class, in the random order
    rank[by_class] = torch.arange(len(inverse)) - first
    count = max(len(classes), round(len(labels) * share_or_count) if is_share else int(share_or_count))
    chosen = torch.argsort(rank * len(classes) + turn[inverse])[:count]  # all first ones, all second ones, …
    return sorted(order[chosen].tolist())


class LabelledDataset(PretrainingImages):
    """Transformed images of a labelled source with their classes.

    Keys are those of `PretrainingImages`: with `key = epoch * len(self) + index` a sample is a function of (seed,
    epoch, index) alone, so that `EpochSampler` orders it too. An image that cannot be decoded is replaced by the next
    one that can, with that one's class, and named once in a warning of this module's logger.

    Args:
        images: what `load_labelled_images` returns.
        transform: called with [C, H, W] uint8 and the sample's generator, returns [C, rows, columns] float32; its
            `color_mode` says how to decode.
        seed: of all randomness.
        cache_bytes: memory for decoded images, in each worker.
    """

    def __init__(
        self,
        images: LabelledImages,
        transform: PretrainingTransform | EvaluationTransform | Any,
        *,
        seed: int = 0,
        cache_bytes: int = 0,
    ):
        super().__init__(images.source, transform, seed=seed, cache_bytes=cache_bytes)
        self.labels = images.labels.tolist()
        self.class_names = images.class_names
        self._warned: set[str] = set()

    def __getitem__(self, key: int) -> dict[str, Any]:
        """The sample of one key: `pixel_values` [C, rows, columns] float32 and `labels`, an int."""
        if key < 0:
            raise IndexError(f"key {key} must be 0 or more")
        epoch, index = divmod(key, len(self))
        image, skipped = self._read(index)
        for name, reason in skipped:
            if name not in self._warned:
                self._warned.add(name)
                logger.warning("Bad image %s: %s; another one takes its place", name, reason)
        generator = seeded_generator(mix_seed(self.seed, epoch, index))
        return {
            "pixel_values": self.transform(image, generator),
            "labels": self.labels[(index + len(skipped)) % len(self)],
        }


def _read_column(dataset: datasets.Dataset, column: str) -> pa.ChunkedArray:
    return dataset.select_columns([column]).with_format("arrow")[:][column]


def _is_image_folder(images: ImageSource) -> bool:
    """Whether `load_images` made the data set of the files of a folder: it has nothing but their paths."""
    is_folder = Path(images.name).expanduser().is_dir() and list(images.dataset.features) == [images.image_column]
    if not is_folder or len(images.dataset) == 0:
        return is_folder
    record = images.dataset[0][images.image_column]
    return record["bytes"] is None and record["path"] is not None


def _with_folder_classes(images: ImageSource, split: str, place: str) -> ImageSource:
    """The source with a column of the names of the class folders."""
    root = Path(images.name).expanduser().absolute()
    paths = [Path(record["path"]) for record in _read_column(images.dataset, images.image_column).to_pylist()]
    parts = [path.relative_to(root).parts for path in paths]
    if all(SPLIT_FOLDERS.get(names[0].lower()) == split for names in parts):
        parts = [names[1:] for names in parts]
    for path, names in zip(paths, parts, strict=True):
        if len(names) < 2:
            raise ValueError(
                f"{place}: image {path} has no class; put the images of each class into a sub-folder with its name"
            )
    classes = pa.array([names[0] for names in parts])
    return replace(images, dataset=images.dataset.add_column(FOLDER_LABEL_COLUMN, classes))


def _find_label_column(features: datasets.Features, image_column: str, wanted: str | None, name: str) -> str:
    others = {column: feature for column, feature in features.items() if column != image_column}
    if wanted is not None:
        candidates = [wanted] if wanted in others and _can_hold_classes(others[wanted]) else []
        problem = f"has no column {wanted!r}" if wanted not in others else f"holds no classes in {wanted!r}"
    else:
        candidates = [column for column, feature in others.items() if isinstance(feature, datasets.ClassLabel)]
        if not candidates:
            named = [column for column in others if column.lower() in LABEL_COLUMN_NAMES]
            candidates = [column for column in named if _can_hold_classes(others[column])]
        problem = "has several columns of classes" if candidates else "has no column known to hold classes"
    if len(candidates) == 1:
        return candidates[0]
    choices = ", ".join(candidates or (column for column, feature in others.items() if _can_hold_classes(feature)))
    remedy = f"set --label-column to one of: {choices}" if choices else "give one with a column of integers or text"
    raise ValueError(f"data set {name!r} {problem}; {remedy}")


def _can_hold_classes(feature: Any) -> bool:
    dtype = str(getattr(feature, "dtype", ""))
    return isinstance(feature, datasets.ClassLabel | datasets.Value) and (_is_text(dtype) or "int" in dtype)


def _is_text(dtype: str) -> bool:
    return dtype in ("string", "large_string")


def _as_classes(
    values: pa.ChunkedArray, feature: Any, given: tuple[str, ...] | None, place: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """(class of each row [N] int64, names of the classes)."""
    if _is_text(feature.dtype):
        found, numbers = np.unique(np.array(_without_unlabelled(values, place), dtype=object), return_inverse=True)
        return _matched(numbers, tuple(str(name) for name in found), given, place)
    numbers = np.array(_without_unlabelled(values, place), dtype=np.int64)
    if isinstance(feature, datasets.ClassLabel):
        return _matched(numbers, tuple(feature.names), given, place)
    names = given or tuple(str(number) for number in range(int(numbers.max()) + 1))
    if numbers.max() >= len(names):
        raise ValueError(
            f"{place} has class {numbers.max()}, but there are {len(names)} classes: 0 to {len(names) - 1}; give data "
            "with these classes"
        )
    return numbers, names


def _without_unlabelled(values: pa.ChunkedArray, place: str) -> list[Any]:
    """The values, none of which is None, an empty text or negative (-1 stands for an unknown class)."""
    listed = values.to_pylist()
    if not listed:
        raise ValueError(f"{place} has no rows; give another --split")
    unlabelled = [row for row, value in enumerate(listed) if value in (None, "") or value == -1]
    if unlabelled:
        raise ValueError(
            f"{place} has no class ({listed[unlabelled[0]]!r}) in {len(unlabelled)} of {len(listed)} rows, the first "
            f"is row {unlabelled[0]}; give a split in which every image has one"
        )
    negative = next((value for value in listed if not isinstance(value, str) and value < 0), None)
    if negative is not None:
        raise ValueError(f"{place} has class {negative}; classes are integers from 0 on, or text")
    return listed


def _matched(
    numbers: np.ndarray, found: tuple[str, ...], given: tuple[str, ...] | None, place: str
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Classes and names in the order of `given`, by name; as they are without it."""
    if given is None or given == found:
        return numbers.astype(np.int64), found
    unknown = sorted({found[number] for number in np.unique(numbers)} - set(given))
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        known = ", ".join(given[:10]) + (", …" if len(given) > 10 else "")
        raise ValueError(
            f"{place} has the class {unknown[0]!r}{more}, which is not among the {len(given)} known ones ({known}); "
            "splits and models must have the same class names"
        )
    place_of = {name: number for number, name in enumerate(given)}
    mapping = np.array([place_of.get(name, -1) for name in found], dtype=np.int64)
    return mapping[numbers], given


def _check_all_present(labels: np.ndarray, names: tuple[str, ...], place: str) -> None:
    present = set(np.unique(labels).tolist())
    missing = [name for number, name in enumerate(names) if number not in present]
    if missing:
        raise ValueError(
            f"{place} has no image of class {missing[0]!r} ({len(missing)} of {len(names)} classes have none); give a "
            "split with images of every class (integer labels count from 0)"
        )


__all__ = ["LabelledDataset", "LabelledImages", "label_budget", "load_labelled_images"]
