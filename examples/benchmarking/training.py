"""One training step of GreenSwin against SimMIM, Hiera and ViT-MAE: time and memory.

SimMIM is stock Swin on all patches; its cost does not depend on the mask ratio, so it gets GreenSwin's (its own is
0.6). Hiera and ViT-MAE are hierarchical and plain models of the same name, but not of the same number of parameters:
the table gives both.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarking.attention import ON_A_GPU
from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import add_common, choose_batch, list_of, one_of, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_training
from benchmarking.report import Row
from benchmarking.statistics_of_rounds import summarize_ratios
from benchmarking.tables import failures, find, memory_columns, print_time_and_memory, size_columns, time_columns

KINDS = ("greenswin", "simmim", "hiera", "vitmae")
HIERA_RATIOS = (0.6, 0.75)
AFTER = ({"do": "process_peak"}, {"do": "memory"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--contenders", type=list_of(one_of(*KINDS)), default=list(KINDS), help="default: all four")
    parser.add_argument(
        "--attention",
        type=list_of(str),
        help=f"attention implementations of GreenSwin (default: the model's; on a GPU {','.join(ON_A_GPU)})",
    )


def build_contenders(arguments: argparse.Namespace, variant: str, size: int, precision: str) -> list[Contender]:
    """All contenders of one setting."""
    base = Contender(
        kind="simmim",
        variant=variant,
        image_size=size,
        batch=choose_batch(arguments, variant, size),
        precision=precision,
        mask_ratio=arguments.mask_ratio,
        device=arguments.device,
        threads=arguments.threads,
    )
    attentions = arguments.attention or (ON_A_GPU if arguments.device == "cuda" else [None])
    groups = {
        "greenswin": [
            dataclasses.replace(base, kind="greenswin", masks=masks, attention=attention)
            for attention, masks in product(attentions, arguments.masks)
        ],
        "simmim": [base],
        "hiera": [dataclasses.replace(base, kind="hiera", mask_ratio=ratio) for ratio in HIERA_RATIOS],
        "vitmae": [dataclasses.replace(base, kind="vitmae")],
    }
    return [contender for kind in KINDS if kind in arguments.contenders for contender in groups[kind]]


def setting_of(contender: Contender) -> str:
    return f"{contender.variant}, {contender.image_size} px, batch {contender.batch}, {contender.precision}"


def build_rows(measurements: Sequence[Measurement]) -> list[Row]:
    """A row for each contender that ran."""
    baseline = find(measurements, "simmim")
    rows = []
    for measurement in measurements:
        if measurement.failure:
            continue
        host = sum(measurement.values("host_seconds")) / len(measurement.rounds)
        row: Row = {"contender": measurement.contender.label} | size_columns(measurement)
        row |= time_columns(measurement, baseline) | {"masks_ms": 1000 * host}
        rows.append(row | memory_columns(measurement, baseline))
    return rows


def compare_masks(measurements: Sequence[Measurement]) -> Row | None:
    """Time and memory of a mask for each image over a mask that the batch shares."""
    own, shared = (find(measurements, "greenswin", masks=masks) for masks in ("per-image", "shared"))
    if own is None or shared is None:
        return None
    ratio = summarize_ratios(own.values("seconds"), shared.values("seconds"))
    memory = own.after["activations_bytes"] / shared.after["activations_bytes"]
    return {"time_ratio": ratio, "activations_ratio": memory}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    set_defaults(arguments, sizes=[224], precision=["fp32", "bf16"])
    schedule = Schedule(arguments.rounds, arguments.warmup, arguments.pause)
    settings = []
    for variant, size, precision in product(arguments.variants, arguments.sizes, arguments.precision):
        contenders = build_contenders(arguments, variant, size, precision)
        title = f"training step: {setting_of(contenders[0])}"
        measurements = measure_interleaved(contenders, schedule, after=AFTER, title=title)
        rows, masks = build_rows(measurements), compare_masks(measurements)
        notes = ["ratio: to SimMIM's step of the same round, median and quartiles", *failures(measurements)]
        if masks is not None:
            time, memory = masks["time_ratio"], masks["activations_ratio"]
            spread = f"{time['median']:.3f} of the time ({time['q1']:.3f} to {time['q3']:.3f})"
            notes.append(f"a mask per image takes {spread} and {memory:.3f} of the activations of a shared one")
        print_time_and_memory(title, rows, notes)
        raw = [measurement.as_json() for measurement in measurements]
        settings.append({"title": title, "rows": rows, "masks": masks, "measurements": raw})
    return {"settings": settings}


PART = Part("training", "one training step against SimMIM, Hiera and ViT-MAE", add_arguments, measure, draw_training)
