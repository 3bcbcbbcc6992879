"""The detection script as a user runs it: a short training that must find shapes, exact resume, wrong input."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_config
from transformers import ViTImageProcessor

from green_swin_hf import GreenSwinForMaskedImageModeling
from green_swin_hf.checkpointing import list_checkpoints
from green_swin_hf.coco_data import CocoImages, collate_detection, load_coco
from green_swin_hf.detection import load_detector
from green_swin_hf.detection_metrics import coco_results, detect
from green_swin_hf.detection_recipe import DetectionRecipe
from green_swin_hf.drawn_shapes import load_photographs, write_coco_shapes
from green_swin_hf.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "finetune_detection.py"
PHOTOS = ROOT / "examples" / "data" / "photos"
# fmt: off
TINY = [
    "--drawn-images", "8", "--drawn-validation-images", "3", "--drawn-sides", "48", "72", "--short-sides", "40", "48",
    "--long-side", "80", "--patch-size", "4", "--embed-dim", "16", "--depths", "1", "1", "1", "--num-heads", "1", "2",
    "4", "--pyramid-channels", "16", "--box-head-width", "16", "--mask-head-widths", "16", "--proposals", "40", "20",
    "--samples", "16", "16", "--max-detections", "5", "--batch-size", "4", "--epochs", "2", "--milestones", "1",
    "--warmup-updates", "1", "--validate-every", "1", "--log-every", "1", "--pictures", "2", "--threads", "1",
    "--workers", "0", "--score-threshold", "0", "--precision", "fp32",
]
# fmt: on


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


script = load_script(SCRIPT)


def run_script(*flags):
    """`main` in this process; each call is a new run to accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return script.main([str(flag) for flag in flags])


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_command(*command, **environment):
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=variables, check=False)


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def without_speed(entries):
    return [{name: value for name, value in entry.items() if name != "images_per_second"} for entry in entries]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Two small data sets in COCO's format: `train/annotations.json` and `validation/annotations.json`."""
    folder, photographs = tmp_path_factory.mktemp("shapes"), load_photographs(PHOTOS)
    for seed, (name, count) in enumerate((("train", 6), ("validation", 3))):
        write_coco_shapes(folder / name, photographs, count, seed, sides=(48, 72))
    return folder


def given(shapes):
    return [
        "--train-annotations",
        shapes / "train/annotations.json",
        "--validation-annotations",
        shapes / "validation/annotations.json",
    ]


def test_accelerate_launch_leaves_a_detector_that_loads_and_pictures_and_a_log(tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", SCRIPT, *TINY, "--output-dir", output]
    done = run_command(*command)
    assert done.returncode == 0, done.stderr
    expected = {"detector.json", "model.safetensors", "detections.json", "detections.png", "training_curves.png"}
    expected |= {"log.jsonl", "recipe.yaml", "checkpoints", "drawn_shapes", "run.json"}
    assert expected == {path.name for path in output.iterdir()}
    log = read_log(output)
    assert [entry["epoch"] for entry in log if "box_map" in entry] == [0, 1, 2]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2, 3, 4]
    assert [entry["learning_rate"] for entry in log if "loss" in entry] == pytest.approx([1e-3, 1e-3, 1e-4, 1e-4])
    assert "before training" in done.stdout
    results = json.loads((output / "detections.json").read_text())
    assert {"image_id", "category_id", "bbox", "score", "segmentation"} == set(results[0])

    # The next command that it prints, in a process of its own.
    next_command = re.search(r'python -c "(.*)"', done.stdout)[1]
    shown = run_command(sys.executable, "-c", next_command)
    assert "tensor([[" in shown.stdout, shown.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of a minute or so on one core, by the default recipe but for fewer images with fewer, larger shapes."""
    output = tmp_path_factory.mktemp("trained") / "run"
    # fmt: off
    flags = [
        "--drawn-images", 400, "--drawn-validation-images", 60, "--drawn-sides", 64, 96, "--drawn-shapes", 2,
        "--drawn-radii", 0.2, 0.35, "--short-sides", 64, "--long-side", 128, "--epochs", 5, "--milestones", 4,
        "--warmup-updates", 40, "--validate-every", 5, "--workers", 0, "--precision", "fp32", "--output-dir", output,
    ]
    # fmt: on
    assert run_script(*flags) == 0
    return output


def test_a_short_training_finds_shapes_on_held_out_images_and_an_untrained_detector_does_not(trained):
    """Stated: mean average precision 0.15 of boxes and of masks (COCO's, over IoU 0.50 to 0.95), 0.3 at IoU 0.50."""
    before, after = (entry for entry in read_log(trained) if "box_map" in entry)
    assert before["epoch"] == 0
    assert max(before["box_map_50"], before["mask_map_50"]) < 0.02
    assert min(after["box_map"], after["mask_map"]) >= 0.15, after
    assert min(after["box_map_50"], after["mask_map_50"]) >= 0.3, after


def test_the_detections_left_are_those_of_the_detector_left(trained):
    """In the same batches: images are padded to the largest one of theirs, and windows see the padding."""
    images = CocoImages(load_coco(trained / "drawn_shapes/validation/annotations.json"))
    loader = [collate_detection([images[index], images[index + 1]]) for index in range(0, 12, 2)]
    found = coco_results(images.data, detect(load_detector(trained), loader, torch.device("cpu")))
    written = json.loads((trained / "detections.json").read_text())
    written = [entry for entry in written if entry["image_id"] <= 12]
    assert len(found) == len(written) > 0
    for one, other in zip(found, written, strict=True):
        assert one["category_id"] == other["category_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)
        assert one["bbox"] == pytest.approx(other["bbox"], abs=0.02)


def test_a_resumed_run_equals_one_that_was_never_interrupted(shapes, tmp_path, capsys):
    flags = [*given(shapes), *TINY, "--batch-size", 2, "--gradient-accumulation-steps", 2, "--drop-path-rate", 0.3]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script("--output-dir", whole, *flags, "--layer-decay", 0.8) == 0
    assert run_script("--output-dir", parts, *flags, "--layer-decay", 0.8, "--stop-after", 1) == 0
    assert "Go on with" in capsys.readouterr().out
    assert not (parts / "model.safetensors").exists()
    with pytest.raises(SystemExit, match="2"):
        run_script("--output-dir", parts, "--resume", "auto", "--learning-rate", 1.0)
    assert "learning_rate 0.001 -> 1.0" in capsys.readouterr().err
    assert run_script("--output-dir", parts, "--resume", "auto") == 0
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert without_speed(read_log(whole)) == without_speed(read_log(parts))
    assert len(list_checkpoints(whole / "checkpoints")) == 2


def test_other_annotations_of_as_many_images_are_refused_when_going_on(shapes, tmp_path, capsys):
    moved, other = tmp_path / "moved.json", tmp_path / "other.json"
    text = (shapes / "train" / "annotations.json").read_text()
    moved.write_text(text)
    content = json.loads(text)
    content["annotations"][0]["bbox"][0] += 1
    other.write_text(json.dumps(content))
    run = ["--output-dir", tmp_path / "run"]
    assert run_script(*run, *given(shapes), *TINY, "--stop-after", 1) == 0
    again = [*run, "--resume", "auto", "--train-images", shapes / "train" / "images"]
    with pytest.raises(SystemExit, match="2"):
        run_script(*again, "--train-annotations", other)
    assert re.search(r"cannot change the run: data_fingerprint '\w{12}' -> '\w{12}'; leave", capsys.readouterr().err)
    assert run_script(*again, "--train-annotations", moved) == 0


def test_images_that_do_not_fit_their_annotations_or_cannot_be_measured_on_lose_nothing(shapes, tmp_path, capsys):
    data = shutil.copytree(shapes, tmp_path / "shapes")
    first, cut = sorted((data / "train" / "images").iterdir())[0], sorted((data / "validation" / "images").iterdir())[0]
    Image.new("RGB", (20, 10)).save(first)
    content = cut.read_bytes()
    flags = [*given(data), *TINY, "--validate-every", 0, "--batch-size", 3]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_script("--output-dir", whole, *flags, "--max-bad-share", 0.2) == 0
    assert f"Bad image {first}: has 10 x 20 pixels, its annotations (image id" in capsys.readouterr().err

    cut.write_bytes(content[: len(content) // 2])  # its head is whole
    assert run_script("--output-dir", run, *flags, "--max-bad-share", 0.2) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "stopped" in line]
    assert re.search(rf"stopped: image {cut}: .*truncated.*; whole checkpoints are in {run / 'checkpoints'}", line)
    cut.write_bytes(content)
    assert run_script("--output-dir", run, "--resume", "auto") == 0
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, run))
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert without_speed(read_log(whole)) == without_speed(read_log(run))


def test_a_signal_ends_a_run_within_an_epoch_and_it_goes_on_exactly(shapes, tmp_path, capsys, monkeypatch):
    flags = [*given(shapes), *TINY, "--batch-size", 2, "--drop-path-rate", 0.3, "--log-every", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_script("--output-dir", whole, *flags) == 0
    log_update = script.log_update

    def signalled(run, *arguments):
        log_update(run, *arguments)
        if run.state.update == run.updates_per_epoch + 2:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(script, "log_update", signalled)
    capsys.readouterr()
    assert run_script("--output-dir", parts, *flags) == 0
    assert "on SIGTERM. Go on with: python" in capsys.readouterr().out
    assert not (parts / "model.safetensors").exists()
    monkeypatch.undo()
    assert run_script("--output-dir", parts, "--resume", "auto") == 0
    left, right = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    assert without_speed(read_log(whole)) == without_speed(read_log(parts))


def test_starting_from_a_pretrained_folder_takes_its_weights_statistics_and_channels(shapes, tmp_path, capsys):
    torch.manual_seed(3)
    pretrained = GreenSwinForMaskedImageModeling(tiny_config(num_channels=1, patch_size=4, image_size=64))
    pretrained.save_pretrained(tmp_path / "mim")
    ViTImageProcessor(image_mean=[0.2], image_std=[0.3]).save_pretrained(tmp_path / "mim")
    flags = [*given(shapes), *TINY, "--epochs", 1, "--learning-rate", 0, "--init-from", tmp_path / "mim"]
    flags += ["--drop-path-rate", 0.1]
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_script(*flags, "--output-dir", tmp_path / "run")
    message = f"--init-from {tmp_path / 'mim'} takes 1 channels; give --num-channels 1"
    assert capsys.readouterr().err == f"finetune_detection.py: error: {message}\n"
    assert run_script(*flags, "--output-dir", tmp_path / "run", "--num-channels", 1) == 0
    detector = load_detector(tmp_path / "run")
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", DetectionRecipe)
    assert (recipe.embed_dim, recipe.depths, recipe.drop_path_rate) == (
        8,
        (2, 2, 2),
        0.1,
    )  # of the weights, but the last
    assert (detector.settings.image_mean, detector.settings.image_std) == ((0.2,), (0.3,))
    name = "swin.encoder.layers.1.blocks.1.output.dense.weight"
    found, expected = (model.get_parameter(name) for model in (detector.backbone.body, pretrained))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_what_is_uploaded_is_the_result_with_a_card_of_what_was_recorded(shapes, tmp_path, monkeypatch):
    output, flags = tmp_path / "run", ["--epochs", 1, "--push-to-hub", "--hub-model-id", "shapes"]
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        assert run_script(*given(shapes), *TINY, *flags, "--output-dir", output) == 0
    files = hub.files("someone/shapes")
    expected = {"detector.json", "model.safetensors", "detections.json", "detections.png", "training_curves.png"}
    expected |= {"log.jsonl", "recipe.yaml", "run.json", "README.md", ".gitattributes"}
    assert set(files) == expected
    assert str(tmp_path).encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    shown = {result.metric_type: result.metric_value for result in card.data.eval_results}
    last = read_log(output)[-1]
    assert shown == {name: last[name] for name in ("box_map", "box_map_50", "mask_map", "mask_map_50")}
    assert "annotations.json: 6 images to train on, 3 to validate on" in card.text


def test_two_processes_measure_all_images_and_train_as_one(shapes, tmp_path):
    flags = [*given(shapes), *TINY, "--epochs", 1, "--short-sides", 48]
    assert run_script("--output-dir", tmp_path / "one", *flags) == 0
    launch = ["--multi_gpu", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, SCRIPT, *flags, "--batch-size", 2]
    done = run_command(*command, "--output-dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Fine-tuning a detector") == 1
    one, two = read_log(tmp_path / "one"), read_log(tmp_path / "two")
    # Before training, the same detector on the same images; then regions are sampled by each process for itself.
    before = [{name: value for name, value in log[0].items() if "_m" in name} for log in (one, two)]
    assert before[0].keys() == before[1].keys()
    assert before[0] == pytest.approx(before[1], abs=1e-6)
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two]


def test_a_broken_image_is_named_and_passed_over(tmp_path, capsys):
    for seed, name in enumerate(("train", "validation")):
        write_coco_shapes(tmp_path / name, load_photographs(PHOTOS), 5, seed, sides=(48, 72))
    (tmp_path / "train/images/000002.png").write_bytes(b"no image")
    flags = [*given(tmp_path), *TINY, "--batch-size", 5]
    assert run_script(*flags, "--max-bad-share", 0.2, "--output-dir", tmp_path / "run") == 0
    assert capsys.readouterr().err.count("000002.png") == 1
    counts = {entry["bad_images"] for entry in read_log(tmp_path / "run") if "bad_images" in entry}
    assert counts == {1}
    assert run_script(*flags, "--output-dir", tmp_path / "stopped") == 1
    assert "1 bad images in epoch 1, and max_bad_share 0.01 allows 0 of its 5" in capsys.readouterr().err
    assert any((tmp_path / "stopped" / "checkpoints").iterdir())


def test_too_many_images_that_are_not_the_annotated_ones_end_the_run_in_one_line(tmp_path, capsys):
    for seed, name in enumerate(("train", "validation")):
        write_coco_shapes(tmp_path / name, load_photographs(PHOTOS), 5, seed, sides=(48, 72))
    path = tmp_path / "train/annotations.json"
    content = json.loads(path.read_text())
    content["images"][2]["width"] += 50
    content["annotations"] = [entry for entry in content["annotations"] if isinstance(entry["segmentation"], list)]
    path.write_text(json.dumps(content))
    flags = ["--batch-size", 2, "--no-skip-empty", "--workers", 1, "--output-dir", tmp_path / "run"]
    assert run_script(*given(tmp_path), *TINY, *flags) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_detection.py")]
    assert len(lines) == 1
    assert "1 bad images in epoch 1, and max_bad_share 0.01 allows 0 of its 4; they are listed in" in lines[0]
    assert "000002.png" in (tmp_path / "run" / "bad_images.jsonl").read_text()


def test_a_worker_that_dies_while_measuring_ends_the_run_in_one_line(shapes, tmp_path, monkeypatch, capsys):
    training, read = os.getpid(), CocoImages.__getitem__

    def die_in_a_worker(images, index):
        if os.getpid() != training and "validation" in str(images.data.image_folder):
            os.kill(os.getpid(), signal.SIGKILL)
        return read(images, index)

    monkeypatch.setattr(CocoImages, "__getitem__", die_in_a_worker)
    assert run_script(*given(shapes), *TINY, "--workers", 1, "--output-dir", tmp_path / "run") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("finetune_detection.py")]
    assert len(lines) == 1
    assert re.search(r"stopped: a loader worker died \(SIGKILL: .*\): process \d+ was on image id \d+, .*png", lines[0])


def bad_annotations(shapes, tmp_path):
    """One file with a category that does not exist, and one without objects."""
    content = json.loads((shapes / "train/annotations.json").read_text())
    content["annotations"][3]["category_id"] = 9
    (tmp_path / "bad.json").write_text(json.dumps(content))
    content = json.loads((shapes / "validation/annotations.json").read_text())
    (tmp_path / "empty.json").write_text(json.dumps(content | {"annotations": []}))
    return {name: tmp_path / f"{name}.json" for name in ("bad", "empty")}


WRONG_INPUT = {
    "annotations": ("--train-annotations nowhere.json", "is not a file"),
    "an annotation": (
        "--train-annotations {bad} --train-images {shapes}/train/images",
        "annotation 4: category_id 9 is none of the categories",
    ),
    "images": ("--train-images {shapes}/validation/images", "images of"),
    "no validation": ("ONLY --train-annotations {shapes}/train/annotations.json", "--validation-annotations"),
    "nothing to measure on": (
        "--validation-annotations {empty} --validation-images {shapes}/validation/images",
        "empty.json annotates no objects to measure on",
    ),
    "validation images": ("--validation-images {shapes}/train/images", "its annotations (image id"),
    "no training": ("ONLY --validation-annotations {shapes}/validation/annotations.json", "--train-annotations"),
    "photographs": ("ONLY --photographs {shapes}/train", "holds no images to draw on"),
    "anchors": ("--anchor-sizes 8 16", "anchor_sizes [8, 16] must have 4 sizes"),
    "long side": ("--long-side 10", "long_side 10 must be at least 48"),
    "batch": ("--batch-size 100", "must not exceed the 6 training images"),
    "drawn batch": ("ONLY --batch-size 100", "must not exceed the 8 training images"),
    "heads": ("--num-heads 1 2 3", "num_heads"),
    "channels": ("--num-channels 2", "num_channels 2 must be 1 (grey) or 3 (colour)"),
    "value": ("--epochs many", "epochs 'many' must be an integer"),
    "flag": ("--epoch 3", "unrecognized arguments: --epoch"),
    "weights": ("--init-from ./nowhere", "does not exist"),
    "weights of no model": ("--init-from {shapes}", "cannot be loaded"),
    "recipe": ("--recipe nowhere.yaml", "recipe nowhere.yaml is not a file"),
    "both starts": ("--resume auto --init-from x", "give one of them"),
    "resume": ("--resume {shapes}", "holds no whole checkpoint"),
    "rate": ("--learning-rate inf", "learning_rate inf must be finite"),
    "layer decay": ("--layer-decay 2", "layer_decay 2.0 must be greater than 0 and at most 1"),
    "sides": ("--drawn-sides 100 50", "drawn_sides [100, 50]"),
    "output in use": ("--output-dir {shapes}", "is not empty"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2_and_writes_nothing(shapes, tmp_path, capfd, flags, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    words = flags.format(shapes=shapes, **bad_annotations(shapes, tmp_path)).split()
    first = [*([] if words[0] == "ONLY" else given(shapes)), *TINY]
    first += [] if "--output-dir" in words else ["--output-dir", folder / "run"]
    with pytest.raises(SystemExit) as stopped:
        run_script(*first, *(word for word in words if word != "ONLY"))
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("finetune_detection.py: error: ")
    assert message in lines[0]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["coco_swin_base_window7", "drawn_shapes_tiny"])
def test_the_recipes_make_detectors(name):
    recipe = load_recipe(ROOT / f"examples/recipes/detection/{name}.yaml", DetectionRecipe)
    config = recipe.model_config()
    recipe.detector_settings(("a", "b")).check_fits(config, config.num_layers)
