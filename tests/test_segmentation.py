"""Semantic segmentation: images and masks from files, augmentation, UperNet on GreenSwin, scores, and the script."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from bad_image_files import all_cases
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import backbone_config, images
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex
from transformers import (
    AutoModelForSemanticSegmentation,
    SegformerImageProcessor,
    SwinConfig,
    SwinModel,
    TrainingArguments,
    ViTConfig,
    pipeline,
)

from green_swin_hf import GreenSwinBackbone, GreenSwinForMaskedImageModeling
from green_swin_hf.drawn_shapes import load_photographs
from green_swin_hf.image_decoding import CorruptImageError
from green_swin_hf.pretrained_start import load_backbone
from green_swin_hf.recipe_files import load_recipe
from green_swin_hf.segmentation import (
    SegmentationTrainer,
    build_upernet,
    commonest_class_scores,
    count_pixels,
    segmentation_scores,
)
from green_swin_hf.segmentation_data import (
    DRAWN_CLASSES,
    ImagesWithMasks,
    SegmentationAugmentation,
    SegmentationDataset,
    WholeImages,
    decode_mask,
    load_images_with_masks,
    read_class_names,
    read_labels,
    write_drawn_segmentation,
)
from green_swin_hf.segmentation_recipe import SegmentationRecipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "finetune_segmentation.py"
RECIPES = ROOT / "examples" / "recipes" / "segmentation"
CLASSES = ROOT / "examples" / "data" / "fashion_mnist_10k" / "data" / "validation-00000-of-00001.parquet"
PHOTOS = ROOT / "examples" / "data" / "photos"


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


finetune = load_script(SCRIPT)


def save_image(path, size=(12, 10), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


def save_mask(path, size=(12, 10), value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    values = value if isinstance(value, np.ndarray) else np.full(size, value, dtype=np.uint8)
    Image.fromarray(values).save(path)


def pair_of(image, mask):
    """A data set of one image and its mask, as records."""
    features = datasets.Features({"image": datasets.Image(decode=False), "mask": datasets.Image(decode=False)})
    rows = datasets.Dataset.from_dict({"image": [image], "mask": [mask]}, features)
    return ImagesWithMasks(rows, "image", "mask", "one")


def save_pair(images_folder, masks_folder, name, **mask):
    save_image(images_folder / f"{name}.jpg")
    save_mask(masks_folder / f"{name}.png", **mask)


# Reading


@pytest.mark.parametrize(
    ("layout", "splits"),
    [
        (lambda split: (f"{split}/images", f"{split}/masks"), ("train", "validation", "test")),
        (lambda split: (f"images/{split}", f"annotations/{split}"), ("training", "val")),
        (lambda split: ("images", "masks"), ("train",)),
    ],
    ids=["split over kind", "kind over split", "one split"],
)
def test_masks_find_their_images_by_name(tmp_path, layout, splits):
    for number, split in enumerate(splits):
        for name in ("b", "a/c", "a/b"):
            save_pair(*(tmp_path / folder for folder in layout(split)), name, value=number)
    names = {"training": "train", "val": "validation"}
    for number, split in enumerate(splits):
        pairs = load_images_with_masks(tmp_path, split=names.get(split, split))
        assert len(pairs) == 3
        for row in pairs.dataset:
            assert Path(row["image"]["path"]).stem == Path(row["mask"]["path"]).stem
            assert decode_mask(row["mask"]).unique().tolist() == [number]
    with pytest.raises(ValueError, match="no split 'other'"):
        load_images_with_masks(tmp_path, split="other")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: save_image(folder / "images" / "b.png"), "b.png has no counterpart in .*masks"),
        (lambda folder: save_mask(folder / "masks" / "b.png"), "b.png has no counterpart in .*images"),
        (lambda folder: save_image(folder / "images" / "a.png"), "differ in their ending only"),
        (lambda folder: [path.unlink() for path in folder.rglob("a.*")], "holds no images"),
    ],
    ids=["image alone", "mask alone", "two of a name", "empty"],
)
def test_images_and_masks_that_do_not_fit_are_named(tmp_path, prepare, message):
    save_pair(tmp_path / "images", tmp_path / "masks", "a")
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images_with_masks(tmp_path)


@pytest.mark.parametrize("columns", [("image", "mask"), ("photo", "annotation")])
def test_data_sets_with_a_column_of_images_and_one_of_masks(tmp_path, columns):
    save_pair(tmp_path, tmp_path / "m", "a", value=3)
    features = datasets.Features({column: datasets.Image() for column in columns})
    table = {columns[0]: [str(tmp_path / "a.jpg")], columns[1]: [str(tmp_path / "m" / "a.png")]}
    datasets.Dataset.from_dict(table, features).to_parquet(str(tmp_path / "data.parquet"))
    named = {} if columns[0] == "image" else {"image_column": columns[0]}
    pairs = load_images_with_masks(tmp_path / "data.parquet", **named)
    dataset = SegmentationDataset(pairs, None, num_classes=4)
    assert dataset.read(0)[1].unique().tolist() == [3]
    assert dataset.check([0]).tolist() == [0, 0, 0, 120]
    with pytest.raises(ValueError, match=r"no masks in a column 'nothing'.*--mask-column"):
        load_images_with_masks(tmp_path / "data.parquet", image_column=columns[0], mask_column="nothing")


def test_masks_are_numbers_with_or_without_a_palette_and_never_colours(tmp_path):
    values = np.array([[0, 1], [2, 255]], dtype=np.uint8)
    with_palette = Image.fromarray(values)
    with_palette.putpalette([number for index in range(256) for number in (255 - index, 0, index)])
    with_palette.save(tmp_path / "palette.png")
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "wide.png")
    Image.fromarray(values == 1).save(tmp_path / "bits.png")
    for name in ("palette", "wide"):
        assert decode_mask({"bytes": None, "path": str(tmp_path / f"{name}.png")}).tolist() == values.tolist()
    assert decode_mask({"bytes": (tmp_path / "bits.png").read_bytes()}).tolist() == [[0, 1], [0, 0]]
    save_image(tmp_path / "colours.png")
    for name, problem in (("colours", "has colours"), ("missing", "cannot be read as a mask")):
        with pytest.raises(ValueError, match=problem):
            decode_mask({"bytes": None, "path": str(tmp_path / f"{name}.png")})


def test_masks_and_images_are_opened_as_carefully_as_in_pretraining(tmp_path):
    """No pipes, which would be waited for, no programs, no decompression bombs, and no addresses of this process."""
    os.mkfifo(tmp_path / "pipe.png")
    for case in all_cases():
        if case.kind in ("empty", "zeros", "bomb", "real-bomb", "program"):
            (tmp_path / f"{case}.png").write_bytes(case.content)
    save_mask(tmp_path / "good.png")
    reasons = {"pipe": "is no regular file", "empty": "is empty", "zeros": "cannot identify image file$"}
    reasons |= {"bomb": "pixels.*bomb", "real-bomb": "pixels.*bomb", "program": "cannot identify image file$"}
    good, paths = {"bytes": None, "path": str(tmp_path / "good.png")}, sorted(tmp_path.glob("*.png"))
    assert len(paths) > 20
    for path in paths:
        if path.stem == "good":
            continue
        reason = next(text for kind, text in reasons.items() if path.stem.startswith(kind))
        bad = {"bytes": None, "path": str(path)}
        with pytest.raises(CorruptImageError, match=r"cannot be read as a mask \(.*" + reason.replace("$", r"\)$")):
            decode_mask(bad)
        with pytest.raises(CorruptImageError, match=reason):
            SegmentationDataset(pair_of(bad, good), None, num_classes=256).check([0])


@pytest.mark.parametrize("drawn_on", ["stored", "upright", "turned"])
def test_masks_stay_on_their_image_when_exif_turns_it(tmp_path, drawn_on):
    """A mask of the pixels as stored, as a viewer shows them, or with an orientation of its own."""
    white = np.zeros((12, 10, 3), np.uint8)
    white[2:5, 1:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown after a quarter turn clockwise
    Image.fromarray(white).save(tmp_path / "a.png", exif=exif)
    mask = Image.fromarray((white[..., 0] == 255).astype(np.uint8))
    upright = mask.transpose(Image.Transpose.ROTATE_270)
    options = {"exif": exif} if drawn_on == "turned" else {}
    (upright if drawn_on == "upright" else mask).save(tmp_path / "mask.png", **options)
    image, mask = ({"bytes": None, "path": str(tmp_path / name)} for name in ("a.png", "mask.png"))
    dataset = SegmentationDataset(pair_of(image, mask), None, num_classes=2)
    image, labels = dataset.read(0)
    assert torch.equal(image[0], labels * 255)
    assert image.shape[1:] == ((12, 10) if drawn_on == "stored" else (10, 12))
    assert dataset.check([0]).tolist() == [120 - 21, 21]


def test_labels_out_of_range_are_named_and_reduced_labels_start_at_one(tmp_path):
    save_mask(tmp_path / "a.png", value=np.array([[0, 1, 3, 255]], dtype=np.uint8))
    record = {"bytes": None, "path": str(tmp_path / "a.png")}
    assert read_labels(record, 4, False, "").tolist() == [[0, 1, 3, 255]]
    assert read_labels(record, 3, True, "").tolist() == [[255, 0, 2, 255]]
    with pytest.raises(ValueError, match=r"a.png has label 3, outside 0 … 2"):
        read_labels(record, 3, False, "")
    with pytest.raises(ValueError, match=r"a.png has label 3, outside 1 … 2"):
        read_labels(record, 2, True, "")


@pytest.mark.parametrize("content", ['["a"]', '["a", "a"]', '{"1": "a", "2": "b"}', "[1, 2]", "no json"])
def test_class_names_that_are_none_are_refused(tmp_path, content):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(ValueError, match=r"class names .*names.json"):
        read_class_names(tmp_path / "names.json")
    (tmp_path / "names.json").write_text('{"1": "b", "0": "a"}')
    assert read_class_names(tmp_path / "names.json") == ("a", "b")


# Augmentation


def quadrants(rows=40, columns=56):
    """An image whose pixels are 0 or 255 as its labels are 0 or 1, in unequal blocks."""
    labels = torch.zeros(rows, columns, dtype=torch.uint8)
    labels[:13, :21] = labels[13:30, 33:] = 1
    return (labels * 255).expand(3, -1, -1).contiguous(), labels


@pytest.mark.parametrize(
    ("scale", "short_side", "share"),
    [((1.0, 1.0), None, 1.0), ((2.0, 2.0), None, 0.9999), ((0.5, 2.0), None, 0.993), ((0.5, 2.0), 60, 0.993)],
    ids=["as it is", "twice", "any scale", "any scale of a side"],
)
def test_image_and_mask_move_together(scale, short_side, share):
    augment = SegmentationAugmentation(
        48, (0.5,) * 3, (1.0,) * 3, scale_range=scale, short_side=short_side, max_class_share=1.0, photometric=False
    )
    torch.manual_seed(0)
    agreeing, seen = 0, 0
    for _ in range(20):
        pixels, labels = augment(*quadrants())
        assert pixels.shape == (3, 48, 48)
        assert labels.shape == (48, 48)
        assert labels.dtype == torch.int64
        inside = labels != 255
        assert pixels[:, ~inside].abs().max() < 0.01 if (~inside).any() else True  # filled with the mean
        agreeing += ((pixels[0] > 0) == (labels == 1))[inside].sum().item()
        seen += inside.sum().item()
    # Exact but for pixels that an edge halves; masks that are half a pixel off reach 0.980 and 0.988 at any scale.
    assert agreeing / seen >= share


def test_colours_change_in_the_image_alone_and_crops_of_one_class_are_drawn_anew():
    image, labels = quadrants()
    augment = SegmentationAugmentation(
        24, (0.0,) * 3, (1.0,) * 3, scale_range=(1.0, 1.0), max_class_share=0.9, flip=False
    )
    torch.manual_seed(0)
    shares, changed = [], 0
    for _ in range(40):
        pixels, cropped = augment(image // 2 + 60, labels)
        assert set(cropped.unique().tolist()) <= {0, 1}
        shares.append(cropped.flatten().bincount().max().item() / cropped.numel())
        changed += not torch.isin((pixels * 255).round(), torch.tensor([60.0, 187.0])).all()
    assert changed > 20
    assert max(shares) <= 0.9


def test_a_sample_depends_on_seed_epoch_and_index_alone(tmp_path):
    write_drawn_segmentation(tmp_path, load_photographs(PHOTOS), 3, seed=0, sides=(40, 60))
    augment = SegmentationAugmentation(32, (0.5,) * 3, (0.5,) * 3)

    def read(key, seed=0):
        torch.manual_seed(torch.randint(1000, ()))  # what the global generator holds must not matter
        before = torch.get_rng_state()
        sample = SegmentationDataset(load_images_with_masks(tmp_path), augment, num_classes=4, seed=seed)[key]
        assert torch.equal(torch.get_rng_state(), before)
        return sample

    first = read(1)
    assert torch.equal(first["pixel_values"], read(1)["pixel_values"])
    assert torch.equal(first["labels"], read(1)["labels"])
    for other in (read(1 + 3), read(1, seed=5)):
        assert not torch.equal(first["pixel_values"], other["pixel_values"])


def test_whole_images_are_prepared_by_the_processor_and_labels_keep_their_size(tmp_path):
    processor = SegformerImageProcessor(size={"shortest_edge": 20, "longest_edge": 40})
    image, labels = quadrants(30, 90)
    pixels, kept = WholeImages(processor)(image, labels)
    assert pixels.shape == (3, 13, 40)  # the longer side limits it
    assert torch.equal(kept, labels.long())
    from_pil = processor(Image.fromarray(image.permute(1, 2, 0).numpy()), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(pixels, from_pil)


def test_drawn_masks_show_the_shapes_and_repeat(tmp_path):
    for name in ("one", "two"):
        write_drawn_segmentation(tmp_path / name, load_photographs(PHOTOS), 12, seed=3, sides=(40, 70))
    pairs = [load_images_with_masks(tmp_path / name) for name in ("one", "two")]
    read = [SegmentationDataset(pair, None, num_classes=len(DRAWN_CLASSES)) for pair in pairs]
    sizes = set()
    for index in range(12):
        (image, labels), again = read[0].read(index), read[1].read(index)
        assert torch.equal(image, again[0])
        assert torch.equal(labels, again[1])
        sizes.add(tuple(labels.shape))
    assert len(sizes) > 6
    assert (read[0].check(range(12)) > 0).all()


# Scores


def test_scores_equal_torchmetrics_over_all_pixels_at_once():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(0, 5, (6, 20, 30), generator=generator)
    predicted = torch.where(torch.rand(6, 20, 30, generator=generator) < 0.6, truth, 2)
    truth[truth == 4] = 255  # no class 4 in the truth; it is predicted
    truth[:, :2] = 255
    counts = sum(count_pixels(one, other, 6) for one, other in zip(predicted, truth, strict=True))
    scores = segmentation_scores(counts)
    jaccard = {kind: MulticlassJaccardIndex(6, average=kind, ignore_index=255) for kind in ("macro", "none")}
    assert scores["mean_iou"] == pytest.approx(jaccard["macro"](predicted, truth).item(), abs=1e-6)
    by_class = jaccard["none"](predicted, truth).tolist()
    assert scores["class_iou"][:4] == pytest.approx(by_class[:4], abs=1e-6)
    assert scores["class_iou"][5] is None
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=255)(predicted, truth).item()
    assert scores["pixel_accuracy"] == pytest.approx(accuracy, abs=1e-6)


def test_scores_by_hand():
    scores = segmentation_scores(torch.tensor([[6, 2], [0, 4]]))
    assert scores["class_iou"] == pytest.approx([6 / 8, 4 / 6])
    assert scores["mean_iou"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert scores["pixel_accuracy"] == pytest.approx(10 / 12)
    baseline = commonest_class_scores(torch.tensor([30, 10, 0]))
    assert (baseline["mean_iou"], baseline["pixel_accuracy"]) == pytest.approx((0.75 / 2, 0.75))


# Model


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A folder as pretraining leaves it."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(1)
    GreenSwinForMaskedImageModeling(backbone_config(out_features=None)).save_pretrained(folder)
    return folder


def test_pretrained_weights_reach_upernet(pretrained):
    backbone = load_backbone(pretrained, drop_path_rate=0.3)
    model = build_upernet(backbone, ["a", "b", "c"], hidden_size=8, auxiliary_channels=8)
    assert model.config.backbone_config.model_type == "green_swin"
    assert model.config.backbone_config.drop_path_rate == 0.3
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert model.config.loss_ignore_index == 255
    saved = load_file(pretrained / "model.safetensors")
    weights = model.backbone.swin.state_dict()
    assert len(weights) > 50
    for name, value in weights.items():
        torch.testing.assert_close(value, saved[f"swin.{name}"], rtol=0, atol=0)
    assert build_upernet(backbone, ["a", "b"], hidden_size=8, auxiliary_loss_weight=0).auxiliary_head is None


def test_stock_swin_reaches_upernet_and_other_folders_are_refused(tmp_path, pretrained):
    config = SwinConfig(image_size=64, patch_size=4, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 2], window_size=4)
    stock = SwinModel(config)
    stock.save_pretrained(tmp_path / "swin")
    backbone = load_backbone(tmp_path / "swin")
    assert backbone.config.model_type == "green_swin"
    torch.testing.assert_close(
        backbone.swin.embeddings.patch_embeddings.projection.weight,
        stock.embeddings.patch_embeddings.projection.weight,
    )
    model = build_upernet(backbone, ["a", "b"], hidden_size=8, auxiliary_channels=8)
    assert model.eval()(images(1, rows=50, columns=70)).logits.shape == (1, 2, 50, 70)
    model.save_pretrained(tmp_path / "upernet")
    for folder, problem in (("nothing", "cannot be loaded"), ("upernet", "is a upernet; give the folder")):
        (tmp_path / "nothing").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=problem):
            load_backbone(tmp_path / folder)
    with pytest.raises(ValueError, match="does not exist"):
        load_backbone(tmp_path / "nowhere")
    two_stages = backbone_config(depths=(1, 1), num_heads=(1, 2), out_features=["stage1", "stage2"])
    with pytest.raises(ValueError, match="3 stages or more, this backbone has 2"):
        build_upernet(GreenSwinBackbone(two_stages), ["a", "b"])


def tiny_trainer(tmp_path, **changes):
    model = build_upernet(GreenSwinBackbone(backbone_config()), ["a", "b"], hidden_size=8, auxiliary_channels=8)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True, label_names=["labels"], **changes
    )
    return SegmentationTrainer(model, arguments)


def test_a_batch_without_any_label_has_loss_zero_and_finite_gradients(tmp_path):
    trainer = tiny_trainer(tmp_path)
    labels = torch.full((2, 64, 64), 255)
    loss = trainer.compute_loss(trainer.model, {"pixel_values": images(2, rows=64, columns=64), "labels": labels})
    assert loss == 0
    loss.backward()
    assert all(value.grad is not None and not value.grad.any() for value in trainer.model.parameters())
    labels[0, 0, 0] = 1
    batch = {"pixel_values": images(2, rows=64, columns=64), "labels": labels}
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss, trainer.model(**batch).loss)


def test_evaluation_returns_counts_at_the_size_of_the_labels(tmp_path):
    trainer = tiny_trainer(tmp_path)
    trainer.model.eval()
    labels = torch.randint(0, 2, (1, 30, 50))
    batch = {"pixel_values": images(1, rows=45, columns=75), "labels": labels}
    loss, counts, _ = trainer.prediction_step(trainer.model, batch, False)
    assert counts.shape == (1, 2, 2)
    assert counts[0].sum(1).tolist() == labels.flatten().bincount().tolist()
    assert loss.isfinite()


# Script

TINY = """--crop-size 32 --embed-dim 8 --depths 1 1 1 1 --num-heads 1 1 2 2 --window-size 4 --head-channels 8
--auxiliary-channels 8 --batch-size 4 --max-steps 4 --warmup-steps 1 --validate-every 2 --log-every 1
--precision fp32""".split()  # noqa: SIM905


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A small data set as a user has one: folders, class names, a mask with pixels that count nowhere."""
    folder = tmp_path_factory.mktemp("drawn")
    photos = load_photographs(PHOTOS)
    for number, (split, count) in enumerate((("train", 12), ("validation", 3), ("test", 2))):
        write_drawn_segmentation(folder / split, photos, count, seed=number, sides=(40, 70))
    path = folder / "train" / "masks" / "000000.png"
    mask = np.array(Image.open(path))
    mask[:5] = 255
    Image.fromarray(mask).save(path)
    (folder / "classes.json").write_text(json.dumps(DRAWN_CLASSES))
    return folder


def run_script(*flags):
    return finetune.main([str(flag) for flag in flags])


def run_command(*command):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=variables, check=False)


@pytest.fixture(scope="module")
def finished(drawn, tmp_path_factory):
    """A finished run, with images resized for the model."""
    output = tmp_path_factory.mktemp("run") / "out"
    flags = ["--data", drawn, *TINY, "--test-split", "test", "--short-side", 48, "--output-dir", output]
    assert run_script(*flags) == 0
    return output


LEARNING = """--crop-size 48 --embed-dim 16 --depths 1 1 2 1 --num-heads 1 2 4 8 --window-size 6 --head-channels 24
--auxiliary-channels 16 --batch-size 16 --no-photometric --scale-range 0.9 1.1 --learning-rate 2e-3 --warmup-steps 10
--max-steps 80 --validate-every 40 --test-split test""".split()  # noqa: SIM905


def test_a_short_training_finds_shapes_in_held_out_images_and_an_untrained_model_does_not(tmp_path):
    photos = load_photographs(PHOTOS)
    for number, (split, count) in enumerate((("train", 96), ("validation", 8), ("test", 24))):
        write_drawn_segmentation(tmp_path / "data" / split, photos, count, seed=number, sides=(48, 80))
        for path in (tmp_path / "data" / split / "masks").iterdir():  # a shape, of whatever kind
            Image.fromarray(np.minimum(np.array(Image.open(path)), 1)).save(path)
    (tmp_path / "data" / "classes.json").write_text('["background", "shape"]')
    scores = {}
    for name, flags in (("trained", []), ("untrained", ["--learning-rate", 0, "--max-steps", 11])):
        flags = ["--data", tmp_path / "data", *LEARNING, *flags, "--output-dir", tmp_path / name]
        assert run_script(*flags) == 0
        scores[name] = json.loads((tmp_path / name / "metrics.json").read_text())["test"]
    assert scores["trained"]["mean_iou"] > 0.7
    assert scores["untrained"]["mean_iou"] < 0.5
    assert scores["trained"]["commonest_class"]["mean_iou"] < 0.5


def test_the_script_leaves_a_model_that_judges_whole_images_as_it_was_judged(finished, drawn):
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "metrics.json"}
    expected |= {"log.jsonl", "curve.png", "predictions.png", "checkpoints", "run.json"}
    assert expected == {path.name for path in finished.iterdir()}
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["test"]["class_iou"]) == set(DRAWN_CLASSES)

    # The same scores from the pipeline's masks, image by image.
    segment = pipeline("image-segmentation", model=str(finished), device="cpu")
    predicted, truth = [], []
    for path in sorted((drawn / "test" / "images").iterdir()):
        labels = torch.from_numpy(np.array(Image.open(drawn / "test" / "masks" / path.name))).long()
        found = torch.full_like(labels, -1)
        for entry in segment(str(path)):
            found[torch.from_numpy(np.array(entry["mask"])) > 0] = DRAWN_CLASSES.index(entry["label"])
        assert (found >= 0).all()
        predicted.append(found.flatten())
        truth.append(labels.flatten())
    iou = MulticlassJaccardIndex(4, ignore_index=255)(torch.cat(predicted), torch.cat(truth)).item()
    assert metrics["test"]["mean_iou"] == pytest.approx(iou, abs=1e-5)


def test_the_composite_loads_in_a_new_process(finished):
    code = f"""if True:
        import torch, transformers, green_swin_hf
        folder = {str(finished)!r}
        model, info = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        print([name for entries in info.values() for name in entries], type(model.backbone).__name__,
              tuple(model.eval()(torch.zeros(1, 3, 50, 70)).logits.shape), processor.size["shortest_edge"])
    """
    shown = run_command(sys.executable, "-W", "error::UserWarning", "-c", code)
    assert "[] GreenSwinBackbone (1, 4, 50, 70) 48" in shown.stdout, shown.stderr


def test_a_resumed_run_equals_one_that_was_never_interrupted(drawn, tmp_path):
    flags = ["--data", drawn, *TINY, "--drop-path-rate", 0.2, "--gradient-accumulation-steps", 2, "--batch-size", 2]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script(*flags, "--output-dir", whole) == 0
    assert run_script(*flags, "--output-dir", parts, "--stop-after", 1) == 0
    assert run_script("--output-dir", parts, "--resume", "auto", "--stop-after", 1) == 0
    assert not (parts / "metrics.json").exists()
    broken = parts / "checkpoints" / "checkpoint-3"  # what a killed run leaves
    shutil.copytree(parts / "checkpoints" / "checkpoint-2", broken)
    (broken / "trainer_state.json").unlink()
    assert run_script("--output-dir", parts, "--resume", "auto") == 0
    last = [load_file(run / "checkpoints" / "checkpoint-4" / "model.safetensors") for run in (whole, parts)]
    for name, value in last[0].items():
        torch.testing.assert_close(value, last[1][name], rtol=0, atol=0, msg=name)
    left = (parts / "metrics.json").read_text()
    assert left == (whole / "metrics.json").read_text()
    (parts / "metrics.json").unlink()
    assert run_script("--output-dir", parts, "--resume", "auto") == 0  # nothing is left to train
    assert (parts / "metrics.json").read_text() == left
    with pytest.raises(SystemExit, match="2"):
        run_script("--output-dir", parts, "--resume", "auto", "--learning-rate", 1)


def save_other_data(drawn, folder, change):
    """The data set, of which `change` makes another one; without a change it only moves."""
    shutil.copytree(drawn, folder)
    if change == "class names":
        (folder / "classes.json").write_text(json.dumps([*DRAWN_CLASSES[:-1], "comet"]))
    elif change == "fewer":
        for path in (folder / "train").rglob("000003.png"):
            path.unlink()
    elif change == "masks":
        for path in (folder / "train" / "masks").iterdir():
            Image.fromarray(3 - np.minimum(np.array(Image.open(path)), 3)).save(path)
    return folder


def test_other_data_are_refused_when_going_on_and_moved_ones_are_not(drawn, tmp_path, capsys):
    output = tmp_path / "run"
    assert run_script("--data", drawn, *TINY, "--output-dir", output, "--stop-after", 1) == 0
    again = ["--output-dir", output, "--resume", "auto", "--data"]
    for change, message in (
        ("class names", rf"cannot change the run: class 3 '{DRAWN_CLASSES[3]}' -> 'comet'; leave"),
        ("fewer", r"num_images 12 -> 11, data_fingerprint '\w{12}' -> '\w{12}'"),
        ("masks", r"cannot change the run: data_fingerprint '\w{12}' -> '\w{12}'; leave"),
    ):
        other = save_other_data(drawn, tmp_path / change.replace(" ", "-"), change)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run_script(*again, other)
        assert re.search(message, capsys.readouterr().err)
    shutil.copytree(output, copy := tmp_path / "copy")
    assert run_script(*again, save_other_data(drawn, tmp_path / "moved", None)) == 0

    checkpoint = copy / "checkpoints" / "checkpoint-1"  # as it was before it said what it was trained on
    (checkpoint / "data_facts.json").unlink()
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    del checksums["data_facts.json"]
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))
    assert run_script("--output-dir", copy, *again[2:], tmp_path / "masks") == 0


def test_an_image_that_cannot_be_read_at_the_end_costs_no_trained_model(drawn, tmp_path, capsys):
    shutil.copytree(drawn, folder := tmp_path / "data")
    image, output = folder / "test" / "images" / "000001.png", tmp_path / "run"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])  # its head is whole
    flags = ["--data", folder, *TINY, "--test-split", "test", "--output-dir", output]
    assert run_script(*flags) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"finetune_segmentation.py: stopped: {image}: ")
    assert f"the trained model is in {output}; measure it with: python" in last
    AutoModelForSemanticSegmentation.from_pretrained(output)
    assert not (output / "metrics.json").exists()
    image.write_bytes(content)
    assert run_script("--output-dir", output, "--resume", "auto") == 0
    assert json.loads((output / "metrics.json").read_text())["test"]["images"] == 2


def test_a_run_on_drawn_shapes_that_was_stopped_while_it_drew_starts_anew(tmp_path, monkeypatch, capsys):
    flags = ["--drawn-images", 8, *TINY, "--max-steps", 2, "--warmup-steps", 0, "--output-dir", tmp_path / "run"]

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finetune, "write_drawn_segmentation", full)
    with pytest.raises(SystemExit, match="2"):
        run_script(*flags)
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert run_script("--output-dir", tmp_path / "run", "--resume", "auto") == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["validation"]["images"], metrics["test"]["images"]) == (10, 10)


def test_pretrained_weights_bring_their_sizes_and_a_tenth_is_held_out(drawn, pretrained, tmp_path, capsys):
    flags = ["--data", drawn / "train", "--class-names", drawn / "classes.json", *TINY[:2], *TINY[16:]]
    flags += ["--init-from", pretrained, "--learning-rate", 0, "--output-dir", tmp_path / "run", "--validate-every", 4]
    assert run_script(*flags) == 0
    assert "11 train, 1 validation images" in capsys.readouterr().out
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", SegmentationRecipe)
    assert recipe.embed_dim is None
    saved, own = (load_file(folder / "model.safetensors") for folder in (pretrained, tmp_path / "run"))
    name = "swin.encoder.layers.2.blocks.0.attention.self.query.weight"
    torch.testing.assert_close(own[f"backbone.{name}"], saved[name], rtol=0, atol=0)


def test_what_is_uploaded_is_the_result_with_a_card_of_what_was_recorded(drawn, tmp_path, monkeypatch):
    output = tmp_path / "run"
    flags = ["--data", drawn, *TINY, "--test-split", "test", "--output-dir", output, "--push-to-hub"]
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        assert run_script(*flags) == 0
    files = hub.files("someone/run")
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "metrics.json", "log.jsonl"}
    expected |= {"curve.png", "predictions.png", "recipe.yaml", "run.json", "README.md", ".gitattributes"}
    assert set(files) == expected
    assert str(drawn).encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    shown = {(result.dataset_split, result.metric_type): result.metric_value for result in card.data.eval_results}
    metrics = json.loads((output / "metrics.json").read_text())
    assert shown["test", "mean_iou"] == metrics["test"]["mean_iou"]
    assert shown["validation", "pixel_accuracy"] == metrics["validation"]["pixel_accuracy"]
    assert "12 images to train on, 3 to validate on, 2 to test on" in card.text


def test_a_bad_mask_found_in_training_ends_the_run_in_one_line(drawn, tmp_path, monkeypatch, capsys):
    read = SegmentationDataset.read

    def broken(self, index):
        if index == 7:
            raise ValueError("mask seven.png has label 9, outside 0 … 3")
        return read(self, index)

    monkeypatch.setattr(SegmentationDataset, "read", broken)
    assert run_script("--data", drawn, *TINY, "--output-dir", tmp_path / "run") == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("finetune_segmentation.py: stopped: mask seven.png has label 9")
    assert "--resume auto" in lines[-1]


def spoil(folder, problem):
    """A data set with something wrong in it."""
    for split in ("train", "validation"):
        for name in ("a", "b", "c", "d"):
            save_pair(folder / split / "images", folder / split / "masks", name)
    (folder / "classes.json").write_text('["one", "two"]')
    if problem == "label":
        save_mask(folder / "train" / "masks" / "c.png", value=7)
    elif problem == "size":
        save_mask(folder / "validation" / "masks" / "b.png", size=(5, 5))
    elif problem == "mask":
        (folder / "train" / "masks" / "c.png").unlink()
    elif problem == "empty":
        for path in (folder / "validation").rglob("*.*"):
            path.unlink()
    elif problem == "ignored":
        for path in (folder / "validation" / "masks").iterdir():
            save_mask(path, value=255)
    elif problem == "torn":
        image = folder / "validation" / "images" / "a.jpg"
        Image.effect_noise((10, 12), 90).convert("RGB").save(image)
        image.write_bytes(image.read_bytes()[:-40])  # its head is whole
    elif problem == "colours":
        save_image(folder / "train" / "masks" / "a.png")
    elif problem == "names":
        (folder / "classes.json").unlink()


WRONG_DATA = {
    "label": "c.png has label 7, outside 0 … 1",
    "size": "12x10 pixels and its mask 5x5",
    "mask": "c.jpg has no counterpart",
    "empty": "holds no images",
    "ignored": "has a pixel with a class",
    "torn": "validation/images/a.jpg: ",
    "colours": "a.png: has colours",
    "names": "--class-names",
}
WRONG_FLAGS = {
    "folder": ("--data ./nowhere --class-names {data}/classes.json", "'./nowhere' does not exist"),
    "split": ("--data {data} --test-split test", "no split 'test'"),
    "validation split": ("--data {data} --validation-split other", "no split 'other'"),
    "batch": ("--data {data} --batch-size 5", "must not exceed the 4 training images"),
    "batch of one": ("--batch-size 1", "batch_size 1 must be at least 2"),
    "drawn": ("--drawn-images 8 --batch-size 9", "must not exceed drawn_images 8"),
    "photographs": ("--photographs {data}", "holds no images to draw on"),
    "class names": ("--class-names nowhere.json", "nowhere.json do not exist"),
    "weights": ("--init-from ./nowhere", "does not exist"),
    "no weights": ("--init-from {data}", "cannot be loaded"),
    "another model": ("--init-from {data}/vit", "/vit is a vit; give the folder of a GreenSwin or a Swin"),
    "drawn classes": ("--class-names {data}/classes.json", "are 2, and the drawn shapes have 4 classes"),
    "hub": ("--push-to-hub --drawn-images 20 --batch-size 4", "does not answer"),
    "size beside weights": ("--init-from {data} --embed-dim 8", "embed_dim 8 is set by the weights"),
    "warm-up": ("--max-steps 10 --warmup-steps 10", "must be less than max_steps 10"),
    "rate": ("--learning-rate nan", "must be finite"),
    "scale": ("--scale-range 2 1", "the smaller first"),
    "heads": ("--num-heads 1 2 3", "num_heads"),
    "no masks": ("--data {classes} --class-names {data}/classes.json", "has no column known to hold masks"),
    "flag": ("--learning-rat 1", "unrecognized arguments"),
    "resume": ("--resume {data}", "holds no whole checkpoint"),
    "output in use": ("--output-dir {data}", "is not empty"),
}


def assert_one_line(capfd, run, message):
    with pytest.raises(SystemExit) as stopped:
        run()
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("finetune_segmentation.py: error: ")
    assert message in lines[0]


@pytest.mark.parametrize("problem", WRONG_DATA)
def test_wrong_data_is_one_line_and_writes_nothing(tmp_path, capfd, problem):
    spoil(tmp_path / "data", problem)
    flags = ["--data", tmp_path / "data", *TINY, "--output-dir", tmp_path / "run"]
    assert_one_line(capfd, lambda: run_script(*flags), WRONG_DATA[problem])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS.keys())
def test_wrong_flags_are_one_line_and_write_nothing(tmp_path, monkeypatch, capfd, flags, message):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    spoil(tmp_path / "data", "")
    ViTConfig().save_pretrained(tmp_path / "data" / "vit")
    words = flags.format(data=tmp_path / "data", classes=CLASSES).split()
    words += [] if "--output-dir" in words else ["--output-dir", tmp_path / "run"]
    assert_one_line(capfd, lambda: run_script(*words), message)
    assert not (tmp_path / "run").exists()


def test_the_recipes_load_and_build_their_models():
    for path in RECIPES.glob("*.yaml"):
        recipe = load_recipe(path, SegmentationRecipe)
        config = recipe.model_config()
        assert config.out_features == ["stage1", "stage2", "stage3", "stage4"]
    swin_base = load_recipe(RECIPES / "upernet_swin_base_ade20k.yaml", SegmentationRecipe)
    assert (swin_base.max_steps, swin_base.learning_rate, swin_base.drop_path_rate) == (160_000, 6e-5, 0.3)
    assert swin_base.size == {"shortest_edge": 512, "longest_edge": 2048}
