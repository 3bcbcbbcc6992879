"""Drawn shapes: what is written is what was drawn."""

import json

import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths
from tiny import seeded

from green_swin_hf.drawn_shapes import (
    SHAPE_NAMES,
    draw_shapes_image,
    load_photographs,
    run_length_code,
    write_coco_shapes,
)


@pytest.fixture(scope="module")
def photograph():
    return torch.randint(0, 256, (3, 120, 90), dtype=torch.uint8, generator=seeded(3))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(64, 64), (50, 90)], ids=str)
def test_shapes_change_the_photograph_where_their_masks_are_and_nowhere_else(size, channels):
    flat = torch.full((channels, 200, 200), 128, dtype=torch.uint8)
    for seed in range(10):
        drawn = draw_shapes_image(flat, seeded(seed), size)
        assert drawn.image.shape == (channels, *size)
        assert drawn.masks.shape == (len(drawn.labels), *size)
        assert 1 <= len(drawn.labels) <= 3
        assert drawn.masks.sum(0).max() == 1  # no pixel belongs to two
        assert torch.equal((drawn.image != 128).any(0), drawn.masks.any(0))


def test_labels_name_the_shapes_by_their_share_of_the_bounding_box(photograph):
    """A turned rectangle has no more of its hull than itself; a star is far from convex, an ellipse has no corners."""
    for seed in range(30):
        drawn = draw_shapes_image(photograph, seeded(seed), (120, 120), max_shapes=1)
        (outline,), label = drawn.outlines, SHAPE_NAMES[int(drawn.labels[0])]
        assert len(outline) == {"rectangle": 4, "star": 10, "ellipse": 48}[label]
        x, y = outline.T
        area = 0.5 * abs((x * y.roll(-1) - y * x.roll(-1)).sum().item())  # the shoelace formula
        assert drawn.masks[0].sum().item() == pytest.approx(area, rel=0.06)


def test_the_same_seed_draws_the_same_files_and_another_seed_others(photograph, tmp_path):
    for name, seed in (("one", 1), ("same", 1), ("other", 2)):
        write_coco_shapes(tmp_path / name, [photograph], 4, seed, sides=(40, 60))
    files = {name: [path.read_bytes() for path in sorted((tmp_path / name).rglob("*.*"))] for name in ("one", "same")}
    assert len(files["one"]) == 5
    assert files["one"] == files["same"]
    texts = [(tmp_path / name / "annotations.json").read_text() for name in ("one", "other")]
    assert texts[0] != texts[1]


def test_annotations_decode_to_the_drawn_masks_and_boxes(photograph, tmp_path):
    content = json.loads(write_coco_shapes(tmp_path, [photograph], 12, 0, sides=(40, 80)).read_text())
    kinds = set()
    for entry in content["annotations"]:
        image = content["images"][entry["image_id"] - 1]
        height, width = image["height"], image["width"]
        with Image.open(tmp_path / "images" / image["file_name"]) as picture:
            assert picture.size == (width, height)
        code = run_lengths.frPyObjects(entry["segmentation"], height, width)
        code = run_lengths.merge(code) if isinstance(code, list) else code
        kinds.add(type(entry["segmentation"]))
        exact = isinstance(entry["segmentation"], dict)
        assert int(run_lengths.area(code)) == pytest.approx(entry["area"], rel=0 if exact else 0.06)
        assert run_lengths.toBbox(code).tolist() == pytest.approx(entry["bbox"], abs=0 if exact else 1)
    assert kinds == {dict, list}  # covered shapes and whole ones
    sizes = {(image["height"], image["width"]) for image in content["images"]}
    assert len(sizes) > 6
    assert any(height > width for height, width in sizes)
    assert any(height < width for height, width in sizes)


def test_run_lengths_are_those_of_pycocotools():
    for seed in range(5):
        mask = torch.rand(7, 5, generator=seeded(seed)) < 0.5
        code = run_lengths.frPyObjects(run_length_code(mask), 7, 5)
        assert torch.equal(torch.from_numpy(run_lengths.decode(code)).bool(), mask)


def test_a_folder_without_photographs_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no images"):
        load_photographs(tmp_path)
