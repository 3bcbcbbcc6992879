"""The detector: sizes, saving, where it starts from, COCO's figures, and a short training that must find shapes."""

import json

import pytest
import torch
from PIL import Image
from tiny import backbone_config, seeded, tiny_config
from torch.nn.functional import pad
from transformers import SwinConfig, SwinModel

from green_swin_hf import GreenSwinBackbone, GreenSwinForMaskedImageModeling
from green_swin_hf.coco_data import CocoImages, collate_detection, encode_mask, load_coco
from green_swin_hf.detection import (
    DetectorSettings,
    GreenSwinMaskRCNN,
    load_detector,
    new_backbone,
    total_loss,
)
from green_swin_hf.detection_metrics import Detections, coco_results, detect, mean_average_precision
from green_swin_hf.optimization import parameter_groups
from green_swin_hf.pretrained_start import load_backbone

CPU = torch.device("cpu")
TINY = DetectorSettings(
    ("cat", "dog"),
    short_sides=(48, 64),
    long_side=96,
    pyramid_channels=16,
    anchor_sizes=(8, 16, 32, 48, 64),
    box_head_width=24,
    mask_head_widths=(12, 16),
    proposals=(40, 20),
    samples=(16, 16),
    score_threshold=0.0,
    max_detections=7,
)


def tiny_settings(**changes):
    return DetectorSettings(**{**TINY.__dict__, **changes})


def build(settings=TINY, **changes):
    torch.manual_seed(0)
    return GreenSwinMaskRCNN(new_backbone(backbone_config(**changes)), settings)


def picture(rows, columns, channels=3, seed=0):
    return torch.rand(channels, rows, columns, generator=seeded(seed))


def target(rows, columns, *boxes):
    masks = torch.zeros(len(boxes), rows, columns, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
    return {"boxes": corners, "labels": torch.ones(len(boxes), dtype=torch.int64), "masks": masks}


def test_a_batch_of_unequal_and_oblong_images_trains_every_parameter():
    model = build()
    images = [picture(60, 90), picture(83, 50), picture(31, 64)]
    targets = [target(60, 90, (10, 10, 40, 40), (50, 20, 80, 55)), target(83, 50, (5, 30, 45, 70)), target(31, 64)]
    losses = model(images, targets)
    names = {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    assert set(losses) == names
    assert total_loss(losses).item() == pytest.approx(sum(loss.item() for loss in losses.values()))
    total_loss(losses).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []


def test_a_batch_without_objects_has_finite_losses():
    losses = build()([picture(48, 64)], [target(48, 64)])
    assert total_loss(losses).isfinite()
    total_loss(losses).backward()


def test_detections_are_in_the_pixels_of_each_image():
    model = build().eval()
    images = [picture(60, 90), picture(83, 50)]
    for image, found in zip(images, model(images), strict=True):
        rows, columns = image.shape[1:]
        assert 0 < len(found["boxes"]) <= 7
        assert found["masks"].shape[1:] == (1, rows, columns)
        assert found["boxes"].min() >= 0
        assert found["boxes"][:, 2].max() <= columns
        assert found["boxes"][:, 3].max() <= rows
        assert set(found["labels"].tolist()) <= {1, 2}


def test_short_sides_are_drawn_in_training_and_the_last_one_is_for_use():
    transform = build().transform
    image = picture(50, 100)
    drawn = {tuple(transform([image])[0].image_sizes[0]) for _ in range(30)}
    assert drawn == {(48, 96)}  # the long side bounds both
    image = picture(50, 60)
    drawn = {tuple(transform([image])[0].image_sizes[0]) for _ in range(30)}
    assert drawn == {(48, 57), (64, 76)}
    assert {tuple(transform.eval()([image])[0].image_sizes[0]) for _ in range(5)} == {(64, 76)}


def test_images_are_normalised_with_the_statistics_given():
    model = build(tiny_settings(image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.25, 2.0))).eval()
    image = torch.full((3, 64, 64), 0.6)
    pixels = model.transform([image])[0].tensors
    assert pixels[0, :, 5, 5].tolist() == pytest.approx([1.0, 1.6, 0.15])


def test_grey_images():
    model = build(tiny_settings(image_mean=(0.5,), image_std=(0.5,)), num_channels=1)
    total_loss(model([picture(60, 40, 1)], [target(60, 40, (10, 10, 30, 30))])).backward()
    assert len(model.eval()([picture(60, 40, 1)])) == 1


def same_detections(left, right):
    for one, other in zip(left, right, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=0, atol=0)


def test_a_saved_detector_finds_the_same(tmp_path):
    model = build(drop_path_rate=0.1).eval()
    model.save_pretrained(tmp_path)
    loaded = load_detector(tmp_path)
    assert (loaded.settings, loaded.config.to_dict()) == (model.settings, model.config.to_dict())
    assert not loaded.training
    images = [picture(60, 90), picture(83, 50)]
    same_detections(loaded(images), model(images))
    model.backbone.body.save_pretrained(tmp_path / "backbone")
    body = GreenSwinBackbone.from_pretrained(tmp_path / "backbone")
    maps = body(images[0][None]).feature_maps
    torch.testing.assert_close(maps, model.backbone.body(images[0][None]).feature_maps)


def test_a_folder_without_a_detector_is_named(tmp_path):
    with pytest.raises(ValueError, match="holds no detector"):
        load_detector(tmp_path)
    build().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load_detector(tmp_path)
    assert "\n" not in str(error.value)


def stock_swin():
    fields = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}
    return SwinModel(SwinConfig(**fields, window_size=4))


@pytest.mark.parametrize("kind", ["masked image modeling", "backbone", "stock Swin"])
def test_a_backbone_starts_from_the_weights_of_a_folder(tmp_path, kind):
    makers = {
        "masked image modeling": lambda: GreenSwinForMaskedImageModeling(tiny_config()),
        "backbone": lambda: GreenSwinBackbone(tiny_config(out_features=["stage2"])),
        "stock Swin": stock_swin,
    }
    model = makers[kind]()
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path, drop_path_rate=0.3)
    assert backbone.channels == [8, 16, 32]
    assert backbone.config.drop_path_rate == 0.3
    assert backbone.config.model_type == "green_swin"
    if kind == "stock Swin":
        expected = model.encoder.layers[1].blocks[0].layernorm_before.weight
    else:
        expected = model.swin.encoder.layers[1].blocks[0].layernorm_before.weight
    found = backbone.swin.encoder.layers[1].blocks[0].layernorm_before.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_weights_to_start_from_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load_backbone(tmp_path)
    build().save_pretrained(tmp_path / "detector")
    with pytest.raises(ValueError, match=r"lacks .* weights of a Swin encoder"):
        load_backbone(tmp_path / "detector")


WRONG_SETTINGS = {
    "levels": ({"anchor_sizes": (8, 16)}, r"anchor_sizes \[8, 16\] must have 5 sizes"),
    "mean": ({"image_mean": (0.5,)}, r"image_mean \[0.5\] must have one number for each of the 3 channels"),
    "classes": ({"class_names": ()}, "class_names"),
    "classes twice": ({"class_names": ("a", "a")}, "class_names"),
    "sides": ({"short_sides": (200,)}, "long_side 96 must be at least 200"),
    "std": ({"image_std": (0.0, 1.0, 1.0)}, "image_std"),
    "threshold": ({"score_threshold": 1.0}, "score_threshold 1.0"),
    "width": ({"pyramid_channels": 0}, "pyramid_channels 0 must be greater than 0"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG_SETTINGS.values(), ids=WRONG_SETTINGS.keys())
def test_settings_that_cannot_be_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        build(tiny_settings(**changes))


def test_layers_of_the_backbone_learn_slower_the_deeper_they_are():
    groups = parameter_groups(build(), weight_decay=0.05, layer_decay=0.5)
    scales = {name: group["lr_scale"] for group in groups for name in group["names"]}
    blocks = sum(backbone_config().depths)
    assert scales["backbone.body.swin.embeddings.patch_embeddings.projection.weight"] == 0.5 ** (blocks + 1)
    assert scales["backbone.body.swin.encoder.layers.3.blocks.0.output.dense.weight"] == 0.5
    assert scales["roi_heads.box_head.fc6.weight"] == scales["backbone.pyramid.inner_blocks.0.0.weight"] == 1
    decays = {name: group["weight_decay"] for group in groups for name in group["names"]}
    assert decays["rpn.head.conv.0.0.weight"] == 0.05
    assert decays["rpn.head.conv.0.0.bias"] == 0


# COCO's figures


OBJECTS = {1: [("cat", (10, 30, 40, 55)), ("dog", (50, 10, 80, 40))], 2: [("cat", (5, 30, 45, 70))]}


@pytest.fixture
def annotated(tmp_path):
    """Two oblong images with two and one objects, and a crowd of cats in a corner of the first."""
    sizes, numbers, annotations = {1: (60, 90), 2: (80, 50)}, {"cat": 3, "dog": 8}, []
    for image, objects in [*OBJECTS.items(), (1, [("crowd", (0, 0, 12, 12))])]:
        for name, (left, top, right, bottom) in objects:
            entry = {
                "id": len(annotations) + 1,
                "image_id": image,
                "category_id": numbers.get(name, 3),
                "bbox": [left, top, right - left, bottom - top],
                "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                "area": (right - left) * (bottom - top),
                "iscrowd": int(name == "crowd"),
            }
            annotations.append(entry)
    images = []
    for image, (rows, columns) in sizes.items():
        Image.new("RGB", (columns, rows)).save(tmp_path / f"{image}.png")
        images.append({"id": image, "file_name": f"{image}.png", "width": columns, "height": rows})
    categories = [{"id": number, "name": name} for name, number in numbers.items()]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    return CocoImages(load_coco(tmp_path / "annotations.json"))


def as_found(images, shift=0, drop_masks=False):
    """The annotations (but crowds) as detections, moved to the right by some pixels."""
    found = []
    for index in range(len(images)):
        truth = images.target(index)
        kept = truth["iscrowd"] == 0
        masks = pad(truth["masks"][kept], (shift, 0))[:, :, : truth["masks"].shape[2]]
        masks = torch.zeros_like(masks) if drop_masks else masks
        boxes = truth["boxes"][kept] + torch.tensor([shift, 0, shift, 0])
        codes = tuple(encode_mask(mask) for mask in masks)
        found.append(Detections(index, boxes, truth["labels"][kept], torch.linspace(0.9, 0.8, len(boxes)), codes))
    return found


def test_what_is_annotated_scores_one_and_what_is_shifted_less(annotated):
    perfect = mean_average_precision(annotated, as_found(annotated))
    assert {perfect[name] for name in ("box_map", "box_map_50", "mask_map", "mask_map_75")} == {1.0}
    shifted = mean_average_precision(annotated, as_found(annotated, shift=4))
    assert 0 < shifted["box_map"] < 0.9
    assert 0 < shifted["mask_map"] < 0.9
    missed = mean_average_precision(annotated, as_found(annotated, shift=60))
    assert missed["box_map"] == missed["mask_map"] == 0


def test_boxes_and_masks_are_scored_apart(annotated):
    figures = mean_average_precision(annotated, as_found(annotated, drop_masks=True))
    assert figures["box_map"] == 1
    assert figures["mask_map"] == 0


def with_changed_first_image(images, boxes, labels, scores):
    """The annotations as detections, those of the first image replaced; masks as the boxes."""
    rest = as_found(images)[1:]
    masks = torch.zeros(len(boxes), 60, 90, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[top:bottom, left:right] = 1
    corners, codes = torch.tensor(boxes, dtype=torch.float32), tuple(encode_mask(mask) for mask in masks)
    return [Detections(0, corners, torch.tensor(labels), torch.tensor(scores), codes), *rest]


def test_precision_of_a_hand_made_case(annotated):
    """The dog is found with an IoU of 25/30: at seven of the ten thresholds 0.50, 0.55, …; both cats are exact."""
    found = with_changed_first_image(annotated, [(10, 30, 40, 55), (50, 10, 75, 40)], [1, 2], [0.9, 0.8])
    figures = mean_average_precision(annotated, found)
    expected = {"map": (1.0 + 0.7) / 2, "map_50": 1.0, "map_75": 1.0, "map_small": 0.85}
    for name, value in expected.items():
        assert figures[f"box_{name}"] == pytest.approx(value, abs=1e-6)
        assert figures[f"mask_{name}"] == pytest.approx(value, abs=1e-6)
    assert "box_map_large" not in figures


def test_detections_on_a_crowd_count_neither_way_and_elsewhere_they_cost(annotated):
    right = [(10, 30, 40, 55), (50, 10, 80, 40)], [1, 2], [0.9, 0.8]
    for extra, is_free in (((1, 1, 10, 10), True), ((60, 45, 70, 55), False)):
        boxes, labels, scores = ([first, *rest] for first, rest in zip((extra, 1, 0.99), right, strict=True))
        figures = mean_average_precision(annotated, with_changed_first_image(annotated, boxes, labels, scores))
        assert (figures["box_map"] == 1) == (figures["mask_map"] == 1) == is_free


def test_results_in_cocos_format_are_scored_alike_by_pycocotools(annotated, tmp_path, capsys):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    found = as_found(annotated, shift=3)
    figures = mean_average_precision(annotated, found)
    (tmp_path / "results.json").write_text(json.dumps(coco_results(annotated.data, found)))
    truth = COCO(str(annotated.data.path))
    for kind, name in (("bbox", "box_map"), ("segm", "mask_map")):
        scored = COCOeval(truth, truth.loadRes(str(tmp_path / "results.json")), kind)
        scored.evaluate()
        scored.accumulate()
        scored.summarize()
        assert figures[name] == pytest.approx(scored.stats[0], abs=1e-4)
    capsys.readouterr()


def test_detecting_keeps_the_mode_and_gives_masks_as_codes():
    model = build()
    batch = collate_detection([{"image": picture(60, 40), "target": target(60, 40), "index": 5, "skipped": ()}])
    (found,) = detect(model, [batch], CPU)
    assert model.training
    assert found.index == 5
    expected = (model.eval()(batch["images"])[0]["masks"][:, 0] > 0.5).sum((1, 2))
    assert torch.equal(found.dense_masks(60, 40).sum((1, 2)), expected)
