"""Ctrl-C in a study: one line and an exit code of its own, for what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable

INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT


def until_interrupted(work: Callable[[], int], kept: Callable[[], str]) -> int:
    """The exit code of `work`, or `INTERRUPTED` with one line where Ctrl-C ends it.

    Args:
        kept: says at that moment what is kept, without a full stop.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\nStopped. {kept()}; the same command goes on.", flush=True)
        return INTERRUPTED
