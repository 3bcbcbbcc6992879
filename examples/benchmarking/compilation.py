"""torch.compile against eager: step time, time to compile, and recompilations over new masks.

torch gives up on a function after some recompilations (eight, by default) and runs it eagerly from there on, so a count
near that number means "at every new shape".
"""

import argparse
import dataclasses
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import WrongInput, add_common, choose_batch, positive_int, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_compilation
from benchmarking.report import Row, print_table
from benchmarking.tables import failures, time_columns
from benchmarking.training import setting_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--backend", help="of torch.compile (default: inductor; with --quick: eager)")
    parser.add_argument("--new-masks", type=positive_int, help="steps whose recompilations count (default: 50)")


def build_pairs(arguments: argparse.Namespace, base: Contender, backend: str) -> list[Contender]:
    """Each model eager and, next to it, compiled."""
    models = [dataclasses.replace(base, kind="greenswin-dense")]
    models += [dataclasses.replace(base, kind="greenswin", masks=masks) for masks in arguments.masks]
    return [dataclasses.replace(model, backend=each) for model in models for each in (None, backend)]


def choose_backend(arguments: argparse.Namespace) -> str:
    """The backend that was asked for; `eager` only captures graphs, which a quick check is satisfied with."""
    if arguments.backend is None:
        return "eager" if arguments.quick else "inductor"
    import torch

    known = torch.compiler.list_backends(exclude_tags=())
    if arguments.backend not in known:
        raise WrongInput(f"--backend {arguments.backend!r} must be one of {', '.join(known)}")
    return arguments.backend


def title_of(contender: Contender) -> str:
    return "whole images" if contender.kind == "greenswin-dense" else f"visible only, {contender.masks} masks"


def build_rows(measurements: Sequence[Measurement]) -> list[Row]:
    """A row for each compiled model that ran beside its eager form."""
    rows = []
    for eager, compiled in zip(measurements[::2], measurements[1::2], strict=True):
        if eager.failure or compiled.failure:
            continue
        warmup = [reply[part] for reply in compiled.warmup for part in ("untimed_seconds", "seconds")]
        compiling = sum(warmup) - len(warmup) * median(compiled.values("seconds"))
        times = time_columns(compiled, eager)
        graphs = compiled.after
        rows.append(
            {"model": title_of(compiled.contender), "eager_s": median(eager.values("seconds"))}
            | {name: times[name] for name in ("step_s", "q1", "q3", "ratio", "ratio_q1", "ratio_q3")}
            | {"compile_s": compiling, "graphs": graphs["warm_graphs"]}
            | {"recompilations": graphs["graphs"] - graphs["warm_graphs"]}
            | {"over_masks": 2 * len(compiled.rounds) + graphs["extra_steps"]}  # a timed step has an untimed one before
        )
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    set_defaults(arguments, sizes=[224], precision=["fp32"])
    schedule = Schedule(arguments.rounds, arguments.warmup, arguments.pause)
    backend = choose_backend(arguments)
    steps = arguments.new_masks or (4 if arguments.quick else 50)
    settings = []
    for variant, size, precision in product(arguments.variants, arguments.sizes, arguments.precision):
        batch = choose_batch(arguments, variant, size)
        options = {"mask_ratio": arguments.mask_ratio, "device": arguments.device, "threads": arguments.threads}
        base = Contender("greenswin-dense", variant, size, batch, precision, **options)
        title = f"torch.compile ({backend}): {setting_of(base)}"
        after = [{"do": "recompilations", "steps": steps}]
        measurements = measure_interleaved(
            build_pairs(arguments, base, backend), schedule, before=[{"do": "warm_graphs"}], after=after, title=title
        )
        rows = build_rows(measurements)
        print_table(title, rows, ["ratio: compiled over eager in the same round", *failures(measurements)])
        raw = [measurement.as_json() for measurement in measurements]
        settings.append({"title": title, "rows": rows, "measurements": raw})
    return {"settings": settings}


PART = Part("compile", "torch.compile against eager, recompilations", add_arguments, measure, draw_compilation)
