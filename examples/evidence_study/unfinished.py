"""A training under way: its state, written every few minutes, so that an interruption costs minutes and not hours."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

KEPT_EVERY = 300.0  # seconds

State = dict[str, Any]


class Unfinished:
    """The file with the state of one training; what is in it decides every number that the training gives.

    Args:
        path: of the file. It is written whole or not at all.
        title: of the training, for the line that says that it goes on.
        every: seconds between two writings.
    """

    def __init__(self, path: Path, title: str, every: float = KEPT_EVERY):
        self.path, self.title, self.every = path, title, every
        self._since = time.monotonic()

    def load(self) -> State | None:
        """The state that was kept last, on the CPU; None where there is none."""
        if not self.path.is_file():
            return None
        state: State = torch.load(self.path, map_location="cpu", weights_only=True)
        print(f"  going on with {self.title} after {state['step']:,} updates", flush=True)
        return state

    def keep(self, make_state: Callable[[], State]) -> None:
        """Write the state if it is time to; it has a key "step", the updates done.

        Where it cannot be written, one line says so and the training goes on.
        """
        if time.monotonic() - self._since < self.every:
            return
        partial = Path(f"{self.path}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(make_state(), partial)
            os.replace(partial, self.path)
        except (OSError, RuntimeError) as error:  # RuntimeError: PyTorch's, where the disk is full
            print(f"  {self.title} goes on without its state being kept: {str(error).splitlines()[0]}", flush=True)
            with contextlib.suppress(OSError):
                partial.unlink()
        self._since = time.monotonic()

    def remove(self) -> None:
        """The training is finished and its numbers are kept."""
        self.path.unlink(missing_ok=True)
