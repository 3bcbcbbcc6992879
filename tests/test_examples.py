"""The examples as a user runs them: their command lines, what they leave, and what they say to wrong input."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import SwinConfig, SwinModel

from green_swin_hf import publish
from green_swin_hf.checkpointing import list_checkpoints, read_trainer_state, read_training_state
from green_swin_hf.optimization import cosine_factor
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
PRETRAIN = ROOT / "examples" / "pretrain.py"
PHOTOS = ROOT / "examples" / "data" / "photos"
TINY = [
    "--precision",  # or a machine with native bf16 would train in it, which is not the same with another batch size
    "fp32",
    "--batch-size",
    "8",
    "--validation-images",
    "4",
    "--log-every",
    "1",
    "--depths",
    "1",
    "1",
    "1",
    "--embed-dim",
    "16",
    "--num-heads",
    "1",
    "2",
    "4",
    "--decoder-hidden-size",
    "32",
    "--decoder-intermediate-size",
    "64",
    "--warmup-epochs",
    "0.5",
    "--threads",
    "1",
]


def load_script(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


pretrain = load_script(PRETRAIN)


@pytest.fixture(scope="session")
def grey_images(tmp_path_factory):
    """A Parquet file with 64 images of the embedded data set."""
    file = ROOT / "examples/data/fashion_mnist_10k/data/validation-00000-of-00001.parquet"
    path = tmp_path_factory.mktemp("data") / "grey.parquet"
    images = datasets.load_dataset("parquet", data_files=str(file), split="train", cache_dir=str(path.parent))
    images.select(range(64)).to_parquet(str(path))
    return path


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_pretrain(*flags):
    """`main` in this process; each call is a new run to accelerate."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return pretrain.main([str(flag) for flag in flags])


def run_command(*command, **environment):
    """A command as a user gives it, the package on the path."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    words = [str(word) for word in command]
    return subprocess.run(words, capture_output=True, text=True, env=variables, timeout=300, check=False)


def read_log(output):
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def training_losses(output):
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in read_log(output) if "loss" in entry]


def weights(output):
    return load_file(output / "model.safetensors")


def assert_same(left, right):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=0, atol=0, msg=name)


def test_accelerate_launch_leaves_a_model_that_loads_and_pictures_and_a_log(grey_images, tmp_path):
    output = tmp_path / "run"
    command = [sys.executable, "-m", "accelerate.commands.launch", PRETRAIN, "--data", grey_images, *TINY]
    done = run_command(*command, "--output-dir", output, "--max-steps", 3, "--report-to", "tensorboard")
    assert done.returncode == 0, done.stderr
    expected = {"config.json", "model.safetensors", "preprocessor_config.json", "recipe.yaml"}
    expected |= {"reconstructions.png", "loss_curve.png", "log.jsonl", "checkpoints"}
    assert expected <= {path.name for path in output.iterdir()}
    assert [step for step, _, _ in training_losses(output)] == [1, 2, 3]
    assert "Predicting each unit's mean" in done.stdout
    assert list(output.rglob("events.out.tfevents*"))

    # The next command that it prints, and both Auto classes, in a process of their own.
    next_command = re.search(r'python -c "(.*)"', done.stdout)[1]
    shown = run_command(sys.executable, "-W", "error::UserWarning", "-c", next_command)
    assert "torch.Size([1, 16, 64])" in shown.stdout, shown.stderr
    code = f"""if True:
        import green_swin_hf, numpy, torch, transformers
        from PIL import Image
        folder = {str(output)!r}
        model = transformers.AutoModelForMaskedImageModeling.from_pretrained(folder)
        processor = transformers.AutoImageProcessor.from_pretrained(folder)
        image = Image.fromarray(numpy.arange(28 * 28, dtype=numpy.uint8).reshape(28, 28))
        pixels = processor(image, return_tensors="pt").pixel_values
        print(tuple(pixels.shape), tuple(model(pixels).reconstruction.shape))
    """
    shown = run_command(sys.executable, "-c", code)
    assert "(1, 1, 32, 32) (1, 1, 32, 32)" in shown.stdout, shown.stderr


def test_the_processor_prepares_images_as_validation_does(grey_images, tmp_path):
    assert run_pretrain("--data", grey_images, "--output-dir", tmp_path / "run", "--max-steps", 1, *TINY) == 0
    import transformers

    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "run")
    image = datasets.load_dataset("parquet", data_files=str(grey_images), split="train")[0]["image"]
    transform = pretrain.EvaluationTransform((32, 32), 1, mean=(0.5,), std=(0.5,))
    uint8 = torch.frombuffer(bytearray(image.convert("L").tobytes()), dtype=torch.uint8).view(1, 28, 28)
    pixels = processor(image, return_tensors="pt").pixel_values[0]
    expected = transform(uint8) * 0.5 + 0.5
    recipe = load_recipe(tmp_path / "run" / "recipe.yaml", PretrainingRecipe)
    torch.testing.assert_close(pixels * recipe.pixel_std[0] + recipe.pixel_mean[0], expected, atol=1 / 254, rtol=0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_equals_one_that_was_never_interrupted(grey_images, tmp_path, accumulation):
    flags = ["--data", grey_images, *TINY, "--gradient-accumulation-steps", accumulation, "--drop-path-rate", 0.2]
    flags += ["--max-steps", 8, "--validate-every", 4]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_pretrain("--output-dir", whole, *flags) == 0
    assert run_pretrain("--output-dir", parts, *flags, "--stop-after", 5) == 0  # in the second epoch with accumulation
    assert not (parts / "model.safetensors").exists()
    assert run_pretrain("--output-dir", parts, "--resume", "auto") == 0
    assert_same(weights(whole), weights(parts))
    assert training_losses(whole) == training_losses(parts)
    assert (whole / "recipe.yaml").read_text() == (parts / "recipe.yaml").read_text()
    last = [list_checkpoints(folder / "checkpoints")[-1] for folder in (whole, parts)]
    states = [read_training_state(path) for path in last]
    for before, after in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert_same(before, after)
    assert torch.equal(*(state["random_states"][0]["torch"] for state in states))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_ends_a_run_after_its_update_and_it_goes_on_exactly(grey_images, tmp_path, capsys, monkeypatch, name):
    flags = ["--data", grey_images, *TINY, "--drop-path-rate", 0.2, "--max-steps", 6, "--log-every", 1]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_pretrain("--output-dir", whole, *flags) == 0
    log_update = pretrain.log_update

    def signalled(run, *arguments):
        log_update(run, *arguments)
        if run.state.update == 2:
            os.kill(os.getpid(), signal.Signals[name])

    monkeypatch.setattr(pretrain, "log_update", signalled)
    capsys.readouterr()
    assert run_pretrain("--output-dir", parts, *flags) == 0
    assert f"Stopped after update 2 of 6 on {name}. Go on with: python" in capsys.readouterr().out
    assert [path.name for path in list_checkpoints(parts / "checkpoints")] == ["step-00000002"]
    monkeypatch.undo()
    assert run_pretrain("--output-dir", parts, "--resume", "auto") == 0
    assert_same(weights(whole), weights(parts))
    assert training_losses(whole) == training_losses(parts)


def test_resuming_passes_over_damage_and_refuses_changes(grey_images, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--output-dir", output, "--data", grey_images, *TINY, "--max-steps", 6, "--save-every", 2]
    assert run_pretrain(*flags, "--stop-after", 4) == 0
    with pytest.raises(SystemExit, match="2"):
        run_pretrain("--output-dir", output, "--resume", "auto", "--learning-rate", 1.0)
    assert "learning_rate 0.003 -> 1.0" in capsys.readouterr().err
    newest = list_checkpoints(output / "checkpoints")[-1]
    (newest / "model.safetensors").write_bytes(b"torn")
    assert run_pretrain("--output-dir", output, "--resume", "auto") == 0
    assert f"{newest} is damaged" in capsys.readouterr().out
    assert [step for step, _, _ in training_losses(output)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SystemExit, match="2"):  # a finished or started run is never overwritten
        run_pretrain(*flags)


def test_override_goes_on_with_other_settings_that_count_from_then_on_and_are_noted(grey_images, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--data", grey_images, *TINY, "--max-steps", 6, "--save-every", 2, "--keep-checkpoints", 9]
    assert run_pretrain("--output-dir", output, *flags, "--stop-after", 4) == 0
    going = ["--output-dir", output, "--resume", "auto"]
    changed = ["--learning-rate", 0.3, "--weight-decay", 0.5, "--batch-size", 4, "--max-steps", 8]
    with pytest.raises(SystemExit, match="2"):
        run_pretrain(*going, *changed)
    assert "or add --override" in capsys.readouterr().err
    assert run_pretrain(*going, *changed, "--override") == 0
    assert "Going on with other settings: max_steps 6 -> 8, batch_size 8 -> 4" in capsys.readouterr().out
    entries = read_log(output)
    rates = {entry["step"]: entry["learning_rate"] for entry in entries if "loss" in entry}
    # Half an epoch of warm-up is now 8 updates, as long as the run, so none of it is left.
    assert [rates[step] for step in (1, 4)] == pytest.approx([3e-3 * 8 / 256 * cosine_factor(s, 4, 6) for s in (0, 3)])
    assert [rates[step] for step in (5, 8)] == pytest.approx([0.3 * 4 / 256 * cosine_factor(s, 0, 8) for s in (4, 7)])
    (note,) = (entry for entry in entries if "changed_settings" in entry)
    assert note["step"] == 4
    assert note["changed_settings"]["learning_rate"] == [0.003, 0.3]
    (kept,) = json.loads((output / "run.json").read_text())["changed_settings"]
    assert kept == {"after_update": 4, "settings": note["changed_settings"]}
    last = read_training_state(list_checkpoints(output / "checkpoints")[-1])
    assert {group["weight_decay"] for group in last["optimizer"]["param_groups"]} == {0.5, 0.0}
    assert load_recipe(output / "recipe.yaml", PretrainingRecipe).batch_size == 4


def test_the_same_command_again_goes_on_with_the_run(grey_images, tmp_path):
    """As a queue gives it; what flags for data and epochs do to a recipe file, they do to it each time."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "validation_split: validation\nepochs: 20\nwarmup_epochs: 4\nnum_channels: 1\nmean: [0.3]\nstd: [0.2]\n"
        "image_size: 32\npatch_size: 2\nwindow_size: 4\nprobe_every: 3\nlabel_column: label\n"
    )
    flags = ["--recipe", recipe, "--data", grey_images, *TINY[:-4], "--threads", 1, "--epochs", 1, "--resume", "auto"]
    flags += ["--output-dir", tmp_path / "run"]
    assert run_pretrain(*flags, "--stop-after", 3) == 0
    assert run_pretrain(*flags) == 0
    assert [step for step, _, _ in training_losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6, 7]


def test_an_override_that_was_not_saved_is_not_recorded(grey_images, tmp_path):
    output = tmp_path / "run"
    assert run_pretrain("--output-dir", output, "--data", grey_images, *TINY, "--max-steps", 3, "--stop-after", 2) == 0
    record = json.loads((output / "run.json").read_text())
    lost = [{"after_update": 2, "settings": {"learning_rate": [0.003, 0.3]}}]
    (output / "run.json").write_text(json.dumps({**record, "changed_settings": lost}))  # as a killed start leaves it
    assert run_pretrain("--output-dir", output, "--resume", "auto") == 0
    assert json.loads((output / "run.json").read_text())["changed_settings"] == []


def test_override_cannot_change_the_model_and_is_for_runs_that_go_on(grey_images, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--output-dir", output, "--data", grey_images, *TINY, "--max-steps", 4]
    assert run_pretrain(*flags, "--stop-after", 2) == 0
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    for words, message in (
        (["--resume", "auto", "--override", "--embed-dim", 32], "does not fit the model of these settings"),
        (["--override"], "--override is for a run that goes on"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit, match="2"):
            run_pretrain(*flags, *words)
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_two_processes_with_half_the_batch_train_as_one(grey_images, tmp_path):
    flags = ["--data", grey_images, *TINY, "--max-steps", 4, "--validation-images", 0, "--save-every", 0]
    assert run_pretrain("--output-dir", tmp_path / "one", *flags) == 0
    config = ROOT / "examples" / "launch" / "one_machine.yaml"
    launch = ["--config_file", config, "--num_processes", 2, "--main_process_port", 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, PRETRAIN, *flags, "--batch-size", 4]
    done = run_command(*command, "--output-dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Pretraining GreenSwin") == 1
    assert "2 processes" in done.stdout
    assert "Warning" not in done.stderr
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    worst = max((one[name] - two[name]).abs().max().item() for name in one)
    assert worst < 1e-6, worst
    pairs = zip(training_losses(tmp_path / "one"), training_losses(tmp_path / "two"), strict=True)
    for (_, loss, norm), (_, other_loss, other_norm) in pairs:
        assert (loss, norm) == pytest.approx((other_loss, other_norm), rel=1e-5)


def test_colour_photos_in_non_square_images_with_larger_mask_units_shared_by_the_batch(tmp_path):
    flags = ["--data", PHOTOS, *TINY, "--num-channels", 3, "--image-size", 64, 96, "--mask-unit-size", 16]
    flags += ["--batch-size", 4, "--mask-sharing", "batch", "--max-steps", 2, "--output-dir", tmp_path / "run"]
    assert run_pretrain(*flags) == 0
    processor = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert processor["size"] == {"height": 64, "width": 96}
    assert processor["do_convert_rgb"] is True
    assert (tmp_path / "run" / "reconstructions.png").is_file()


def test_streaming_trains_and_goes_on(grey_images, tmp_path, capsys):
    output = tmp_path / "run"
    flags = ["--data", grey_images, *TINY, "--streaming", "--max-steps", 3, "--output-dir", output]
    assert run_pretrain(*flags, "--stop-after", 2) == 0
    assert run_pretrain("--output-dir", output, "--resume", "auto") == 0
    assert [step for step, _, _ in training_losses(output)] == [1, 2, 3]
    assert "a stream of" in capsys.readouterr().out


def test_unreadable_images_are_named_and_counted(tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(PHOTOS, folder)
    (folder / "broken.png").write_bytes(b"not an image")
    flags = ["--data", folder, *TINY, "--batch-size", 5, "--max-steps", 3, "--output-dir", tmp_path / "run"]
    assert run_pretrain(*flags, "--validation-images", 0, "--max-bad-share", 0.2) == 0
    assert read_log(tmp_path / "run")[-1]["skipped_images"] == 3  # once an epoch
    assert capsys.readouterr().err.count("broken.png") == 1


def test_starting_from_a_stock_swin_takes_its_encoder(grey_images, tmp_path, capsys):
    config = SwinConfig(
        image_size=32, patch_size=2, num_channels=1, embed_dim=16, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=4
    )
    SwinModel(config).save_pretrained(tmp_path / "swin")
    flags = ["--data", grey_images, *TINY, "--max-steps", 1, "--learning-rate", 0, "--output-dir", tmp_path / "run"]
    assert run_pretrain(*flags, "--init-from", tmp_path / "swin") == 0
    stock, own = load_file(tmp_path / "swin" / "model.safetensors"), weights(tmp_path / "run")
    name = "encoder.layers.2.blocks.0.attention.self.query.weight"
    torch.testing.assert_close(own[f"swin.{name}"], stock[name], rtol=0, atol=0)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model_type"] == "green_swin"
    with pytest.raises(SystemExit, match="2"):
        run_pretrain(*flags[:-1], tmp_path / "other", "--init-from", tmp_path / "swin", "--embed-dim", 32)
    assert "does not fit the recipe" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_update_that_is_not_finite_is_skipped_and_too_many_end_the_run(grey_images, tmp_path, monkeypatch, capsys):
    flags = ["--data", grey_images, *TINY, "--max-steps", 6, "--save-every", 1, "--keep-checkpoints", 9]
    compute = pretrain.forward_backward

    def poison(run, batches):
        loss, names = compute(run, batches)
        if run.state.update in bad:
            next(run.model.parameters()).grad[0] = float("nan")
            loss = loss * float("nan")
        return loss, names

    monkeypatch.setattr(pretrain, "forward_backward", poison)
    bad = {0, 3}
    assert run_pretrain("--output-dir", tmp_path / "run", *flags) == 0
    checkpoints = [load_file(path / "model.safetensors") for path in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert_same(checkpoints[2], checkpoints[3])  # update 4 changed nothing
    changed = (checkpoints[3][name] != checkpoints[4][name] for name in checkpoints[3])
    assert any(difference.any() for difference in changed)
    entries = read_log(tmp_path / "run")
    assert [entry["loss"] is None for entry in entries if "loss" in entry] == [True, False, False, True, False, False]
    assert entries[-2]["skipped_updates"] == 2
    rates = [entry["learning_rate"] for entry in entries if "loss" in entry]
    assert rates == pytest.approx([3e-3 * 8 / 256 * cosine_factor(step, 4, 6) for step in range(6)])
    assert "Skipped update 4" in capsys.readouterr().err

    bad = set(range(1, 9))
    assert run_pretrain("--output-dir", tmp_path / "lost", *flags, "--stop-after-skipped", 3) == 1
    assert "3 updates in a row, up to update 4" in capsys.readouterr().err
    newest = list_checkpoints(tmp_path / "lost" / "checkpoints")[-1]
    assert read_trainer_state(newest)["state"]["update"] == 3


def test_what_is_uploaded_is_the_result_with_a_card_of_what_was_recorded(grey_images, tmp_path, monkeypatch, capsys):
    pytest.importorskip("codecarbon")
    output = tmp_path / "run"
    flags = ["--data", grey_images, *TINY, "--max-steps", 2, "--output-dir", output, "--push-to-hub"]
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        assert run_pretrain(*flags, "--track-energy", "DEU") == 0
    said = capsys.readouterr().out
    assert "Uploaded to http://127.0.0.1" in said
    assert "code (*.py)" in said
    files, record = hub.files("someone/run"), json.loads((output / "run.json").read_text())
    assert hub.repositories["someone/run"].is_private
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "reconstructions.png"} <= set(files)
    assert not any("checkpoint" in name or "training_state" in name for name in files)
    assert str(tmp_path).encode() not in b"".join(files.values())
    card = ModelCard(files["README.md"].decode())
    (result,) = card.data.eval_results
    assert result.metric_value == record["metrics"][0]["value"] == read_log(output)[-1]["validation_loss"]
    assert record["data"] == {"name": "grey.parquet", "on_hub": False, "train_images": 60, "validation_images": 4}
    assert record["training"]["updates"] == 2
    assert record["model"]["parameters"] == sum(tensor.numel() for tensor in weights(output).values())
    (start,) = record["starts"]
    assert start["seconds"] > 0
    assert start["energy"]["country"] == "DEU"
    assert card.data.to_dict()["co2_eq_emissions"]["emissions"] == pytest.approx(
        start["energy"]["co2_eq_grams"], rel=1e-3
    )
    assert "trained from random values" in card.text


def test_an_upload_that_fails_leaves_the_results_and_says_how_to_repeat_it(grey_images, tmp_path, monkeypatch, capsys):
    output = tmp_path / "run"
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        hub.break_at("POST", "/commit/", 403)
        flags = ["--data", grey_images, *TINY, "--max-steps", 1, "--output-dir", output, "--push-to-hub"]
        assert run_pretrain(*flags) == 1
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        hub.mend()
        again = re.search(r"python -m green_swin_hf.publish (.*)", said.err)[1].split()
        assert publish.main(again) == 0
    assert "model.safetensors" in hub.files("someone/run")


def test_a_run_that_goes_on_adds_its_time_and_keeps_where_it_started(grey_images, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    flags = ["--data", grey_images, *TINY, "--max-steps", 2]
    assert run_pretrain(*flags, "--output-dir", first) == 0
    start = ["--init-from", first, "--stop-after", 1]
    assert run_pretrain(*flags, "--output-dir", second, *start) == 0
    assert run_pretrain("--output-dir", second, "--resume", "auto") == 0
    record = json.loads((second / "run.json").read_text())
    assert record["start_from"] == {"name": "first", "on_hub": False, "is_own": True}
    assert [entry["seconds"] > 0 for entry in record["starts"]] == [True, True]


WRONG_INPUT = {
    "folder": ("--data ./nowhere", "'./nowhere' does not exist"),
    "image column": ("--image-column label", "'label'"),
    "image size": ("--image-size 30", "image_size 30 must be a multiple of mask_unit_size 8"),
    "mask ratio 1": ("--mask-ratio 1", "mask_ratio 1.0 must be greater than 0 and less than 1"),
    "mask ratio 0": ("--mask-ratio 0", "mask_ratio 0.0 must be greater than 0 and less than 1"),
    "mask unit": ("--mask-unit-size 12", "mask_unit_size 12 must be a multiple of"),
    "flag": ("--learning-rat 1", "unrecognized arguments: --learning-rat"),
    "value": ("--epochs many", "epochs 'many' must be a number"),
    "choice": ("--mask-sharing none", "mask_sharing 'none' must be one of image, batch"),
    "no batch": ("--batch-size 0", "batch_size 0 must be at least 1"),
    "no full batch": ("--batch-size 100", "must not exceed the 60 training images; give --batch-size 60 or less"),
    "channels": ("--num-channels 2", "num_channels 2"),
    "heads": ("--num-heads 1 2 3", "num_heads"),
    "recipe file": ("--recipe nowhere.yaml", "recipe nowhere.yaml is not a file"),
    "recipe key": ("--recipe {folder}/typo.yaml", "unknown key 'mask_ration'; the closest valid key is 'mask_ratio'"),
    "resume path": ("--resume {folder}/none", "is no folder"),
    "resume from nothing": ("--resume {folder}", "holds no whole checkpoint"),
    "weights": ("--init-from {folder}/none", "does not exist"),
    "weights of no model": ("--init-from {folder}", "cannot be loaded"),
    "weights of text": ("--init-from {folder}/typo.yaml", "cannot be loaded"),
    "threads": ("--threads 100000", "threads 100000 must be at most"),
    "padding": ("--pad 1000000", "pad 1000000 must be at most image_size 32"),
    "rate": ("--learning-rate inf", "learning_rate inf must be finite"),
    "mask unit of the whole image": ("--mask-unit-size 32", "larger images or smaller mask units"),
    "both starts": ("--resume auto --init-from x", "give one of them"),
    "output": ("--output-dir {folder}/typo.yaml/run", "is a file"),
    "output in use": ("--output-dir {folder}", "is not empty"),
    "tracker": ("--report-to wandb", "needs the package wandb"),
    "split": ("--split nothing", "no split 'nothing'"),
    "stream without end": ("--streaming", "give --max-steps"),
    "half precision on the CPU": ("--precision fp16", "needs a GPU"),
    "hub": ("--push-to-hub", "does not answer"),
    "energy": ("--track-energy Atlantis", "is no country that codecarbon knows"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2_and_writes_nothing(
    grey_images, tmp_path, monkeypatch, capfd, flags, message
):
    if "wandb" in flags and importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    if "energy" in flags:
        pytest.importorskip("codecarbon")
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 30)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "typo.yaml").write_text("mask_ration: 0.5\n")
    words = flags.format(folder=folder).split()
    first = ["--data", grey_images, *TINY] if "--recipe" not in words else []
    first += [] if "--output-dir" in words else ["--output-dir", tmp_path / "run"]
    with pytest.raises(SystemExit) as stopped:
        run_pretrain(*first, *words)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("pretrain.py: error: ")
    assert message in lines[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "typo.yaml"]


def test_wrong_input_through_the_command_line(tmp_path):
    done = run_command(sys.executable, PRETRAIN, "--mask-ratio", 2, "--output-dir", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr == "pretrain.py: error: mask_ratio 2.0 must be greater than 0 and less than 1\n"
    launched = run_command(
        sys.executable, "-m", "accelerate.commands.launch", "--quiet", PRETRAIN, "--mask-ratio", 2, "--output-dir",
        tmp_path / "run",
    )  # fmt: skip
    assert launched.returncode != 0
    assert launched.stderr.count("pretrain.py: error: mask_ratio 2.0") == 1
    assert not (tmp_path / "run").exists()


def test_a_second_run_without_a_folder_gets_one_of_its_own(grey_images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_pretrain("--data", grey_images, *TINY, "--max-steps", 1) == 0
    assert sorted(path.name for path in (tmp_path / "outputs").iterdir()) == ["pretrain", "pretrain-2"]


def test_going_on_from_an_older_checkpoint_loses_none(grey_images, tmp_path, capsys):
    run = ["--data", grey_images, *TINY, "--output-dir", tmp_path / "run", "--save-every", 1, "--keep-checkpoints", 3]
    assert run_pretrain(*run, "--max-steps", 5) == 0
    checkpoints = tmp_path / "run" / "checkpoints"
    older = list_checkpoints(checkpoints)[0]
    assert run_pretrain("--resume", older, "--stop-after", 1) == 0
    assert "later update" in capsys.readouterr().out
    kept = sorted(path.name for path in checkpoints.iterdir())
    assert kept == ["step-00000003", "step-00000004", "step-00000004.superseded-1", "step-00000005.superseded-1"]
    assert run_pretrain("--output-dir", tmp_path / "run", "--resume", "auto") == 0
    assert [entry["step"] for entry in read_log(tmp_path / "run") if "loss" in entry] == [1, 2, 3, 4, 5]


def test_moved_data_can_be_named_when_going_on(grey_images, tmp_path):
    run = ["--data", grey_images, *TINY, "--output-dir", tmp_path / "run", "--save-every", 1]
    assert run_pretrain(*run, "--max-steps", 3, "--stop-after", 1) == 0
    moved = shutil.copy(grey_images, tmp_path / "moved.parquet")
    assert run_pretrain("--output-dir", tmp_path / "run", "--resume", "auto", "--data", moved) == 0


def test_a_start_that_found_no_room_can_be_repeated(grey_images, tmp_path, monkeypatch, capsys):
    run = ["--data", grey_images, *TINY, "--output-dir", tmp_path / "run", "--max-steps", 1, "--resume", "auto"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("green_swin_hf.recipe_files.os.replace", full)
        with pytest.raises(SystemExit, match="2"):
            run_pretrain(*run)
    assert "No space left on device" in capsys.readouterr().err
    assert not any((tmp_path / "run").iterdir())
    (tmp_path / "run" / "recipe.yaml.partial").write_text("data")  # a start that was killed there
    assert run_pretrain(*run) == 0


def test_other_data_of_the_same_size_are_refused_when_going_on(grey_images, tmp_path, capsys):
    run = ["--data", grey_images, *TINY, "--output-dir", tmp_path / "run", "--save-every", 1]
    assert run_pretrain(*run, "--max-steps", 3, "--stop-after", 1) == 0
    rows = datasets.Dataset.from_parquet(str(grey_images), cache_dir=str(tmp_path))
    rows.select(range(63, -1, -1)).to_parquet(str(tmp_path / "reversed.parquet"))
    again = ["--output-dir", tmp_path / "run", "--resume", "auto", "--data", tmp_path / "reversed.parquet"]
    with pytest.raises(SystemExit, match="2"):
        run_pretrain(*again)
    assert re.search(
        r"cannot change the run: data_fingerprint '\w{12}' -> '\w{12}'; .* --override", capsys.readouterr().err
    )
    assert run_pretrain(*again, "--override") == 0


def test_a_full_disk_ends_the_run_in_one_line_with_the_earlier_checkpoint_whole(
    grey_images, tmp_path, monkeypatch, capsys
):
    write = torch.save

    def full(state, path):
        if "step-00000002" in str(path):
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
        write(state, path)

    monkeypatch.setattr(torch, "save", full)
    run = ["--data", grey_images, *TINY, "--output-dir", tmp_path / "run", "--save-every", 1, "--max-steps", 3]
    assert run_pretrain(*run) == 1
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step-00000002 cannot be written" in said
    assert "the checkpoint after update 1 was written whole, go on with:" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
