"""The probe during pretraining: what it classifies, what it leaves alone, what it shows, and what it needs."""

import re
import sys

import datasets
import pytest
import torch
from test_examples import (
    PHOTOS,
    PRETRAIN,
    ROOT,
    TINY,
    _fresh_accelerator,  # noqa: F401 (a fixture)
    assert_same,
    grey_images,  # noqa: F401 (a fixture)
    read_log,
    run_command,
    run_pretrain,
    training_losses,
    weights,
)

from green_swin_hf import GreenSwinConfig, GreenSwinModel
from green_swin_hf.checkpointing import list_checkpoints, read_training_state
from green_swin_hf.data import EvaluationTransform
from green_swin_hf.online_probe import open_probe
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import load_recipe

PROBED = ["--probe-every", "1", "--validation-images", "6"]


def probes(output):
    return [entry for entry in read_log(output) if "probe_accuracy" in entry]


def recipe_of(path, **changes):
    small = {"num_channels": 1, "image_size": 32, "probe_every": 1, "validation_images": 6}
    return PretrainingRecipe().replace(data=str(path), **{**small, **changes})


def transform():
    return EvaluationTransform((32, 32), 1)


def test_a_run_with_probes_ends_in_the_same_weights_and_random_state_and_goes_on_exactly(
    grey_images,  # noqa: F811
    tmp_path,
):
    flags = ["--data", grey_images, *TINY, "--drop-path-rate", 0.2, "--max-steps", 15, "--validation-images", 6]
    plain, probed, parts = (tmp_path / name for name in ("plain", "probed", "parts"))
    assert run_pretrain("--output-dir", plain, *flags) == 0
    assert run_pretrain("--output-dir", probed, *flags, "--probe-every", 1) == 0
    assert run_pretrain("--output-dir", parts, *flags, "--probe-every", 1, "--stop-after", 8) == 0
    assert run_pretrain("--output-dir", parts, "--resume", "auto") == 0
    for other in (probed, parts):
        assert_same(weights(plain), weights(other))
        assert training_losses(plain) == training_losses(other)
    last = [read_training_state(list_checkpoints(output / "checkpoints")[-1]) for output in (plain, probed, parts)]
    assert torch.equal(*(state["random_states"][0]["torch"] for state in last[:2]))
    assert [entry["step"] for entry in probes(probed)] == [0, 7, 14, 15]  # 7 updates an epoch, and at both ends
    assert probes(probed) == probes(parts)
    assert probes(plain) == []
    for entry in probes(probed):
        assert 0 <= entry["probe_accuracy"] <= 1
        assert (6 * entry["probe_accuracy"]) % 1 == pytest.approx(0)  # six images were classified
    # Turned off, a probed run goes on as well: probing changes no weight.
    assert run_pretrain("--output-dir", parts, "--resume", list_checkpoints(parts / "checkpoints")[0],
                        "--probe-every", 0) == 0  # fmt: skip
    assert_same(weights(plain), weights(parts))


def test_what_it_shows(grey_images, tmp_path, capsys):  # noqa: F811
    output = tmp_path / "run"
    assert run_pretrain("--data", grey_images, *TINY, *PROBED, "--max-steps", 7, "--output-dir", output) == 0
    said = capsys.readouterr()
    assert "k-NN probe   every 1 epochs: 6 held-out images against 58 labelled training images" in said.out
    first, last = (f"{entry['probe_accuracy']:.3f}" for entry in probes(output))
    assert re.search(rf"accuracy {last} ± \d\.\d{{3}} at the end, {first} after update 0", said.out)
    assert "k-NN=" in said.err
    assert (output / "loss_curve.png").stat().st_size > 1000


def test_images_that_are_classified_are_in_no_bank(grey_images):  # noqa: F811
    probe = open_probe(recipe_of(grey_images), transform())
    everything = datasets.load_dataset("parquet", data_files=str(grey_images), split="train")
    everything = everything.cast_column("image", datasets.Image(decode=False))
    bank, held_out = (
        {record["image"]["bytes"] for record in images.records} for images in (probe.bank, probe.held_out)
    )
    assert len(held_out) == 6
    assert not bank & held_out
    assert bank | held_out == {record["image"]["bytes"] for record in everything}


def test_large_sets_are_cut_to_balanced_subsets(grey_images):  # noqa: F811
    probe = open_probe(recipe_of(grey_images, probe_bank_images=20, probe_images=5), transform())
    assert (len(probe.bank), len(probe.held_out)) == (20, 5)
    assert max(torch.bincount(torch.tensor(probe.bank.labels))) <= 3


def test_the_bank_is_that_of_the_training_run(grey_images):  # noqa: F811
    """The same images are held out as by the run itself, so that none of them was trained on."""
    from test_examples import pretrain

    recipe = recipe_of(grey_images)
    source, held_out = pretrain.open_data(recipe)
    probe = open_probe(recipe, transform())
    names = [[record[images.image_column]["bytes"] for record in images.dataset] for images in (source, held_out)]
    found = [[record["image"]["bytes"] for record in images.records] for images in (probe.bank, probe.held_out)]
    assert [sorted(part) for part in names] == [sorted(part) for part in found]


def test_an_encoder_stays_in_its_mode_and_the_random_state_as_it_was(grey_images):  # noqa: F811
    probe = open_probe(recipe_of(grey_images), transform())
    config = GreenSwinConfig(
        image_size=32, num_channels=1, patch_size=2, embed_dim=16, depths=(1, 1, 1), num_heads=(1, 2, 4),
        window_size=4, drop_path_rate=0.5,
    )  # fmt: skip
    encoder = GreenSwinModel(config).train()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    first, again = (probe(encoder, torch.device("cpu")) for _ in range(2))
    assert first == again
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in encoder.modules())
    assert_same(before, encoder.state_dict())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_two_processes_probe_as_one(grey_images, tmp_path):  # noqa: F811
    flags = ["--data", grey_images, *TINY, *PROBED, "--max-steps", 7, "--save-every", 0]
    assert run_pretrain("--output-dir", tmp_path / "one", *flags) == 0
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, PRETRAIN, *flags, "--batch-size", 4]
    done = run_command(*command, "--output-dir", tmp_path / "two", ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    one, two = probes(tmp_path / "one"), probes(tmp_path / "two")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] == [0, 7]
    assert one[0]["probe_accuracy"] == two[0]["probe_accuracy"]
    worst = max((weights(tmp_path / "one")[n] - weights(tmp_path / "two")[n]).abs().max().item() for n in
                weights(tmp_path / "one"))  # fmt: skip
    assert worst < 1e-6


WRONG_INPUT = {
    "no labels": (f"--data {PHOTOS}", "probe_every 1 needs images with classes"),
    "a stream": ("--streaming --max-steps 2", "give --no-streaming or --probe-every 0"),
    "nothing held out": ("--validation-images 0", "give --validation-split, or --validation-images"),
    "tested on training images": ("--validation-split train", "other than the training split 'train'"),
    "label column": ("--label-column colour", "has no column 'colour'; set --label-column to one of: label"),
    "negative": ("--probe-every -1", "probe_every -1 must be at least 0"),
    "part of an epoch": ("--probe-every 0.5", "probe_every '0.5' must be an integer"),
}


@pytest.mark.parametrize(("flags", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_before_the_run(grey_images, tmp_path, capfd, flags, message):  # noqa: F811
    words = flags.split()
    data = [] if "--data" in words else ["--data", grey_images]
    with pytest.raises(SystemExit) as stopped:
        run_pretrain(*data, *TINY, *PROBED, *words, "--output-dir", tmp_path / "run")
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]
    assert not (tmp_path / "run").exists()


def test_folders_with_a_sub_folder_for_each_class_have_labels(grey_images, tmp_path):  # noqa: F811
    records = datasets.load_dataset("parquet", data_files=str(grey_images), split="train")
    for index, record in enumerate(records):
        folder = tmp_path / "images" / f"class_{record['label']}"
        folder.mkdir(parents=True, exist_ok=True)
        record["image"].save(folder / f"{index}.png")
    probe = open_probe(recipe_of(tmp_path / "images"), transform())
    assert (len(probe.bank), len(probe.held_out), probe.num_classes) == (58, 6, 10)


def test_other_data_and_streams_are_not_probed_unless_asked():
    recipe = load_recipe(ROOT / "examples/recipes/pretraining/fashion_mnist_tiny.yaml", PretrainingRecipe)
    assert recipe.probe_every == 5
    assert recipe.with_flags({"data": "other"}).probe_every == 0
    assert recipe.with_flags({"streaming": True}).probe_every == 0
    assert recipe.with_flags({"data": "other", "probe_every": "2"}).probe_every == 2
    assert recipe.with_flags({"epochs": "20"}).probe_every == 5
    assert not recipe.differences(recipe.replace(probe_every=0, probe_images=5, label_column="other"))
