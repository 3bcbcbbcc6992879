"""Data sets in COCO's format: a file of annotations and a folder of images to boxes, labels and masks.

What a file says is checked when it is opened, so that a bad annotation is named by its id before any training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from pycocotools import mask as run_lengths
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, Mask

from .data import mix_seed, seeded_generator
from .image_decoding import (
    BrokenDataError,
    ColorMode,
    CorruptImageError,
    decode_image,
    open_image,
    reason_of,
    upright_size,
)

MAX_CORRUPT_RUN = 100


@dataclass(frozen=True)
class CocoData:
    """An opened data set. Nothing of its images is read yet.

    Attributes:
        path: of the annotations.
        image_folder: where `file_name` of an image is.
        images: entries with `id`, `file_name`, `width` and `height`.
        objects: of each image in order, its annotations.
        class_names: label `i + 1` is the name `i`.
        category_ids: the file's number of each class, -1 of one that it has not.
    """

    path: Path
    image_folder: Path
    images: tuple[Mapping[str, Any], ...]
    objects: tuple[tuple[Mapping[str, Any], ...], ...]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    @property
    def num_objects(self) -> int:
        return sum(map(len, self.objects))

    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that another annotation file hardly shares, wherever it lies.

        They follow from the bytes of the file, not from the images.
        """
        return hashlib.sha256(self.path.read_bytes()).hexdigest()[:12]

    def for_training(self, skip_empty: bool = True) -> CocoData:
        """Without crowds and boxes of less than a pixel, and without images that have nothing else.

        Args:
            skip_empty: False keeps images without objects.

        Raises:
            ValueError: no image is left.
        """
        pairs = [
            (image, tuple(o for o in objects if not o.get("iscrowd") and _is_a_pixel(o["bbox"], image)))
            for image, objects in zip(self.images, self.objects, strict=True)
        ]
        kept = [pair for pair in pairs if pair[1] or not skip_empty]
        if not any(objects for _, objects in kept):
            raise ValueError(f"{self.path} annotates no objects to train on; give a file with some that are no crowds")
        images, objects = zip(*kept, strict=True)
        return replace(self, images=images, objects=objects)


def _is_a_pixel(box: Sequence[float], image: Mapping[str, Any]) -> bool:
    """Whether both sides of a box have a pixel inside the image."""
    left, top, width, height = box
    right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
    return right - max(left, 0) >= 1 and bottom - max(top, 0) >= 1


def load_coco(
    annotations: str | os.PathLike[str],
    images: str | os.PathLike[str] | None = None,
    *,
    class_names: Sequence[str] | None = None,
) -> CocoData:
    """Open and check a data set in COCO's format.

    Args:
        annotations: a JSON file with `images`, `annotations` and `categories`.
        images: folder of the images; `images` beside the file, or else the file's own folder, by default.
        class_names: the names that labels stand for, in this order, as of the data set that was trained on; by
            default the file's categories in the order of their ids.

    Raises:
        ValueError: anything that does not hold, in one line with the id of the entry and the remedy.
    """
    path = Path(annotations)
    content = _read_json(path)
    beside = path.parent / "images"
    folder = Path(images) if images is not None else beside if beside.is_dir() else path.parent
    if not folder.is_dir():
        raise ValueError(f"image folder {folder} does not exist; give the folder of the images of {path}")
    categories = _check_categories(path, content["categories"])
    entries = _check_images(path, folder, content["images"])
    objects = _check_annotations(path, entries, categories, content["annotations"])
    names = tuple(categories.values()) if class_names is None else tuple(class_names)
    unknown = sorted(set(categories.values()) - set(names))
    if unknown:
        raise ValueError(f"{path} has categories that the model does not know, such as {unknown[0]!r}")
    ids = {name: number for number, name in categories.items()}
    return CocoData(path, folder, tuple(entries.values()), objects, names, tuple(ids.get(name, -1) for name in names))


def _read_json(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        raise ValueError(f"annotations {path} is not a file; give a JSON file in COCO's format")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"annotations {path} is not valid JSON: {error}") from None
    for key in ("images", "annotations", "categories"):
        entries = content.get(key) if isinstance(content, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ValueError(f"annotations {path} has no list {key!r} of entries; give a JSON file in COCO's format")
    return content


def _check_categories(path: Path, entries: list[dict[str, Any]]) -> dict[int, str]:
    """Names by id, in the order of the ids."""
    names: dict[int, str] = {}
    for entry in entries:
        number, name = entry.get("id"), entry.get("name")
        if not _is_integer(number) or not isinstance(name, str):
            raise ValueError(f"{path}: a category needs an integer id and a name, not {json.dumps(entry)[:80]}")
        if number in names or name in names.values():
            raise ValueError(f"{path}: category {number} ({name}) is there twice; ids and names must differ")
        names[number] = name
    if not names:
        raise ValueError(f"{path} has no categories; give a file that names the classes")
    return dict(sorted(names.items()))


def _check_images(path: Path, folder: Path, entries: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Entries by id."""
    images: dict[int, dict[str, Any]] = {}
    missing = []
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        if not _is_integer(number) or not isinstance(name, str):
            raise ValueError(f"{path}: an image needs an integer id and a file_name, not {json.dumps(entry)[:80]}")
        if number in images:
            raise ValueError(f"{path}: image id {number} is there twice; ids must differ")
        sides = entry.get("width"), entry.get("height")
        if not all(_is_integer(side) and side > 0 for side in sides):
            raise ValueError(f"{path}: image {number} needs width and height in pixels, not {sides}")
        if _leads_out(name):
            raise ValueError(
                f"{path}: image {number} has the file_name {name[:200]!r}, which leads out of {folder}; "
                "it must be the path below that folder"
            )
        if not (folder / name).is_file():
            missing.append(name)
        images[number] = entry
    if not images:
        raise ValueError(f"{path} lists no images; give a file with images")
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(images)} images of {path} are not in {folder}, such as {missing[0]}; "
            "give the folder they are in"
        )
    return images


def _leads_out(name: str) -> bool:
    """Whether a file's name, which a stranger may have written, is no plain path below a folder."""
    parts = name.replace("\\", "/").split("/")
    return ".." in parts or name.startswith(("/", "\\")) or ":" in parts[0] or "\0" in name


def _check_annotations(
    path: Path, images: dict[int, dict[str, Any]], categories: dict[int, str], entries: list[dict[str, Any]]
) -> tuple[tuple[dict[str, Any], ...], ...]:
    """Annotations of each image."""
    objects: dict[int, list[dict[str, Any]]] = {number: [] for number in images}
    seen: set[int] = set()
    for place, entry in enumerate(entries):
        number = entry.get("id")
        if not _is_integer(number):
            raise ValueError(f"{path}: annotation at place {place} has the id {number!r}; it must be an integer")
        fault = "the id is there twice" if number in seen else _find_fault(entry, images, categories)
        if fault:
            raise ValueError(f"{path}: annotation {number}: {fault}")
        seen.add(number)
        objects[entry["image_id"]].append(entry)
    return tuple(map(tuple, objects.values()))


def _find_fault(entry: dict[str, Any], images: dict[int, dict[str, Any]], categories: dict[int, str]) -> str | None:
    """What is wrong with an annotation, in words; None when nothing is."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if not _is_integer(image_id) or image_id not in images:
        return f"image_id {image_id} is none of the images"
    if not _is_integer(category_id) or category_id not in categories:
        return f"category_id {category_id} is none of the categories"
    image = images[image_id]
    if entry.get("iscrowd", 0) not in (0, 1):
        return f"iscrowd {entry['iscrowd']} must be 0 or 1"
    box = entry.get("bbox")
    if not _are_numbers(box) or len(box) != 4 or box[2] < 0 or box[3] < 0:
        return f"bbox {box} must be x, y, width and height in pixels"
    width, height = image["width"], image["height"]
    if box[0] >= width or box[1] >= height or box[0] + box[2] < 0 or box[1] + box[3] < 0:
        return f"bbox {box} is outside its image of {width} x {height} pixels"
    if "area" in entry and not _are_numbers([entry["area"]]):
        return f"area {entry['area']} must be a number of pixels"
    return _find_segmentation_fault(entry.get("segmentation"), height, width)


def _find_segmentation_fault(segmentation: Any, height: int, width: int) -> str | None:
    if isinstance(segmentation, dict):
        return _find_code_fault(segmentation, height, width)
    if not isinstance(segmentation, list) or not segmentation:
        return "segmentation must be a list of polygons or a run-length code: masks are needed"
    for polygon in segmentation:
        if not _are_numbers(polygon) or len(polygon) < 6 or len(polygon) % 2:
            return "segmentation must have polygons of x, y, x, y, … with at least three points"
    return None


def _find_code_fault(code: dict[str, Any], height: int, width: int) -> str | None:
    counts = code.get("counts")
    if code.get("size") != [height, width]:
        return f"segmentation has the size {code.get('size')}, its image [{height}, {width}]"
    if isinstance(counts, str):
        counts = _decode_counts(counts)
    if not _are_numbers(counts) or min(counts, default=-1) < 0:
        return "segmentation needs counts: a list of run lengths, or their compressed text"
    if sum(counts) != height * width:
        return f"segmentation has runs of {sum(counts)} pixels in all, its image has {height * width}"
    return None


def _decode_counts(text: str) -> list[int] | None:
    """Run lengths from COCO's compressed text, None for what is none. pycocotools reads past the end of a short one.

    A character holds five bits of a number, from the low ones, and whether more follow; the highest bit of the last is
    the sign; from the fourth on, a number is the difference to the one two before.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return None if shift else counts


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _are_numbers(values: Any) -> TypeGuard[list[float]]:
    return isinstance(values, list) and all(
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) for value in values
    )


def decode_mask(segmentation: Any, height: int, width: int) -> Tensor:
    """[height, width] uint8, 1 inside: of polygons (their union) or a run-length code, compressed or not."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        code = segmentation
    else:
        code = run_lengths.frPyObjects(segmentation, height, width)
        code = run_lengths.merge(code) if isinstance(code, list) else code
    return torch.from_numpy(run_lengths.decode(code))


def encode_mask(mask: Tensor) -> dict[str, Any]:
    """COCO's compressed run-length code, as JSON holds it, of a mask [H, W]."""
    code = run_lengths.encode(np.asfortranarray(mask.to(device="cpu", dtype=torch.uint8).numpy()))
    return {"size": code["size"], "counts": code["counts"].decode()}


class CocoImages(Dataset[dict[str, Any]]):
    """Images and what is on them, read by keys that hold the epoch (see `PretrainingImages`).

    Args:
        data: what `load_coco` returns.
        mode: "RGB" or "L".
        seed: of the flips.
        training: True mirrors half of the images and takes the next one for an image that cannot be decoded (crowds are
            left out by `CocoData.for_training`); False changes nothing, and raises.
    """

    def __init__(self, data: CocoData, *, mode: ColorMode = "RGB", seed: int = 0, training: bool = False):
        self.data = data
        self.mode = mode
        self.seed = seed
        self.training = training
        self.labels = {number: label for label, number in enumerate(data.category_ids, start=1)}

    def __len__(self) -> int:
        return len(self.data.images)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """The sample of key `epoch * len(self) + index`.

        Returns:
            image: [C, H, W] float32 in 0 … 1.
            target: `boxes` [n, 4] float32 (x1, y1, x2, y2), `labels` [n] int64 from 1, `masks` [n, H, W] uint8,
                `iscrowd` [n] int64, `area` [n] float32 as annotated.
            index: row of the image.
            skipped: (name, reason) of the images that could not be decoded in its place, its own first.

        Raises:
            BrokenDataError: an image that cannot be decoded, or has not the size that was annotated, and may not, or
                cannot, be replaced.
        """
        if key < 0:
            raise IndexError(f"key {key} must be 0 or more")
        epoch, index = divmod(key, len(self))
        skipped: list[tuple[str, str]] = []
        while True:
            try:
                image = self._decode(index)
                break
            except CorruptImageError as error:
                skipped.append((error.name, error.reason))
                if not self.training or len(skipped) >= min(MAX_CORRUPT_RUN, len(self)):
                    others = f" and {len(skipped) - 1} others in a row" if len(skipped) > 1 else ""
                    raise BrokenDataError(
                        f"image {': '.join(skipped[0])}{others}; give images that can be read and were annotated"
                    ) from None
                index = (index + 1) % len(self)
        target = self.target(index)
        if self.training and torch.rand((), generator=seeded_generator(mix_seed(self.seed, epoch, index))) < 0.5:
            image, target = mirrored(image, target)
        return {"image": image.float() / 255, "target": target, "index": index, "skipped": tuple(skipped)}

    def describe(self, key: int) -> str:
        """Which image a key means, in words, without reading its file."""
        epoch, index = divmod(key, len(self))
        return f"{self.image_name(index)}, in epoch {epoch + 1}"

    def image_name(self, index: int) -> str:
        """An image's id and path."""
        entry = self.data.images[index]
        return f"image id {entry['id']}, {self.data.image_folder / entry['file_name']}"

    def target(self, index: int) -> dict[str, Tensor]:
        """What is on the image of row `index`, without reading it."""
        entry = self.data.images[index]
        height, width = entry["height"], entry["width"]
        objects = self.data.objects[index]
        masks = [decode_mask(o["segmentation"], height, width) for o in objects]
        corners = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32).view(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners[:, 0::2].clamp_(0, width)
        corners[:, 1::2].clamp_(0, height)
        areas = [o.get("area", float(mask.sum())) for o, mask in zip(objects, masks, strict=True)]
        return {
            "boxes": corners,
            "labels": torch.tensor([self.labels[o["category_id"]] for o in objects], dtype=torch.int64),
            "masks": torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
            "iscrowd": torch.tensor([o.get("iscrowd", 0) for o in objects], dtype=torch.int64),
            "area": torch.tensor(areas, dtype=torch.float32),
        }

    def check_files(self) -> None:
        """Look at the head of every image, without decoding it.

        Raises:
            ValueError: one of them is missing, is none, or has not the size that was annotated.
        """
        for entry in self.data.images:
            path = self.data.image_folder / entry["file_name"]
            try:
                with open_image({"bytes": None, "path": str(path)}) as file:
                    sizes = upright_size(file), (file.height, file.width)
            except Exception as error:  # PIL raises nearly every built-in exception on damaged files
                raise ValueError(f"image {path}: {reason_of(error)}; give images that can be read") from None
            if (entry["height"], entry["width"]) not in sizes:
                raise ValueError(f"image {path} {_size_reason(sizes[0], entry)}; give the images that were annotated")

    def _decode(self, index: int) -> Tensor:
        entry = self.data.images[index]
        path = self.data.image_folder / entry["file_name"]
        size = entry["height"], entry["width"]
        image = decode_image({"bytes": None, "path": str(path)}, self.mode, size=size)  # turned as it was annotated
        if (found := tuple(image.shape[1:])) != size:
            raise CorruptImageError(str(path), _size_reason(found, entry))
        return image


def _size_reason(found: tuple[int, ...], entry: Mapping[str, Any]) -> str:
    return (
        f"has {found[0]} x {found[1]} pixels, its annotations (image id {entry['id']}) are for {entry['height']} x "
        f"{entry['width']}"
    )


def mirrored(image: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Image [C, H, W] and target with left and right exchanged."""
    size = (image.shape[-2], image.shape[-1])
    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)  # type: ignore[call-overload]
    changed = {
        "boxes": F.horizontal_flip(boxes).as_subclass(Tensor),
        "masks": F.horizontal_flip(Mask(target["masks"])).as_subclass(Tensor),
    }
    return F.horizontal_flip(image), {**target, **changed}


def collate_detection(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A batch: `images` and `targets` as lists, since sizes differ, `indices`, and the images that were `skipped`."""
    return {
        "images": [sample["image"] for sample in samples],
        "targets": [sample["target"] for sample in samples],
        "indices": [sample["index"] for sample in samples],
        "skipped": [image for sample in samples for image in sample["skipped"]],
        "num_bad": sum(bool(sample["skipped"]) for sample in samples),
    }


__all__ = ["CocoData", "CocoImages", "collate_detection", "decode_mask", "encode_mask", "load_coco", "mirrored"]
