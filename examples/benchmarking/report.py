"""What a measurement leaves: tables, a JSON report with machine, versions and date."""

import argparse
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import green_swin_hf

Row = dict[str, Any]
MEGABYTE = 1e6


def format_table(rows: Sequence[Row]) -> str:
    """The rows as aligned columns under their keys; a value that was not measured is a dash."""
    header = list(rows[0])
    lines = [header, *([format_value(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def format_value(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(title: str, rows: Sequence[Row], notes: Sequence[str] = ()) -> None:
    """The table under its title; a line for each note (why a contender did not run, say) behind it."""
    lines = [title, *([format_table(rows)] if rows else []), *notes]
    print("\n".join(lines) + "\n", flush=True)


def describe_run(arguments: argparse.Namespace) -> Row:
    """Machine, versions, date and arguments, so that a figure can be traced and repeated."""
    options = {name: value for name, value in vars(arguments).items() if name not in ("command", "output")}
    machine = {"cpu": read_cpu_model(), "cores": os.cpu_count(), "system": platform.platform()}
    if options.get("device") == "cuda":
        import torch

        machine["gpu"] = torch.cuda.get_device_name()
        machine["cuda"] = torch.version.cuda
    return {
        "machine": machine,
        "versions": {
            "green-swin-hf": green_swin_hf.__version__,
            **{name: read_version(name) for name in ("ortools", "torch", "transformers")},
            "python": platform.python_version(),
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "arguments": options,
    }


def read_cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def read_version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def write_json(report: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n")
    print(f"Wrote {path}", flush=True)
