"""Images in the idx files of MNIST and its relatives, as splits of a data set.

A split is a file of images, `train-images-idx3-ubyte`, and one of labels, `train-labels-idx1-ubyte`; "t10k" is the test
split, and `.gz` may follow. Source: the MNIST home page describes the format, a big-endian header and plain bytes.
"""

from __future__ import annotations

import gzip
import math
import re
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow

SPLIT_NAMES = {"train": "train", "valid": "validation", "validation": "validation", "t10k": "test", "test": "test"}

_UNSIGNED_BYTE = 8
_IMAGES_NAME = re.compile(rf"({'|'.join(SPLIT_NAMES)})-images[-.]idx3-ubyte(\.gz)?")


def find_idx_images(folder: Path) -> dict[str, Path]:
    """The file of images of each split, of those in `folder` itself; an unpacked file goes before its `.gz`."""
    # In this order "train" is read before "t10k", and of two files for a split the later one stays.
    matches = [(path, _IMAGES_NAME.fullmatch(path.name)) for path in sorted(folder.iterdir(), reverse=True)]
    return {SPLIT_NAMES[match[1]]: path for path, match in matches if match and path.is_file()}


def load_idx_images(image_files: Mapping[str, Path]) -> dict[str, datasets.Dataset]:
    """Data sets by split, with the column "image" and, where the file of labels is there, "label".

    Labels are a `ClassLabel` whose classes are named by their numbers: idx files hold no names.

    Args:
        image_files: what `find_idx_images` found.

    Raises:
        ValueError: a file is damaged, truncated or of another kind, or images and labels differ in number; one line
            that names the file and the remedy.
    """
    columns = {split: _read_columns(file) for split, file in image_files.items()}
    classes = 1 + max((int(column["label"].max()) for column in columns.values() if "label" in column), default=0)
    kinds = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(num_classes=classes)}
    return {
        split: datasets.Dataset.from_dict(column, datasets.Features({name: kinds[name] for name in column}))
        for split, column in columns.items()
    }


def _read_columns(images_file: Path) -> dict[str, Any]:
    """Undecoded records of a split's images, and its labels if there are any."""
    images = read_idx(images_file, ("images", "rows", "columns"))
    columns: dict[str, Any] = {"image": _as_pgm_records(images)}
    labels_file = _find_labels(images_file)
    if labels_file is not None:
        columns["label"] = read_idx(labels_file, ("labels",))
        if len(columns["label"]) != len(images):
            raise ValueError(
                f"{str(labels_file)!r} holds {len(columns['label'])} labels for the {len(images)} images of "
                f"{images_file.name!r}; take both from the same release"
            )
    return columns


def _find_labels(images_file: Path) -> Path | None:
    """The file of labels beside a file of images, packed or not."""
    name = images_file.name.removesuffix(".gz").replace("-images", "-labels").replace("idx3", "idx1")
    candidates = (images_file.with_name(name), images_file.with_name(f"{name}.gz"))
    return next((path for path in candidates if path.is_file()), None)


def read_idx(file: Path, axes: tuple[str, ...]) -> np.ndarray:
    """The content of one idx file, packed or not: an array with an axis for each of `axes`, uint8.

    Raises:
        ValueError: not an idx file of unsigned bytes with so many axes, or empty, damaged or truncated.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {error}; get the file again") from error
    magic, header_size = struct.pack(">HBB", 0, _UNSIGNED_BYTE, len(axes)), 4 + 4 * len(axes)
    if content[:4] != magic:
        raise ValueError(
            f"{str(file)!r} is no idx file of {axes[0]}: it begins with 0x{content[:4].hex()}, not 0x{magic.hex()}; "
            "check that images and labels are not exchanged, or get the file again"
        )
    shape = struct.unpack_from(f">{len(axes)}I", content.ljust(header_size, b"\0"), 4)
    found, expected = max(len(content) - header_size, 0), math.prod(shape)
    if found != expected or not expected:
        stated = " x ".join(f"{size} {axis}" for size, axis in zip(shape, axes, strict=True))
        raise ValueError(f"{str(file)!r} holds {found} bytes where its header says {stated}; get the file again")
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)


def _as_pgm_records(images: np.ndarray) -> pyarrow.StructArray:
    """Records `{"bytes", "path"}` of grey images [N, rows, columns] as PGM files: a header, then the pixels."""
    rows, columns = images.shape[1:]
    header = f"P5 {columns} {rows} 255\n".encode()
    files = pyarrow.array((header + image.tobytes() for image in images), pyarrow.binary(), size=len(images))
    return pyarrow.StructArray.from_arrays([files, pyarrow.nulls(len(images), pyarrow.string())], ["bytes", "path"])
