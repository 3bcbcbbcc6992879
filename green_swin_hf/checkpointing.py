"""Training checkpoints that are whole or not there: written aside, checked, renamed; the oldest rotated away after.

A checkpoint is a folder `step-00000500` with the model in `save_pretrained` form, `training_state.pt` (optimizer,
scheduler, loss scaler, random state of every process; tensors and plain values only), `trainer_state.json` (where the
run stands) and `checksums.json` (size and SHA-256 of every other file, written last).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

_NAME = re.compile(r"step-(\d{8,})")
_PARTIAL = ".partial"
_WEIGHTS, _TENSORS, _PROGRESS = "model.safetensors", "training_state.pt", "trainer_state.json"
CHECKSUMS = "checksums.json"


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Make the folder `target` by `write(folder)` and add the checksums of its files: whole or not at all.

    As `new_folder`.

    Raises:
        OSError: it could not be written, for whatever reason; the message names it.
    """
    try:
        with new_folder(target) as folder:
            write(folder)
            write_checksums(folder)
    except Exception as error:  # writers of tensors raise their own kinds when the disk is full
        raise OSError(f"{target} cannot be written: {_one_line(error)}") from error


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to write to that becomes `target` at the end of the block: whole or not at all.

    The files go to a hidden folder beside `target`, reach the disk, and only then get their name. A folder that has
    the name already is kept under another one (`….replaced-1`), an empty one goes. When the block fails, nothing is
    left behind.
    """
    partial = target.with_name(f".{target.name}{_PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.rglob("*"):
            _flush_to_disk(path)
        _flush_to_disk(partial)
        if target.exists():
            _make_way(target)
        partial.rename(target)
        _flush_to_disk(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make_way(target: Path) -> None:
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    else:
        target.rename(_unused_name(target, "replaced"))


def replace_files(folder: Path, write: Callable[[Path], None], last: str = _WEIGHTS) -> list[str]:
    """Make files by `write(aside)` and move each into `folder` when all are on the disk; `last` arrives last.

    Returns:
        The names of the files, sorted.

    Raises:
        OSError: they could not be written, for whatever reason; the message names it.
    """
    aside = folder / f".files{_PARTIAL}"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        write(aside)
        names = sorted(path.name for path in aside.iterdir())
        for name in names:
            _flush_to_disk(aside / name)
        for name in sorted(names, key=lambda name: name == last):
            os.replace(aside / name, folder / name)
        _flush_to_disk(folder)
    except Exception as error:
        raise OSError(f"the files of {folder} cannot be written: {_one_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return names


def listed_files(names: Iterable[str]) -> str:
    """Names of the files of a result, for people: the code beside the weights counts as one."""
    shown = sorted({"code (*.py)" if name.endswith(".py") else name for name in names})
    return ", ".join(shown)


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    save_model: Callable[[Path], None],
    training_state: Mapping[str, Any],
    trainer_state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of update `step` into `folder`, then remove all but the `keep` newest.

    Args:
        folder: where the checkpoints of the run are.
        step: updates done.
        save_model: writes the model (and what belongs to it) into the folder it is given.
        training_state: tensors, numbers, text and containers of them; read back with `weights_only=True`.
        trainer_state: what JSON holds.
        keep: checkpoints to keep, at least 1.

    Raises:
        OSError: it could not be written; the earlier checkpoints are as they were.
    """

    def write(target: Path) -> None:
        save_model(target)
        with (target / _TENSORS).open("wb") as file:  # where writing fails, Python says why and torch does not
            torch.save(dict(training_state), file)
        (target / _PROGRESS).write_text(json.dumps(trainer_state, indent=1))

    target = folder / f"step-{step:08d}"
    write_folder(target, write)
    for path in list_checkpoints(folder)[:-keep]:
        _remove_folder(path)
    return target


def prepare_checkpoints(folder: Path, step: int) -> list[Path]:
    """Make `folder` ready for a run that goes on (or starts) after update `step`.

    What a killed run left half-written is removed. Checkpoints of later updates, which another run continued from here
    would mix with its own, are kept under other names (`….superseded-1`).

    Returns:
        The new names of these.
    """
    if not folder.is_dir():
        return []
    for path in folder.glob(f".*{_PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)
    later = [path for path in list_checkpoints(folder) if checkpoint_step(path) > step]
    return [path.rename(_unused_name(path, "superseded")) for path in later]


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first; whether they are whole is not looked at."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if path.is_dir() and _NAME.fullmatch(path.name)]
    return sorted(found, key=checkpoint_step)


def checkpoint_step(path: Path) -> int:
    """Updates done, from a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path} is not named like a checkpoint (step-00000500)")
    return int(match[1])


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is there with its checksum."""
    return find_wrong_file(path, {_WEIGHTS, _TENSORS, _PROGRESS})


def find_wrong_file(folder: Path, needed: Iterable[str] = ()) -> str | None:
    """What is wrong with the files of which a folder holds the checksums, in words; None when nothing is.

    Args:
        folder: where `write_checksums` was.
        needed: names that must be among them.
    """
    try:
        expected = json.loads((folder / CHECKSUMS).read_text())
        for name, entry in expected.items():
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != entry["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(file) != entry["sha256"]:
                return f"{name} does not have its checksum"
        missing = set(needed) - set(expected)
        return f"{', '.join(sorted(missing))} is missing" if missing else None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{CHECKSUMS} cannot be read ({type(error).__name__})"


@dataclass(frozen=True)
class CheckpointFormat:
    """How checkpoints of a kind are found.

    Attributes:
        list_in: those in a folder, oldest first, whether they are whole or not.
        find_damage: what is wrong with one, in words; None for a whole one.
    """

    list_in: Callable[[Path], list[Path]]
    find_damage: Callable[[Path], str | None]


OWN_FORMAT = CheckpointFormat(list_checkpoints, find_damage)


def newest_checkpoint(folder: Path, checkpoints: CheckpointFormat = OWN_FORMAT) -> tuple[Path | None, dict[Path, str]]:
    """The newest whole checkpoint in `folder` (None: there is none) and, of each newer one, what is wrong with it."""
    damaged: dict[Path, str] = {}
    for path in reversed(checkpoints.list_in(folder)):
        damage = checkpoints.find_damage(path)
        if damage is None:
            return path, damaged
        damaged[path] = damage
    return None, damaged


def read_trainer_state(path: Path) -> dict[str, Any]:
    """The `trainer_state` that `save_checkpoint` got."""
    return json.loads((path / _PROGRESS).read_text())


def read_training_state(path: Path) -> dict[str, Any]:
    """The `training_state` that `save_checkpoint` got, on the CPU. Runs no code from the file."""
    return torch.load(path / _TENSORS, map_location="cpu", weights_only=True)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load the weights of a checkpoint into a model of the same shape, strictly.

    Raises:
        ValueError: names or shapes differ.
    """
    try:
        model.load_state_dict(load_file(path / _WEIGHTS), strict=True)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {path} does not fit the model of these settings: {_one_line(error)}") from None


def random_state() -> dict[str, Any]:
    """State of every global random generator of this process: torch, its accelerators, NumPy, Python."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Put back what `random_state` returned, here or in another process on as many devices."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_as_bytes(entry) for entry in state["cuda"]])


def _as_bytes(state: Tensor) -> Tensor:
    return state.to(device="cpu", dtype=torch.uint8)


def write_checksums(folder: Path, leave_out: str = "") -> None:
    """Add size and SHA-256 of the files of a folder to it, as `checksums.json`.

    Args:
        folder: of files that are whole.
        leave_out: pattern of names that are left out, "rng_state*.pth".
    """
    skipped = (CHECKSUMS, leave_out or CHECKSUMS)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not any(map(path.match, skipped)))
    entries = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in files
    }
    partial = folder / f"{CHECKSUMS}{_PARTIAL}"
    partial.write_text(json.dumps(entries, indent=1))
    os.replace(partial, folder / CHECKSUMS)


def sha256(path: Path) -> str:
    """Checksum of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_folder(path: Path) -> None:
    """Remove a checkpoint; from the first moment on it does not look like one."""
    doomed = path.with_name(f".{path.name}{_PARTIAL}")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _one_line(error: BaseException) -> str:
    """What an error says, or rather the system's error that it came from."""
    first: BaseException | None = error
    while first is not None and not isinstance(first, OSError):
        first = first.__context__
    return " ".join(str(first or error).split())[:300] or type(error).__name__


def _unused_name(path: Path, reason: str) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.name}.{reason}-{number}")).exists():
        number += 1
    return candidate


__all__ = [
    "CHECKSUMS",
    "OWN_FORMAT",
    "CheckpointFormat",
    "checkpoint_step",
    "find_damage",
    "find_wrong_file",
    "list_checkpoints",
    "listed_files",
    "load_weights",
    "new_folder",
    "newest_checkpoint",
    "prepare_checkpoints",
    "random_state",
    "read_trainer_state",
    "read_training_state",
    "replace_files",
    "restore_random_state",
    "save_checkpoint",
    "sha256",
    "write_checksums",
    "write_folder",
]
