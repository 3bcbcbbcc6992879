"""Pretraining that is killed again and again, also while it writes a checkpoint, ends as if nothing had happened.

`pytest tests/test_survival.py --kills 50` kills more often.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from test_examples import (
    TINY,
    _fresh_accelerator,  # noqa: F401
    assert_same,
    grey_images,  # noqa: F401
    load_script,
    run_pretrain,
    training_losses,
    weights,
)

from green_swin_hf.checkpointing import find_damage, list_checkpoints, read_training_state

PRETRAIN = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"


def pretrain_in_child(flags, output):
    """What a killable child process does; `_exit` because a finished run needs no more."""
    # Loader workers that are forked see that their parent is gone; those of a server of the child's own would stay.
    multiprocessing.set_start_method("fork", force=True)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(load_script(PRETRAIN).main(flags))


def run_killed(context, flags, run, moment, rng):
    """Start or go on with a run and kill it at a random time after `moment` changed; its exit code."""
    child = context.Process(target=pretrain_in_child, args=(flags, run.parent / "shown.txt"))
    child.start()
    before = moment(run)
    while child.is_alive() and moment(run) == before:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.08))
    if child.is_alive():
        os.kill(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def newest_update(run):
    return [path.name for path in list_checkpoints(run / "checkpoints")][-1:]


def file_being_written(run):
    return sorted(path.name for path in (run / "checkpoints").glob(".*"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_killed_at_random_moments_ends_with_identical_bytes(grey_images, tmp_path, request, accumulation):  # noqa: F811
    kills, rng = request.config.getoption("kills"), random.Random(accumulation)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_examples"])
    flags = ["--data", grey_images, *TINY, "--drop-path-rate", 0.2, "--gradient-accumulation-steps", accumulation]
    flags += ["--max-steps", 3 * kills + 6, "--save-every", 1, "--keep-checkpoints", 2]
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert run_pretrain("--output-dir", whole, *flags) == 0
    going = [str(word) for word in ("--output-dir", run, "--resume", "auto", *flags)]
    killed = 0
    for number in range(kills):
        moment = (newest_update, file_being_written)[number % 2]
        killed += run_killed(context, going, run, moment, rng) == -signal.SIGKILL
        assert [damage for path in list_checkpoints(run / "checkpoints") if (damage := find_damage(path))] == []
    assert killed >= kills - 1  # the last may come after the end
    assert run_pretrain(*going) == 0
    assert_same(weights(whole), weights(run))
    assert training_losses(whole) == training_losses(run)
    states = [read_training_state(list_checkpoints(folder / "checkpoints")[-1]) for folder in (whole, run)]
    for before, after in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert_same(before, after)
