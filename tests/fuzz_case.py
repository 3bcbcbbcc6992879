"""What a fuzz target is, and what it may do with a case: a correct result, or a `ValueError` of one line."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

ACCEPTED, REFUSED = "accepted", "refused"
LONGEST_MESSAGE = 1000


class Choices:
    """What a case is made of; subclasses say where numbers come from."""

    def integer(self, low: int, high: int) -> int:
        raise NotImplementedError

    def of(self, options: Sequence[Any]) -> Any:
        return options[self.integer(0, len(options) - 1)]

    def one_in(self, count: int) -> bool:
        return self.integer(0, count - 1) == 0

    def text(self, longest: int) -> str:
        ranges = ((32, 126), (32, 126), (0, 0xFF), (0x100, 0xFFFF), (0x10000, 0x10FFFF))
        return "".join(chr(self.integer(*self.of(ranges))) for _ in range(self.integer(0, longest)))


class RandomChoices(Choices):
    """Cheap: microseconds for each."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)

    def integer(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


class HypothesisChoices(Choices):
    """Slow, and shrinks what fails."""

    def __init__(self, draw: Any):
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))


class BytesChoices(Choices):
    """From the bytes that a coverage-guided fuzzer changes; zeros when they are used up."""

    def __init__(self, data: bytes):
        self._data, self._place = data, 0

    def integer(self, low: int, high: int) -> int:
        count = ((high - low).bit_length() + 7) // 8
        taken = self._data[self._place : self._place + count]
        self._place += count
        return low + int.from_bytes(taken, "little") % (high - low + 1)


@dataclass(frozen=True)
class Target:
    """One thing that is fuzzed.

    Attributes:
        name: as `--target` takes it.
        draw: makes a case of choices; it is made of what JSON holds, so that it can be saved and repeated.
        check: runs a case and returns `ACCEPTED` or `REFUSED`; raises anything for a finding.
    """

    name: str
    draw: Callable[[Choices], Any]
    check: Callable[[Any], str]


def attempt(function: Callable[..., Any], *arguments: Any) -> tuple[Any, ValueError | None]:
    """What a call returns, or the `ValueError` that it raises."""
    try:
        return function(*arguments), None
    except ValueError as error:
        return None, error


def refused(error: ValueError, names: Iterable[str]) -> str:
    """`REFUSED` where the message of an error is one line and holds one of `names`."""
    message = str(error)
    assert not {"\n", "\r"} & set(message), f"a message of several lines: {message[:300]!r}"
    assert len(message) <= LONGEST_MESSAGE, f"a message of {len(message)} characters: {message[:200]!r}…"
    wanted = list(names)
    assert any(name in message for name in wanted), f"a message that names none of {wanted}: {message!r}"
    return REFUSED
