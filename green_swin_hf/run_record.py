"""What a run was, as `run.json` in its output folder: the only source of what a model card says of training.

    kind        "pretraining", "classification", "detection", "segmentation"; "conversion" for weights only renamed
    script      name of the program
    starts      one entry for each start of the run: `started` (UTC), `seconds` (missing where it was cut off),
                `device`, `precision`, `processes`, `threads`, `machine`, `versions`, `energy`; {}: left no record
    data        `name`, `on_hub`, `train_images`, `validation_images`, `test_images`, `classes`
    start_from  weights that the run started from: `name`, `on_hub`, and where known `license` (with `license_name` and
                `license_link` where that is "other"), `base_model` (on the Hub), `is_own` (trained from random weights
                by runs that left records)
    model       `parameters`, …
    training    `updates`, `epochs`, `images_per_update`, `learning_rate`, …
    metrics     entries as `metric` makes them
    license     of the weights, where known
    weights     SHA-256 of each file of weights that all this was recorded for

Whatever was not known is missing. Paths of the machine are not in it, only their last component, and no credentials.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from huggingface_hub import ModelCard, hf_hub_download

from .checkpointing import sha256
from .energy import EnergyMeter
from .redaction import without_local_paths

RECORD_FILE = "run.json"
LICENCE_ENTRIES = ("license", "license_name", "license_link")  # of a card, and of a record
_CARD = "README.md"
_HUB_TIMEOUT_SECONDS = 10
_PACKAGES = ("torch", "torchvision", "transformers", "accelerate", "datasets")


class RunRecord:
    """The record of a run that is under way, from the start of its work on. Only the main process writes.

    Args:
        folder: output folder of the run, which exists.
        kind, script: see the module.
        is_resumed: whether the run goes on; it keeps what its earlier starts recorded.
        device, precision: of this start.
        track_energy: country of `EnergyMeter`; None estimates nothing.

    Raises:
        ValueError: the record of the earlier starts cannot be read.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        script: str,
        *,
        is_resumed: bool,
        device: torch.device,
        precision: str,
        track_energy: str | None = None,
    ):
        state = PartialState()
        self.folder, self._writes = folder, state.is_main_process
        self._began = time.monotonic()
        self.content: dict[str, Any] = {"kind": kind, "script": script, "starts": []}
        if is_resumed:
            self.content = read_record(folder) or {**self.content, "starts": [{}]}
        self._start: dict[str, Any] = {
            "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": str(device),
            "precision": {"no": "fp32"}.get(precision, precision),
            "processes": state.num_processes,
            "threads": torch.get_num_threads(),
            "machine": describe_machine(),
            "versions": package_versions(),
        }
        self.content["starts"].append(self._start)
        self._energy = EnergyMeter(track_energy) if track_energy and self._writes else None
        self.note()

    def note(self, **facts: Any) -> None:
        """Write entries of the record; what is None is left out, and stays what it was."""
        self.content.update({name: _without_none(value) for name, value in facts.items() if value is not None})
        if self._writes:
            write_record(self.folder, self.content)

    def stop(self, **facts: Any) -> None:
        """Note the time and energy of this start (and say the latter), and what else is known at its end.

        Without facts it is the end of a start that brought no result; where the disk is full it is not noted.
        """
        energy, self._energy = self._energy.stop() if self._energy else {}, None
        self._start["seconds"] = round(time.monotonic() - self._began, 1)
        if energy:
            self._start["energy"] = energy
            grams = f", {energy['co2_eq_grams']:.3g} g of CO2 equivalent" if "co2_eq_grams" in energy else ""
            print(f"Energy: about {energy['kwh']:.3g} kWh{grams} ({energy['source']})")
        if facts and self._writes:
            facts["weights"] = weight_checksums(self.folder)
        with contextlib.nullcontext() if facts else contextlib.suppress(OSError):
            self.note(**facts)


def weight_checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of weights in a folder."""
    return {path.name: sha256(path) for path in sorted(folder.glob("model*.safetensors"))}


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Write `run.json`, whole or not at all."""
    partial = folder / f"{RECORD_FILE}.partial"
    text = json.dumps(without_local_paths(content), indent=1, ensure_ascii=False)
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, folder / RECORD_FILE)


def read_record(folder: Path) -> dict[str, Any]:
    """The record in a folder; nothing where there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; remove it, and the card will say nothing of a run") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is no record of a run; remove it")
    return content


def metric(name: str, kind: str, value: float | None, split: str, images: int, **more: Any) -> dict[str, Any]:
    """One figure of a record.

    Args:
        name: as a reader calls it, "Top-1 accuracy".
        kind: identifier of the metric, "accuracy".
        value: None or not finite where nothing was measured; `measured` leaves it out.
        split: of the data that it was measured on, "test".
        images: how many.
        more: `standard_error`; `baseline` and `baseline_name`, what something simpler scores on the same.
    """
    given = {key: entry for key, entry in more.items() if entry is not None}
    return {"name": name, "type": kind, "value": value, "split": split, "images": images, **given}


def measured(metrics: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries that have a value."""
    return [entry for entry in metrics if entry["value"] is not None and math.isfinite(entry["value"])]


def describe_data(name: str, **facts: Any) -> dict[str, Any]:
    """Name of the data as others may read it: on the Hub its name, of a file or folder the last component."""
    return {**_public_name(name), **facts}


def describe_start(name: str | None, folder: Path | None = None) -> dict[str, Any] | None:
    """What is known of the weights that a run starts from, from their own record and their card.

    Args:
        name: a folder or file, or a repository on the Hub, whose card is fetched; nothing is known where it cannot be.
        folder: of a repository on the Hub, where it was fetched to.
    """
    if name is None:
        return None
    found = _public_name(name)
    if found["on_hub"]:
        card = folder / _CARD if folder else _fetched_card(name)
        return {**found, **_card_entries(card, LICENCE_ENTRIES), "base_model": name}
    local = Path(name)
    record = read_record(local) if local.is_dir() else {}
    known = _card_entries(local / _CARD, (*LICENCE_ENTRIES, "base_model"))
    if not record:
        return {**found, **known}
    before = record.get("start_from") or {}
    for source in (before, record):  # a record knows its weights better than a card that may be older
        known |= {entry: source[entry] for entry in (*LICENCE_ENTRIES, "base_model") if source.get(entry)}
    is_whole = bool(record.get("starts")) and all(record["starts"])  # an earlier start may have begun from anything
    is_own = is_whole and record["kind"] != "conversion" and (not before or bool(before.get("is_own")))
    return {**found, **known, **({"is_own": True} if is_own and "base_model" not in known else {})}


def _fetched_card(name: str) -> Path | None:
    """The card of a repository on the Hub; None where it has none, or nobody answers."""
    with contextlib.suppress(Exception):  # the HTTP library's own types, which differ between versions
        return Path(hf_hub_download(name, _CARD, etag_timeout=_HUB_TIMEOUT_SECONDS))
    return None


def _card_entries(card: Path | None, names: Iterable[str]) -> dict[str, Any]:
    """Entries of a card's metadata, as one downloaded from the Hub has them; a list of one is that one."""
    if card is None or not card.is_file():
        return {}
    try:
        entries = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except Exception:  # a stranger's card, which need not be one
        return {}
    single = {key: value[0] if isinstance(value, list) and len(value) == 1 else value for key, value in entries.items()}
    return {name: single[name] for name in names if isinstance(single.get(name), str)}


def _public_name(name: str) -> dict[str, Any]:
    on_hub = not os.path.exists(name) and re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name) is not None
    is_path = not on_hub and "://" not in name
    return {"name": without_local_paths(Path(name).resolve().name if is_path else name), "on_hub": on_hub}


def describe_machine() -> dict[str, Any]:
    """Processor, cores that this process may use, memory, and accelerators of this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    memory = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        memory = round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    return _without_none(
        {
            "processor": _processor_name(),
            "cores": cores,
            "memory_gib": memory,
            "gpus": gpus or None,
            "system": platform.system(),
        }
    )


def _processor_name() -> str | None:
    path = Path("/proc/cpuinfo")  # `platform.processor()` is empty on most Linux systems
    lines = path.read_text().splitlines() if path.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or None


def package_versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that compute."""
    from . import __version__

    found = {"python": platform.python_version(), "green-swin-hf": __version__}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def total_seconds(record: dict[str, Any]) -> float | None:
    """Seconds of all starts of a run; None where one of them was not measured to its end."""
    seconds = [start.get("seconds") for start in record.get("starts", [])]
    return None if not seconds or None in seconds else sum(seconds)


def total_energy(record: dict[str, Any]) -> dict[str, Any]:
    """Energy of all starts of a run; nothing where it was not estimated for each of them."""
    parts = [start.get("energy") for start in record.get("starts", [])]
    if not parts or not all(parts):
        return {}
    total: dict[str, Any] = {"kwh": sum(part["kwh"] for part in parts), "source": parts[-1]["source"]}
    if all("co2_eq_grams" in part for part in parts):
        total["co2_eq_grams"] = sum(part["co2_eq_grams"] for part in parts)
        total["country"] = ", ".join(dict.fromkeys(part["country"] for part in parts))
    return total


def _without_none(value: Any) -> Any:
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


__all__ = [
    "LICENCE_ENTRIES",
    "RECORD_FILE",
    "RunRecord",
    "describe_data",
    "describe_machine",
    "describe_start",
    "measured",
    "metric",
    "package_versions",
    "read_record",
    "total_energy",
    "total_seconds",
    "weight_checksums",
    "write_record",
]
