"""Images with a class for every pixel: opening data sets, reading masks, augmentation of image and mask together.

A mask is an image of one channel whose pixels are class numbers; 255 is a pixel without a class, which counts
neither in training nor in evaluation.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional
from transformers import SegformerImageProcessor

from .data import mix_seed
from .drawn_shapes import SHAPE_NAMES, draw_shapes_image
from .image_decoding import CorruptImageError, decode_image, open_image, reason_of, turn_upright, upright_size
from .image_sources import ENCODED_DTYPES, IMAGE_EXTENSIONS, SPLIT_FOLDERS, load_images, sample_fingerprint

IGNORED_LABEL = 255
IMAGE_FOLDERS = ("images",)
MASK_FOLDERS = ("masks", "annotations", "labels")
MASK_COLUMN_NAMES = (
    "mask",
    "masks",
    "label",
    "labels",
    "annotation",
    "segmentation_mask",
    "segmentation_map",
    "segmap",
)
CLASS_NAMES_FILE = "classes.json"
DRAWN_CLASSES = ("background", *SHAPE_NAMES)
_CROP_TRIES = 10


@dataclass(frozen=True)
class ImagesWithMasks:
    """One split of a data set.

    Attributes:
        dataset: `image_column` and `mask_column` give undecoded records `{"bytes", "path"}`.
        name: what was asked for, with the split, for messages.
    """

    dataset: datasets.Dataset
    image_column: str
    mask_column: str
    name: str

    def __len__(self) -> int:
        return len(self.dataset)

    def select(self, rows: Sequence[int]) -> ImagesWithMasks:
        """Some of the rows, in the order given."""
        return ImagesWithMasks(self.dataset.select(rows), self.image_column, self.mask_column, self.name)

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that other images or other masks hardly share, wherever they lie."""
        return sample_fingerprint(self.dataset, [self.image_column, self.mask_column])


def load_images_with_masks(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    image_column: str | None = None,
    mask_column: str | None = None,
    subset: str | None = None,
) -> ImagesWithMasks:
    """Open one split of a data set without decoding any image.

    Args:
        source: a folder with `train/images` and `train/masks` (or `images/train` and `masks/train`, or `images` and
            `masks` alone, which are then "train"), whose files have the same names but for the ending; or what
            `load_images` takes, with a column of images and a column of masks.
        split: name of the split: train, validation or test (also val, testing, …) of a folder.
        image_column, mask_column: found by their types and names when not given.
        subset: configuration of a data set that has several.

    Raises:
        ValueError: missing path, split or column, an image without its mask or the other way round: one line.
    """
    name = os.fspath(source)
    folders = find_mask_folders(name)
    if folders:
        if split not in folders:
            raise ValueError(f"data set {name!r} has no split {split!r}; choose one of: {', '.join(folders)}")
        pairs = _pair_files(*folders[split])
        features = datasets.Features({"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)})
        columns = {"image": [str(image) for image, _ in pairs], "mask": [str(mask) for _, mask in pairs]}
        return ImagesWithMasks(datasets.Dataset.from_dict(columns, features), "image", "mask", f"{name} ({split})")
    return _load_columns(name, split, image_column, mask_column, subset)


def find_mask_folders(source: str) -> dict[str, tuple[Path, Path]]:
    """Folder of images and folder of masks of each split; empty where the source is no folder with such folders."""
    root = Path(source).expanduser()
    if not root.is_dir():
        return {}
    children = sorted(child for child in root.iterdir() if child.is_dir() and child.name.lower() in SPLIT_FOLDERS)
    found = {SPLIT_FOLDERS[child.name.lower()]: pair for child in children if (pair := _image_and_mask_folder(child))}
    top = _image_and_mask_folder(root)
    if found or top is None:
        return found
    below = {child.name: child for child in sorted(top[0].iterdir()) if child.name.lower() in SPLIT_FOLDERS}
    found = {
        SPLIT_FOLDERS[name.lower()]: (child, top[1] / name)
        for name, child in below.items()
        if child.is_dir() and (top[1] / name).is_dir()
    }
    return found or {"train": top}


def _image_and_mask_folder(folder: Path) -> tuple[Path, Path] | None:
    images = next((folder / name for name in IMAGE_FOLDERS if (folder / name).is_dir()), None)
    masks = next((folder / name for name in MASK_FOLDERS if (folder / name).is_dir()), None)
    return (images, masks) if images and masks else None


def _pair_files(images: Path, masks: Path) -> list[tuple[Path, Path]]:
    """Images and masks of the same name, in the order of the names.

    Raises:
        ValueError: there are none, one has no counterpart, or two files differ in their ending only.
    """
    found = [_files_by_name(folder) for folder in (images, masks)]
    for here, there, folder in ((found[0], found[1], masks), (found[1], found[0], images)):
        alone = sorted(set(here) - set(there))
        if alone:
            more = f" (nor have {len(alone) - 1} others)" if len(alone) > 1 else ""
            raise ValueError(f"{here[alone[0]]} has no counterpart in {folder}{more}; give both the same name")
    if not found[0]:
        raise ValueError(f"folder {images} holds no images; fill it, or name another split")
    return [(found[0][name], found[1][name]) for name in sorted(found[0])]


def _files_by_name(folder: Path) -> dict[str, Path]:
    """Image files below the folder by their path without ending."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in IMAGE_EXTENSIONS or path.name.startswith("."):
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise ValueError(f"{found[name]} and {path} differ in their ending only; remove one of them")
        found[name] = path
    return found


def _load_columns(
    name: str, split: str, image_column: str | None, mask_column: str | None, subset: str | None
) -> ImagesWithMasks:
    if image_column is None and mask_column is not None:
        raise ValueError(f"--mask-column {mask_column} is given alone; give --image-column as well")
    # `load_images` takes the only column of images; where masks have the type too, the usual names tell them apart.
    try:
        source = load_images(name, split=split, image_column=image_column, subset=subset)
    except ValueError as error:
        if image_column is not None or "several image columns" not in str(error):
            raise
        source = load_images(name, split=split, image_column="image", subset=subset)
    assert isinstance(source.dataset, datasets.Dataset)
    features = source.dataset.features
    others = [column for column in features if column != source.image_column and _can_hold_masks(features[column])]
    if mask_column is None:
        mask_column = next((column for column in others if column.lower() in MASK_COLUMN_NAMES), None)
    if mask_column is None or mask_column not in others:
        problem = "column known to hold masks" if mask_column is None else f"masks in a column {mask_column!r}"
        choice = f", or set --mask-column to one of: {', '.join(others)}" if others else ""
        raise ValueError(
            f"data set {name!r} has no {problem}; put a folder's files into train/images and train/masks{choice}"
        )
    dataset = source.dataset.cast_column(mask_column, datasets.Image(decode=False))
    return ImagesWithMasks(dataset, source.image_column, mask_column, f"{name} ({split})")


def _can_hold_masks(feature: Any) -> bool:
    is_record = isinstance(feature, dict) and "bytes" in feature
    return is_record or isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ENCODED_DTYPES


def read_class_names(path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Names of the classes from a JSON file: a list, or a mapping of class numbers to names.

    Raises:
        ValueError: no such file, or another content.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"class names {path} do not exist; give a JSON file with a list: --class-names FILE") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"class names {path} cannot be read: {error}") from None
    if isinstance(content, dict):
        numbers = [str(number) for number in range(len(content))]
        content = [content[number] for number in numbers] if set(content) == set(numbers) else None
    if not isinstance(content, list) or not all(isinstance(name, str) and name for name in content):
        raise ValueError(
            f"class names {path} must be a JSON list of names, or a mapping of the numbers 0, 1, … to names"
        )
    if not 2 <= len(content) <= IGNORED_LABEL or len(set(content)) < len(content):
        raise ValueError(f"class names {path} must be 2 to {IGNORED_LABEL} different names, not {len(content)}")
    return tuple(content)


def decode_mask(record: Mapping[str, Any] | None, unnamed: str = "a mask without a path") -> Tensor:
    """Decode one mask: [H, W] int64, the numbers stored in its pixels (with a palette: the places in it).

    Raises:
        CorruptImageError: it cannot be read, or has colours instead of one channel of numbers.
    """
    record = record or {}
    name = record.get("path") or unnamed
    try:
        with open_image(record) as file:
            turn_upright(file)
            values = np.array(file)
    except Exception as error:  # PIL raises nearly every built-in exception on damaged files
        raise CorruptImageError(name, f"cannot be read as a mask ({reason_of(error)})") from error
    if values.ndim != 2 or values.dtype.kind not in "bui":
        raise CorruptImageError(name, "has colours; a mask has one channel with the class number of every pixel")
    return torch.from_numpy(values.astype(np.int64))


def read_labels(record: Mapping[str, Any] | None, num_classes: int, reduce_labels: bool, unnamed: str) -> Tensor:
    """[H, W] uint8: classes `0 … num_classes - 1`, or 255 for a pixel without one.

    Args:
        reduce_labels: 0 stands for no class and 1 for the first, as in ADE20K.

    Raises:
        CorruptImageError: as `decode_mask`.
        ValueError: a number that is no class.
    """
    mask = decode_mask(record, unnamed)
    labels = torch.where((mask == 0) | (mask == IGNORED_LABEL), IGNORED_LABEL, mask - 1) if reduce_labels else mask
    wrong = (labels < 0) | ((labels >= num_classes) & (labels != IGNORED_LABEL))
    if wrong.any():
        name, first = (record or {}).get("path") or unnamed, int(reduce_labels)
        raise ValueError(
            f"mask {name} has label {int(mask[wrong][0])}, outside {first} … {num_classes - 1 + first} "
            f"(and {IGNORED_LABEL}: ignored); name all classes with --class-names, or mend the mask"
        )
    return labels.to(torch.uint8)


class SegmentationDataset(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Images with labels for the model, read by keys that hold the epoch.

    With `key = epoch * len(self) + index` a sample is a function of (seed, epoch, index) alone. A plain index is a key
    of epoch 0.

    Args:
        source: images and masks.
        transform: from ([3, H, W] uint8, [H, W] uint8) to ([3, h, w] float32, [h', w'] int64); its randomness comes
            from torch's global generator, which is left as it was.
        num_classes: classes of the masks.
        reduce_labels: 0 in the masks stands for no class and 1 for the first.
        seed: of the randomness.
    """

    def __init__(
        self, source: ImagesWithMasks, transform: Any, *, num_classes: int, reduce_labels: bool = False, seed: int = 0
    ):
        self.source = source
        self.transform = transform
        self.num_classes = num_classes
        self.reduce_labels = reduce_labels
        self.seed = seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: int) -> dict[str, Tensor]:
        """`pixel_values` [3, h, w] float32 and `labels` [h', w'] int64.

        Raises:
            ValueError: an image or mask that cannot be read, a label that is no class, two sizes.
        """
        epoch, index = divmod(key, len(self))
        try:
            image, labels = self.read(index)
        except CorruptImageError as error:  # whose two arguments a loader's worker could not hand over
            raise ValueError(str(error)) from error
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(mix_seed(self.seed, epoch, index))
            pixel_values, labels = self.transform(image, labels)
        return {"pixel_values": pixel_values, "labels": labels}

    def read(self, index: int) -> tuple[Tensor, Tensor]:
        """Image [3, H, W] and labels [H, W] of a row, both uint8."""
        row = self.source.dataset[index]
        record = row[self.source.image_column]
        labels = self.read_labels(index, row)
        rows, columns = labels.shape
        image = decode_image(record, "RGB", f"row {index}", size=(rows, columns))  # turned as its mask was drawn
        if labels.shape != image.shape[1:]:
            raise _size_error(record, f"row {index}", tuple(image.shape[1:]), labels)
        return image, labels

    def read_labels(self, index: int, row: Mapping[str, Any] | None = None) -> Tensor:
        """Labels [H, W] uint8 of a row."""
        row = self.source.dataset[index] if row is None else row
        return read_labels(row[self.source.mask_column], self.num_classes, self.reduce_labels, f"row {index}")

    def check(self, rows: Sequence[int]) -> Tensor:
        """Read the masks of some rows and the sizes of their images: pixels of each class, [num_classes] int64.

        Raises:
            ValueError: an image or mask that cannot be read, a label that is no class, two sizes.
        """
        counts = torch.zeros(self.num_classes, dtype=torch.int64)
        for index in rows:
            row = self.source.dataset[index]
            labels = self.read_labels(index, row)
            upright, stored = _image_sizes(record := row[self.source.image_column], f"row {index}")
            if labels.shape not in (upright, stored):
                raise _size_error(record, f"row {index}", upright, labels)
            counts += labels.flatten().bincount(minlength=IGNORED_LABEL + 1)[: self.num_classes]
        return counts


def _size_error(record: Mapping[str, Any], unnamed: str, size: tuple[int, ...], labels: Tensor) -> ValueError:
    image, mask = ("x".join(map(str, shape)) for shape in (size, labels.shape))
    name = record.get("path") or unnamed
    return ValueError(f"image {name} has {image} pixels and its mask {mask}; give both the same rows and columns")


def _image_sizes(record: Mapping[str, Any], unnamed: str) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rows, columns) from the head of an image file, upright and as stored."""
    name = record.get("path") or unnamed
    try:
        with open_image(record) as file:
            return upright_size(file), (file.height, file.width)
    except Exception as error:  # PIL raises nearly every built-in exception on damaged files
        raise CorruptImageError(name, reason_of(error)) from error


class RandomRescale(v2.Transform):
    """Resize image and mask by a random factor, keeping the proportions; a mask by its nearest pixels.

    Args:
        scale_range: smallest and largest factor, uniform between.
        short_side: pixels of the shorter side at factor 1; None: that of the image.
        long_side: the longer side at factor 1 has no more pixels than this.
    """

    def __init__(self, scale_range: tuple[float, float], short_side: int | None = None, long_side: int | None = None):
        super().__init__()
        self.scale_range = scale_range
        self.short_side = short_side
        self.long_side = long_side

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = flat_inputs[0].shape[-2:]
        factor = (self.short_side or min(height, width)) / min(height, width)
        if self.long_side:
            factor = min(factor, self.long_side / max(height, width))
        factor *= torch.empty(()).uniform_(*self.scale_range).item()
        return {"size": [max(1, round(height * factor)), max(1, round(width * factor))]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if not isinstance(inpt, tv_tensors.Mask):
            return functional.resize(inpt, params["size"], antialias=True)
        # torchvision's own resizing of masks is half a pixel off that of images.
        pixels = functional.resize(inpt.as_subclass(Tensor)[None], params["size"], InterpolationMode.NEAREST_EXACT)
        return tv_tensors.wrap(pixels[0], like=inpt)


class SegmentationAugmentation:
    """Random scale, crop, flip and colours; image and mask move together.

    A crop in which one class fills more than `max_class_share` of the pixels that have a class is drawn anew, up to
    ten times. Where the image ends the crop is filled with the mean colour, and with 255 in the mask.

    Args:
        crop_size: rows and columns of the result.
        mean, std: of each channel, of pixels in 0 … 1.
        scale_range, short_side, long_side: of `RandomRescale`.
        max_class_share: 1 takes every crop.
        flip: mirror half of the images.
        photometric: brightness, contrast, saturation and hue change, each in half of the images.

    Source: the training pipeline of Swin's segmentation repository for ADE20K (Liu et al. 2021, arXiv 2103.14030).
    """

    def __init__(
        self,
        crop_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        scale_range: tuple[float, float] = (0.5, 2.0),
        short_side: int | None = None,
        long_side: int | None = None,
        max_class_share: float = 0.75,
        flip: bool = True,
        photometric: bool = True,
    ):
        fill: dict[Any, Any] = {tv_tensors.Image: [255 * value for value in mean], tv_tensors.Mask: IGNORED_LABEL}
        self.rescale = RandomRescale(scale_range, short_side, long_side)
        self.crop = v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill)
        self.max_class_share = max_class_share
        self.finish = v2.Compose(
            [
                v2.RandomHorizontalFlip(0.5 if flip else 0.0),
                v2.RandomPhotometricDistort() if photometric else v2.Identity(),
                v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
                v2.Normalize(mean, std),
            ]
        )

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """([3, H, W] uint8, [H, W] uint8) → ([3, crop, crop] float32, [crop, crop] int64)."""
        pair = self.rescale(tv_tensors.Image(image), tv_tensors.Mask(labels))
        for _ in range(_CROP_TRIES):
            cropped = self.crop(*pair)
            if self._is_varied(cropped[1]):
                break
        pixel_values, cropped_labels = self.finish(*cropped)
        return pixel_values.as_subclass(Tensor), cropped_labels.as_subclass(Tensor)

    def _is_varied(self, labels: Tensor) -> bool:
        counts = labels.as_subclass(Tensor).flatten().bincount(minlength=IGNORED_LABEL + 1)[:IGNORED_LABEL]
        return bool(0 < counts.max() <= self.max_class_share * counts.sum())


class WholeImages:
    """The same for every look at an image: what the image processor does. The labels keep their size.

    Predictions are enlarged to that size before they are judged, as the processor's
    `post_process_semantic_segmentation` does.
    """

    def __init__(self, processor: SegformerImageProcessor):
        self.processor = processor

    def __call__(self, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """([3, H, W] uint8, [H, W] uint8) → ([3, h, w] float32, [H, W] int64)."""
        return self.processor(images=[image], return_tensors="pt")["pixel_values"][0], labels.long()


def write_drawn_segmentation(
    folder: str | os.PathLike[str],
    photographs: Sequence[Tensor],
    num_images: int,
    seed: int,
    *,
    sides: tuple[int, int] = (96, 160),
    max_shapes: int = 3,
    radii: tuple[float, float] = (0.14, 0.32),
) -> None:
    """Write drawn shapes as `folder/images` and `folder/masks`; the classes are `DRAWN_CLASSES`.

    The same arguments give the same files.

    Args:
        folder: made if it does not exist.
        photographs: [3, H, W] uint8 each, to draw on.
        num_images: how many to draw.
        seed: of everything that is drawn.
        sides: the smallest and the largest number of rows and of columns, drawn apart from each other.
        max_shapes, radii: see `draw_shapes_image`.
    """
    folder = Path(folder)
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(num_images):
        rng = torch.Generator().manual_seed(mix_seed(seed, index))
        rows, columns = torch.randint(sides[0], sides[1] + 1, (2,), generator=rng).tolist()
        photo = photographs[int(torch.randint(len(photographs), (), generator=rng))]
        drawn = draw_shapes_image(photo, rng, (rows, columns), max_shapes=max_shapes, radii=radii)
        labels = torch.zeros(rows, columns, dtype=torch.uint8)
        for mask, label in zip(drawn.masks, drawn.labels.tolist(), strict=True):
            labels[mask] = label + 1
        Image.fromarray(drawn.image.permute(1, 2, 0).numpy()).save(folder / "images" / f"{index:06d}.png")
        Image.fromarray(labels.numpy()).save(folder / "masks" / f"{index:06d}.png")


__all__ = [
    "CLASS_NAMES_FILE",
    "DRAWN_CLASSES",
    "IGNORED_LABEL",
    "ImagesWithMasks",
    "RandomRescale",
    "SegmentationAugmentation",
    "SegmentationDataset",
    "WholeImages",
    "decode_mask",
    "find_mask_folders",
    "load_images_with_masks",
    "read_class_names",
    "read_labels",
    "write_drawn_segmentation",
]
