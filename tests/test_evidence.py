"""The study of what pretraining is worth: its parts on tiny numbers, its rules, and what it says to wrong input."""

import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence_study.arms import ARMS
from evidence_study.cells import Cells
from evidence_study.finetuning import FlatCurve, build_classifier, finetune, updates_between_looks
from evidence_study.placed import Placement, place_garments, prepare_photo, silhouettes
from evidence_study.pretraining import build_masked_model, masks_for, pretrain, swin_config
from evidence_study.recipe import EvidenceRecipe
from evidence_study.report import NOT_FLAT_LABEL, draw, gains, percent, tables
from evidence_study.tasks import load_task, vary, with_margin
from evidence_study.unfinished import Unfinished, identity_of
from test_examples import load_script
from torch._dynamo.utils import counters
from transformers import SwinForMaskedImageModeling

from green_swin_hf.labelled_images import label_budget
from green_swin_hf.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "evidence.py"
RECIPES = ROOT / "examples" / "recipes" / "evidence"


@pytest.fixture(scope="module")
def evidence():
    return load_script(SCRIPT)


@pytest.fixture(scope="module")
def quick_recipe():
    return load_recipe(RECIPES / "quick.yaml", EvidenceRecipe)


@pytest.fixture(scope="module")
def task(quick_recipe):
    return load_task(quick_recipe)


@pytest.fixture(scope="module")
def finished(evidence, tmp_path_factory):
    """A folder with the whole quick study."""
    folder = tmp_path_factory.mktemp("study") / "evidence"
    assert evidence.main(["--quick", "--output-dir", str(folder)]) == 0
    return folder


@pytest.fixture
def fast_compiler(monkeypatch):
    """`torch.compile` without code generation, which is what takes its time."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    yield
    torch.compiler.reset()


def lines_of(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


# The study


def test_a_quick_study_has_every_cell_of_every_arm(finished):
    cells = lines_of(finished)
    of = {kind: {(c["arm"], c["budget"]) for c in cells if c["kind"] == kind} for kind in ("probe", "finetune")}
    budgets = {0.05, 1.0}
    assert of["finetune"] == {(arm, budget) for arm in ARMS for budget in budgets}
    assert of["probe"] == {(arm, budget) for arm in ("pixels", *ARMS) for budget in budgets}
    assert [c["arm"] for c in cells if c["kind"] == "pretraining"] == ["green", "dense", "green_third", "green_equal"]
    assert all(0 <= c["test"] <= 1 and c["cpu_seconds"] > 0 for c in cells if c["kind"] == "finetune")


def test_timed_arms_get_their_share_of_the_dense_time(finished):
    cells = {c["arm"]: c for c in lines_of(finished) if c["kind"] == "pretraining"}
    an_epoch = cells["green"]["cpu_seconds"] / cells["green"]["epochs"]
    for arm, share in (("green_third", 1 / 3), ("green_equal", 1.0)):
        assert cells[arm]["epochs"] * an_epoch == pytest.approx(share * cells["dense"]["cpu_seconds"], rel=1e-3)


def test_a_study_leaves_tables_a_picture_and_a_summary(finished):
    tables = (finished / "tables.md").read_text()
    for text in ("raw pixels", "random encoder", "scratch", "dense SimMIM", "200 labels (100 %)", "10 labels (5 %)"):
        assert text in tables
    summary = json.loads((finished / "results.json").read_text())
    assert summary["machine"]["cores"] == os.cpu_count()
    assert summary["recipe"]["seeds"] == [0]
    assert (finished / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_finished_cells_are_not_computed_again(evidence, finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("computed again")

    before = (finished / "cells.jsonl").read_bytes()
    for name in ("pretrain", "probe", "finetune"):
        monkeypatch.setattr(evidence, name, never)
    assert evidence.main(["--output-dir", str(finished)]) == 0
    assert (finished / "cells.jsonl").read_bytes() == before


def test_an_interrupted_study_computes_what_is_missing(evidence, finished, monkeypatch):
    path = finished / "cells.jsonl"
    whole = path.read_text()
    last = json.loads(whole.splitlines()[-1])
    path.write_text(whole[:-20])  # cut off while the last line was written
    for name in ("pretrain", "probe"):
        monkeypatch.setattr(evidence, name, None)
    assert evidence.main(["--output-dir", str(finished)]) == 0
    again = lines_of(finished)[-1]
    same = ("kind", "arm", "seed", "budget", "learning_rate", "validation", "test", "curve", "steps")
    assert {key: again[key] for key in same} == {key: last[key] for key in same}
    assert len(lines_of(finished)) == len(whole.splitlines())


# Trainings that go on


class StopsAfter(Unfinished):
    """Keeps the state after each update, and interrupts the training after so many."""

    def __init__(self, folder, updates):
        super().__init__(folder, "training", every=0)
        self.updates = updates

    def keep(self, identity, make_state):
        super().keep(identity, make_state)
        self.updates -= 1
        if self.updates == 0:
            raise KeyboardInterrupt


def interrupted(train, folder, updates):
    """What `train` gives in two starts, the first of which ends after so many updates."""
    with pytest.raises(KeyboardInterrupt):
        train(StopsAfter(folder, updates))
    return train(StopsAfter(folder, -1))


def without_time(result):
    return {key: value for key, value in result.items() if key not in ("seconds", "cpu_seconds")}


@pytest.mark.parametrize("method", ["green", "dense"])
def test_an_interrupted_pretraining_gives_the_same_model(quick_recipe, task, tmp_path, method):
    def train(unfinished):
        return pretrain(method, quick_recipe, task, 3, tmp_path / "model", torch.device("cpu"), 3, unfinished)

    def weights():
        return (tmp_path / "model" / "model.safetensors").read_bytes()

    result, expected = train(None), weights()
    assert result["steps"] % 3 == 0
    for updates in (1, result["steps"] // 3, result["steps"] // 3 + 1, result["steps"]):  # on and beside a pass's end
        assert without_time(interrupted(train, tmp_path / str(updates), updates)) == without_time(result)
        assert weights() == expected


FINETUNING = {"learning_rate": 1e-3, "layer_decay": 1.0, "seed": 3, "device": torch.device("cpu")}


@pytest.mark.usefixtures("fast_compiler")
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_an_interrupted_finetuning_gives_the_same_curve_and_weights(quick_recipe, task, tmp_path, is_compiled):
    recipe = dataclasses.replace(quick_recipe, evaluate_every=4, patience=2, max_steps=300, compile=is_compiled)
    labelled, models = task.train.rows(range(70)), []

    def train(unfinished):
        models.append(build_classifier(recipe, 10, 0, None))
        return finetune(models[-1], recipe, task, labelled, **FINETUNING, unfinished=unfinished)

    result, expected = train(None), models[-1].state_dict()
    assert result["is_flat"]  # so its learning rate had fallen, at least 2 looks of 4 updates before
    after_the_fall = (result["steps"] - 2,)  # alone where it is compiled, which takes seconds each time
    for updates in after_the_fall if is_compiled else range(1, result["steps"], 5):
        assert without_time(interrupted(train, tmp_path / str(updates), updates)) == without_time(result)
        for name, weights in models[-1].state_dict().items():
            assert torch.equal(weights, expected[name])


@pytest.mark.usefixtures("fast_compiler")
def test_a_compiled_finetuning_is_compiled_and_gives_what_an_eager_one_gives(quick_recipe, task):
    images = torch.randn(5, 1, 48, 48, generator=torch.Generator().manual_seed(0))

    def logits_after(updates, is_compiled):
        recipe = dataclasses.replace(quick_recipe, max_steps=updates, evaluate_every=updates, compile=is_compiled)
        model = build_classifier(recipe, 10, 0, None)
        finetune(model, recipe, task, task.train.rows(range(70)), **{**FINETUNING, "learning_rate": 1e-2})
        assert list(model.state_dict()) == list(build_classifier(recipe, 10, 0, None).state_dict())
        with torch.no_grad():
            return model.eval()(images).logits

    start, expected = logits_after(1, False), logits_after(12, False)
    assert (expected - start).abs().max() > 0.1
    assert counters["stats"]["unique_graphs"] == 0
    torch.testing.assert_close(logits_after(12, True), expected, rtol=0, atol=1e-3)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.usefixtures("fast_compiler")
def test_a_study_can_be_compiled(evidence, tmp_path):
    part = ["--arms", "scratch", "--seeds", "0", "--budgets", "1.0", "--finetune-learning-rates", "1e-3"]
    assert evidence.main(["--quick", "--compile", *part, "--output-dir", str(tmp_path / "study")]) == 0
    assert [cell["arm"] for cell in lines_of(tmp_path / "study") if cell["kind"] == "finetune"] == ["scratch"]
    # That of the check before, and the classifier's: none anew after the looks at validation images.
    assert counters["stats"]["unique_graphs"] == 2


def test_a_machine_that_cannot_compile_is_told_before_anything_is_written(evidence, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", fail)
    folder = tmp_path / "study"
    with pytest.raises(SystemExit) as stopped:
        evidence.main(["--quick", "--compile", "--output-dir", str(folder)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "torch.compile does not work here (No working C++ compiler found); install what it needs" in said
    assert not folder.exists()


@pytest.fixture
def pretrained_twice(quick_recipe, task, tmp_path):
    """Pretrains with a kept state; the second time that state is the one before the last update, after `change`."""
    unfinished = StopsAfter(tmp_path / "unfinished", -1)

    def train(epochs=1):
        return pretrain("green", quick_recipe, task, 3, tmp_path / "model", torch.device("cpu"), epochs, unfinished)

    def train_twice(change, epochs=1):
        train()
        path = unfinished.folder / "state.pt"
        path.write_bytes(change(path.read_bytes()))
        return train(epochs)

    return train_twice


def test_the_time_of_both_starts_counts(pretrained_twice):
    def earlier(data):
        kept, file = torch.load(io.BytesIO(data)), io.BytesIO()
        kept["state"]["time"] = {"seconds": 1000.0, "cpu_seconds": 500.0}
        torch.save(kept, file)
        return file.getvalue()

    result = pretrained_twice(earlier)
    assert result["seconds"] >= 1000
    assert result["cpu_seconds"] >= 500


@pytest.mark.parametrize("change", [lambda data: b"", lambda data: data[:1000]], ids=["empty", "cut"])
def test_a_damaged_state_is_told_and_starts_anew(pretrained_twice, capsys, change):
    assert pretrained_twice(change)["steps"] > 0
    assert "state.pt cannot be read" in capsys.readouterr().out


def test_a_state_of_another_training_is_told_and_starts_anew(pretrained_twice, capsys):
    assert pretrained_twice(lambda data: data, epochs=2)["epochs"] == 2
    assert "is of other weights, images or settings; training starts anew" in capsys.readouterr().out


def test_what_decides_the_numbers_of_a_training_is_its_identity(task):
    device, images = torch.device("cpu"), task.train.images
    one, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    same = identity_of(one, images, device, steps=3)
    assert identity_of(one, images.clone(), device, steps=3) == same
    assert identity_of(other, images, device, steps=3) != same
    assert identity_of(one, images.flip(0), device, steps=3) != same
    assert identity_of(one, images, device, steps=4) != same
    assert identity_of(one, images, torch.device("cuda"), steps=3) != same


def test_a_study_goes_on_in_the_middle_of_a_training(evidence, finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "study")
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[:-1]))
    monkeypatch.setattr(evidence, "Unfinished", lambda path, title: StopsAfter(path, 3))
    assert evidence.main(["--output-dir", str(folder)]) == 130
    (left,) = (folder / "unfinished").iterdir()
    monkeypatch.setattr(evidence, "Unfinished", Unfinished)
    assert evidence.main(["--output-dir", str(folder)]) == 0
    assert "going on with finetune green_equal, seed 0, budget 1, rate 0.001 after 3 updates" in capsys.readouterr().out
    assert without_time(lines_of(folder)[-1]) == without_time(json.loads(lines[-1]))
    assert not left.exists()


def test_a_state_that_cannot_be_written_does_not_end_a_training(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    Unfinished(tmp_path / "file" / "training", "training", every=0).keep({}, lambda: {"step": 1})
    assert "training goes on and its state is not kept" in capsys.readouterr().out


def test_a_state_beside_a_finished_cell_is_removed(evidence, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    left = folder / "unfinished" / "pretraining-green-seed-0"
    left.mkdir(parents=True)
    assert evidence.main(["--output-dir", str(folder)]) == 0
    assert not left.exists()


def stop(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_study_ends_in_one_line_and_keeps_its_cells(evidence, finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "study")
    lines = (folder / "cells.jsonl").read_text().splitlines(keepends=True)
    (folder / "cells.jsonl").write_text("".join(lines[:-1]))
    monkeypatch.setattr(evidence, "finetune", stop)
    assert evidence.main(["--output-dir", str(folder)]) == 130
    out = capsys.readouterr().out
    kept = "Finished cells are kept, and a training under way as it was up to 5 minutes ago"
    assert out.endswith(f"\nStopped. {kept}; the same command goes on.\n")
    assert (folder / "cells.jsonl").read_text() == "".join(lines[:-1])
    monkeypatch.setattr(evidence, "load_task", stop)  # before any cell
    assert evidence.main(["--output-dir", str(folder)]) == 130


def without(folder, **values):
    """Take the lines with these values out of `cells.jsonl`."""
    left = [cell for cell in lines_of(folder) if any(cell.get(key) != value for key, value in values.items())]
    (folder / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in left))


def test_a_pretrained_model_that_no_cell_needs_may_be_gone(evidence, finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(folder / "encoders")
    (folder / "tables.md").unlink()
    assert evidence.main(["--output-dir", str(folder)]) == 0
    assert (folder / "tables.md").is_file()


@pytest.mark.parametrize("kind", ["probe", "finetune"])
def test_a_pretrained_model_that_is_needed_and_gone_is_named(evidence, finished, tmp_path, monkeypatch, capsys, kind):
    folder = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(folder / "encoders" / "green-0")
    without(folder, kind=kind, arm="green", budget=1.0)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as stopped:
        evidence.main(["--output-dir", str(folder)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{folder / 'encoders' / 'green-0'} has no pretrained model" in error
    assert f"remove the line of pretraining 'green' with seed 0 from {folder / 'cells.jsonl'}" in error
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    # The remedy: it is pretrained again.
    without(folder, kind="pretraining", arm="green")
    monkeypatch.setattr(evidence, "pretrain", stop)
    assert evidence.main(["--output-dir", str(folder)]) == 130


def test_while_the_first_seed_is_not_done_another_needs_its_model_for_every_rate(evidence, quick_recipe, tmp_path):
    recipe = quick_recipe.replace(seeds=(0, 1), budgets=(0.1,), finetune_learning_rates=(1e-3, 3e-3))
    cells = Cells(tmp_path / "cells.jsonl")
    study = evidence.Study(recipe, None, tmp_path, cells, torch.device("cpu"))
    cell = {"arm": "green", "budget": 0.1}
    for seed in (0, 1):
        cells.add({**cell, "kind": "probe", "seed": seed})
        cells.add({**cell, "kind": "finetune", "seed": seed, "learning_rate": 1e-3, "validation": 0.5})
    assert evidence.needs_encoder(study, "green", 1)  # 3e-3 may prove better with seed 0
    cells.add({**cell, "kind": "finetune", "seed": 0, "learning_rate": 3e-3, "validation": 0.4})
    assert not evidence.needs_encoder(study, "green", 1)


def test_a_study_as_a_user_runs_it_names_wrong_input_in_one_line(tmp_path):
    command = [
        sys.executable,
        str(SCRIPT),
        "--quick",
        "--arms",
        "green",
        "sparse",
        "--output-dir",
        str(tmp_path / "no"),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "evidence.py: error: arms 'sparse' must be one of scratch, green, dense, green_third, green_equal"
    ]
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--budgets", "0.1", "2"], "budgets 2.0"),
        (["--epochs", "0"], "epochs 0.0"),
        (["--placed-gain", "0.9", "0.5"], "placed_gain [0.9, 0.5]"),
        (["--data", "./missing"], "./missing"),
        (["--photos", "./missing"], "./missing"),
        (["--arms", "scratch", "dense", "green_third"], "green_third"),
        (["--seeds", "1", "1"], "seeds [1, 1]"),
        (["--image-size", "50"], "image_size 50"),
        (["--task", "plain", "--image-size", "24"], "image_size 24"),
        (["--recipe", "x.yaml"], "--quick"),
    ],
)
def test_wrong_input_writes_nothing(evidence, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        evidence.main(["--quick", "--output-dir", str(tmp_path / "no"), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_cells_of_other_settings_are_not_mixed(evidence, finished, capsys):
    with pytest.raises(SystemExit):
        evidence.main(["--output-dir", str(finished), "--mask-ratio", "0.5"])
    assert "mask_ratio 0.75, not 0.5" in capsys.readouterr().err


def test_all_recipes_are_read():
    for path in RECIPES.glob("*.yaml"):
        load_recipe(path, EvidenceRecipe)


# Labels


def test_label_subsets_are_balanced_nested_and_apart_from_validation_and_test(task):
    small, large = (set(label_budget(task.train.labels, share, seed=1)) for share in (0.1, 0.5))
    assert small < large
    assert task.train.labels[sorted(small)].bincount(minlength=10).tolist() == [2] * 10
    trained, others = (
        {image.numpy().tobytes() for image in images}
        for images in (task.train.images, torch.cat([task.validation.images, task.test.images]))
    )
    assert not trained & others


# Placed images


@pytest.fixture(scope="module")
def photos():
    generator = torch.Generator().manual_seed(0)
    return [
        prepare_photo(torch.randint(256, (1, *size), generator=generator).byte()) for size in ((200, 300), (170, 170))
    ]


def white_squares(count):
    garments = torch.zeros(count, 1, 28, 28, dtype=torch.uint8)
    garments[..., 4:24, 4:24] = 255
    return garments


def test_a_placed_image_depends_on_seed_and_index_alone(photos):
    garments = white_squares(6)
    placement = Placement(size=48)
    images = place_garments(garments, photos, placement, seed=3)
    torch.testing.assert_close(place_garments(garments[4:], photos, placement, 3, first_index=4), images[4:])
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(place_garments(garments, photos, placement, seed=4), images)


def test_a_placed_garment_is_whole_and_has_the_size_drawn(photos):
    black = [torch.zeros_like(photo) for photo in photos]
    placement = Placement(size=48, scale=(0.5, 0.5), degrees=0.0, gain=(1.0, 1.0))
    images = place_garments(white_squares(20), black, placement, seed=0).float() / 255
    side = 20 * 24 / 28  # pixels of the square, whose image of 28 px is drawn 24 px wide
    torch.testing.assert_close(images.sum(dim=(1, 2, 3)), torch.full((20,), side**2), rtol=0.03, atol=0)
    centres = [image[0].nonzero().float().mean(0).tolist() for image in images]
    assert max(row for row, _ in centres) - min(row for row, _ in centres) > 12


def test_around_a_garment_is_background_and_inside_is_garment(photos):
    white = [torch.full_like(photo, 255) for photo in photos]
    hollow = white_squares(1)
    hollow[..., 12:14, 12:14] = 0  # a dark button is part of the garment
    placement = Placement(size=28, scale=(1.0, 1.0), degrees=0.0, gain=(1.0, 1.0))
    image = place_garments(hollow, white, placement, seed=0)[0, 0]
    assert image[0].min() == 255
    assert image[12:14, 12:14].max() == 0
    assert silhouettes(hollow)[0, 0].sum() == 20 * 20


def test_a_dimmed_background_leaves_the_garment_as_it_is(photos):
    sharp, dim = (Placement(size=28, background=(gain, gain), gain=(1.0, 1.0)) for gain in (1.0, 0.0))
    bright, alone = (place_garments(white_squares(4), photos, placement, seed=0).int() for placement in (sharp, dim))
    assert torch.equal(bright[alone == 255], alone[alone == 255])
    assert alone[:, :, 0, 0].max() == 0
    assert (bright >= alone).all()


def test_placed_images_keep_the_labels_and_other_placements_come_after(quick_recipe, task):
    plain = load_task(quick_recipe.replace(task="plain"))
    assert torch.equal(task.train.labels, plain.train.labels)
    twice = load_task(quick_recipe.replace(placements=2))
    assert torch.equal(twice.unlabelled[:200], task.train.images)
    assert torch.equal(twice.train.images, task.train.images)
    assert len(twice.unlabelled) == 400
    assert not torch.equal(twice.unlabelled[200:], twice.unlabelled[:200])


# Images in training


def test_varied_images_are_shifted_and_mirrored_copies():
    image = torch.zeros(1, 1, 9, 9, dtype=torch.uint8)
    image[0, 0, 4, 3] = 200
    varied = vary(image.expand(64, -1, -1, -1), torch.Generator().manual_seed(0), shift=2, flip=True)
    assert varied.sum(dim=(1, 2, 3)).eq(200).all()
    places = varied.nonzero()[:, 2:]
    assert places[:, 0].unique().tolist() == [2, 3, 4, 5, 6]
    assert places[:, 1].unique().tolist() == [1, 2, 3, 4, 5, 6, 7]
    unchanged = vary(image, torch.Generator().manual_seed(0), shift=0, flip=False)
    assert torch.equal(unchanged, image)


def test_a_margin_is_black_and_even():
    framed = with_margin(torch.full((1, 1, 28, 28), 9, dtype=torch.uint8), 32)
    assert framed.shape == (1, 1, 32, 32)
    assert framed[..., 2:30, 2:30].min() == 9
    assert framed.sum() == 9 * 28 * 28


# Arms


def test_the_dense_arm_starts_from_exactly_its_pretrained_encoder(quick_recipe, finished):
    folder = finished / "encoders" / "dense-0"
    pretrained = SwinForMaskedImageModeling.from_pretrained(folder).eval()
    classifier = build_classifier(quick_recipe, 10, 0, folder).eval()
    images = torch.randn(3, 1, 48, 48)
    with torch.no_grad():
        expected = pretrained.swin(images).last_hidden_state
        torch.testing.assert_close(classifier.swin(images).last_hidden_state, expected, rtol=1e-5, atol=1e-5)
    random = build_classifier(quick_recipe, 10, 0, None).eval()
    assert not torch.allclose(random.swin(images).last_hidden_state, expected, atol=0.1)


def test_both_ways_of_pretraining_have_the_same_encoder_and_mask_the_same_squares(quick_recipe):
    config = quick_recipe.model_config()
    count = {
        method: sum(
            p.numel() for n, p in build_masked_model(method, config, 0).swin.named_parameters() if "mask" not in n
        )
        for method in ("green", "dense")
    }
    assert count["green"] == count["dense"]
    units, patches = (
        masks_for(method, config, 2, 0.6, torch.Generator().manual_seed(0)) for method in ("green", "dense")
    )
    grid = patches.view(2, 4, 4, 4, 4).transpose(2, 3).flatten(3)  # [images, units, units, patches of a unit]
    assert torch.equal(grid.amin(-1), grid.amax(-1))
    assert torch.equal(grid.amax(-1).flatten(1).bool(), units)
    assert swin_config(config).encoder_stride == config.mask_unit_size


# The rule that ends trainings


def decisions(values, patience):
    rule = FlatCurve(patience)
    return [rule.look(value) for value in values]


def test_a_rising_curve_is_never_stopped():
    assert set(decisions([step / 100 for step in range(100)], patience=1)) == {"better"}


def test_a_flat_curve_lowers_the_rate_once_and_then_ends():
    assert decisions([0.5] * 7, patience=3) == ["better", "go on", "go on", "lower", "go on", "go on", "stop"]


def test_a_better_value_after_a_wait_counts_anew():
    assert decisions([0.5, 0.4, 0.6, 0.5, 0.5], patience=2) == ["better", "go on", "better", "go on", "lower"]


# Cells and figures


def test_a_look_comes_at_least_four_times_in_a_pass_over_many_labels(quick_recipe):
    recipe = quick_recipe.replace(evaluate_every=100)
    assert [updates_between_looks(recipe, updates) for updates in (18, 400, 1844)] == [100, 100, 461]


def test_of_several_learning_rates_the_one_best_on_validation_counts(tmp_path):
    cells = Cells(tmp_path / "cells.jsonl")
    for arm, seed, rate, validation, test in (
        ("scratch", 0, 1e-3, 0.6, 0.58),
        ("scratch", 0, 3e-3, 0.5, 0.70),
        ("green", 0, 1e-3, 0.7, 0.66),
        ("green", 1, 1e-3, 0.9, 0.9),  # no scratch of that seed to compare with
    ):
        cell = {"kind": "finetune", "arm": arm, "seed": seed, "budget": 0.01, "learning_rate": rate}
        cells.add({**cell, "labels": 80, "validation": validation, "test": test})
    read = Cells(tmp_path / "cells.jsonl")
    assert read.best_finetuning("scratch", 0, 0.01)["test"] == 0.58
    assert gains(read) == [{"arm": "green", "budget": 0.01, "labels": 80, "points": [8.0]}]


def finetunings(path, ends):
    """Cells with a fine-tuning of each (arm, labels, is_flat), and a probe for more labels."""
    cells = Cells(path)
    for arm, labels, is_flat in ends:
        cell = {"kind": "finetune", "arm": arm, "seed": 0, "budget": labels / 100, "labels": labels, "test": 0.5}
        cells.add(cell | {"learning_rate": 1e-3, "validation": 0.5, "steps": 9, "best_step": 8, "is_flat": is_flat})
    cells.add({"kind": "probe", "arm": "green", "seed": 0, "budget": 1.0, "labels": 100, "knn": 0.4, "linear": 0.3})
    return cells


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """The panels of the picture of some cells."""
    figures = []
    monkeypatch.setattr("green_swin_hf.visualization.save_figure", lambda figure, path: figures.append(figure))

    def draw_cells(cells):
        draw(cells, tmp_path / "accuracy.png")
        return figures[-1].axes

    return draw_cells


def test_what_ended_at_the_limit_is_starred_and_hollow_and_the_star_is_explained(tmp_path, drawn):
    cells = finetunings(tmp_path / "cells.jsonl", [("scratch", 10, True), ("scratch", 50, False), ("green", 50, True)])
    accuracies, rest = tables(cells).split("**Gain over scratch**")
    gain, _ = rest.split("**Frozen features**")
    assert "| scratch | test accuracy | 50.0 | 50.0* | - |" in accuracies
    assert "| GreenSwin | test accuracy | - | 50.0 | - |" in accuracies
    assert "| GreenSwin | - | +0.0 (+0.0)* | - |" in gain  # that of scratch was not flat
    for part in (accuracies, gain):
        assert "|\n\n\\* a fine-tuning behind this number ended at the limit of updates" in part
    panel = drawn(cells)[0]
    hollow = [line for line in panel.lines if line.get_markerfacecolor() == "white" and len(line.get_xdata())]
    assert [(*line.get_xdata(), line.get_color()) for line in hollow] == [(50, "#000000")]
    assert NOT_FLAT_LABEL in [text.get_text() for text in panel.get_legend().get_texts()]


def test_where_all_is_flat_there_is_no_star(tmp_path, drawn):
    cells = finetunings(tmp_path / "cells.jsonl", [("scratch", 10, True), ("green", 10, True)])
    assert "50.0 |" in tables(cells)
    assert "limit" not in tables(cells)
    assert NOT_FLAT_LABEL not in [text.get_text() for text in drawn(cells)[0].get_legend().get_texts()]


def test_a_picture_has_ticks_where_points_are_and_legends_below(tmp_path, drawn):
    panels = drawn(finetunings(tmp_path / "cells.jsonl", [("scratch", 10, True), ("green", 10, True)]))
    assert [list(axes.get_xticks()) for axes in panels] == [[10], [100]]
    for axes in panels:
        axes.figure.canvas.draw()
        assert axes.get_legend().get_window_extent().y1 < axes.get_window_extent().y0


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.write_text('{"kind": "probe", "arm": "green", "seed": 0}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Cells(path)


def test_spread_is_the_deviation_over_seeds():
    assert percent([0.6, 0.7, 0.8]) == "70.0 ± 10.0"
