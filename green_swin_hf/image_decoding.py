"""Decoding one image file of any common kind to a uint8 tensor, or saying which one is broken and why.

What a file is says its content, not its name. Nothing is read of a file that is no regular one or too large, and
nothing decoded of an image with too many pixels, so that no file can take the memory of the machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, BinaryIO, Literal

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from PIL.TiffImagePlugin import TiffImageFile
from torch import Tensor

from .redaction import redacted

ColorMode = Literal["L", "RGB"]

# PIL's own limit is a variable of the process that other libraries set to None. Decoding takes up to 38 bytes a pixel
# (an animated WebP with transparency).
MAX_PIXELS = 89_478_485
MAX_FILE_BYTES = 1 << 30  # an image of so many pixels without compression, and half as much again

# Not what PIL reads beside: EPS starts Ghostscript, others are recognised in any noise.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "DIB", "JPEG2000", "AVIF")

EXIF_ORIENTATION = 0x0112
_TIFF_TILE_SIDES = (322, 323)
_WEBP_HEAD_BYTES = 30

_FLOAT_OVERSHOOT = 1.2  # of a range, as resampling leaves it


class CorruptImageError(ValueError):
    """An image that cannot be decoded.

    Attributes:
        name: its path, or its place such as "row 17".
        reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        if "://" in name and redacted(name) != name:  # a password or a signature; the digits tell images apart
            name = f"{redacted(name)} ({hashlib.sha256(name.encode()).hexdigest()[:8]})"
        reason = redacted(reason)
        super().__init__(name, reason)  # both, so that it can be pickled
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class BrokenDataError(ValueError):
    """So many images in a row cannot be decoded that the data set itself must be broken."""


def decode_image(
    record: Mapping[str, Any] | None,
    mode: ColorMode,
    place: str = "",
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Decode one image: [1, H, W] uint8 for mode "L", [3, H, W] for "RGB".

    EXIF orientation is applied, transparency is laid on white, the first frame of an animation counts. Deep greys are
    scaled to 8 bits by the range that holds them: 16-bit pixels by 65535; 32-bit pixels by 255, 65535 or 2³¹ - 1; float
    pixels by 1, 255 or 65535 (a fifth above is cut off).

    Args:
        record: `{"bytes": …, "path": …}`; the path is read where there are no bytes.
        mode: "L" for grey, "RGB" for colour.
        place: what to call an image that is no file of its own, such as "row 17".
        size: (H, W) of what was annotated on the image. One that has this size as it is stored, but not upright, stays
            as it is stored.

    Raises:
        CorruptImageError: missing, empty, truncated or damaged, no regular file, none of `FORMATS`, NaN or infinite
            pixels, more than `MAX_PIXELS` (a decompression bomb) or `MAX_FILE_BYTES`.
    """
    record = record or {}
    content, path = record.get("bytes"), record.get("path")
    name = f"{place} ({path})" if place and path and content is not None else path or place or "an image without a path"
    try:
        with open_image(record) as file:
            pixels = _decode(file, mode, size)
    except Exception as error:  # PIL raises nearly every built-in exception on damaged files
        raise CorruptImageError(name, reason_of(error)) from error
    return torch.from_numpy(pixels).view(pixels.shape[0], pixels.shape[1], -1).permute(2, 0, 1).contiguous()


@contextlib.contextmanager
def open_image(record: Mapping[str, Any]) -> Iterator[Image.Image]:
    """The image file of a record, opened and not decoded yet: of a local file no more than its head is read.

    Raises whatever the system or PIL does where it cannot be read, and a `ValueError` for what is empty, no regular
    file, or has more than `MAX_FILE_BYTES` or `MAX_PIXELS`.
    """
    with _open_file(record) as content, warnings.catch_warnings(), _limit_of_pixels():
        warnings.simplefilter("ignore")  # PIL warns of oddities that do not hurt
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        head = content.read(_WEBP_HEAD_BYTES)
        if not head:
            raise ValueError("is empty")
        _check_pixels(*_webp_canvas(head))
        content.seek(0)
        with Image.open(content, formats=_known_formats()) as file:
            if isinstance(file, TiffImageFile):  # whose tiles may be larger than the image
                _check_pixels(*(file.tag_v2.get(tag, 0) for tag in _TIFF_TILE_SIDES))
            yield file


def _open_file(record: Mapping[str, Any]) -> BinaryIO:
    content, path = record.get("bytes"), record.get("path")
    if content is None and not path:
        raise ValueError("holds no image")
    if content is None and "://" not in str(path):
        found = os.stat(str(path))
        if not stat.S_ISREG(found.st_mode):  # reading a pipe may wait for ever, a device may never end
            raise ValueError("is no regular file")
        _check_size(found.st_size, MAX_FILE_BYTES, "bytes")
        return open(str(path), "rb")
    if content is None:
        with fsspec.open(str(path), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    _check_size(len(content), MAX_FILE_BYTES, "bytes")
    return io.BytesIO(content)


@contextlib.contextmanager
def _limit_of_pixels() -> Iterator[None]:
    """Within it PIL's limit is ours: for a GIF it takes the canvas when it opens one, after a look at its own limit."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def _webp_canvas(head: bytes) -> tuple[int, int]:
    """(width, height) that the head of a WebP file says, (0, 0) of anything else.

    PIL takes the memory of the whole canvas twice when it opens one, up to version 12 before it looks at its limit. The
    layouts of the three kinds of head are those of RFC 9649.
    """
    kind, data = head[12:16], head[20:_WEBP_HEAD_BYTES].ljust(10, b"\0")  # a whole file may be shorter
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP":
        return 0, 0
    if kind == b"VP8X":  # after four bytes of flags, 24 bits each, less one
        return int.from_bytes(data[4:7], "little") + 1, int.from_bytes(data[7:10], "little") + 1
    if kind == b"VP8L":  # after a byte of signature, 14 bits each, less one
        both = int.from_bytes(data[1:5], "little")
        return (both & 0x3FFF) + 1, (both >> 14 & 0x3FFF) + 1
    both = int.from_bytes(data[6:10], "little")  # after a tag and a start code, 14 of 16 bits each
    return (both & 0x3FFF, both >> 16 & 0x3FFF) if kind == b"VP8 " else (0, 0)


def _check_pixels(width: int, height: int) -> None:
    _check_size(width * height, MAX_PIXELS, "pixels")


def _check_size(size: int, limit: int, unit: str) -> None:
    if size > limit:
        bomb = " (a decompression bomb)" if unit == "pixels" else ""
        raise ValueError(f"has {size:,} {unit}, more than the {limit:,} that are decoded{bomb}")


def reason_of(error: Exception) -> str:
    """What an error of decoding says, on one line."""
    return " ".join(re.sub(r" <_io\.[^>]*>", "", str(error) or type(error).__name__).split())


def _decode(file: Image.Image, mode: ColorMode, size: tuple[int, int] | None) -> np.ndarray:
    """[H, W] or [H, W, 3] uint8."""
    file.load()
    stored = (file.height, file.width)
    if size is None or size != stored or upright_size(file) == size:
        turn_upright(file)
    image = _as_eight_bits(file) if file.mode[0] in "IF" else file
    if image.has_transparency_data:
        background = Image.new("RGBA", image.size, "white")
        background.alpha_composite(image.convert("RGBA"))
        image = background
    return np.array(image if image.mode == mode else image.convert(mode))


@lru_cache
def _known_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this version of PIL reads."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(H, W) of an image when it is turned as its EXIF orientation says."""
    with contextlib.suppress(Exception):
        if image.getexif().get(EXIF_ORIENTATION, 1) >= 5:
            return image.width, image.height
    return image.height, image.width


def turn_upright(image: Image.Image) -> None:
    """Turn an image, in place, as its EXIF orientation says."""
    with contextlib.suppress(Exception):  # damaged EXIF data is no reason to drop a picture
        ImageOps.exif_transpose(image, in_place=True)


def _as_eight_bits(image: Image.Image) -> Image.Image:
    """A grey 8-bit image of one with 16-bit, 32-bit or float pixels, scaled by the smallest range that holds them.

    Pixels below 0 are black.
    """
    values = np.asarray(image)
    if not np.isfinite(values).all():
        raise ValueError("has pixels that are NaN or infinite")
    largest = float(values.max())
    ranges: tuple[int, ...]
    if image.mode == "F":
        ranges, largest = (1, 255, 65535), largest / _FLOAT_OVERSHOOT
    else:
        ranges = (255, 65535, 2**31 - 1) if image.mode == "I" else (65535,)
        if image.format in ("PNG", "PPM"):  # which hold 16 bits, although Pillow opens some as 32
            ranges = (65535,)
    whole = next((limit for limit in ranges if largest <= limit), None)
    if whole is None:
        raise ValueError(f"has float pixels up to {values.max():.3g}: no known range")
    scaled = values.astype(np.float32)
    scaled *= 255 / whole
    return Image.fromarray(np.clip(np.rint(scaled, out=scaled), 0, 255, out=scaled).astype(np.uint8))
