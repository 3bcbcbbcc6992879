"""Small labelled images for tests and first runs: shapes drawn on photographs, with masks from the drawing itself."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from .data import sample_crop_box, seeded_generator
from .image_decoding import decode_image
from .image_sources import IMAGE_EXTENSIONS

SHAPE_NAMES = ("ellipse", "rectangle", "star")
_PLACING_TRIES = 20


class DrawnImage(NamedTuple):
    """An image and what was drawn on it.

    Attributes:
        image: [C, H, W] uint8.
        masks: [n, H, W] bool, the pixels of each shape that are seen; no pixel belongs to two.
        labels: [n] int64, places in `SHAPE_NAMES`.
        outlines: n polygons [points, 2] of x and y in pixels, of the whole shapes, those below others included.
    """

    image: Tensor
    masks: Tensor
    labels: Tensor
    outlines: tuple[Tensor, ...]


def load_photographs(folder: str | os.PathLike[str]) -> list[Tensor]:
    """The images of a folder in the order of their names, each [3, H, W] uint8.

    Raises:
        ValueError: there are none, or one cannot be decoded.
    """
    paths = [path for path in sorted(Path(folder).glob("*")) if path.suffix.lower() in IMAGE_EXTENSIONS]
    if not paths:
        raise ValueError(f"folder {os.fspath(folder)} holds no images to draw on; give one with photographs")
    return [decode_image({"bytes": None, "path": str(path)}, "RGB") for path in paths]


def draw_shapes_image(
    photo: Tensor,
    rng: torch.Generator,
    size: tuple[int, int],
    *,
    max_shapes: int = 3,
    radii: tuple[float, float] = (0.14, 0.32),
) -> DrawnImage:
    """A random part of a photograph with 1 … `max_shapes` ellipses, rectangles and stars on it.

    Later shapes may cover earlier ones, of which at least half stays to be seen.

    Args:
        photo: [C, H, W] uint8.
        rng: what all is drawn from.
        size: (rows, columns) of the result.
        max_shapes: the largest number of shapes.
        radii: smallest and largest radius of a shape, as a share of the short side.
    """
    rows, columns = size
    aspect = columns / rows
    top, left, height, width = sample_crop_box((photo.shape[1], photo.shape[2]), (0.1, 0.6), (aspect, aspect), rng)
    crop = photo[None, :, top : top + height, left : left + width]
    image = interpolate(crop, size, mode="bicubic", antialias=True)[0].float()
    masks, labels, outlines = torch.zeros(0, rows, columns, dtype=torch.bool), [], []
    for _ in range(int(torch.randint(1, max_shapes + 1, (), generator=rng))):
        placed = _place(masks, size, radii, rng)
        if placed is None:
            break
        label, outline, mask = placed
        masks = torch.cat([masks & ~mask, mask[None]])
        labels.append(label)
        outlines.append(outline)
        _paint(image, mask, rng)
    return DrawnImage(image.round().clamp(0, 255).to(torch.uint8), masks, torch.tensor(labels), tuple(outlines))


def write_coco_shapes(
    folder: str | os.PathLike[str],
    photographs: Sequence[Tensor],
    num_images: int,
    seed: int,
    *,
    sides: tuple[int, int] = (96, 160),
    max_shapes: int = 3,
    radii: tuple[float, float] = (0.14, 0.32),
) -> Path:
    """Write drawn images as a data set in COCO's format: `folder/annotations.json` and `folder/images/`.

    Rows and columns of an image are drawn apart from each other. A shape that is seen whole is annotated by its
    polygon, one that is partly covered by a run-length code. The same arguments give the same files; the annotations
    are written last.

    Args:
        folder: made if it does not exist.
        photographs: [C, H, W] uint8 each; `load_photographs` reads them.
        num_images: how many to draw.
        seed: of everything that is drawn.
        sides: the smallest and the largest number of rows and of columns.
        max_shapes, radii: see `draw_shapes_image`.

    Returns:
        Path of the annotations.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(num_images):
        rng = seeded_generator(seed, index)
        rows, columns = torch.randint(sides[0], sides[1] + 1, (2,), generator=rng).tolist()
        photo = photographs[int(torch.randint(len(photographs), (), generator=rng))]
        drawn = draw_shapes_image(photo, rng, (rows, columns), max_shapes=max_shapes, radii=radii)
        name = f"{index:06d}.png"
        Image.fromarray(drawn.image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / "images" / name)
        images.append({"id": index + 1, "file_name": name, "width": columns, "height": rows})
        annotations += [{"image_id": index + 1, **entry} for entry in _annotations(drawn)]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    categories = [{"id": number, "name": name} for number, name in enumerate(SHAPE_NAMES, start=1)]
    info = {"description": f"Shapes drawn on photographs, seed {seed}"}
    content = {"info": info, "images": images, "annotations": annotations, "categories": categories}
    partial = folder / "annotations.json.partial"
    partial.write_text(json.dumps(content))
    os.replace(partial, folder / "annotations.json")
    return folder / "annotations.json"


def run_length_code(mask: Tensor) -> dict[str, list[int]]:
    """COCO's uncompressed run-length code of a mask [H, W]: runs down the columns, of zeros and ones in turn.

    >>> run_length_code(torch.tensor([[False, True], [True, True]]))
    {'size': [2, 2], 'counts': [1, 3]}
    """
    values = torch.cat([torch.zeros(1, dtype=torch.bool), mask.bool().T.flatten()])
    changes = (values[1:] != values[:-1]).nonzero().flatten().tolist()
    ends = [*changes, mask.numel()]
    return {"size": list(mask.shape), "counts": [end - start for start, end in zip([0, *changes], ends, strict=True)]}


def _place(
    masks: Tensor, size: tuple[int, int], radii: tuple[float, float], rng: torch.Generator
) -> tuple[int, Tensor, Tensor] | None:
    """Label, outline and mask of one more shape that leaves half of each earlier one to be seen; None: no room."""
    areas = masks.sum((1, 2))
    for _ in range(_PLACING_TRIES):
        label = int(torch.randint(len(SHAPE_NAMES), (), generator=rng))
        outline = _outline(SHAPE_NAMES[label], size, radii, rng)
        mask = _inside(outline, size)
        if bool(((masks & ~mask).sum((1, 2)) * 2 >= areas).all()):
            return label, outline, mask
    return None


def _outline(name: str, size: tuple[int, int], radii: tuple[float, float], rng: torch.Generator) -> Tensor:
    """[points, 2] of x and y: a shape of random size, proportions and turn, whole inside the image."""
    draws = torch.rand(5, generator=rng, dtype=torch.float64)
    rows, columns = size
    radius = (radii[0] + (radii[1] - radii[0]) * draws[0]) * min(size)
    flatness = 0.55 + 0.45 * draws[1]
    points = _unit_outline(name) * torch.stack([radius, radius * flatness])
    turn = 2 * math.pi * draws[2]
    rotation = torch.stack([torch.stack([turn.cos(), turn.sin()]), torch.stack([-turn.sin(), turn.cos()])])
    free = torch.stack([columns - 2 * radius, rows - 2 * radius])
    return points @ rotation + radius + free * draws[3:5]


def _unit_outline(name: str) -> Tensor:
    """[points, 2] on and inside the unit circle."""
    if name == "rectangle":
        return torch.tensor([[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    count = 10 if name == "star" else 48
    angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
    radius = torch.ones(count, dtype=torch.float64)
    if name == "star":
        radius[1::2] = 0.45
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def _inside(outline: Tensor, size: tuple[int, int]) -> Tensor:
    """[rows, columns] bool, True where the centre of a pixel is inside the polygon (even-odd rule)."""
    y = (torch.arange(size[0], dtype=torch.float64) + 0.5)[:, None, None]
    x = (torch.arange(size[1], dtype=torch.float64) + 0.5)[None, :, None]
    (x1, y1), (x2, y2) = outline.T, outline.roll(-1, 0).T
    crosses = (y1 > y) != (y2 > y)  # [rows, 1, edges]
    to_the_right = x < x1 + (y - y1) * (x2 - x1) / (y2 - y1)
    return (crosses & to_the_right).sum(2) % 2 == 1


def _paint(image: Tensor, mask: Tensor, rng: torch.Generator) -> None:
    """Fill `mask` of `image` [C, H, W] in place with a colour that stands out, the photograph shining through a bit."""
    behind = image[:, mask]
    drawn = torch.rand(image.shape[0], generator=rng) * 255
    mean = behind.mean(1)
    while (drawn - mean).abs().max() < 80:
        drawn = torch.rand(image.shape[0], generator=rng) * 255
    image[:, mask] = 0.85 * drawn[:, None] + 0.15 * behind


def _annotations(drawn: DrawnImage) -> list[dict[str, Any]]:
    """COCO's entries of the shapes, without ids."""
    entries = []
    for mask, label, outline in zip(drawn.masks, drawn.labels.tolist(), drawn.outlines, strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        left, top = int(columns[0]), int(rows[0])
        box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
        is_whole = torch.equal(mask, _inside(outline, (mask.shape[0], mask.shape[1])))
        polygon = [[round(value, 2) for value in outline.flatten().tolist()]]
        segmentation: Any = polygon if is_whole else run_length_code(mask)
        entry = {"category_id": label + 1, "bbox": box, "area": int(mask.sum()), "iscrowd": 0}
        entries.append({**entry, "segmentation": segmentation})
    return entries


__all__ = [
    "SHAPE_NAMES",
    "DrawnImage",
    "draw_shapes_image",
    "load_photographs",
    "run_length_code",
    "write_coco_shapes",
]
