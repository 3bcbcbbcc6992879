"""GreenSwin's training step against its number of visible tokens: by image size at batch 1, by batch at one size."""

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Any

from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import add_common, list_of, positive_int, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_scaling
from benchmarking.report import Row, print_table
from benchmarking.statistics_of_rounds import fit_line, summarize, summarize_ratios
from benchmarking.tables import failures

AFTER = ({"do": "process_peak"}, {"do": "memory"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    batches = list_of(positive_int)
    parser.add_argument("--batches", type=batches, help="at the first of the sizes (default: 1,2,4,8,16)")


def build_rows(measurements: Sequence[Measurement], axis: str) -> list[Row]:
    """A row for each point; the time per visible token is relative to that of the first point in the same round."""
    if not measurements:
        return []
    first = measurements[0]
    rows = []
    for measurement in measurements:
        tokens = measurement.contender.visible_tokens
        growth = tokens / first.contender.visible_tokens
        time = summarize(measurement.values("seconds"))
        ratio = summarize_ratios(measurement.values("seconds"), first.values("seconds"))
        rows.append(
            {axis: getattr(measurement.contender, "image_size" if axis == "size" else "batch")}
            | {"visible_tokens": tokens, "step_s": time["median"], "q1": time["q1"], "q3": time["q3"]}
            | {"µs_per_token": 1e6 * time["median"] / tokens, "relative": ratio["median"] / growth}
            | {"relative_q1": ratio["q1"] / growth, "relative_q3": ratio["q3"] / growth}
            | {"activations_kB_per_token": measurement.after["activations_bytes"] / tokens / 1e3}
        )
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    set_defaults(arguments, sizes=[224, 448, 672, 896], precision=["fp32"])
    batches = arguments.batches or ([1, 2, 4] if arguments.quick else [1, 2, 4, 8, 16])
    schedule = Schedule(arguments.rounds, arguments.warmup, arguments.pause)
    fixed = arguments.batch or 1
    settings = []
    for variant, precision, masks in product(arguments.variants, arguments.precision, arguments.masks):
        points = {
            "size": [(size, fixed) for size in arguments.sizes],
            "batch": [(arguments.sizes[0], batch) for batch in batches],
        }
        options = {"mask_ratio": arguments.mask_ratio, "device": arguments.device, "threads": arguments.threads}
        contenders = {
            point: Contender("greenswin", variant, *point, precision, masks, **options)
            for point in dict.fromkeys([*points["size"], *points["batch"]])
        }
        title = f"{variant}, {masks} masks, {precision}"
        measured = measure_interleaved(list(contenders.values()), schedule, after=AFTER, title=f"scaling: {title}")
        by_point = dict(zip(contenders, measured, strict=True))
        raw = [measurement.as_json() for measurement in measured]
        setting: dict[str, Any] = {"title": title, "measurements": raw}
        for axis, of_axis in points.items():
            done = [by_point[point] for point in of_axis if not by_point[point].failure]
            setting[axis] = report_axis(title, axis, build_rows(done, axis))
        if failures(measured):
            print_table(f"failures: {title}", [], failures(measured))
        settings.append(setting)
    return {"settings": settings}


def report_axis(title: str, axis: str, rows: list[Row]) -> dict[str, Any]:
    line, notes = None, []
    if len(rows) > 2:
        line = fit_line([row["visible_tokens"] for row in rows], [row["step_s"] for row in rows])
        fixed, slope = 1e3 * line["intercept"], 1e6 * line["slope"]
        notes.append(f"line through the medians: {fixed:.2f} ms + {slope:.3f} µs per token, r² {line['r2']:.4f}")
    notes.append("relative: time per token over that of the first row, median and quartiles of rounds")
    print_table(f"scaling with {axis}: {title}", rows, notes)
    return {"rows": rows, "line": line}


PART = Part(
    "scaling", "step time against visible tokens, by image size and batch", add_arguments, measure, draw_scaling
)
