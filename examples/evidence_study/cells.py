"""Finished cells of a study: one JSON line each, kept as soon as it is there and never computed again."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

Cell = dict[str, Any]
KEYS = ("kind", "arm", "seed", "budget", "learning_rate")


class Cells:
    """The lines of a file. A cell is named by `KEYS`, None where it has none.

    Raises:
        ValueError: a line is damaged, other than a last one that was cut off.
    """

    def __init__(self, path: Path):
        self.path = path
        self._cells: dict[tuple[Any, ...], Cell] = {}
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        for number, line in enumerate(lines, start=1):
            if not line.endswith("\n"):  # an interrupted write: the cell is computed again
                self._cut_last_line(line)
                break
            try:
                cell = json.loads(line)
                self._cells[_name(cell)] = cell
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{path}, line {number} is damaged; delete that line") from None

    def _cut_last_line(self, line: str) -> None:
        os.truncate(self.path, self.path.stat().st_size - len(line.encode()))

    def find(
        self, kind: str, arm: str, seed: int, budget: float | None = None, learning_rate: float | None = None
    ) -> Cell | None:
        return self._cells.get((kind, arm, seed, budget, learning_rate))

    def add(self, cell: Cell) -> Cell:
        """Keep a finished cell, on the disk as well."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(cell) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._cells[_name(cell)] = cell
        return cell

    def best_finetuning(self, arm: str, seed: int, budget: float) -> Cell | None:
        """Of the fine-tunings with several learning rates the one that is best on validation images."""
        place = (arm, seed, budget)
        tried = [cell for cell in self.of_kind("finetune") if (cell["arm"], cell["seed"], cell["budget"]) == place]
        return max(tried, key=lambda cell: cell["validation"], default=None)

    def chosen_finetunings(self) -> list[Cell]:
        """`best_finetuning` of every arm, seed and budget that has any."""
        places = dict.fromkeys((cell["arm"], cell["seed"], cell["budget"]) for cell in self.of_kind("finetune"))
        return [cell for place in places if (cell := self.best_finetuning(*place))]

    def of_kind(self, kind: str) -> list[Cell]:
        return [cell for cell in self.all() if cell["kind"] == kind]

    def all(self) -> list[Cell]:
        return list(self._cells.values())


def _name(cell: Cell) -> tuple[Any, ...]:
    kind, arm, seed, *rest = KEYS
    return (cell[kind], cell[arm], cell[seed], *(cell.get(key) for key in rest))
