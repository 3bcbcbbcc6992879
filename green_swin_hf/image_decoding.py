"""Decoding one image file of any common kind to a uint8 tensor, or saying which one is broken and why."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

ColorMode = Literal["L", "RGB"]


class CorruptImageError(ValueError):
    """An image that cannot be decoded.

    Attributes:
        name: its path, or its place such as "row 17".
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives the way out of a worker
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


def decode_image(record: Mapping[str, Any] | None, mode: ColorMode, unnamed: str = "an image without a path") -> Tensor:
    """Decode one image: [1, H, W] uint8 for mode "L", [3, H, W] for "RGB".

    EXIF orientation is applied, transparency is laid on white, the first frame of an animation counts. 16-bit
    greys are scaled to 8 bits; float images are taken to be in [0, 1] if nothing in them is above 1, else in
    [0, 255].

    Args:
        record: `{"bytes": …, "path": …}`; the path is read where there are no bytes.
        mode: "L" for grey, "RGB" for colour.
        unnamed: what to call an image that has no path, such as "row 17".

    Raises:
        CorruptImageError: missing, empty, truncated or damaged, NaN or infinite pixels, or with more pixels
            than `PIL.Image.MAX_IMAGE_PIXELS` (a decompression bomb).
    """
    record = record or {}
    content, path = record.get("bytes"), record.get("path")
    name = path or unnamed
    if content is None and not path:
        raise CorruptImageError(name, "holds no image")
    try:
        content = _read_bytes(name) if content is None else content
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of oddities that do not hurt
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            pixels = _decode(content, mode)
    except Exception as error:  # PIL raises nearly every built-in exception on damaged files
        reason = "is empty" if content == b"" else str(error) or type(error).__name__
        reason = re.sub(r" <_io\.BytesIO object at \w+>", "", reason)
        raise CorruptImageError(name, reason) from error
    return torch.from_numpy(pixels).view(pixels.shape[0], pixels.shape[1], -1).permute(2, 0, 1).contiguous()


def _read_bytes(path: str) -> bytes:
    if "://" not in path:
        return Path(path).read_bytes()
    with fsspec.open(path, "rb") as file:
        return file.read()


def _decode(content: bytes, mode: ColorMode) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8."""
    with Image.open(io.BytesIO(content)) as file:
        file.load()
        _turn_upright(file)
        image: Image.Image = file
        if image.mode[0] in "IF":
            image = _as_eight_bits(image)
        if image.has_transparency_data:
            background = Image.new("RGBA", image.size, "white")
            background.alpha_composite(image.convert("RGBA"))
            image = background
        return np.array(image if image.mode == mode else image.convert(mode))


def _turn_upright(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # damaged EXIF data is no reason to drop a picture
        ImageOps.exif_transpose(image, in_place=True)


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """A grey 8-bit image of one with 16-bit, 32-bit or float pixels.

    32-bit pixels are taken for 16-bit ones, which PIL reads so from some files, unless none is above 255; float pixels
    are in [0, 1] unless one is above 1, then in [0, 255].
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("has pixels that are NaN or infinite")
    if image.mode[0] == "I":
        scale = 1 / 257 if image.mode != "I" or values.max() > 255 else 1.0
    else:
        scale = 255.0 if values.max() <= 1 else 1.0
    return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8))
