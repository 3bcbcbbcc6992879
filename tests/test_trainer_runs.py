"""Checkpoints of `Trainer`: what is missing in them, or changed since they were written, is found."""

import json
from types import SimpleNamespace

import pytest

from green_swin_hf.checkpointing import newest_checkpoint
from green_swin_hf.trainer_runs import TRAINER_FORMAT, TrainerProgress

FILES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


def write_checkpoint(folder, step, is_killed=False):
    """As `Trainer` does it: the files, then the callbacks."""
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    for name in FILES:
        (path / name).write_text(json.dumps({"of": step}))
    if not is_killed:
        state = SimpleNamespace(is_world_process_zero=True, global_step=step)
        TrainerProgress(str).on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    return path


@pytest.mark.parametrize("name", FILES[1:4])
def test_a_file_that_changed_is_named_and_the_checkpoint_before_is_taken(tmp_path, name):
    first, second = (write_checkpoint(tmp_path, step) for step in (9, 10))
    assert newest_checkpoint(tmp_path, TRAINER_FORMAT) == (second, {})
    (second / name).write_text(json.dumps({"of": 99}))
    newest, damaged = newest_checkpoint(tmp_path, TRAINER_FORMAT)
    assert newest == first
    assert damaged == {second: f"{name} does not have its checksum"}


def test_random_states_may_come_later_and_a_kill_before_the_checksums_loses_nothing(tmp_path):
    first, second = write_checkpoint(tmp_path, 1), write_checkpoint(tmp_path, 2, is_killed=True)
    (first / "rng_state.pth").write_text("that of another process, written after")
    assert TRAINER_FORMAT.find_damage(first) is None
    assert newest_checkpoint(tmp_path, TRAINER_FORMAT) == (second, {})
    (second / "optimizer.pt").unlink()
    assert newest_checkpoint(tmp_path, TRAINER_FORMAT) == (first, {second: "optimizer.pt is missing"})
