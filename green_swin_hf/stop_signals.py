"""Ending a run on a signal (a queue's time limit, Ctrl-C) after the update in hand, so that it is saved first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import reduce

# SIGUSR1 is what Slurm sends ahead of its limit (`sbatch --signal=USR1@120`); Windows has none.
SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]

_open = 0  # `StopSignals` that are entered


def _leave_group() -> None:
    """In a worker process that was forked within `StopSignals`: do not get the signals of the process group.

    Launchers and terminals signal the whole group. A loader's worker ends on SIGTERM, whatever Python's handler says,
    and the process that was to finish its update and save fails for want of it.
    """
    if _open:
        os.setpgid(0, 0)


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_leave_group)


class StopSignals:
    """Within it SIGTERM, SIGUSR1 and the first Ctrl-C (SIGINT) are only noted; the second Ctrl-C interrupts.

    Worker processes that are forked within it do not get signals to the group of this one, which still needs their
    batches. Those of a `LoaderWatch` pay no heed to signals to themselves either.

    Attributes:
        received: name of the signal that came; None while there was none.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        global _open
        _open += 1
        if threading.current_thread() is threading.main_thread():  # only there may a handler be set
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _open
        _open -= 1
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, self._before[number])

    def agreed(self, state: PartialState) -> bool:
        """Whether any process of the run got a signal; all processes ask at the same update and get one answer."""
        if state.num_processes == 1:
            return self.received is not None
        noted = torch.tensor(float(self.received is not None), device=state.device)
        if reduce(noted, "sum").item() > 0 and self.received is None:
            self.received = "a signal to another process"
        return self.received is not None


__all__ = ["SIGNALS", "StopSignals"]
