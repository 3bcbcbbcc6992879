"""How a training script starts: flags, folder, recipe, the checkpoint it goes on from, device, threads, precision."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from .checkpointing import OWN_FORMAT, CheckpointFormat, newest_checkpoint
from .host_memory import keep_freed_memory
from .optimization import native_bf16
from .recipe_files import RecipeFile, RecipeT, add_recipe_flags, flag_overrides, load_recipe
from .training import OneLineParser, check_output_folder, unused_folder

RECIPE_FILE = "recipe.yaml"  # in an output folder: the settings of its run
_TRACKERS = ("none", "tensorboard", "trackio", "wandb")


def run_parser(
    description: str | None, kind: type[RecipeFile], recipe: Path, output: Path, *, stop_unit: str
) -> OneLineParser:
    """A parser with the flags that every training script has, and those of its kind of recipe.

    Args:
        description: docstring of the script, of which the first line is shown.
        kind: of recipe, whose keys are flags.
        recipe: the recipe file that is taken where none is given.
        output: the output folder that is taken where none is given.
        stop_unit: what `--stop-after` counts, "updates" or "epochs".
    """
    parser = OneLineParser(description=(description or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, help=f"YAML file (default: {recipe.name}); flags go on top")
    parser.add_argument("--output-dir", type=Path, help=f"new folder for all results (default: {output}, …-2)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    parser.add_argument(
        "--stop-after",
        type=positive_count,
        metavar=stop_unit.upper(),
        help="save and stop after so many, to go on later",
    )
    parser.add_argument("--report-to", default="none", choices=_TRACKERS, help="also log there (default: none)")
    add_recipe_flags(parser.add_argument_group("keys of the recipe"), kind)
    return parser


def positive_count(text: str) -> int:
    """Type of a flag."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be a whole number and at least 1")
    return int(text)


def find_run(
    output_dir: Path | None, resume: str | None, default: Path, checkpoints: CheckpointFormat = OWN_FORMAT
) -> tuple[Path, Path | None]:
    """The output folder of a run, and the checkpoint to go on from (None: a new run). Makes nothing.

    Args:
        output_dir: as asked for; None takes the run of `resume`, or `default`, or behind a number an unused name.
        resume: "auto" for the newest whole checkpoint of the run in the output folder (a folder without one starts a
            new run there), a checkpoint, the output folder of a run, or None.
        default: output folder where none is given.
        checkpoints: how those of this kind of run look.

    Raises:
        ValueError: the folder is in use or cannot be made, or there is nothing to go on with.
    """
    run, checkpoint = _find_checkpoint(output_dir, resume, default, checkpoints) if resume else (None, None)
    output = output_dir or run or unused_folder(default)
    is_own = run is not None and output.resolve() == run.resolve()
    if output.is_dir() and any(output.iterdir()) and not is_own:
        raise ValueError(
            f"output folder {output} is not empty; go on with its run: --resume auto, or give another --output-dir"
        )
    check_output_folder(output)
    return output, checkpoint


def _find_checkpoint(
    output_dir: Path | None, resume: str, default: Path, checkpoints: CheckpointFormat
) -> tuple[Path, Path | None]:
    """The folder of the run to go on with and its checkpoint; with "auto" a run may have none yet."""
    is_auto = resume == "auto"
    path = (output_dir or _newest_output(default)) if is_auto else Path(resume)
    if path in checkpoints.list_in(path.parent):
        if damage := checkpoints.find_damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {damage}; --resume auto takes the newest whole one")
        return path.resolve().parents[1], path
    if not is_auto and not path.is_dir():
        raise ValueError(f"--resume {path} is no folder; give a checkpoint, a run's output folder, or auto")
    checkpoint, damaged = newest_checkpoint(path / "checkpoints", checkpoints)
    for passed_over, damage in damaged.items():
        process_state().print(f"Passed over and kept: {passed_over} is damaged ({damage})")
    entries = {entry.name for entry in path.iterdir()} if path.exists() else set()
    is_new = entries <= {f"{RECIPE_FILE}.partial"} or RECIPE_FILE in entries  # killed while it wrote that, or later
    if checkpoint is None and not (is_auto and is_new):
        raise ValueError(f"--resume: {path} holds no whole checkpoint; give another, or none")
    if checkpoint is None:
        process_state().print(f"Nothing to go on with in {path}: a new run starts there")
    return path, checkpoint


def _newest_output(default: Path) -> Path:
    """The default output folder with the highest number."""
    number = int(unused_folder(default).name.removeprefix(default.name).removeprefix("-") or 1) - 1
    return default if number < 2 else default.with_name(f"{default.name}-{number}")


def read_recipe(
    arguments: Namespace, kind: type[RecipeT], output: Path, default: Path, before: RecipeT | None = None
) -> RecipeT:
    """The recipe of a run: its file, or what it went by before, with the flags on top and its paths absolute.

    Args:
        arguments: of `run_parser`.
        kind: of recipe.
        output: output folder of the run.
        default: the recipe file that is taken where none is given.
        before: the recipe of the run that is gone on with from a checkpoint.

    Raises:
        ValueError: a file or a value is wrong (see `load_recipe`).
    """
    own = output / RECIPE_FILE
    if arguments.recipe:
        recipe = load_recipe(arguments.recipe, kind)
    elif before is not None:
        recipe = before
    else:  # a run that was stopped before its first checkpoint has its recipe all the same
        recipe = load_recipe(own if arguments.resume and own.is_file() else default, kind)
    flags = flag_overrides(arguments, kind)
    # The same command again means the same run: what flags do to a file, they do to it each time.
    is_from_file = before is None or arguments.recipe
    recipe = recipe.with_flags(flags) if is_from_file else recipe.replace(**flags)
    # so that the run goes on from another working directory, too
    return recipe.replace(**{name: os.path.abspath(path) for name, path in recipe.existing_paths().items()})


def check_changes(
    before: RecipeFile | None,
    recipe: RecipeFile,
    facts: Mapping[str, tuple[Any, Any]] | None = None,
    *,
    allowed: bool | None = None,
) -> dict[str, tuple[Any, Any]]:
    """Changes that make a run that is gone on with another run: settings, each as it was and as it is.

    Args:
        before: recipe of the run that is gone on with; None for a new run.
        recipe: the one to go on with.
        facts: of the data and the processes, each as it was and as it is.
        allowed: whether the user wants such changes; None where a script has no flag for it.

    Raises:
        ValueError: there are changes, and they are not allowed.
    """
    if before is None:
        return {}
    changes = {
        **before.differences(recipe),
        **{name: pair for name, pair in (facts or {}).items() if pair[0] != pair[1]},
    }
    if changes and not allowed:
        shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        remedies = ["leave these as they were", "start a new run", *(["add --override"] if allowed is False else [])]
        raise ValueError(f"--resume cannot change the run: {shown}; {', or '.join(remedies)}")
    return changes


def set_up_process(precision: str, threads: int | None, resumed_threads: int | None = None) -> str:
    """Set threads, memory and kind of workers of this process; turn off transformers' and datasets' progress bars.

    Args:
        precision: "auto" (bf16 where native, else fp32), "fp32", "bf16" or "fp16".
        threads: of this process on the CPU; None for an equal share of all cores.
        resumed_threads: of the run that is gone on with; sums over another number of threads differ in their last bits.

    Returns:
        The precision: "fp32", "bf16" or "fp16".

    Raises:
        ValueError: more threads than make sense, or fp16 on the CPU.
    """
    state, cores = process_state(), available_cores()
    if sys.platform == "linux":  # as before Python 3.14: forked workers end with a parent that is killed
        multiprocessing.set_start_method("fork", force=True)
    if threads and threads > 8 * cores:
        raise ValueError(f"threads {threads} must be at most 8 for each of the {cores} cores")
    if precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; give --precision bf16 or fp32")
    if threads or state.device.type == "cpu":
        # `accelerate launch` may leave a process on the CPU fewer threads than there are cores.
        share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(threads or resumed_threads or share)
    if state.device.type == "cpu":
        keep_freed_memory()
    transformers_logging.disable_progress_bar()  # of loading weights: a run has a bar of its own
    if not state.is_main_process or not sys.stderr.isatty():
        _quiet_datasets()
    automatic = "bf16" if native_bf16(state.device) else "fp32"
    return automatic if precision == "auto" else precision


def _quiet_datasets() -> None:
    import datasets  # not needed by every script

    datasets.disable_progress_bars()


def build_accelerator(precision: str, report_to: str, output: Path) -> Accelerator:
    """accelerate's accelerator for a precision that `set_up_process` gave, with a tracker that writes to `output`."""
    # Neither concerns the models: they change no output in place; and what has other strides is the gradient of a
    # position table for one head, in a dimension of size 1.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return Accelerator(
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=None if report_to == "none" else report_to,
        project_dir=output,
    )


def process_state(timeout: float = 600) -> PartialState:
    """Device and rank of this process, as `Accelerator` will find them.

    Args:
        timeout: seconds that the processes of a run wait for one of them; only the first call sets it.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(seconds=timeout))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def progress_bar(total: int, done: int, *, shown: bool) -> tqdm:
    """A bar over the updates of a run; it draws seldom where nobody watches."""
    return tqdm(
        total=total, initial=done, disable=not shown, unit="update",
        mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True, smoothing=0.05,
    )  # fmt: skip


def how_to_go_on(output: Path, num_processes: int) -> str:
    """The command that goes on with a run."""
    launcher = "python" if num_processes == 1 else "accelerate launch (as before)"
    return f"{launcher} {sys.argv[0]} --output-dir {output} --resume auto"


__all__ = [
    "RECIPE_FILE",
    "available_cores",
    "build_accelerator",
    "check_changes",
    "find_run",
    "how_to_go_on",
    "positive_count",
    "process_state",
    "progress_bar",
    "read_recipe",
    "run_parser",
    "set_up_process",
]
