"""Rows of tables from measurements of contenders."""

from collections.abc import Sequence
from typing import Any

from benchmarking.interleave import Measurement
from benchmarking.report import MEGABYTE, Row, print_table
from benchmarking.statistics_of_rounds import summarize, summarize_ratios


def time_columns(measurement: Measurement, baseline: Measurement | None, key: str = "seconds") -> Row:
    """Median and spread of a step's time, and of its ratio to the baseline's step of the same round."""
    time = summarize(measurement.values(key))
    row: Row = {"step_s": time["median"], "q1": time["q1"], "q3": time["q3"], "min": time["min"], "max": time["max"]}
    row["images/s"] = measurement.contender.batch / time["median"]
    if baseline is None or baseline.failure:
        return row | {"ratio": None, "ratio_q1": None, "ratio_q3": None, "speedup": None}
    ratio = summarize_ratios(measurement.values(key), baseline.values(key))
    speedup = summarize_ratios(baseline.values(key), measurement.values(key))["median"]
    return row | {"ratio": ratio["median"], "ratio_q1": ratio["q1"], "ratio_q3": ratio["q3"], "speedup": speedup}


def memory_columns(measurement: Measurement, baseline: Measurement | None) -> Row:
    """Megabytes of weights, gradients and optimizer state, of activations, and of the whole process.

    The process is given before it builds its model (Python with its imports) and at its peak.
    """
    after = measurement.after
    static = after["weights_bytes"] + after["gradients_bytes"] + after["optimizer_bytes"]
    row: Row = {"weights+optimizer_MB": static / MEGABYTE, "activations_MB": after["activations_bytes"] / MEGABYTE}
    is_comparable = baseline is not None and not baseline.failure
    reference: Any = baseline.after["activations_bytes"] if baseline is not None and is_comparable else None
    row["activations_ratio"] = after["activations_bytes"] / reference if reference else None
    row["process_start_MB"] = after["process_start_bytes"] / MEGABYTE
    row["process_peak_MB"] = after["process_peak_bytes"] / MEGABYTE
    if "cuda_peak_bytes" in after:
        row["gpu_peak_MB"] = after["cuda_peak_bytes"] / MEGABYTE
    return row


def size_columns(measurement: Measurement) -> Row:
    sizes = measurement.description
    return {"encoder_M": sizes["encoder_parameters"] / 1e6, "all_M": sizes["parameters"] / 1e6}


def failures(measurements: Sequence[Measurement]) -> list[str]:
    """A line for each contender that gave no result."""
    return [f"not measured: {each.contender.label}: {each.failure}" for each in measurements if each.failure]


def find(measurements: Sequence[Measurement], kind: str, **fields: Any) -> Measurement | None:
    """The first measurement of a kind with these fields that did not fail."""
    for measurement in measurements:
        wanted = {"kind": kind, **fields}
        if not measurement.failure and all(getattr(measurement.contender, k) == v for k, v in wanted.items()):
            return measurement
    return None


def select(rows: Sequence[Row], *columns: str) -> list[Row]:
    """The rows with these columns only, where there are any: the first of them names the row."""
    return [{name: row[name] for name in columns if name in row} for row in rows]


def print_time_and_memory(title: str, rows: Sequence[Row], notes: Sequence[str]) -> None:
    """Two tables from rows of `size_columns`, `time_columns` and `memory_columns`."""
    spread = ("q1", "q3", "min", "max", "images/s", "ratio", "ratio_q1", "ratio_q3", "speedup", "masks_ms")
    memory = ("weights+optimizer_MB", "activations_MB", "activations_ratio", "process_start_MB", "process_peak_MB")
    print_table(title, select(rows, "contender", "encoder_M", "all_M", "step_s", *spread), notes)
    if rows:
        print_table(f"memory of a {title}", select(rows, "contender", *memory, "gpu_peak_MB"))
