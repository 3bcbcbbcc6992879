"""Fine-tuning a classifier as a user does it: what a run starts from, learns from, leaves, and says to wrong input."""

import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import datasets
import pytest
import torch
from hub_server import HubServer
from huggingface_hub import ModelCard
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from test_examples import _fresh_accelerator, load_script, run_command  # noqa: F401
from tiny import tiny_config
from torch.nn.functional import cross_entropy
from transformers import AutoImageProcessor, SwinConfig, SwinForImageClassification, ViTConfig, pipeline

from green_swin_hf import GreenSwinForImageClassification, GreenSwinForMaskedImageModeling
from green_swin_hf.data import EvaluationTransform
from green_swin_hf.finetuning import build_processor, build_transforms
from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.image_decoding import decode_image
from green_swin_hf.labelled_images import load_labelled_images
from green_swin_hf.optimization import cosine_factor
from green_swin_hf.pretrained_start import load_for_finetuning
from green_swin_hf.trainer_runs import TrainerProgress, check_facts

ROOT = Path(__file__).resolve().parents[1]
FINETUNE = ROOT / "examples" / "finetune.py"
EMBEDDED = ROOT / "examples" / "data" / "fashion_mnist_10k"
PHOTOS = ROOT / "examples" / "data" / "photos"
NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
GEOMETRY = {"embed_dim": 16, "depths": (1, 1, 1), "num_heads": (1, 2, 4), "num_channels": 1}
FLAGS = ["--batch-size", 8, "--warmup-epochs", 0.5, "--epochs", 2, "--log-every", 1, "--threads", 1, "--workers", 0]
FLAGS += ["--precision", "fp32", "--learning-rate", 4e-3, "--layer-decay", 0.9, "--min-lr-ratio", 0.01]
SCRATCH = ["--model", "none", "--embed-dim", 16, "--depths", 1, 1, 1, "--num-heads", 1, 2, 4]

finetune = load_script(FINETUNE)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder with splits of 40, 20 and 20 images of the embedded data."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in (("train", 40), ("validation", 20), ("test", 20)):
        file = EMBEDDED / "data" / f"{split}-00000-of-00001.parquet"
        rows = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(folder / "cache"))
        per_class = [[row for row, label in enumerate(rows["label"]) if label == c][: count // 10] for c in range(10)]
        rows.select(sorted(row for part in per_class for row in part)).to_parquet(str(folder / f"{split}.parquet"))
    shutil.rmtree(folder / "cache")
    return folder


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """What a pretraining run leaves."""
    folder = tmp_path_factory.mktemp("models") / "pretrained"
    torch.manual_seed(5)
    GreenSwinForMaskedImageModeling(tiny_config(**GEOMETRY)).save_pretrained(folder)
    recipe = FinetuningRecipe(image_size=32, num_channels=1, mean=(0.3,), std=(0.4,))
    build_processor(recipe).save_pretrained(folder)
    return folder


def run_finetune(*flags):
    """`main` in this process."""
    return finetune.main([str(flag) for flag in flags])


def splits_of(data):
    return ["--data", data, "--validation-split", "validation", "--test-split", "test"]


def weights(output):
    return load_file(output / "model.safetensors")


def metrics(output):
    return json.loads((output / "metrics.json").read_text())


def log_of(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def assert_same(left, right, tolerance=0.0):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=tolerance, msg=name)


def test_a_run_leaves_a_classifier_for_pipelines_with_its_metrics_and_pictures(data, pretrained, tmp_path, capsys):
    output = tmp_path / "run"
    assert run_finetune("--model", pretrained, *splits_of(data), *FLAGS, "--output-dir", output) == 0
    said = capsys.readouterr()
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml", "metrics.json"}
    expected |= {"training_curve.png", "predictions.png", "log.jsonl", "checkpoints", "run.json"}
    assert expected == {path.name for path in output.iterdir() if path.suffix != ".py"}
    assert (said.out + said.err).count("validation loss") == 2
    assert "Always answering the most common class scores 10.0%" in said.out
    assert "0.3" in (output / "recipe.yaml").read_text()  # of the pretrained folder's processor

    # The model that is kept is the best on the validation images, and what is measured is what the folder gives.
    results = metrics(output)
    measured = [entry for entry in log_of(output) if "eval_loss" in entry]
    best = max(measured, key=lambda entry: entry["eval_top_1_accuracy"])
    assert results["best_epoch"] == best["epoch"]
    assert results["validation"]["top_1_accuracy"] == best["eval_top_1_accuracy"]
    config = json.loads((output / "config.json").read_text())
    assert tuple(config["id2label"][str(index)] for index in range(10)) == NAMES

    test = load_labelled_images(data, split="test")
    pictures = [decode_image(record, "L") for record in test.source.dataset["image"]]
    model = GreenSwinForImageClassification.from_pretrained(output).eval()
    transform = EvaluationTransform((32, 32), 1, mean=(0.3,), std=(0.4,))
    with torch.no_grad():
        logits = model(torch.stack([transform(picture) for picture in pictures])).logits
    assert cross_entropy(logits, test.labels).item() == pytest.approx(results["test"]["loss"], abs=1e-5)
    accuracy = (logits.argmax(-1) == test.labels).float().mean().item()
    assert accuracy == pytest.approx(results["test"]["top_1_accuracy"])

    # The pipeline sees colour, and gives the same.
    classify = pipeline("image-classification", model=str(output), device="cpu")
    answers = classify([Image.fromarray(picture[0].numpy()) for picture in pictures], top_k=10)
    for row, answer in zip(logits.softmax(-1), answers, strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert [scores[name] for name in NAMES] == pytest.approx(row.tolist(), abs=2e-3)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", [None, 0.875])
def test_the_processor_prepares_images_as_evaluation_does(channels, crop, tmp_path):
    mean, std = (0.3, 0.4, 0.5)[:channels], (0.2, 0.3, 0.4)[:channels]
    size = (48, 48) if crop else (32, 48)
    recipe = FinetuningRecipe(image_size=size, num_channels=channels, mean=mean, std=std, evaluation_crop=crop)
    build_processor(recipe).save_pretrained(tmp_path)
    tiny_config(num_channels=channels).save_pretrained(tmp_path)  # AutoImageProcessor may look there
    _, transform = build_transforms(recipe)
    for name in ("rocket.jpg", "chelsea.png"):
        with Image.open(PHOTOS / name) as picture:
            colour = picture.convert("RGB")
            uint8 = decode_image({"bytes": None, "path": str(PHOTOS / name)}, transform.color_mode)
            for backend in ("torchvision", "pil"):
                processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
                given = processor(colour, return_tensors="pt").pixel_values[0]
                error = (given - transform(uint8)).abs() * torch.tensor(std)[:, None, None] * 255
                assert given.shape == (channels, *size)
                # two resizes of 8-bit pixels: torchvision's is ours, Pillow's rounds between its two passes
                assert error.max() < (1.01 if backend == "torchvision" else 3), (backend, error.max())


def test_a_resumed_run_equals_one_that_was_never_interrupted(data, pretrained, tmp_path):
    flags = ["--model", pretrained, *splits_of(data), *FLAGS, "--epochs", 3, "--drop-path-rate", 0.3]
    flags += ["--rand-augment", 9, "--mixup", 0.8, "--cutmix", 1, "--random-erasing", 0.5, "--layer-decay", 0.8]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_finetune("--output-dir", whole, *flags) == 0
    assert run_finetune("--output-dir", parts, *flags, "--stop-after", 1) == 0
    assert not (parts / "model.safetensors").exists()
    (parts / "checkpoints" / "checkpoint-9").mkdir()  # what a killed run leaves
    assert run_finetune("--output-dir", parts, "--resume", "auto") == 0
    last = [folder / "checkpoints" / "checkpoint-15" for folder in (whole, parts)]
    assert_same(*map(weights, last))
    assert_same(weights(whole), weights(parts))
    losses = [
        [(entry["step"], entry["loss"]) for entry in log_of(folder) if "loss" in entry] for folder in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 15
    left = json.loads((parts / "metrics.json").read_text())
    moved = parts.rename(tmp_path / "moved")
    assert run_finetune("--output-dir", moved, "--resume", "auto") == 0  # nothing is left to train
    again = json.loads((moved / "metrics.json").read_text())
    assert {**again, "seconds": 0} == {**left, "seconds": 0}
    assert_same(weights(whole), weights(moved))


def test_a_signal_ends_a_run_within_an_epoch_and_it_goes_on_exactly(data, pretrained, tmp_path, capsys, monkeypatch):
    flags = ["--model", pretrained, *splits_of(data), *FLAGS, "--drop-path-rate", 0.3]
    flags += ["--rand-augment", 9, "--mixup", 0.8, "--cutmix", 1, "--random-erasing", 0.5]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_finetune("--output-dir", whole, *flags) == 0
    on_step_end = TrainerProgress.on_step_end

    def signalled(self, args, state, *others, **more):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        on_step_end(self, args, state, *others, **more)

    monkeypatch.setattr(TrainerProgress, "on_step_end", signalled)
    capsys.readouterr()
    assert run_finetune("--output-dir", parts, *flags) == 0
    assert "Stopped after update 7 of 10 on SIGTERM. Go on with: python" in capsys.readouterr().out
    monkeypatch.undo()
    assert run_finetune("--output-dir", parts, "--resume", "auto") == 0
    assert_same(*(weights(folder / "checkpoints" / "checkpoint-10") for folder in (whole, parts)))


def test_resume_auto_starts_a_run_that_has_no_checkpoint_yet(data, pretrained, tmp_path, capsys):
    flags = ["--model", pretrained, *splits_of(data), *FLAGS, "--epochs", 1, "--output-dir", tmp_path / "run"]
    assert run_finetune(*flags, "--resume", "auto") == 0
    assert "a new run starts there" in capsys.readouterr().out
    assert log_of(tmp_path / "run")[-1]["step"] == 5


def test_resuming_refuses_another_run(data, pretrained, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--model", pretrained, *splits_of(data), *FLAGS, "--output-dir", output]
    assert run_finetune(*flags, "--stop-after", 1) == 0
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    for extra, message in (
        (["--mixup", 0.8], "mixup 0.0 -> 0.8"),
        (["--labels-share", 0.5], "labels_share None -> 0.5"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run_finetune("--output-dir", output, "--resume", "auto", *extra)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run_finetune(*flags)
    assert "is not empty" in capsys.readouterr().err
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("*")}


def save_other_data(data, folder, change):
    """The splits, of which `change` makes other rows of those to train on; without a change they only move."""
    shutil.copytree(data, folder)
    if change == "class names":
        for path in folder.iterdir():
            rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(folder.with_suffix(".cache")))
            classes = datasets.ClassLabel(names=[*NAMES[:-1], "Boot"])
            rows.cast_column("label", classes).to_parquet(str(path))
    elif change:
        path = str(folder / "train.parquet")
        rows = datasets.Dataset.from_parquet(path, cache_dir=str(folder.with_suffix(".cache")))
        labels = rows["label"][::-1]
        changes = {
            "fewer": lambda: rows.select(range(38)),
            "images": lambda: rows.select(range(39, -1, -1)),
            "labels": lambda: rows.remove_columns("label").add_column("label", labels, feature=rows.features["label"]),
        }
        changes[change]().to_parquet(path)
    return folder


def forget_facts(checkpoint):
    """Leave a checkpoint as it was written before it said what it was trained on."""
    (checkpoint / "data_facts.json").unlink()
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    del checksums["data_facts.json"]
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))


OTHER_DATA = {
    "class names": "cannot change the run: class 9 'Ankle boot' -> 'Boot'; leave",
    "fewer": r"num_images 40 -> 38, data_fingerprint '\w{12}' -> '\w{12}'",
    "images": r"cannot change the run: data_fingerprint '\w{12}' -> '\w{12}'; leave",
    "labels": r"cannot change the run: data_fingerprint '\w{12}' -> '\w{12}'; leave",
}


def test_other_data_are_refused_when_going_on_and_moved_ones_are_not(data, tmp_path, capsys):
    output = tmp_path / "run"
    assert run_finetune(*splits_of(data), *SCRATCH, *FLAGS, "--output-dir", output, "--stop-after", 1) == 0
    again = ["--output-dir", output, "--resume", "auto", "--data"]
    for change, message in OTHER_DATA.items():
        other = save_other_data(data, tmp_path / change.replace(" ", "-"), change)
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run_finetune(*again, other)
        assert re.search(message, capsys.readouterr().err)
    facts = output / "checkpoints" / "checkpoint-5" / "data_facts.json"
    (copy := tmp_path / "copy").mkdir()
    shutil.copytree(output, copy, dirs_exist_ok=True)
    assert run_finetune(*again, save_other_data(data, tmp_path / "moved", None)) == 0
    kept = [path.read_text() for path in output.rglob("data_facts.json")]
    assert kept == [facts.read_text()] * 2

    forget_facts(copy / "checkpoints" / "checkpoint-5")
    assert run_finetune("--output-dir", copy, *again[2:], tmp_path / "images") == 0
    assert (copy / "checkpoints" / "checkpoint-10" / "data_facts.json").is_file()


def test_facts_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "data_facts.json").write_text("torn")
    with pytest.raises(ValueError, match=r"data_facts\.json cannot be read: .*; go on from another checkpoint"):
        check_facts(tmp_path, FinetuningRecipe(), {"class_names": ["a"]})


def save_classes(folder, splits, good=10):
    """Images of two classes in splits; of each class in a split of `splits` so many can be read."""
    for split in ("train", "validation", "test"):
        for name, value in (("dark", 30), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for index in range(10):
                path = folder / split / name / f"{index}.png"
                Image.new("RGB", (16, 16), (value, value, 10 * index)).save(path)
                if split in splits and index >= good:
                    path.write_bytes(b"torn")
    return folder


TWO_CLASSES = [*SCRATCH, *FLAGS, "--image-size", 16, "--depths", 1, 1, "--num-heads", 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_test_images_that_cannot_be_read_cost_no_trained_model(tmp_path, monkeypatch, capfd, workers):
    monkeypatch.setattr("green_swin_hf.data.MAX_CORRUPT_RUN", 3)
    folder, output = save_classes(tmp_path / "data", ["test"], good=2), tmp_path / "run"
    flags = [*splits_of(folder), *TWO_CLASSES, "--workers", workers, "--output-dir", output]
    assert run_finetune(*flags) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert re.match(r"finetune\.py: stopped: data set '.*' looks broken: 3 images in a row cannot be decoded", last)
    assert f"the trained model is in {output}; measure it with: python" in last
    assert not (output / "metrics.json").exists()
    AutoImageProcessor.from_pretrained(output)
    saved = weights(output)
    assert_same(saved, GreenSwinForImageClassification.from_pretrained(output).state_dict())

    shutil.rmtree(folder)
    save_classes(folder, [])
    assert run_finetune("--output-dir", output, "--resume", "auto") == 0
    assert metrics(output)["test"]["images"] == 20
    assert_same(saved, weights(output))


def test_validation_images_that_cannot_be_read_end_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("green_swin_hf.data.MAX_CORRUPT_RUN", 3)
    folder, output = save_classes(tmp_path / "data", ["validation"], good=2), tmp_path / "run"
    assert run_finetune(*splits_of(folder), *TWO_CLASSES, "--output-dir", output) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "looks broken: 3 images in a row" in last
    assert "it has no whole checkpoint yet; start it anew with: python" in last


def test_a_full_disk_ends_the_run_in_one_line_with_the_earlier_checkpoint_whole(data, tmp_path, monkeypatch, capsys):
    save = GreenSwinForImageClassification.save_pretrained

    def full(self, folder, *others, **more):
        if "checkpoint-10" in str(folder):  # as safetensors has it
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return save(self, folder, *others, **more)

    monkeypatch.setattr(GreenSwinForImageClassification, "save_pretrained", full)
    output = tmp_path / "run"
    assert run_finetune(*splits_of(data), *SCRATCH, *FLAGS, "--output-dir", output) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        "finetune.py: stopped: checkpoint 10 cannot be written: Error while serializing: I/O error: No"
    )
    assert f"{output / 'checkpoints' / 'checkpoint-5'} is whole; go on with: python" in last
    monkeypatch.undo()
    assert run_finetune("--output-dir", output, "--resume", "auto") == 0


def test_two_processes_with_half_the_batch_train_as_one(data, pretrained, tmp_path):
    flags = ["--model", pretrained, *splits_of(data), *FLAGS, "--drop-path-rate", 0, "--epochs", 1]
    assert run_finetune("--output-dir", tmp_path / "one", *flags) == 0
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, FINETUNE, *flags, "--batch-size", 4]
    done = run_command(*command, "--output-dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Fine-tuning an image classifier") == 1
    assert "2 processes" in done.stdout
    assert_same(weights(tmp_path / "one"), weights(tmp_path / "two"), tolerance=1e-6)
    one, two = (metrics(tmp_path / name)["test"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-6)
    rates = [
        [entry["learning_rate"] for entry in log_of(tmp_path / name) if "loss" in entry] for name in ("one", "two")
    ]
    assert rates[0] == pytest.approx([4e-3 * 8 / 512 * cosine_factor(step, 2, 5, 0.01) for step in range(5)])
    assert rates[0] == pytest.approx(rates[1])

    next_command = re.search(r'python -c "(.*)"', done.stdout)[1].replace("examples/", f"{ROOT}/examples/")
    shown = run_command(sys.executable, "-c", next_command)
    assert "'label': '" in shown.stdout, shown.stderr


def test_a_run_starts_from_a_stock_swin_and_keeps_its_head_only_for_the_same_classes(tmp_path):
    folder = tmp_path / "swin"
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    config = SwinConfig(**sizes, id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "dog": 1})
    stock = SwinForImageClassification(config).eval()
    stock.save_pretrained(folder)
    same = load_for_finetuning(str(folder), ("cat", "dog"), drop_path_rate=0.3).eval()
    pixels = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same(pixels).logits, stock(pixels).logits, atol=1e-5, rtol=1e-5)
    assert (same.config.model_type, same.config.drop_path_rate) == ("green_swin", 0.3)
    for names in (("dog", "cat"), ("a", "b", "c")):
        other = load_for_finetuning(str(folder), names)
        query = "swin.encoder.layers.1.blocks.0.attention.self.query.weight"
        assert torch.equal(other.state_dict()[query], same.state_dict()[query])
        assert other.classifier.weight.shape[0] == other.config.num_labels == len(names)
        assert not torch.equal(other.classifier.weight[:2], same.classifier.weight)
        assert other.config.id2label == dict(enumerate(names))


def test_labels_can_be_limited_and_images_held_out(data, tmp_path, capsys):
    flags = ["--data", data, *SCRATCH, *FLAGS, "--max-steps", 1, "--output-dir", tmp_path / "run"]
    assert run_finetune(*flags, "--validation-share", 0.25, "--label-budget", 20) == 0
    said = capsys.readouterr().out
    assert "20 images of" in said
    assert "10 images (held out of train)" in said
    results = metrics(tmp_path / "run")
    assert (results["train_images"], results["validation"]["images"], results["test"]) == (20, 10, None)


def test_without_validation_the_last_model_is_kept(data, tmp_path):
    flags = ["--data", data, *SCRATCH, *FLAGS, "--max-steps", 2, "--output-dir", tmp_path / "run"]
    assert run_finetune(*flags, "--validation-share", 0, "--test-split", "test") == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "run" / "checkpoints" / "checkpoint-2"))
    assert metrics(tmp_path / "run")["validation"] is None


def test_colour_photos_in_class_folders_with_accumulation_and_an_unreadable_one(tmp_path, caplog):
    for name, photos in (("animals", ["chelsea.png"]), ("things", ["coffee.png", "rocket.jpg"])):
        for copy in range(3):
            for photo in photos:
                target = tmp_path / "images" / "train" / name / f"{copy}-{photo}"
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(PHOTOS / photo, target)
    (tmp_path / "images" / "train" / "things" / "broken.png").write_bytes(b"torn")
    flags = ["--data", tmp_path / "images", *SCRATCH, "--num-channels", 3, "--image-size", 32, 48, *FLAGS]
    flags += ["--batch-size", 2, "--gradient-accumulation-steps", 3, "--validation-share", 0.2, "--epochs", 2]
    assert run_finetune(*flags, "--output-dir", tmp_path / "run") == 0
    assert metrics(tmp_path / "run")["updates"] == 4  # 4 batches an epoch: 3 and what is left
    assert "top_5_accuracy" not in metrics(tmp_path / "run")["validation"]
    assert caplog.text.count("broken.png") >= 1
    assert (
        json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())["image_processor_type"]
        == "ViTImageProcessor"
    )


def test_what_is_uploaded_is_the_result_with_a_card_of_what_was_recorded(data, tmp_path, monkeypatch):
    output = tmp_path / "run"
    flags = [*splits_of(data), *SCRATCH, *FLAGS, "--max-steps", 1, "--output-dir", output, "--push-to-hub"]
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        assert run_finetune(*flags, "--hub-model-id", "shoes", "--hub-public") == 0
    files, record = hub.files("someone/shoes"), json.loads((output / "run.json").read_text())
    assert not hub.repositories["someone/shoes"].is_private
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "metrics.json", "recipe.yaml"} <= set(files)
    assert not any("checkpoint" in name for name in files)
    assert str(tmp_path).encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    shown = {(result.dataset_split, result.metric_name): result.metric_value for result in card.data.eval_results}
    assert shown["test", "Top-1 accuracy"] == metrics(output)["test"]["top_1_accuracy"]
    assert shown["validation", "Top-5 accuracy"] == metrics(output)["validation"]["top_5_accuracy"]
    assert record["data"]["train_images"] == 40
    assert record["training"]["images_per_update"] == 8


WRONG_INPUT = {
    "no pretrained model": ("--recipe {recipe}", "outputs/pretrain is not here; run examples/pretrain.py first"),
    "no model there": (
        "--model {folder}/none",
        "does not exist; give a folder with a model, or a name on the Hub, or none",
    ),
    "no model": ("--model {folder}", "cannot be loaded"),
    "another model": ("--model {vit}", "/vit is a vit; give the folder of a GreenSwin or a Swin"),
    "torn validation images": (
        "--model none --data {torn} --validation-split validation",
        "validation images: data set",
    ),
    "torn test images": ("--model none --data {torn} --test-split test", "test images: data set"),
    "other image size": ("--model {pretrained} --image-size 16", "leave out image_size"),
    "other channels": ("--model {pretrained} --num-channels 3", "leave out image_size and num_channels"),
    "other geometry": ("--model {pretrained} --embed-dim 32", "embed_dim 32 is not that of the model"),
    "split": ("--model none --validation-split dev", "no split 'dev'"),
    "label column": ("--model none --label-column image2", "no column 'image2'; set --label-column to one of: label"),
    "no classes": ("--model none --data {photos}", "has no class; put the images of each class into a sub-folder"),
    "one class": ("--model none --data {one}", "the class 'only' only; a classifier needs two or more"),
    "budget below a batch": ("--model none --label-budget 10 --batch-size 16", "give --batch-size 10 or less"),
    "too much held out": ("--model none --validation-share 0.99", "too few images of class"),
    "flag": ("--model none --mixupp 1", "unrecognized arguments: --mixupp"),
    "range": ("--model none --label-smoothing 1", "label_smoothing 1.0 must be at least 0 and less than 1"),
    "statistics": ("--model none --mean 0.1 0.2", "mean (0.1, 0.2) must be as many numbers as num_channels 1"),
    "resume from nothing": ("--resume {folder}", "holds no whole checkpoint"),
    "resume path": ("--resume {folder}/none", "is no folder"),
    "tracker": ("--report-to wandb --model none", "needs the package wandb"),
    "half precision on the CPU": ("--precision fp16 --model none", "needs a GPU"),
    "hub": ("--push-to-hub --model none", "does not answer"),
    "output in use": ("--model none --output-dir {folder}", "is not empty"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2_and_writes_nothing(
    data, pretrained, tmp_path, monkeypatch, capfd, flags, message
):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.chdir(tmp_path)
    folder, one = tmp_path / "folder", tmp_path / "one"
    (one / "only").mkdir(parents=True)
    Image.new("L", (8, 8)).save(one / "only" / "a.png")
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    ViTConfig().save_pretrained(tmp_path / "vit")
    names = {
        "vit": tmp_path / "vit",
        "torn": save_classes(tmp_path / "torn", ["validation", "test"], good=0) if "{torn}" in flags else "",
        "folder": folder,
        "one": one,
        "pretrained": pretrained,
        "photos": PHOTOS,
        "recipe": finetune.DEFAULT_RECIPE,
    }
    words = flags.format(**names).split()
    first = FLAGS if "--data" in words else [*FLAGS, "--data", data]
    first = [*first, "--embed-dim", 16, "--depths", 1, 1, 1] if "none" in words else first
    first += [] if "--output-dir" in words else ["--output-dir", tmp_path / "run"]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as stopped:
        run_finetune(*first, *words)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("finetune.py: error: ")
    assert message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
