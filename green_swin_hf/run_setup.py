"""How a training script starts: its folder, the checkpoint it goes on from, device, threads and precision."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import parse_flag_from_env

from .checkpointing import find_damage, list_checkpoints, newest_checkpoint
from .optimization import native_bf16
from .training import check_output_folder, unused_folder


def find_run(output_dir: Path | None, resume: str | None, default: Path) -> tuple[Path, Path | None]:
    """The output folder of a run, and the checkpoint to go on from (None: a new run). Makes nothing.

    Args:
        output_dir: as asked for; None takes the run of `resume`, or `default`, or behind a number an unused name.
        resume: "auto" for the newest whole checkpoint of the run in the output folder (a folder without one starts a
            new run there), a checkpoint, the output folder of a run, or None.
        default: output folder where none is given.

    Raises:
        ValueError: the folder is in use or cannot be made, or there is nothing to go on with.
    """
    run, checkpoint = _find_checkpoint(output_dir, resume, default) if resume else (None, None)
    output = output_dir or run or unused_folder(default)
    is_own = run is not None and output.resolve() == run.resolve()
    if output.is_dir() and any(output.iterdir()) and not is_own:
        raise ValueError(
            f"output folder {output} is not empty; go on with its run: --resume auto, or give another --output-dir"
        )
    check_output_folder(output)
    return output, checkpoint


def _find_checkpoint(output_dir: Path | None, resume: str, default: Path) -> tuple[Path, Path | None]:
    """The folder of the run to go on with and its checkpoint; with "auto" a run may have none yet."""
    is_auto = resume == "auto"
    path = (output_dir or _newest_output(default)) if is_auto else Path(resume)
    if path in list_checkpoints(path.parent):
        if damage := find_damage(path):
            raise ValueError(f"checkpoint {path} is damaged: {damage}; --resume auto takes the newest whole one")
        return path.resolve().parents[1], path
    if not is_auto and not path.is_dir():
        raise ValueError(f"--resume {path} is no folder; give a checkpoint, a run's output folder, or auto")
    checkpoint, damaged = newest_checkpoint(path / "checkpoints")
    for passed_over, damage in damaged.items():
        process_state().print(f"Passed over and kept: {passed_over} is damaged ({damage})")
    is_new = not path.exists() or not any(path.iterdir()) or (path / "log.jsonl").is_file()
    if checkpoint is None and not (is_auto and is_new):
        raise ValueError(f"--resume: {path} holds no whole checkpoint; give another, or none")
    if checkpoint is None:
        process_state().print(f"Nothing to go on with in {path}: a new run starts there")
    return path, checkpoint


def _newest_output(default: Path) -> Path:
    """The default output folder with the highest number."""
    number = int(unused_folder(default).name.removeprefix(default.name).removeprefix("-") or 1) - 1
    return default if number < 2 else default.with_name(f"{default.name}-{number}")


def build_accelerator(precision: str, threads: int | None, resumed_threads: int | None = None) -> Accelerator:
    """accelerate's accelerator, after the threads of this process are set.

    Args:
        precision: "auto" (bf16 where native, else fp32), "fp32", "bf16" or "fp16".
        threads: of this process on the CPU; None for an equal share of all cores.
        resumed_threads: of the run that is gone on with; sums over another number of threads differ in their last bits.

    Raises:
        ValueError: more threads than make sense, or fp16 on the CPU.
    """
    device, cores = process_state().device, available_cores()
    if threads and threads > 8 * cores:
        raise ValueError(f"threads {threads} must be at most 8 for each of the {cores} cores")
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; give --precision bf16 or fp32")
    if threads or device.type == "cpu":
        # `accelerate launch` may leave a process on the CPU fewer threads than there are cores.
        share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        torch.set_num_threads(threads or resumed_threads or share)
    automatic = "bf16" if native_bf16(device) else "fp32"
    chosen = automatic if precision == "auto" else precision
    return Accelerator(mixed_precision="no" if chosen == "fp32" else chosen)


def process_state() -> PartialState:
    """Device and rank of this process, as `Accelerator` will find them."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))


def available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["available_cores", "build_accelerator", "find_run", "process_state"]
