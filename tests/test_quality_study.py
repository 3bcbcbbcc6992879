"""The quality studies: what the settings change, what is kept, and what the script says to wrong input."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from evidence_study.cells import Cells
from evidence_study.pretraining import build_masked_model
from test_examples import load_script
from tiny import images, seeded, tiny_config

from green_swin_hf import GreenSwinForMaskedImageModeling, sample_masks
from green_swin_hf.modeling_green_swin import position_encoding
from green_swin_hf.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "studies" / "quality.py"
quality = load_script(SCRIPT)

from quality_study import report  # noqa: E402 (found once the script is loaded)
from quality_study.placement import misplace_latents, place_as_published  # noqa: E402
from quality_study.recipe import QualityRecipe  # noqa: E402
from quality_study.settings import SETTINGS, STUDIES, Setting, settings_of  # noqa: E402

TINY = """
data: {data}
photos: {photos}
train_images: 60
validation_images: 30
test_images: 20
test_placements: 2
image_size: 32
patch_size: 4
embed_dim: 8
depths: [1, 1]
num_heads: [1, 2]
window_size: 4
decoder_hidden_size: 64
decoder_intermediate_size: 64
batch_size: 30
epochs: 1
probe_labels: 1.0
finetune_labels: 0.5
finetune_updates: 2
seeds: [0]
"""


# Placement of latents


def mae_arrangement(latents, draws, visible, num_units):
    """Where a decoder in the way of MAE puts latents: [B, U, C], zeros for mask tokens.

    It appends mask tokens to the latents and un-shuffles both by the inverse of the order in which the sampler drew the
    units, the visible ones first.
    """
    placed = torch.zeros(latents.shape[0], num_units, latents.shape[2])
    for image in range(latents.shape[0]):
        noise = torch.arange(num_units) + 10.0
        noise[visible[image]] = draws[image]
        restore = noise.argsort().argsort()
        tokens = torch.cat([latents[image], torch.zeros(num_units - latents.shape[1], latents.shape[2])])
        placed[image] = tokens[restore]
    return placed


def visible_units(masks):
    return torch.stack([(~mask).nonzero().flatten() for mask in masks])


def placed_in_raster_order(latents, visible, num_units):
    placed = torch.zeros(latents.shape[0], num_units, latents.shape[2])
    return placed.scatter(1, visible[:, :, None].expand_as(latents), latents)


def test_published_placement_is_the_un_shuffling_of_latents_in_raster_order():
    visible = visible_units(sample_masks(5, (7, 7), 0.75, seeded()))
    latents, draws = torch.randn(5, 12, 3), torch.rand(5, 12)
    published = placed_in_raster_order(place_as_published(latents, draws), visible, 49)
    assert torch.equal(published, mae_arrangement(latents, draws, visible, 49))


def test_published_placement_misplaces_as_many_latents_as_were_counted():
    latents = torch.arange(12.0).expand(100, 12)[:, :, None]
    moved = place_as_published(latents, torch.rand(100, 12, generator=seeded())) != latents
    # The published code was seen to misplace 1092 of 1200; one in twelve of a random order stays in place.
    assert int(moved.sum()) == pytest.approx(1092, abs=30)


@pytest.mark.parametrize("is_shared", [False, True], ids=["a mask per image", "one mask"])
def test_a_model_with_published_placement_differs_in_what_its_decoder_sees_alone(is_shared):
    model = GreenSwinForMaskedImageModeling(tiny_config()).train()
    masks = sample_masks(1 if is_shared else 4, (4, 4), 0.75, seeded(3)).expand(4, -1)
    seen, latents = [], []
    model.decoder.layers[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.decoder.embed.register_forward_hook(lambda _, given, out: latents.append(given[0]))
    before = sum(parameter.numel() for parameter in model.parameters())
    model(images(4), bool_masked_pos=masks)
    handle = misplace_latents(model, seeded(7), is_shared)
    model(images(4), bool_masked_pos=masks)
    handle.remove()
    model(images(4), bool_masked_pos=masks)
    assert torch.equal(seen[0], seen[2])
    assert sum(parameter.numel() for parameter in model.parameters()) == before

    raster = latents[0]  # what the encoder returns
    draws = torch.rand(1 if is_shared else 4, 4, generator=seeded(7)).expand(4, -1)
    visible = visible_units(masks)
    moved = model.decoder.embed(mae_arrangement(raster, draws, visible, 16))
    hidden = masks[:, :, None].expand_as(moved)
    expected = torch.where(hidden, model.decoder.mask_token, moved)
    torch.testing.assert_close(seen[1], expected + position_encoding((4, 4), 16, expected))
    assert not torch.allclose(seen[0], seen[1])
    torch.testing.assert_close(seen[0][masks], seen[1][masks])


def test_both_placements_have_the_same_weights_at_the_start():
    first, second = (build_masked_model("green", tiny_config(), seed=1) for _ in range(2))
    misplace_latents(second, seeded(), is_shared=False)
    for (name, mine), (other, theirs) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(mine, theirs)


# Masks


def test_one_mask_per_batch_is_one_and_a_mask_per_image_is_many():
    each, shared = (SETTINGS[name].draw_masks(tiny_config(), 32, seeded()) for name in ("default", "shared"))
    assert each.shape == shared.shape == (32, 16)
    assert len(shared.unique(dim=0)) == 1
    assert len(each.unique(dim=0)) > 16
    assert each.sum(1).tolist() == shared.sum(1).tolist() == [12] * 32


def test_a_unit_of_twice_the_side_is_masked_as_one():
    masks = SETTINGS["unit_16"].draw_masks(tiny_config(), 32, seeded()).view(32, 2, 2, 2, 2)
    squares = masks.transpose(2, 3).flatten(3)  # [images, rows, columns, units of a square]
    assert torch.equal(squares.amin(-1), squares.amax(-1))
    assert squares.sum(dim=(1, 2, 3)).tolist() == [12] * 32


def test_a_unit_that_does_not_divide_the_grid_is_refused():
    with pytest.raises(ValueError, match="units_per_side 3 must divide"):
        Setting(units_per_side=3).draw_masks(tiny_config(), 2, seeded())


# Settings


@pytest.mark.parametrize("path", [quality.FULL_RECIPE, quality.QUICK_RECIPE], ids=["full", "quick"])
def test_labels_of_the_default_say_what_the_recipes_hold(path):
    recipe = load_recipe(path, QualityRecipe)
    assert (
        f"ratio {recipe.mask_ratio}, unit {recipe.model_config().mask_unit_size} px"
        in (STUDIES["masks"].labels["default"])
    )
    blocks, width = recipe.decoder_num_hidden_layers, recipe.decoder_hidden_size
    assert STUDIES["decoder"].labels["default"] == f"{blocks} block, width {width}"
    assert STUDIES["windows"].labels["default"] == f"window {recipe.window_size}"
    for setting in SETTINGS.values():
        config = recipe.replace(**setting.changes).model_config()
        assert setting.draw_masks(config, 2, seeded()).shape == (2, 16)


def test_studies_share_their_default_and_every_setting_belongs_to_one():
    assert settings_of(list(STUDIES)) == list(SETTINGS)
    assert settings_of(["windows", "placement"])[0] == "default"
    assert STUDIES["placement"].comparisons() == [("published", "default"), ("shared_published", "shared")]
    assert ("shared", "default") in STUDIES["masks"].comparisons()


# The script


@pytest.fixture(scope="module")
def tiny_recipe(tmp_path_factory):
    data = ROOT / "examples" / "data"
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(TINY.format(data=data / "fashion_mnist_10k", photos=data / "photos"))
    return path


@pytest.fixture
def run(tiny_recipe, monkeypatch):
    monkeypatch.setattr(quality, "QUICK_RECIPE", tiny_recipe)
    return lambda folder, *flags: quality.main(["--quick", "--output-dir", str(folder), *flags])


@pytest.fixture(scope="module")
def finished(tiny_recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "quality"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "QUICK_RECIPE", tiny_recipe)
        assert quality.main(["--quick", "--output-dir", str(folder), "--only", "windows"]) == 0
    return folder


def lines_of(folder):
    return [json.loads(line) for line in (folder / "cells.jsonl").read_text().splitlines()]


def test_a_study_has_its_settings_and_their_baselines(finished):
    trained = ["pretraining", "probe", "finetune"]
    expected = [(name, kind) for name in ("default", "window_2") for kind in trained]
    expected += [("scratch", "probe"), ("scratch", "finetune"), ("pixels", "probe")]
    assert [(cell["arm"], cell["kind"]) for cell in lines_of(finished)] == expected
    counts = json.loads((finished / "results.json").read_text())["images"]
    assert counts == {"unlabelled": 60, "train": 60, "validation": 30, "test": 40}


def test_a_study_leaves_a_table_a_picture_and_a_summary(finished):
    table = (finished / "table.md").read_text()
    for text in ("## Window size", "raw pixels", "random weights", "window 2, against: window 4", "k-NN, 60 labels"):
        assert text in table
    assert "## Depth and width" not in table
    summary = json.loads((finished / "results.json").read_text())
    assert summary["machine"]["cores"] == os.cpu_count()
    assert [found["setting"] for found in summary["studies"]["windows"]] == ["window_2"] * 3
    assert (finished / "windows.png").read_bytes().startswith(b"\x89PNG")
    assert not (finished / "masks.png").exists()


def test_finished_cells_are_not_computed_again_and_a_missing_one_is(run, finished, monkeypatch):
    path = finished / "cells.jsonl"
    whole = path.read_text()
    for name in ("train_masked", "probe", "finetune_for"):
        monkeypatch.setattr(f"quality_study.cells.{name}", None)
    assert run(finished, "--only", "windows") == 0
    assert path.read_text() == whole
    last = lines_of(finished)[5]
    assert (last["kind"], last["arm"]) == ("finetune", "window_2")
    monkeypatch.undo()
    monkeypatch.setattr(quality, "QUICK_RECIPE", finished / "recipe.yaml")
    monkeypatch.setattr("quality_study.cells.train_masked", None)
    path.write_text("".join(line for row, line in enumerate(whole.splitlines(True)) if row != 5))
    assert run(finished, "--only", "windows") == 0
    again = lines_of(finished)[-1]
    assert {key: again[key] for key in ("kind", "arm", "test")} == {key: last[key] for key in ("kind", "arm", "test")}


def stop(*_, **__):
    raise KeyboardInterrupt


def test_an_interrupted_study_ends_in_one_line_and_keeps_its_cells(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("quality_study.cells.probe", stop)
    assert run(tmp_path / "study", "--only", "windows") == 130
    assert capsys.readouterr().out.endswith("\nStopped. Finished cells are kept; the same command goes on.\n")
    assert [cell["kind"] for cell in lines_of(tmp_path / "study")] == ["pretraining"]


def without(folder, kind, arm):
    """Take a line out of `cells.jsonl`."""
    left = [cell for cell in lines_of(folder) if (cell["kind"], cell["arm"]) != (kind, arm)]
    (folder / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in left))


def test_a_pretrained_model_may_be_gone_unless_it_is_needed(run, finished, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(finished, tmp_path / "study")
    shutil.rmtree(folder / "encoders")
    (folder / "table.md").unlink()
    assert run(folder, "--only", "windows") == 0
    assert (folder / "table.md").is_file()
    without(folder, "finetune", "window_2")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(folder, "--only", "windows")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{folder / 'encoders' / 'window_2-0'} has no pretrained model" in error
    assert f"remove the line of pretraining 'window_2' with seed 0 from {folder / 'cells.jsonl'}" in error
    without(folder, "pretraining", "window_2")
    monkeypatch.setattr("quality_study.cells.train_masked", stop)  # it is pretrained again
    assert run(folder, "--only", "windows") == 130


def test_cells_of_a_setting_that_meant_something_else_are_not_mixed(run, finished, monkeypatch, capsys):
    monkeypatch.setitem(SETTINGS, "window_2", Setting({"window_size": 3}))
    with pytest.raises(SystemExit):
        run(finished)
    assert "pretraining 'window_2' with settings other than" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--only", "window"], "--only 'window' must be one of placement, masks, decoder, windows"),
        (["--seeds", "0", "0"], "seeds [0, 0]"),
        (["--seeds", "one"], "seeds ['one']"),
        (["--epochs", "3"], "--epochs"),
    ],
)
def test_wrong_input_is_one_line_and_writes_nothing(run, tmp_path, capsys, flags, named):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path / "no", *flags)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1
    assert not (tmp_path / "no").exists()


def test_the_script_as_a_user_runs_it_names_wrong_input(tmp_path):
    command = [sys.executable, str(SCRIPT), "--only", "widths", "--output-dir", str(tmp_path / "no")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == ("quality.py: error: --only 'widths' must be one of placement, masks, decoder, windows\n")
    assert not (tmp_path / "no").exists()


# Differences


@pytest.fixture
def cells(tmp_path):
    kept = Cells(tmp_path / "cells.jsonl")
    for name, accuracies in {"default": (0.50, 0.51, 0.52), "window_2": (0.48, 0.49, 0.51)}.items():
        for seed, accuracy in enumerate(accuracies):
            kept.add({"kind": "probe", "arm": name, "seed": seed, "labels": 100, "knn": accuracy, "linear": 0.5})
    return kept


def test_a_difference_is_taken_with_the_same_seed_and_says_its_spread(cells):
    found = report.difference(cells, "window_2", "default", "knn")
    assert found["points"] == [-2.0, -2.0, -1.0]
    assert found["mean"] == pytest.approx(-1.67)
    half = 4.3027 * (1 / 3) ** 0.5 / 3**0.5  # t for 2 degrees of freedom, deviation, root of the count
    assert found["interval"] == pytest.approx([-5 / 3 - half, -5 / 3 + half], abs=0.01)
    assert report.said(found) == "**-1.7** (-2.0, -2.0, -1.0) [-3.1, -0.2]"


def test_a_difference_that_seeds_do_not_support_is_not_bold(cells):
    cells.add({"kind": "probe", "arm": "window_2", "seed": 2, "labels": 100, "knn": 0.54, "linear": 0.5})
    found = report.difference(cells, "window_2", "default", "knn")
    assert not report.excludes_zero(found)
    assert "**" not in report.said(found)


def test_fewer_than_three_seeds_have_no_interval(cells):
    few = Cells(cells.path.with_name("few.jsonl"))
    for cell in cells.of_kind("probe"):
        if cell["seed"] < 2:
            few.add(cell)
    assert report.said(report.difference(few, "window_2", "default", "knn")) == "-2.0 (-2.0, -2.0)"
    assert report.difference(few, "window_2", "default", "test") is None
