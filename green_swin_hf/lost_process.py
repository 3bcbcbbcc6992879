"""What is left to do when another process of a distributed run is gone: say so, and end."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from accelerate import PartialState
from torch.distributed import DistError

# gloo raises plain RuntimeErrors; these words are in those of a connection that broke, and of one that timed out.
_GLOO_WORDS = ("gloo", "Connection closed by peer", "Connection reset by peer", "Timed out waiting")


def is_lost_peer(error: RuntimeError, state: PartialState) -> bool:
    """Whether an error of a collective operation means that another process of the run died or does not answer.

    Args:
        error: what the operation raised.
        state: of the processes.
    """
    if state.num_processes == 1:
        return False
    return isinstance(error, DistError) or any(word in str(error) for word in _GLOO_WORDS)


def end_without_peers(message: str) -> NoReturn:
    """Print a message on stderr and end this process with code 1, at once.

    The interpreter's own end would wait for the processes that are gone.
    """
    print(message, file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(1)


__all__ = ["end_without_peers", "is_lost_peer"]
