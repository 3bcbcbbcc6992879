"""Checkpoints are whole or not there: what a failure, damage and rotation leave."""

import json
import random

import numpy as np
import pytest
import torch

from green_swin_hf import checkpointing
from green_swin_hf.checkpointing import (
    checkpoint_step,
    find_damage,
    list_checkpoints,
    load_weights,
    newest_checkpoint,
    prepare_checkpoints,
    random_state,
    read_trainer_state,
    read_training_state,
    replace_files,
    restore_random_state,
    save_checkpoint,
    write_folder,
)


class Weights(torch.nn.Module):
    """The part of a model that checkpoints need."""

    def __init__(self, value):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((3,), float(value)))

    def save_pretrained(self, folder):
        from safetensors.torch import save_file

        save_file(self.state_dict(), folder / "model.safetensors")


def save(folder, step, keep=2, save_model=None):
    return save_checkpoint(
        folder,
        step,
        save_model=save_model or Weights(step).save_pretrained,
        training_state={"moment": torch.full((2,), float(step))},
        trainer_state={"update": step},
        keep=keep,
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_gives_back_what_went_in(tmp_path):
    path = save(tmp_path, 7)
    model = Weights(0)
    load_weights(model, path)
    assert model.weight.tolist() == [7, 7, 7]
    assert read_training_state(path)["moment"].tolist() == [7, 7]
    assert read_trainer_state(path) == {"update": 7}
    assert find_damage(path) is None
    assert names(path) == ["checksums.json", "model.safetensors", "trainer_state.json", "training_state.pt"]


def test_the_newest_are_kept_in_the_order_of_their_steps(tmp_path):
    for step in (5, 10, 99999999, 100000000):
        save(tmp_path, step)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-99999999", "step-100000000"]
    assert names(tmp_path) == ["step-100000000", "step-99999999"]


@pytest.mark.parametrize("moment", ["model", "state", "checksum", "rename"])
def test_a_failure_while_writing_leaves_the_earlier_ones_whole_and_nothing_half_written(tmp_path, monkeypatch, moment):
    earlier = [save(tmp_path, 1), save(tmp_path, 2)]

    def fail(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    def half_a_model(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        fail()

    targets = {
        "state": (torch, "save"),
        "checksum": (checkpointing, "sha256"),
        "rename": (type(tmp_path), "rename"),
    }
    if moment in targets:
        monkeypatch.setattr(*targets[moment], fail)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 3, save_model=half_a_model if moment == "model" else None)
    monkeypatch.undo()
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    assert [find_damage(path) for path in earlier] == [None, None]
    assert newest_checkpoint(tmp_path) == (earlier[1], {})


def test_what_a_killed_process_left_is_no_checkpoint_and_in_nobodys_way(tmp_path):
    first = save(tmp_path, 1)
    half = tmp_path / ".step-00000002.partial"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert newest_checkpoint(tmp_path) == (first, {})
    save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


DAMAGE = {
    "torn": (lambda path: (path / "model.safetensors").write_bytes(b"x"), "model.safetensors has 1 bytes"),
    "changed": (lambda path: (path / "trainer_state.json").write_text('{\n "update": 9\n}'), "checksum"),
    "missing": (lambda path: (path / "training_state.pt").unlink(), "training_state.pt is missing"),
    "no list": (lambda path: (path / "checksums.json").unlink(), "cannot be read"),
    "bad list": (lambda path: (path / "checksums.json").write_text("[1]"), "cannot be read"),
    "short list": (lambda path: (path / "checksums.json").write_text("{}"), "is missing"),
}


@pytest.mark.parametrize(("harm", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_damage_is_found_named_and_passed_over(tmp_path, harm, message):
    whole, broken = save(tmp_path, 1), save(tmp_path, 2)
    harm(broken)
    newest, damaged = newest_checkpoint(tmp_path)
    assert newest == whole
    assert message in damaged[broken]
    assert broken.exists()


def test_writing_a_step_again_keeps_what_was_there(tmp_path):
    path = save(tmp_path, 1)
    (path / "model.safetensors").write_bytes(b"x")
    save(tmp_path, 1)
    assert find_damage(path) is None
    assert names(tmp_path) == ["step-00000001", "step-00000001.replaced-1"]


def test_a_folder_is_not_seen_before_it_is_whole(tmp_path):
    seen = []
    write_folder(tmp_path / "target", lambda folder: seen.append((tmp_path / "target").exists()))
    assert seen == [False]
    assert json.loads((tmp_path / "target" / "checksums.json").read_text()) == {}


def test_files_are_replaced_together_with_the_weights_last(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")

    def write(folder):
        for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
            (folder / name).write_text("new")

    def fail(folder):
        write(folder)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_files(tmp_path, fail)
    assert names(tmp_path) == ["config.json", "notes.txt"]
    assert (tmp_path / "config.json").read_text() == "old"
    order = []
    replace = checkpointing.os.replace
    monkeypatch.setattr(checkpointing.os, "replace", lambda a, b: (order.append(a.name), replace(a, b)))
    assert replace_files(tmp_path, write) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert order[-1] == "model.safetensors"
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_random_numbers_go_on_where_they_were(tmp_path):
    def draw():
        return torch.rand(3).tolist(), np.random.rand(), random.random(), torch.randn(1).item()

    random.gauss(0, 1)
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw()
    draw()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert draw() == expected


def test_reading_a_checkpoint_runs_no_code_from_it(tmp_path):
    path = save(tmp_path, 1)
    torch.save({"moment": print}, path / "training_state.pt")
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        read_training_state(path)


def test_going_on_from_an_older_checkpoint_keeps_the_later_ones_under_other_names(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, step, keep=5)
    (tmp_path / ".step-00000012.partial").mkdir()
    moved = prepare_checkpoints(tmp_path, 6)
    assert [path.name for path in moved] == ["step-00000009.superseded-1"]
    assert find_damage(moved[0]) is None
    assert [checkpoint_step(path) for path in list_checkpoints(tmp_path)] == [3, 6]
    assert not list(tmp_path.glob(".*.partial"))
    save(tmp_path, 7, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000007"]
    assert prepare_checkpoints(tmp_path / "none", 0) == []


def test_whatever_fails_while_writing_is_an_os_error(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("unexpected pos 64 vs 0")

    for write in (write_folder, replace_files):
        (tmp_path / "target").mkdir(exist_ok=True)
        with pytest.raises(OSError, match=r"target.* cannot be written: unexpected pos 64"):
            write(tmp_path / "target", fail)
    assert not list(tmp_path.rglob("half"))
