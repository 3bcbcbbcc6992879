"""Knowing which sample a loader's worker was on when it died or hung, and ending what hangs.

A worker notes what it is on in memory that it shares with the training process: a few stores for each sample. A thread
of the training process looks at the notes and kills a worker that has been on one sample for too long. The `timeout` of
`DataLoader` is not enough: it does not hold while a batch is being received, for which the worker must answer.

PyTorch's handler of SIGCHLD raises in the training process wherever that is when a worker dies: in the middle of the
writing of a checkpoint, or where no `except` can catch it. Here the end of a watched worker waits for the next batch.
"""

from __future__ import annotations

import contextlib
import copy
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.context import BaseContext
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .stop_signals import SIGNALS

_PROCESS, _KEY, _SINCE = range(3)
_BETWEEN = -1  # a key that is none: between two samples
_JOIN_SECONDS = 5
_CLOSING_SECONDS = 0.5
_LATE_SECONDS = 2  # by which a busy machine may wake the watching thread too late
_BATCH_FACTOR = 10  # a batch of slow images may take longer than one image


class LoaderError(RuntimeError):
    """A worker of the loader died or hangs; the text says on which sample, and for how long."""


class _WorkerNotes:
    """Process id, key in hand and when it was taken, of every worker of a loader, in shared memory."""

    def __init__(self, num_workers: int):
        self._memory = torch.tensor([[0, _BETWEEN, 0]] * max(1, num_workers)).share_memory_()
        self._open()

    def _open(self) -> None:
        self._rows = self._memory.numpy()  # stores into it take a tenth of the time of stores into the tensor
        self._row: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = state["_memory"]
        self._open()

    def begin(self, worker_id: int) -> None:
        """Called in a worker before all else: note its process, and leave signals to the training process.

        A queue signals every process of a job, and the training process still needs this one's batches. It also ends
        it, and a worker whose training process is gone ends by itself.
        """
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self._row = self._rows[worker_id]
        self.leave()
        self._row[_PROCESS] = os.getpid()

    def take(self, key: int) -> None:
        """Note that this worker begins with a sample."""
        assert self._row is not None
        self._row[_SINCE] = time.monotonic_ns()
        self._row[_KEY] = key

    def leave(self) -> None:
        """Note that this worker has given its sample."""
        assert self._row is not None
        self._row[_KEY] = _BETWEEN

    def rows(self) -> list[tuple[int, int, int]]:
        """Of each worker: process (0: it has not begun), key in hand or -1, clock when it took it."""
        return [tuple(row) for row in self._rows.tolist()]


class _DoneFlag:
    """What `DataLoader` needs of `multiprocessing.Event`, without its lock.

    A worker that is killed while it holds the lock keeps it for ever, and the training process would wait for it when
    it ends the loader.
    """

    def __init__(self) -> None:
        self._memory = torch.zeros(1, dtype=torch.bool).share_memory_()

    def set(self) -> None:
        self._memory.fill_(True)

    def is_set(self) -> bool:
        return bool(self._memory)


def _context_with_flags() -> BaseContext:
    """That of this process, with `_DoneFlag` in the place of events."""
    context: Any = copy.copy(multiprocessing.get_context())
    context.Event = _DoneFlag
    return context


class _NotedImages(Dataset[Any]):
    """A map-style data set whose workers note the key that they are on."""

    def __init__(self, images: Any, notes: _WorkerNotes):
        self.images, self.notes = images, notes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: int) -> Any:
        self.notes.take(key)
        sample = self.images[key]  # after an error the note stays: the worker is on it
        self.notes.leave()
        return sample


class _NotedStream(IterableDataset[Any]):
    """A stream whose workers note how many samples they have given."""

    def __init__(self, stream: Any, notes: _WorkerNotes):
        self.stream, self.notes = stream, notes

    def __iter__(self) -> Iterator[Any]:
        # Before the first sample a stream is opened and its shuffle buffer filled, which takes as long as it takes.
        for number, sample in enumerate(self.stream, start=1):
            self.notes.leave()
            yield sample
            self.notes.take(number)
        self.notes.leave()


class LoaderWatch:
    """A loader whose workers are watched.

    Args:
        images: a map-style data set with `describe(key)`, or a stream.
        num_workers: of the loader; without any there is nobody to watch.
        timeout: seconds on one sample after which a worker counts as hung (seen within a second more). Ten times as
            long without a batch ends the loader, too, for what hangs outside of samples. 0: no limit.
        options: of `DataLoader`, but for `worker_init_fn` and `multiprocessing_context`.

    Attributes:
        loader: the `DataLoader`.
    """

    def __init__(self, images: Any, *, num_workers: int, timeout: float, **options: Any):
        self.images = images
        self.timeout = timeout if num_workers else 0
        self._notes = _WorkerNotes(num_workers)
        self._workers: dict[int, Any] = {}
        self._hung: tuple[int, int, int] | None = None
        self._is_over = threading.Event()
        self._is_waiting = self._has_child_ended = False
        self._handler: Any = None  # PyTorch's, while ours is in its place
        self._told: str | None = None
        if num_workers:
            noted = _NotedStream if isinstance(images, IterableDataset) else _NotedImages
            images = noted(images, self._notes)
            options |= {"worker_init_fn": self._notes.begin, "multiprocessing_context": _context_with_flags()}
        self.loader: DataLoader[Any] = DataLoader(
            images, num_workers=num_workers, timeout=_BATCH_FACTOR * self.timeout, **options
        )

    def __iter__(self) -> Iterator[Any]:
        """One pass of the loader, to be made within `explained`."""
        others = {child.pid for child in multiprocessing.active_children()}
        batches = iter(self.loader)  # starts the workers, before the thread
        started = [child for child in multiprocessing.active_children() if child.pid not in others]
        self._workers = {child.pid: child for child in started if child.pid}
        is_heard = threading.current_thread() is threading.main_thread() and hasattr(os, "waitid")  # Unix
        if self._workers and self._handler is None and is_heard:
            self._handler = signal.signal(signal.SIGCHLD, self._hear_child)
        if self.timeout:
            threading.Thread(target=self._look, daemon=True).start()
        return self._wait_for(batches)

    def _wait_for(self, batches: Iterator[Any]) -> Iterator[Any]:
        while True:
            try:
                self._is_waiting = True
                if self._has_child_ended and self._dead_workers():  # since the last batch
                    raise RuntimeError("DataLoader worker is gone")
                batch = next(batches)
            except StopIteration:
                return
            finally:
                self._is_waiting = False
            yield batch

    def _hear_child(self, number: int, frame: FrameType | None) -> None:
        """A child of this process has ended, perhaps a worker, perhaps one of another loader."""
        self._has_child_ended = True
        is_heard = self._is_waiting or not any(map(_has_failed, self._workers))
        if is_heard and not self._is_over.is_set():
            self._ask_handler(number, frame)

    def _ask_handler(self, number: int, frame: FrameType | None) -> None:
        """Let PyTorch raise a `RuntimeError` where a worker of any loader died, which it does once for a loader.

        What it says is noted: raised in a `__del__`, it would be lost.
        """
        try:
            if callable(self._handler):
                self._handler(number, frame)
        except RuntimeError as error:
            self._told = _one_line(error)
            raise

    def _look(self) -> None:
        """Kill a worker that has been on one sample for too long, which ends the loader."""
        between = min(1, self.timeout / 4)
        looked = resumed = time.monotonic_ns()
        while not self._is_over.wait(between):
            now = time.monotonic_ns()
            if now - looked > (between + _LATE_SECONDS) * 1e9:  # all were stopped, and the clock was not
                resumed = now
            looked, since = now, now - self.timeout * 1e9
            rows = self._notes.rows() if resumed < since else []
            hung = next((row for row in rows if row[_KEY] != _BETWEEN and row[_SINCE] < since), None)
            if hung:
                self._hung = hung
                self._workers[hung[_PROCESS]].kill()  # not joined: torch's handler in the main thread looks for its end
                return

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within it the end of a worker is a `LoaderError` that names its sample; after it no worker is left.

        It shows when the next batch is waited for, and may be wrapped in other errors.
        """
        try:
            yield
        except Exception as error:
            self._is_over.set()
            reason = self._explain(error)
            if reason is None:
                raise
            raise LoaderError(reason) from error
        finally:
            self._is_waiting = False
            self._is_over.set()
            try:
                self._end_workers()
            finally:
                if self._handler is not None:
                    signal.signal(signal.SIGCHLD, self._handler)
                    self._handler = None

    def _explain(self, error: Exception) -> str | None:
        """What befell a worker, in words; None where all are well."""
        is_ours = self._hung and self._workers[self._hung[_PROCESS]].exitcode in (None, -signal.SIGKILL)
        if self._hung and is_ours:  # and it was not crashing meanwhile
            return f"a loader worker hung and was ended: {self._describe(self._hung)} (worker_timeout {self.timeout:g})"
        dead, tells_of_one = self._dead_workers(), str(error).startswith("DataLoader worker")
        is_of_connection = isinstance(error, OSError | EOFError)
        if not dead and (tells_of_one or is_of_connection):
            time.sleep(_CLOSING_SECONDS)  # its connections close a moment before it is gone
            dead = self._dead_workers()
        if dead:
            ends = ", ".join(sorted({_how(self._workers[pid].exitcode) for pid in dead}))
            on = [row for row in self._notes.rows() if row[_PROCESS] in dead and row[_KEY] != _BETWEEN]
            return f"a loader worker died ({ends}): {'; '.join(map(self._describe, on)) or 'between two images'}"
        if str(error).startswith("DataLoader timed out"):
            seconds = _BATCH_FACTOR * self.timeout
            return f"no batch came for {seconds:g} seconds ({_BATCH_FACTOR} x worker_timeout); no image took long"
        if tells_of_one:  # of another loader
            return _one_line(error)
        if not is_of_connection:
            return None
        with contextlib.suppress(RuntimeError):
            self._ask_handler(signal.SIGCHLD, None)
        return self._told

    def _dead_workers(self) -> list[int]:
        """Those that did not end by themselves, as that of an empty share of a stream does."""
        return [pid for pid, worker in self._workers.items() if not worker.is_alive() and worker.exitcode != 0]

    def _describe(self, row: tuple[int, int, int]) -> str:
        process, key, since = row
        seconds = (time.monotonic_ns() - since) / 1e9
        if isinstance(self.images, IterableDataset):
            place = f"the image after the first {key} of its share of the stream"
        else:
            place = f"{self.images.describe(key)} (key {key})"
        return f"process {process} was on {place}, taken {seconds:.0f} seconds before"

    def _end_workers(self) -> None:
        """Kill those that are still there: what hangs hears nothing else, and this process would wait for it."""
        for worker in self._workers.values():
            worker.kill()
            worker.join(_JOIN_SECONDS)


def _has_failed(pid: int) -> bool:
    """Whether a child is dead, not by its own will, and nobody has asked for its exit code; asking here leaves it."""
    try:
        end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return end is not None and (end.si_code, end.si_status) != (os.CLD_EXITED, 0)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _how(exit_code: int | None) -> str:
    if exit_code is None or exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}: perhaps memory ran out" if name == "SIGKILL" else name


__all__ = ["LoaderError", "LoaderWatch"]
