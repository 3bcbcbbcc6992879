"""Whole images: GreenSwin's classifier against stock Swin's, inference and a fine-tuning step."""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import add_common, choose_batch, list_of, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_dense
from benchmarking.report import Row
from benchmarking.tables import failures, find, memory_columns, print_time_and_memory, size_columns, time_columns
from benchmarking.training import setting_of

AFTER = ({"do": "process_peak"}, {"do": "memory"})
TASKS = {"infer": "inference", "train": "fine-tuning step"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--attention",
        type=list_of(str),
        help="attention implementations of both (default: the models' on a CPU, sdpa,eager on a GPU)",
    )
    parser.add_argument(
        "--compiled",
        action=argparse.BooleanOptionalAction,
        help="both also under torch.compile (default: on a GPU)",
    )


def build_contenders(arguments: argparse.Namespace, base: Contender) -> list[Contender]:
    on_gpu = arguments.device == "cuda"
    attentions = arguments.attention or (["sdpa", "eager"] if on_gpu else [None])
    compiled = on_gpu if arguments.compiled is None else arguments.compiled
    kinds = ("greenswin-dense", "swin-dense")
    contenders = [dataclasses.replace(base, kind=kind, attention=each) for each, kind in product(attentions, kinds)]
    if compiled:
        backend = "eager" if arguments.quick else "inductor"
        contenders += [dataclasses.replace(base, kind=kind, backend=backend) for kind in kinds]
    return contenders


def build_rows(measurements: Sequence[Measurement]) -> list[Row]:
    baseline = find(measurements, "swin-dense")
    return [
        {"contender": each.contender.label, **size_columns(each)}
        | time_columns(each, baseline)
        | memory_columns(each, baseline)
        for each in measurements
        if not each.failure
    ]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    set_defaults(arguments, sizes=[224], precision=["fp32", "bf16"])
    schedule = Schedule(arguments.rounds, arguments.warmup, arguments.pause)
    settings = []
    grid = product(arguments.variants, arguments.sizes, arguments.precision, TASKS)
    for variant, size, precision, task in grid:
        batch = choose_batch(arguments, variant, size)
        options = {"device": arguments.device, "threads": arguments.threads}
        base = Contender("swin-dense", variant, size, batch, precision, task=task, **options)
        title = f"dense {TASKS[task]}: {setting_of(base)}"
        measurements = measure_interleaved(build_contenders(arguments, base), schedule, after=AFTER, title=title)
        rows = build_rows(measurements)
        print_time_and_memory(
            title, rows, ["ratio: to the first stock Swin's step of the same round", *failures(measurements)]
        )
        raw = [measurement.as_json() for measurement in measurements]
        settings.append({"title": title, "rows": rows, "measurements": raw})
    return {"settings": settings}


PART = Part("dense", "inference and fine-tuning against stock Swin", add_arguments, measure, draw_dense)
