"""Files of many kinds and formats, and what is to become of each: shared by the tests of bad data."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP")
ROWS, COLUMNS = 32, 48
RED, BLUE = (200, 40, 40), (30, 60, 220)
WHITE, BLACK = (255,) * 3, (0,) * 3


@dataclass(frozen=True)
class BadImageCase:
    """One file.

    Attributes:
        kind, format: what it is.
        content: its bytes.
        left, right: RGB of both halves of the picture that it decodes to; top and bottom where it is turned.
        size: rows and columns of that picture.
        reason: what is said of a file that cannot be decoded; None of one that can.
    """

    kind: str
    format: str
    content: bytes
    left: tuple[int, int, int] = BLACK
    right: tuple[int, int, int] = BLACK
    size: tuple[int, int] = (ROWS, COLUMNS)
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.kind}-{self.format}"


def halves(left, right, mode="RGB", size=(ROWS, COLUMNS)):
    """A picture of two colours side by side."""
    image = Image.new(mode, (size[1], size[0]), right)
    image.paste(left, (0, 0, size[1] // 2, size[0]))
    return image


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def sixteen_bits(values):
    return Image.fromarray(np.repeat(np.asarray([values], np.uint16), ROWS, 0).repeat(COLUMNS // 2, 1))


def floats(left, right):
    return Image.fromarray(np.repeat(np.asarray([[left, right]], np.float32), ROWS, 0).repeat(COLUMNS // 2, 1))


def whole_cases():
    """Files that decode: kind, the formats that have it, how to write it, colours of both halves."""
    two = halves(RED, BLUE)
    clear = halves((0, 0, 0, 0), (*BLUE, 255), "RGBA")
    half_clear = halves((0, 0, 0, 128), (*BLUE, 255), "RGBA")
    palette = two.quantize(4)
    clear_palette = halves(0, 1, "P")
    clear_palette.putpalette([*RED, *BLUE])
    frames = {"save_all": True, "append_images": [halves(BLUE, RED)], "duration": 50}
    greys = ((80,) * 3, (200,) * 3)
    table = [
        ("colour", FORMATS, two, {}, RED, BLUE),
        ("grey", FORMATS, halves(80, 200, "L"), {}, *greys),
        ("black-and-white", ("PNG", "TIFF", "GIF", "BMP"), halves(0, 1, "1"), {}, BLACK, WHITE),
        ("transparent", ("PNG", "TIFF", "WEBP"), clear, {}, WHITE, BLUE),
        ("half-transparent", ("PNG", "TIFF", "WEBP"), half_clear, {}, (127,) * 3, BLUE),
        ("grey-transparent", ("PNG", "TIFF"), halves((80, 0), (200, 255), "LA"), {}, WHITE, greys[1]),
        ("palette", ("PNG", "TIFF", "GIF", "BMP"), palette, {}, RED, BLUE),
        ("palette-transparent", ("PNG", "GIF"), clear_palette, {"transparency": 0}, WHITE, BLUE),
        ("cmyk", ("JPEG", "TIFF"), halves((0, 255, 255, 0), (0, 0, 0, 51), "CMYK"), {}, (255, 0, 0), (204,) * 3),
        ("16-bit", ("PNG", "TIFF"), sixteen_bits([80 * 257, 200 * 257]), {}, *greys),
        ("float-to-1", ("TIFF",), floats(80 / 255, 1.0), {}, greys[0], WHITE),
        ("float-to-65535", ("TIFF",), floats(80 * 257, 65535), {}, greys[0], WHITE),
        ("animated", ("GIF", "WEBP", "PNG", "TIFF"), two, frames, RED, BLUE),
    ]
    for kind, formats, image, options, left, right in table:
        for name in formats:
            yield BadImageCase(kind, name, encode(image, name, **options), left, right)


def turned_cases():
    """The left half is on top after a quarter turn clockwise, at the bottom after one back; a half turn swaps them."""
    two, across = halves(RED, BLUE), (COLUMNS, ROWS)
    for name in ("JPEG", "PNG", "TIFF", "WEBP"):
        yield BadImageCase("turned-right", name, encode(two, name, exif=turned(6)), RED, BLUE, across)
        yield BadImageCase("turned-left", name, encode(two, name, exif=turned(8)), BLUE, RED, across)
        yield BadImageCase("upside-down", name, encode(two, name, exif=turned(3)), BLUE, RED)


def sized_cases():
    for name in FORMATS:
        long_side = 16_000 if name == "WEBP" else 30_000  # WebP has no more than 16,383
        yield BadImageCase("one-pixel", name, encode(Image.new("RGB", (1, 1), RED), name), RED, RED, (1, 1))
        strip = halves(RED, BLUE, size=(1, long_side))
        yield BadImageCase("strip", name, encode(strip, name), RED, BLUE, (1, long_side))


def damaged_cases():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (ROWS, COLUMNS, 3), np.uint8))
    unreadable = "truncated|cannot identify|decoder|broken|Truncated|unrecognized"
    for name in FORMATS:
        content = encode(noise, name)
        yield BadImageCase("empty", name, b"", reason="is empty")
        yield BadImageCase("page-of-html", name, b"<html>404: no such picture</html>", reason="cannot identify")
        yield BadImageCase("zeros", name, bytes(len(content)), reason="cannot identify")
        yield BadImageCase("head-only", name, content[:24], reason=f"{unreadable}|.")
        for share in (25, 50, 90):
            cut = content[: len(content) * share // 100]
            yield BadImageCase(f"truncated-{share}", name, cut, reason=unreadable)
        side = 16_383 if name == "WEBP" else 30_000
        yield BadImageCase("bomb", name, bomb(name, side), reason="pixels.*bomb")
    for kind, content in webp_bombs(16_383).items():
        yield BadImageCase(f"{kind}-bomb", "WEBP", content, reason="268,?402,?689.*bomb")
    yield BadImageCase("tile-bomb", "TIFF", tile_bomb(), reason="900,?000,?000.*bomb")
    yield BadImageCase("real-bomb", "PNG", real_bomb(), reason="900,?000,?000.*bomb")
    yield BadImageCase("nan", "TIFF", encode(floats(0.5, np.nan), "TIFF"), reason="NaN or infinite")
    yield BadImageCase("infinite", "TIFF", encode(floats(0.5, np.inf), "TIFF"), reason="NaN or infinite")
    yield BadImageCase("no-known-range", "TIFF", encode(floats(0.5, 1e9), "TIFF"), reason="no known range")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    yield BadImageCase("program", "EPS", postscript, reason="cannot identify")


def bomb(name, side):
    """A small file whose head says `side` x `side` pixels."""
    content = bytearray(encode(halves(RED, BLUE), name))
    if name == "PNG":
        content[16:24] = struct.pack(">II", side, side)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    elif name == "GIF":
        content[6:10] = struct.pack("<HH", side, side)
    elif name == "BMP":
        content[18:26] = struct.pack("<ii", side, side)
    elif name == "JPEG":
        frame = content.index(b"\xff\xc0")
        content[frame + 5 : frame + 9] = struct.pack(">HH", side, side)
    elif name == "TIFF":
        for tag, old in ((256, COLUMNS), (257, ROWS)):
            for kind, form in ((3, "<HHIHH"), (4, "<HHII")):
                entry = struct.pack(form, tag, kind, 1, old, *([0] if kind == 3 else []))
                value = struct.pack("<HHII", tag, 4, 1, side)
                content = bytearray(bytes(content).replace(entry, value))
    else:  # WebP; lossy, 14 bits each behind the start code of its key frame
        start = content.index(b"\x9d\x01\x2a") + 3
        content[start : start + 4] = struct.pack("<HH", side, side)
    return bytes(content)


def webp_bombs(side):
    """Small WebP files, beside `bomb`, whose head says `side` x `side` pixels."""
    lossless = bytearray(encode(halves(RED, BLUE), "WEBP", lossless=True))
    lossless[21:25] = struct.pack("<I", (side - 1) | (side - 1) << 14)
    animated = bytearray(encode(halves(RED, BLUE), "WEBP", save_all=True, append_images=[halves(BLUE, RED)]))
    animated[24:30] = (side - 1).to_bytes(3, "little") * 2
    shortest = b"RIFF\x12\0\0\0WEBPVP8L\x06\0\0\0" + bytes(lossless[20:25]) + b"\0"  # shorter than other heads
    return {"lossless": bytes(lossless), "shortest": shortest, "animated": bytes(animated)}


def tile_bomb(side=30_000):
    """A TIFF of 16 x 16 pixels in one deflated tile of 30,000 x 30,000."""
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: side, 323: side, 324: 8 + 2 + 10 * 12 + 4, 325: 99}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + zlib.compress(bytes(999)) + bytes(99)


def rare_bombs(side):
    """As `bomb`, of the other formats that this Pillow writes."""
    sides, found = struct.pack(">II", side, side), {"PPM": b"P6 %d %d 255\n" % (side, side) + bytes(99)}
    frame = b"!\xf9\x04\x08\0\0\0\0,\0\0\0\0\x01\0\x01\0\0\x02\x02D\x01\0;"  # to be cleared after it was shown
    found["GIF-cleared"] = b"GIF89a" + struct.pack("<HH", side, side) + b"\x80\0\0" + bytes(6) + frame
    if "JPEG2000" in Image.SAVE:
        content = bytearray(encode(halves(RED, BLUE), "JPEG2000"))
        for place in (content.index(b"ihdr") + 4, content.index(b"\xff\x51") + 6):  # of the file and the codestream
            content[place : place + 8] = sides
        found["JPEG2000"] = bytes(content)
    if "AVIF" in Image.SAVE:
        content = bytearray(encode(halves(RED, BLUE), "AVIF"))
        place = content.index(b"ispe") + 8
        content[place : place + 8] = sides
        found["AVIF"] = bytes(content)
    return found


def real_bomb(side=30_000):
    """A whole PNG of 30,000 x 30,000 pixels in 110 kB, which would take 900 MB and more."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    press = zlib.compressobj(9)
    rows = bytes((1 + side // 8) * 100)
    data = b"".join([*(press.compress(rows) for _ in range(side // 100)), press.flush()])
    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def all_cases() -> list[BadImageCase]:
    return [*whole_cases(), *turned_cases(), *sized_cases(), *damaged_cases()]
