"""Finished cells of the study, and the best of several fine-tunings."""

from __future__ import annotations

from pathlib import Path

from kept_rows import KeptRows, Row

Cell = Row
KEYS, OPTIONAL_KEYS = ("kind", "arm", "seed"), ("budget", "learning_rate")


class Cells(KeptRows):
    """Cells of a file, see `KeptRows`."""

    def __init__(self, path: Path):
        super().__init__(path, KEYS, OPTIONAL_KEYS)

    def find(
        self, kind: str, arm: str, seed: int, budget: float | None = None, learning_rate: float | None = None
    ) -> Cell | None:
        return self.get({"kind": kind, "arm": arm, "seed": seed, "budget": budget, "learning_rate": learning_rate})

    def best_finetuning(self, arm: str, seed: int, budget: float) -> Cell | None:
        """Of the fine-tunings with several learning rates the one that is best on validation images."""
        place = (arm, seed, budget)
        tried = [cell for cell in self.of_kind("finetune") if (cell["arm"], cell["seed"], cell["budget"]) == place]
        return max(tried, key=lambda cell: cell["validation"], default=None)

    def chosen_finetunings(self) -> list[Cell]:
        """`best_finetuning` of every arm, seed and budget that has any."""
        places = dict.fromkeys((cell["arm"], cell["seed"], cell["budget"]) for cell in self.of_kind("finetune"))
        return [cell for place in places if (cell := self.best_finetuning(*place))]
