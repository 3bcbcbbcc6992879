"""Contenders in processes of their own, stepping in turn: one computes, the others wait.

Threads of OpenMP spin for a while after the end of a parallel region (GNU's default is some milliseconds); the pause
before every step lets that pass, so that no process disturbs the next one.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

import green_swin_hf
from benchmarking.contenders import Contender

Reply = dict[str, Any]
EXAMPLES = Path(__file__).resolve().parents[1]


class WorkerFailed(Exception):
    """A contender that cannot go on; the message is the reason."""


class Worker(Protocol):
    """One contender that answers requests."""

    description: Reply

    def wait_until_ready(self) -> None: ...

    def ask(self, do: str, **arguments: Any) -> Reply: ...

    def close(self) -> None: ...


class WorkerProcess:
    """A contender in a process of its own, started at once; `wait_until_ready` returns when its model is built."""

    def __init__(self, contender: Contender):
        self.description: Reply = {}
        # A cache of its own, so that the time of `torch.compile` is that of a first run.
        self._compiled = tempfile.TemporaryDirectory(prefix="benchmark_", ignore_cleanup_errors=True)
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, closed by `close`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarking.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(compiled=self._compiled.name),
        )
        self._send(dataclasses.asdict(contender))

    def wait_until_ready(self) -> None:
        self.description = self._receive()

    def ask(self, do: str, **arguments: Any) -> Reply:
        """Send a request and wait for its answer.

        Raises:
            WorkerFailed: the contender could not do it, or its process ended.
        """
        self._send({"do": do, **arguments})
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the process has ended: `_receive` reports it with the reason
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _receive(self) -> Reply:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerFailed(self._reason_of_end())
        if not line.endswith("\n"):  # it ended while it wrote
            raise WorkerFailed(self._reason_of_end())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def _reason_of_end(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        last = (self._errors.read().strip().splitlines() or ["it said nothing"])[-1]
        killed = " (killed, perhaps for lack of memory)" if code == -9 else ""
        return f"process ended with code {code}{killed}: {last}"

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()
        self._compiled.cleanup()


def _environment(compiled: str) -> dict[str, str]:
    """This process's own, with the examples and the package that it imports on the path, and a folder for kernels."""
    package = Path(green_swin_hf.__file__).resolve().parents[1]
    inherited = [os.path.abspath(path) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    paths = os.pathsep.join([str(EXAMPLES), str(package), *inherited])
    own = {"PYTHONPATH": paths, "TRANSFORMERS_VERBOSITY": "error", "TORCHINDUCTOR_CACHE_DIR": compiled}
    return {**os.environ, **own}


start_worker: Callable[[Contender], Worker] = WorkerProcess


def round_order(names: Sequence[str], round_index: int) -> list[str]:
    """The order of one round: rotated from round to round, and backwards in every other turn.

    So each contender stands at each place equally often.

    >>> ["".join(round_order("ABC", index)) for index in range(4)]
    ['ABC', 'BCA', 'CAB', 'CBA']
    """
    turn, first = divmod(round_index, len(names))
    order = [*names[first:], *names[:first]]
    return order[::-1] if turn % 2 else order


@dataclasses.dataclass
class Measurement:
    """What one contender did.

    Attributes:
        description: sizes of the model.
        warmup, rounds: the answers of each round, in their order.
        after: the answers to what was asked once behind the rounds, merged.
        failure: why there is nothing more; empty if all went well.
    """

    contender: Contender
    description: Reply = dataclasses.field(default_factory=dict)
    warmup: list[Reply] = dataclasses.field(default_factory=list)
    rounds: list[Reply] = dataclasses.field(default_factory=list)
    after: Reply = dataclasses.field(default_factory=dict)
    failure: str = ""

    def values(self, key: str) -> list[float]:
        return [reply[key] for reply in self.rounds]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"label": self.contender.label}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How often and in what rhythm steps are taken: rounds, untimed rounds before them, seconds of pause per step."""

    rounds: int = 7
    warmup: int = 2
    pause: float = 0.3


def measure_interleaved(
    contenders: Sequence[Contender],
    schedule: Schedule,
    *,
    action: str = "step",
    before: Sequence[Reply] = (),
    after: Sequence[Reply] = (),
    title: str = "",
) -> list[Measurement]:
    """Run all contenders at once and let them step in turn; one that fails is left out from there on.

    Args:
        action: the request of every round.
        before, after: requests made once, behind the warm-up and behind the last round.
        title: of the progress bar.
    """
    measurements = [Measurement(contender) for contender in contenders]
    workers: list[Worker] = []
    total = len(contenders) * (1 + schedule.warmup + schedule.rounds + len(before) + len(after))
    with tqdm(total=total, desc=title, unit="request", leave=False) as progress:
        try:
            for contender in contenders:
                workers.append(start_worker(contender))
            _run(measurements, workers, schedule, action, before, after, progress)
        finally:
            for worker in workers:
                worker.close()
    return measurements


def _run(
    measurements: list[Measurement],
    workers: list[Worker],
    schedule: Schedule,
    action: str,
    before: Sequence[Reply],
    after: Sequence[Reply],
    progress: Any,
) -> None:
    def each(function: Callable[[Measurement, Worker], None], round_index: int = 0) -> None:
        order = round_order([str(index) for index in range(len(workers))], round_index)
        for index in map(int, order):
            if not measurements[index].failure:
                try:
                    function(measurements[index], workers[index])
                except WorkerFailed as failed:
                    measurements[index].failure = str(failed)
            progress.update()

    def get_ready(measurement: Measurement, worker: Worker) -> None:
        worker.wait_until_ready()
        measurement.description = worker.description

    def take_turn(replies: str, request: Reply) -> Callable[[Measurement, Worker], None]:
        def turn(measurement: Measurement, worker: Worker) -> None:
            time.sleep(schedule.pause)
            getattr(measurement, replies).append(worker.ask(**request))

        return turn

    def ask_once(request: Reply) -> Callable[[Measurement, Worker], None]:
        return lambda measurement, worker: measurement.after.update(worker.ask(**request))

    each(get_ready)
    for index in range(schedule.warmup):
        each(take_turn("warmup", {"do": "step"}), index)
    for request in before:
        each(ask_once(request))
    for index in range(schedule.rounds):
        each(take_turn("rounds", {"do": action}), index)
    for request in after:
        each(ask_once(request))
