"""Knowing which sample a loader's worker was on when it died, or while it hangs.

A worker notes what it is on in memory that it shares with the training process: a few stores for each sample. When the
loader gives up, because a worker died (at once) or because no batch came for so long (`timeout` of `DataLoader`), the
notes say where it was.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

_PROCESS, _KEY, _SINCE = range(3)
_BETWEEN = -1  # a key that is none: between two samples
_JOIN_SECONDS = 5


class LoaderError(RuntimeError):
    """A worker of the loader died or hangs; the text says on which sample, and for how long."""


class _WorkerNotes:
    """Process id, key in hand and when it was taken, of every worker of a loader, in shared memory."""

    def __init__(self, num_workers: int):
        self._memory = torch.zeros(max(1, num_workers), 3, dtype=torch.int64).share_memory_()
        self._open()

    def _open(self) -> None:
        self._rows = self._memory.numpy()  # stores into it take a tenth of the time of stores into the tensor
        self._row: np.ndarray | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = state["_memory"]
        self._open()

    def take(self, key: int) -> None:
        """Note that this worker begins with a sample."""
        if self._row is None:
            worker = get_worker_info()
            self._row = self._rows[worker.id if worker else 0]
            self._row[_PROCESS] = os.getpid()
        self._row[_KEY] = _BETWEEN  # never a new key with an old time
        self._row[_SINCE] = time.monotonic_ns()
        self._row[_KEY] = key

    def leave(self) -> None:
        """Note that this worker has given its sample."""
        if self._row is not None:
            self._row[_KEY] = _BETWEEN

    def rows(self) -> list[list[int]]:
        return self._rows.tolist()


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
        self.notes.take(0)
        for number, sample in enumerate(self.stream, start=1):
            self.notes.leave()
            yield sample
            self.notes.take(number)
        self.notes.leave()


class LoaderWatch:
    """A loader whose workers are watched, and the words for what befell them.

    Args:
        images: a map-style data set with `describe(key)`, or a stream.
        num_workers: of the loader; without any there is nobody to watch.
        timeout: seconds without a batch after which a worker counts as hung; 0 waits for ever.
        options: of `DataLoader`.

    Attributes:
        loader: the `DataLoader`.
    """

    def __init__(self, images: Any, *, num_workers: int, timeout: float, **options: Any):
        self.images = images
        self.timeout = timeout if num_workers else 0
        self._notes = _WorkerNotes(num_workers)
        noted = _NotedStream if isinstance(images, IterableDataset) else _NotedImages
        watched: Any = noted(images, self._notes) if num_workers else images
        self.loader: DataLoader[Any] = DataLoader(watched, num_workers=num_workers, timeout=self.timeout, **options)

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Within it the end of a worker is a `LoaderError` that names its sample; what hangs is ended.

        It can come at any moment, not only while a batch is waited for.
        """
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader "):  # how torch begins all that it says of its workers
                raise
            message = self._explain(error)
            self._end_workers()
            raise LoaderError(message) from error

    def _explain(self, error: RuntimeError) -> str:
        running = {child.pid for child in multiprocessing.active_children()}
        in_hand = [row for row in self._notes.rows() if row[_PROCESS] and row[_KEY] != _BETWEEN]
        dead = [row for row in in_hand if row[_PROCESS] not in running]
        if "timed out" in str(error):
            longest = sorted((row for row in in_hand if row not in dead), key=lambda row: row[_SINCE])[:1]
            where = self._describe(longest) or "no worker has a sample in hand"
            return f"a loader worker hangs: no batch came for {self.timeout:g} seconds (worker_timeout); {where}"
        where = self._describe(dead) or "between two samples"
        return f"a loader worker died: {_first_sentence(error)}; it was on: {where}"

    def _describe(self, rows: list[list[int]]) -> str:
        return "; ".join(
            f"process {process} on {self._name(key)}, for {(time.monotonic_ns() - since) / 1e9:.0f} seconds"
            for process, key, since in rows
        )

    def _name(self, key: int) -> str:
        if isinstance(self.images, IterableDataset):
            return f"the image after {key} of its share of the stream"
        return f"{self.images.describe(key)} (key {key})"

    def _end_workers(self) -> None:
        """Kill what still has a sample in hand: a process that waits for a file may not hear a gentler signal."""
        stuck = {row[_PROCESS] for row in self._notes.rows() if row[_KEY] != _BETWEEN}
        for child in multiprocessing.active_children():
            if child.pid in stuck:
                with contextlib.suppress(RuntimeError):  # torch's handler tells of this end, too
                    child.kill()
                with contextlib.suppress(RuntimeError):
                    child.join(_JOIN_SECONDS)


def _first_sentence(error: RuntimeError) -> str:
    return " ".join(str(error).split()).split(". ")[0].rstrip(".")


__all__ = ["LoaderError", "LoaderWatch"]
