"""Finished rows of a study: one JSON line each, kept as soon as it is there and never measured again."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class KeptRows:
    """The lines of a file, each named by the values of some of its keys.

    Args:
        keys: every row has them.
        optional_keys: a row may have them too; None where it does not.

    Raises:
        ValueError: a line is damaged, other than a last one that was cut off.
    """

    def __init__(self, path: Path, keys: Sequence[str], optional_keys: Sequence[str] = ()):
        self.path, self._keys, self._optional_keys = path, tuple(keys), tuple(optional_keys)
        self._rows: dict[tuple[Any, ...], Row] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # an interrupted write: the row is measured again
                self._cut_last_line(line)
                break
            try:
                row = json.loads(line)
                self._rows[self._name(row)] = row
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number} is damaged; delete that line") from None

    def _cut_last_line(self, line: str) -> None:
        os.truncate(self.path, self.path.stat().st_size - len(line.encode()))

    def _name(self, row: Row) -> tuple[Any, ...]:
        return (*(row[key] for key in self._keys), *(row.get(key) for key in self._optional_keys))

    def get(self, name: Row) -> Row | None:
        """The row with these values of the keys; other values in `name` do not matter."""
        return self._rows.get(self._name(name))

    def add(self, row: Row) -> Row:
        """Keep a finished row, on the disk as well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[self._name(row)] = row
        return row

    def all(self) -> list[Row]:
        return list(self._rows.values())

    def of_kind(self, kind: str) -> list[Row]:
        return [row for row in self._rows.values() if row["kind"] == kind]
