"""A training under way: its state, written every few minutes, so that an interruption costs minutes and not hours."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from green_swin_hf.checkpointing import replace_files

KEPT_EVERY = 300.0  # seconds
_FILE = "state.pt"

State = dict[str, Any]


class Unfinished:
    """The folder with the state of one training, which is replaced whole or not at all.

    Args:
        folder: of this training alone; made with the first state.
        title: of the training, for the lines that are printed.
        every: seconds between two states.
    """

    def __init__(self, folder: Path, title: str, every: float = KEPT_EVERY):
        self.folder, self.title, self.every = folder, title, every
        self._since = time.monotonic()

    def load(self, identity: State) -> State | None:
        """The state that was kept last, on the CPU; None where there is none of a training with this identity."""
        path = self.folder / _FILE
        if not path.is_file():
            return None
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            is_same, state = kept["identity"] == identity, kept["state"]
        except Exception as error:  # whatever a damaged file leads to
            print(f"  {path} cannot be read ({type(error).__name__}); {self.title} starts anew", flush=True)
            return None
        if not is_same:
            print(f"  {path} is of other weights, images or settings; {self.title} starts anew", flush=True)
            return None
        print(f"  going on with {self.title} after {state['step']:,} updates", flush=True)
        return state

    def keep(self, identity: State, make_state: Callable[[], State]) -> None:
        """Write the state if it is time to; it has a key "step", the updates done.

        Where it cannot be written, one line says so and the training goes on.
        """
        if time.monotonic() - self._since < self.every:
            return
        kept = {"identity": identity, "state": make_state()}
        try:
            replace_files(self.folder, lambda aside: torch.save(kept, aside / _FILE), last=_FILE)
        except OSError as error:
            print(f"  {self.title} goes on and its state is not kept: {error}", flush=True)
        self._since = time.monotonic()

    def remove(self) -> None:
        """The training is finished and its numbers are kept."""
        shutil.rmtree(self.folder, ignore_errors=True)


def identity_of(model: nn.Module, images: Tensor, device: torch.device, **settings: float) -> State:
    """What must be the same where a training goes on: weights at its start, images, machine and settings.

    Device and threads change no number but the time, which decides the epochs of other arms.
    """
    digest = hashlib.sha256(_bytes_of(images))
    for name, weights in model.state_dict().items():
        digest.update(name.encode())
        digest.update(_bytes_of(weights))
    return {"start": digest.hexdigest(), "device": device.type, "threads": torch.get_num_threads(), **settings}


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
