"""What a fuzz target is, and what it may do with a case: a correct result, or a `ValueError` of one line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis.strategies import SearchStrategy

ACCEPTED, REFUSED = "accepted", "refused"
LONGEST_MESSAGE = 1000


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        name: as `--target` takes it.
        cases: draws a case, made of what JSON holds, so that it can be saved and repeated.
        check: runs a case and returns `ACCEPTED` or `REFUSED`; raises anything for a finding.
        share: of all cases.
    """

    name: str
    cases: SearchStrategy[Any]
    check: Callable[[Any], str]
    share: float


def refused(error: ValueError, names: Iterable[str]) -> str:
    """`REFUSED` where the message of an error is one line and holds one of `names`."""
    message = str(error)
    assert "\n" not in message and "\r" not in message, f"a message of several lines: {message[:300]!r}"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]!r}…"
    wanted = list(names)
    assert any(name in message for name in wanted), f"a message that names none of {wanted}: {message!r}"
    return REFUSED
