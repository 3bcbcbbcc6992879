"""Pretraining that is killed again and again, also while it writes a checkpoint, ends as if nothing had happened.

`pytest tests/test_survival.py --kills 10` kills more often, and one and two processes with and without accumulation.
"""

import contextlib
import multiprocessing
import os
import random
import signal
import socket
import time
from pathlib import Path

import pytest
from test_examples import (
    TINY,
    _fresh_accelerator,  # noqa: F401
    assert_same,
    grey_images,  # noqa: F401
    load_script,
    training_losses,
    weights,
)

from green_swin_hf.checkpointing import find_damage, list_checkpoints, read_training_state

PRETRAIN = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"


def pretrain_in_child(flags, output, variables=None):
    """What a killable child process does; `_exit` because a finished run needs no more."""
    os.environ.update(variables or {})
    os.setpgid(0, 0)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os._exit(load_script(PRETRAIN).main(flags))


def run_killed(start, run, moment, rng):
    """Start or go on with a run and kill one of its processes when `moment` shows something new; exit codes.

    While a checkpoint is being written it is the process that writes, stopped first, so that it is still writing when
    it is killed. After a new checkpoint it is any of them, a random time later.
    """
    known = set(moment(run))  # of a file that was being written: left by the kill before, the run removes it
    children = start()
    victim = children[0] if moment is file_being_written else rng.choice(children)
    while victim.is_alive():
        found = set(moment(run))
        new, known = found - known, known & found
        if not new:
            time.sleep(0.002)
            continue
        time.sleep(0 if moment is file_being_written else rng.uniform(0, 0.08))
        with contextlib.suppress(ProcessLookupError):  # it came to its end meanwhile
            os.kill(victim.pid, signal.SIGSTOP)
            time.sleep(0.005)
            is_in_time = moment is newest_update or new <= set(moment(run))
            os.kill(victim.pid, signal.SIGKILL if is_in_time else signal.SIGCONT)
        known |= new
    return [wait_for(child) for child in (victim, *(child for child in children if child is not victim))]


def wait_for(child, seconds=60):
    child.join(seconds)
    assert not child.is_alive(), "still there"
    return child.exitcode


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def starter(flags, output, num_processes=1, target=pretrain_in_child):
    """A function that starts the processes of a run, without a launcher that would end them together."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_examples"])

    def start():
        shared = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes)}
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "ACCELERATE_USE_CPU": "true"}
        each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
        own = each if num_processes > 1 else [{}]
        children = [context.Process(target=target, args=(flags, output, variables)) for variables in own]
        for child in children:
            child.start()
        return children

    return start


def newest_update(run):
    return [path.name for path in list_checkpoints(run / "checkpoints")][-1:]


def file_being_written(run):
    """Not what is being removed, which is older than the newest checkpoint."""
    newest = (newest_update(run) or [""])[0]
    return sorted(path.name for path in (run / "checkpoints").glob(".*") if path.name.removeprefix(".") > newest)


@pytest.mark.parametrize(("accumulation", "processes"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_a_run_killed_at_random_moments_ends_with_identical_bytes(
    grey_images,  # noqa: F811
    tmp_path,
    request,
    accumulation,
    processes,
):
    kills, rng = request.config.getoption("kills"), random.Random(accumulation)
    if kills == 0:
        if accumulation == processes:
            pytest.skip("both ways once are enough here; --kills 10 runs all four")
        kills = 2
    flags = ["--data", grey_images, *TINY, "--drop-path-rate", 0.2, "--gradient-accumulation-steps", accumulation]
    flags += ["--max-steps", 3 * kills + 6, "--save-every", 1, "--keep-checkpoints", 2]
    whole, run, shown = tmp_path / "whole", tmp_path / "run", tmp_path / "shown.txt"
    words = [[str(word) for word in ("--output-dir", folder, "--resume", "auto", *flags)] for folder in (whole, run)]
    start_whole, start = (starter(line, shown, processes) for line in words)
    assert [wait_for(child) for child in start_whole()] == [0] * processes
    killed = killed_in_writing = 0
    for number in range(kills):
        moment = (newest_update, file_being_written)[number % 2]
        victim, *others = run_killed(start, run, moment, rng)
        killed += victim == -signal.SIGKILL
        if victim and moment is file_being_written:
            assert file_being_written(run), "it was killed, but not while it was writing"
            killed_in_writing += 1
        assert set(others) <= ({1} if victim else {0})
        assert [damage for path in list_checkpoints(run / "checkpoints") if (damage := find_damage(path))] == []
    assert killed >= kills - 1  # the last may come after the end
    assert killed_in_writing >= max(1, kills // 2 - 1)
    if processes > 1:
        assert "another process of the run is gone or does not answer" in shown.read_text()
        assert 'pretrain.py", line' not in shown.read_text()  # no traceback; threads of the loader may leave one
    assert [wait_for(child) for child in start()] == [0] * processes
    assert_same(weights(whole), weights(run))
    assert training_losses(whole) == training_losses(run)
    states = [read_training_state(list_checkpoints(folder / "checkpoints")[-1]) for folder in (whole, run)]
    for before, after in zip(*(state["optimizer"]["state"].values() for state in states), strict=True):
        assert_same(before, after)
    assert len(states[0]["random_states"]) == processes


def test_a_process_that_hangs_ends_the_others_in_the_stated_time(grey_images, tmp_path):  # noqa: F811
    run, shown, patience = tmp_path / "run", tmp_path / "shown.txt", 15
    flags = ["--data", grey_images, *TINY, "--max-steps", 10_000, "--save-every", 2, "--peer-timeout", patience]
    children = starter([str(word) for word in (*flags, "--output-dir", run)], shown, 2)()
    while not newest_update(run):
        assert all(child.is_alive() for child in children), shown.read_text()
        time.sleep(0.01)
    os.kill(children[0].pid, signal.SIGSTOP)
    try:
        assert wait_for(children[1], 2 * patience) == 1
    finally:
        children[0].kill()
    assert "process 1 stopped: another process of the run is gone or does not answer" in shown.read_text()
    assert find_damage(list_checkpoints(run / "checkpoints")[-1]) is None


def test_a_signal_to_the_whole_group_does_not_take_the_loader_away(grey_images, tmp_path):  # noqa: F811
    """As launchers and terminals send it. A loader's worker would end at once."""
    run, shown = tmp_path / "run", tmp_path / "shown.txt"
    flags = ["--data", grey_images, *TINY, "--max-steps", 10_000, "--save-every", 2, "--workers", 2]
    (child,) = starter([str(word) for word in (*flags, "--output-dir", run)], shown)()
    while not newest_update(run):
        assert child.is_alive(), shown.read_text()
        time.sleep(0.01)
    os.killpg(child.pid, signal.SIGTERM)
    assert wait_for(child) == 0, shown.read_text()
    assert "on SIGTERM. Go on with: python" in shown.read_text()
    assert find_damage(list_checkpoints(run / "checkpoints")[-1]) is None
