"""Data in COCO's format: masks of every kind, crowds, flips, and files that are wrong."""

import json
import re

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as run_lengths

from green_swin_hf.coco_data import CocoImages, decode_mask, encode_mask, load_coco, mirrored
from green_swin_hf.drawn_shapes import run_length_code

HEIGHT, WIDTH = 20, 30


def rectangle_mask(left, top, right, bottom):
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def polygon(left, top, right, bottom):
    return [left, top, right, top, right, bottom, left, bottom]


def annotation(number, segmentation, box, **changes):
    left, top, right, bottom = box
    entry = {"id": number, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": segmentation}
    return {**entry, "bbox": [left, top, right - left, bottom - top], **changes}


def content():
    """Two images, the second empty; categories with ids that leave gaps and are out of order."""
    left, right = (2, 3, 10, 12), (15, 5, 25, 18)
    compressed = run_lengths.encode(np.asfortranarray(rectangle_mask(*right).numpy().astype(np.uint8)))
    compressed = {"size": compressed["size"], "counts": compressed["counts"].decode()}
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
            {"id": 3, "file_name": "b.png", "width": 8, "height": 9},
        ],
        "annotations": [
            annotation(1, [polygon(*left)], left),
            annotation(2, [polygon(2, 3, 6, 12), polygon(8, 3, 10, 12)], left, category_id=4),
            annotation(3, run_length_code(rectangle_mask(*right)), right, area=99.0),
            annotation(4, compressed, right, iscrowd=1),
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 4, "name": "cat"}],
    }


def write(folder, entries):
    (folder / "images").mkdir(exist_ok=True)
    pixels = np.arange(HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "a.png")
    Image.new("RGB", (8, 9)).save(folder / "images" / "b.png")
    (folder / "annotations.json").write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return folder / "annotations.json"


@pytest.fixture
def path(tmp_path):
    return write(tmp_path, content())


def test_masks_of_polygons_and_both_run_length_codes(path):
    data = load_coco(path)
    assert data.class_names == ("cat", "dog")  # by id
    target = CocoImages(data)[0]["target"]
    assert target["labels"].tolist() == [2, 1, 2, 2]
    assert target["boxes"].tolist() == [[2, 3, 10, 12], [2, 3, 10, 12], [15, 5, 25, 18], [15, 5, 25, 18]]
    left, right = rectangle_mask(2, 3, 10, 12), rectangle_mask(15, 5, 25, 18)
    parts = rectangle_mask(2, 3, 6, 12) | rectangle_mask(8, 3, 10, 12)
    assert torch.equal(target["masks"].bool(), torch.stack([left, parts, right, right]))
    assert target["iscrowd"].tolist() == [0, 0, 0, 1]
    assert target["area"].tolist() == [72, 54, 99, 130]  # as annotated, or counted


def test_training_leaves_crowds_and_empty_images_out(path):
    data = load_coco(path)
    assert (len(data.images), data.num_objects) == (2, 4)
    training = data.for_training()
    assert [image["id"] for image in training.images] == [7]
    assert CocoImages(training, training=True)[0]["target"]["labels"].tolist() == [2, 1, 2]
    assert [image["id"] for image in data.for_training(skip_empty=False).images] == [7, 3]
    empty = CocoImages(data)[1]
    assert empty["image"].shape == (3, 9, 8)
    assert empty["target"]["boxes"].shape == (0, 4)
    assert empty["target"]["masks"].shape == (0, 9, 8)


def test_an_image_of_crowds_only_is_empty_to_training(tmp_path):
    entries = content()
    entries["annotations"] = entries["annotations"][3:]
    data = load_coco(write(tmp_path, entries))
    with pytest.raises(ValueError, match="annotates no objects to train on"):
        data.for_training(skip_empty=False)


def test_boxes_reach_to_the_border_at_most_and_smaller_than_a_pixel_they_are_not_trained_on(tmp_path):
    entries = content()
    entries["annotations"] = [
        annotation(1, [polygon(20, 10, 40, 15)], (20, 10, 31, 15)),
        annotation(2, [polygon(20, 10, 22, 15)], (20, 10, 20, 15)),
        annotation(3, [polygon(28, 10, 30, 15)], (29.5, 10, 33, 15)),
    ]
    data = load_coco(write(tmp_path, entries))
    assert CocoImages(data)[0]["target"]["boxes"].tolist() == [[20, 10, 30, 15], [20, 10, 20, 15], [29.5, 10, 30, 15]]
    assert CocoImages(data.for_training())[0]["target"]["boxes"].tolist() == [[20, 10, 30, 15]]


def test_labels_follow_the_names_of_the_training_data(path):
    names = ("dog", "bird", "cat")
    data = load_coco(path, class_names=names)
    assert CocoImages(data)[0]["target"]["labels"].tolist() == [1, 3, 1, 1]
    assert data.category_ids == (18, -1, 4)
    with pytest.raises(ValueError, match="does not know, such as 'dog'"):
        load_coco(path, class_names=("cat",))


def test_mirroring_moves_boxes_with_masks_and_twice_is_nothing(path):
    sample = CocoImages(load_coco(path))[0]
    image, target = mirrored(sample["image"], sample["target"])
    assert torch.equal(image, torch.flip(sample["image"], [2]))
    assert torch.equal(target["masks"], torch.flip(sample["target"]["masks"], [2]))
    assert type(target["boxes"]) is type(target["masks"]) is torch.Tensor
    for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        assert box == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    again = mirrored(image, target)[1]
    assert torch.equal(again["boxes"], sample["target"]["boxes"])


def test_half_of_the_samples_are_mirrored_by_seed_epoch_and_row_alone(path):
    images = CocoImages(load_coco(path), training=True, seed=5)
    same = CocoImages(load_coco(path), training=True, seed=5)
    lefts = [images[2 * epoch]["target"]["boxes"][0, 0].item() for epoch in range(60)]
    assert lefts[::-1] == [same[2 * epoch]["target"]["boxes"][0, 0].item() for epoch in reversed(range(60))]
    assert set(lefts) == {2, 20}
    assert 15 < lefts.count(2) < 45
    assert [CocoImages(load_coco(path))[2 * epoch]["target"]["boxes"][0, 0].item() for epoch in range(3)] == [2, 2, 2]


def test_grey_images_have_one_channel(path):
    assert CocoImages(load_coco(path), mode="L")[0]["image"].shape == (1, HEIGHT, WIDTH)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_masks_survive_their_code(tmp_path, share):
    """Long and short runs, rising and falling: what pycocotools writes is accepted and read back."""
    entries = content()
    for seed in range(5):
        mask = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed)) < share
        code = json.loads(json.dumps(encode_mask(mask)))
        assert torch.equal(decode_mask(code, HEIGHT, WIDTH).bool(), mask)
        entries["annotations"][0]["segmentation"] = code
        target = CocoImages(load_coco(write(tmp_path, entries)))[0]["target"]
        assert torch.equal(target["masks"][0].bool(), mask)


def change(**changes):
    """A file whose annotation 2 is changed."""

    def apply(entries):
        entries["annotations"][1].update(changes)

    return apply


def change_image(**changes):
    return lambda entries: entries["images"][0].update(changes)


WRONG = {
    "image id": (change(image_id=99), "annotation 2: image_id 99 is none of the images"),
    "category": (change(category_id=5), "annotation 2: category_id 5 is none of the categories"),
    "box of three": (change(bbox=[1, 2, 3]), r"annotation 2: bbox \[1, 2, 3\] must be"),
    "box of text": (change(bbox="all"), "annotation 2: bbox all must be"),
    "negative box": (change(bbox=[1, 2, -3, 4]), "annotation 2: bbox"),
    "box outside": (change(bbox=[40, 2, 3, 4]), "annotation 2: bbox .* outside its image of 30 x 20"),
    "box not finite": (change(bbox=[float("nan"), 2, 3, 4]), "annotation 2: bbox"),
    "no masks": (change(segmentation=None), "annotation 2: segmentation must be a list of polygons"),
    "no polygon": (change(segmentation=[]), "annotation 2: segmentation must be a list of polygons"),
    "two points": (change(segmentation=[[1, 2, 3, 4]]), "annotation 2: segmentation must have polygons"),
    "odd polygon": (change(segmentation=[[1, 2, 3, 4, 5, 6, 7]]), "annotation 2: segmentation must have polygons"),
    "code of another size": (
        change(segmentation={"size": [20, 20], "counts": [400]}),
        r"annotation 2: segmentation has the size \[20, 20\], its image \[20, 30\]",
    ),
    "short code": (change(segmentation={"size": [20, 30], "counts": [5, 7]}), "annotation 2: .* runs of 12 pixels"),
    "negative code": (change(segmentation={"size": [20, 30], "counts": [601, -1]}), "annotation 2: .* counts"),
    "broken code": (change(segmentation={"size": [20, 30], "counts": "é"}), "annotation 2: segmentation needs counts"),
    "short compressed code": (
        change(segmentation={"size": [20, 30], "counts": "05"}),
        "annotation 2: segmentation has runs of 5 pixels in all, its image has 600",
    ),
    "code without counts": (change(segmentation={"size": [20, 30]}), "annotation 2: segmentation needs counts"),
    "crowd": (change(iscrowd=2), "annotation 2: iscrowd 2 must be 0 or 1"),
    "area": (change(area="big"), "annotation 2: area big"),
    "image id of no kind": (change(image_id=[7]), r"annotation 2: image_id \[7\] is none of the images"),
    "category of no kind": (change(category_id={}), "annotation 2: category_id {} is none of the categories"),
    "annotation without id": (change(id=None), "annotation at place 1 has the id None"),
    "annotation twice": (change(id=1), "annotation 1: the id is there twice"),
    "image twice": (change_image(id=3), "image id 3 is there twice"),
    "image without size": (change_image(height=0), "image 7 needs width and height"),
    "image without name": (change_image(file_name=None), "an image needs an integer id and a file_name"),
    "image not there": (change_image(file_name="c.png"), "1 of 2 images .* such as c.png; give the folder"),
    **{
        f"file_name {name!r}": (change_image(file_name=name), r"image 7 has the file_name .* which leads out of")
        for name in ("../a.png", "sub/../../a.png", "/etc/passwd", "C:a.png", r"..\a.png", "a.png\0")
    },
    "no images": (lambda entries: entries["images"].clear(), "lists no images"),
    "no categories": (lambda entries: entries["categories"].clear(), "has no categories"),
    "category twice": (lambda entries: entries["categories"][0].update(name="cat"), "is there twice"),
    "category without name": (lambda entries: entries["categories"][0].pop("name"), "a category needs"),
    "no annotations": (lambda entries: entries.pop("annotations"), "has no list 'annotations'"),
}


@pytest.mark.parametrize(("spoil", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_file_is_one_line_that_names_the_entry(tmp_path, spoil, message):
    entries = content()
    if spoil is not WRONG["no images"][0]:
        load_coco(write(tmp_path, entries))  # nothing else is wrong
    spoil(entries)
    with pytest.raises(ValueError, match=message) as error:
        load_coco(write(tmp_path, entries))
    assert "\n" not in str(error.value)


def test_files_that_are_no_annotations(tmp_path, path):
    with pytest.raises(ValueError, match=r"none.json is not a file"):
        load_coco(tmp_path / "none.json")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_coco(write(tmp_path, "{"))
    with pytest.raises(ValueError, match="has no list 'images'"):
        load_coco(write(tmp_path, "[]"))
    with pytest.raises(ValueError, match=r"image folder .* does not exist"):
        load_coco(write(tmp_path, content()), tmp_path / "nowhere")


def test_an_image_of_another_size_than_annotated_is_a_bad_one(path):
    CocoImages(load_coco(path)).check_files()
    Image.new("RGB", (WIDTH + 1, HEIGHT)).save(path.parent / "images" / "a.png")
    reason = "has 20 x 31 pixels, its annotations (image id 7) are for 20 x 30"
    (skipped,) = CocoImages(load_coco(path), training=True)[0]["skipped"]
    assert skipped == (str(path.parent / "images" / "a.png"), reason)
    for look in (lambda images: images[0], lambda images: images.check_files()):
        with pytest.raises(ValueError, match=rf"a\.png:? {re.escape(reason)}; give"):
            look(CocoImages(load_coco(path)))


@pytest.mark.parametrize(("content", "reason"), [(b"", "is empty"), (b"no image", "cannot identify image file;")])
def test_the_heads_of_all_images_can_be_looked_at(path, content, reason):
    (path.parent / "images" / "b.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"image \S+b\.png: {reason}"):
        CocoImages(load_coco(path)).check_files()


@pytest.mark.parametrize("annotated_on", ["stored", "upright"])
def test_boxes_stay_on_their_object_when_exif_turns_the_image(path, annotated_on):
    """A white rectangle where the first box is: in the pixels as stored, or as a viewer shows them."""
    white = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    white[3:12, 2:10] = 255
    image, exif = Image.fromarray(white), Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    stored = image if annotated_on == "stored" else image.transpose(Image.Transpose.ROTATE_90)
    stored.save(path.parent / "images" / "a.png", exif=exif)
    sample = CocoImages(load_coco(path))[0]
    left, top, right, bottom = sample["target"]["boxes"][0].int().tolist()
    assert sample["image"].shape == (3, HEIGHT, WIDTH)
    assert sample["image"][:, top:bottom, left:right].min() == 1
    assert sample["image"].sum() == 3 * (right - left) * (bottom - top)
    assert (sample["image"][0] * sample["target"]["masks"][0]).sum() == sample["image"][0].sum()


def test_training_takes_the_next_image_for_a_broken_one_and_measuring_raises(path):
    (path.parent / "images" / "a.png").write_bytes(b"no image")
    sample = CocoImages(load_coco(path), training=True)[0]
    assert sample["image"].shape == (3, 9, 8)
    assert [(name.endswith("a.png"), reason[:15]) for name, reason in sample["skipped"]] == [(True, "cannot identify")]
    with pytest.raises(ValueError, match=r"a\.png"):
        CocoImages(load_coco(path))[0]
