"""What runs with transformers' `Trainer` share: their checkpoints, their progress, and going on with them."""

from __future__ import annotations

import contextlib
import json
import os
import re
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerState

from .checkpointing import (
    CHECKSUMS,
    CheckpointFormat,
    find_wrong_file,
    load_weights,
    newest_checkpoint,
    write_checksums,
)
from .recipe_files import RecipeFile, RecipeT, load_recipe
from .run_setup import RECIPE_FILE, check_changes, how_to_go_on, process_state, progress_bar, read_recipe
from .stop_signals import StopSignals
from .training import last_line

_NAME = re.compile(r"checkpoint-(\d+)")
_FILES = ("trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt")
_FACTS = "data_facts.json"  # in a checkpoint: what its run was trained on


def list_trainer_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of `Trainer` in `folder`, oldest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def find_trainer_damage(checkpoint: Path) -> str | None:
    """What is missing in a checkpoint that `Trainer` wrote, or changed since; None for a whole one."""
    missing = [name for name in _FILES if not (checkpoint / name).is_file()]
    if count_processes(checkpoint) == 0:
        missing.append("rng_state.pth")
    if missing:
        return f"{', '.join(missing)} is missing"
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())  # written last
    except (OSError, ValueError):
        return "trainer_state.json cannot be read"
    # `Trainer` writes in place, and the checksums come after: a run that was killed in between left a whole checkpoint.
    return find_wrong_file(checkpoint) if (checkpoint / CHECKSUMS).is_file() else None


TRAINER_FORMAT = CheckpointFormat(list_trainer_checkpoints, find_trainer_damage)


def count_processes(checkpoint: Path) -> int:
    """Processes of the run that wrote a checkpoint: each keeps the state of its random generators."""
    return len(list(checkpoint.glob("rng_state*.pth")))


def read_trainer_recipe(
    arguments: Namespace, kind: type[RecipeT], output: Path, default: Path, checkpoint: Path | None
) -> RecipeT:
    """`read_recipe` for a run that goes on from a checkpoint of `Trainer` or is new.

    Raises:
        ValueError: as `read_recipe`; the run would go on with other settings, or with another number of processes.
    """
    before = load_recipe(checkpoint.resolve().parents[1] / RECIPE_FILE, kind) if checkpoint else None
    recipe = read_recipe(arguments, kind, output, default, before)
    facts = {"num_processes": (count_processes(checkpoint), process_state().num_processes)} if checkpoint else {}
    check_changes(before, recipe, facts)
    return recipe


def check_facts(checkpoint: Path | None, recipe: RecipeFile, facts: Mapping[str, Any]) -> None:
    """Refuse to go on from a checkpoint of `ResumableTrainer` with other data than it was trained on.

    Args:
        checkpoint: None for a new run. One without facts, as earlier versions wrote them, is taken as it is.
        recipe: of the run.
        facts: of the data now, for `ResumableTrainer`.

    Raises:
        ValueError: they differ from those of the checkpoint, or these cannot be read.
    """
    if checkpoint is None or not (checkpoint / _FACTS).is_file():
        return
    try:
        before = dict(json.loads((checkpoint / _FACTS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / _FACTS} cannot be read: {error}; go on from another checkpoint, or start a new run"
        ) from None
    pairs = {name: (before.get(name, value), value) for name, value in facts.items() if name != "class_names"}
    names = list(facts["class_names"])
    check_changes(recipe, recipe, {**_class_changes(before.get("class_names", names), names), **pairs})


def _class_changes(before: Sequence[str], now: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """What differs in the names of classes, of which there may be thousands: their number, or the first other name.

    >>> _class_changes(["cat", "dog"], ["cat", "fox"])
    {'class 1': ('dog', 'fox')}
    """
    if len(before) != len(now):
        return {"num_classes": (len(before), len(now))}
    differing = (number for number, (old, new) in enumerate(zip(before, now, strict=True)) if old != new)
    return {f"class {number}": (before[number], now[number]) for number in list(differing)[:1]}


class ResumableTrainer(Trainer):
    """`Trainer` whose checkpoints say what they were trained on, and which says so when one cannot be written.

    Args:
        facts: of the data, as JSON holds them, that stay what they are when the run is gone on with: `class_names`,
            and others by their names.
    """

    def __init__(self, *arguments: Any, facts: Mapping[str, Any] | None = None, **options: Any):
        super().__init__(*arguments, **options)
        self.facts = dict(facts or {})

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        try:
            if self.args.should_save and self.facts:  # first, so that no whole checkpoint is without them
                self._write_facts(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
            super()._save_checkpoint(model, trial)
        except Exception as error:  # writers of tensors raise their own kinds when the disk is full
            reason = " ".join(str(error).split())
            raise OSError(f"checkpoint {self.state.global_step} cannot be written: {reason}") from error

    def _write_facts(self, checkpoint: Path) -> None:
        checkpoint.mkdir(parents=True, exist_ok=True)
        partial = checkpoint / f"{_FACTS}.partial"
        partial.write_text(json.dumps(self.facts, indent=1), encoding="utf-8")
        os.replace(partial, checkpoint / _FACTS)


class TrainerProgress(TrainerCallback):
    """A progress bar with the newest loss, a line for each measurement, checksums, and a stop when asked or signalled.

    Args:
        describe: text for what an evaluation logged.
        stop_after: updates of this start of the run; None for all.
    """

    def __init__(self, describe: Callable[[dict[str, Any]], str], stop_after: int | None = None):
        self.describe = describe
        self.stop_after = stop_after
        self.signals = StopSignals()
        self.first_update = 0
        self.bar = progress_bar(0, 0, shown=False)

    def attach(self, trainer: Trainer) -> None:
        """Take the place of what `Trainer` itself shows."""
        for other in (PrinterCallback, ProgressCallback):
            trainer.remove_callback(other)
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.first_update = state.global_step
        self.bar = progress_bar(state.max_steps, state.global_step, shown=state.is_world_process_zero)

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)
        is_asked = self.stop_after is not None and state.global_step - self.first_update >= self.stop_after
        if self.signals.agreed(PartialState()) or is_asked:
            control.should_training_stop = True
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **others: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.4f}", "lr": f"{float(logs['learning_rate']):.2e}"}
            self.bar.set_postfix(shown, refresh=False)
        if "eval_loss" in logs and not self.bar.disable:
            self.bar.write(f"  epoch {state.epoch:.3g}: {self.describe(logs)}")

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.is_world_process_zero:  # the random states of the other processes may not be there yet
            write_checksums(Path(args.output_dir) / f"checkpoint-{state.global_step}", leave_out="rng_state*.pth")

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.close()

    def close(self) -> None:
        self.bar.close()

    @property
    def stop_reason(self) -> str:
        """Why the run ended before its last update, to be read after "Stopped"."""
        return f"on {self.signals.received}" if self.signals.received else "as asked"


def train(trainer: Trainer, checkpoint: Path | None, progress: TrainerProgress) -> None:
    """Train from the start or from a checkpoint, until the end or a signal, with `progress` attached to the trainer.

    Of a checkpoint after the last update the best weights are put back: `Trainer` by itself does one update more.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        if state.global_step >= trainer.args.max_steps:
            # The folder of the run may have moved since.
            best = checkpoint.parent / Path(state.best_model_checkpoint or checkpoint).name
            load_weights(trainer.accelerator.unwrap_model(trainer.model), best)
            trainer.state = state
            return
    with progress.signals:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


def describe_stop(error: Exception, output: Path, num_processes: int, *, is_saved: bool) -> str:
    """What ended a run, what of it is whole, and how it goes on: one line.

    Args:
        error: of a worker of a loader, too, whose text arrives with a traceback.
        output: output folder of the run.
        num_processes: of the run.
        is_saved: whether the trained model is in the folder, and the end came while it was measured.
    """
    checkpoint = None
    with contextlib.suppress(OSError):  # of a disk that is gone
        checkpoint, _ = newest_checkpoint(output / "checkpoints", TRAINER_FORMAT)
    if is_saved:
        left = f"the trained model is in {output}; measure it with"
    elif checkpoint:
        left = f"{checkpoint} is whole; go on with"
    else:
        left = "it has no whole checkpoint yet; start it anew with"
    return f"stopped: {last_line(error)}; {left}: {how_to_go_on(output, num_processes)}"


__all__ = [
    "TRAINER_FORMAT",
    "ResumableTrainer",
    "TrainerProgress",
    "check_facts",
    "count_processes",
    "describe_stop",
    "find_trainer_damage",
    "list_trainer_checkpoints",
    "read_trainer_recipe",
    "train",
]
