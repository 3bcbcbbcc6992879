"""Time and memory of a training step: GreenSwin against transformers' SimMIM, over image sizes and batches.

    python examples/studies/time_and_memory.py --quick                            # does it run? a minute or two
    python examples/studies/time_and_memory.py                                    # Swin-T, -B and -L, an hour or more
    python examples/studies/time_and_memory.py --points tiny:224:8,base:448:1     # only these; goes on with a study

Both models run in processes of their own and step in turn, so that what else the machine does meets both; the ratio is
taken round by round. GreenSwin masks each image for itself and computes masks and plans inside the step. On a GPU:
`python examples/benchmark.py training --device cuda`. Exit codes: 0 done, 1 a point was not measured (the others are,
and it is tried again at the next start), 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import functools
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import SWIN_VARIANTS, list_of, masked_image_size, one_of, positive_int
from benchmarking.report import MEGABYTE
from benchmarking.statistics_of_rounds import summarize, summarize_ratios

from green_swin_hf.training import one_line_errors
from studies import study_kit as kit
from studies.study_kit import Row, Study

NAME, TITLE = "time_and_memory", "Time and memory of a training step, GreenSwin against SimMIM"
KEYS = ("variant", "size", "batch", "precision")
PAPER_SPEEDUP, PAPER_MEMORY = 2.7, 0.3  # abstract of arXiv 2205.13515: 2.7 times faster, 70 % less GPU memory
AFTER = ({"do": "process_peak"}, {"do": "memory"})

# (variant, size, batch): by image size at one batch, then by batch at 224 px.
FULL_POINTS = (
    *(("tiny", size, 4) for size in (192, 224, 320, 448)),
    *(("tiny", 224, batch) for batch in (1, 2, 8, 16)),
    *(("base", size, 2) for size in (192, 224, 320, 448)),
    *(("base", 224, batch) for batch in (1, 4, 8)),
    *(("large", size, 1) for size in (192, 224, 320)),
    *(("large", 224, batch) for batch in (2, 4)),
)
QUICK_POINTS = (("tiny", 192, 1), ("tiny", 224, 1))
SMALL_WINDOW = {192: 6}  # as SimMIM's own models at 192 px; stock Swin's window must not be larger than its last grid


@dataclass(frozen=True)
class Settings:
    points: tuple[tuple[str, int, int], ...] = FULL_POINTS
    precision: str = "fp32"
    mask_ratio: float = 0.75
    masks: str = "per-image"
    rounds: int = 5
    warmup: int = 1
    pause: float = 0.3
    threads: int = 1


FULL = Settings()
QUICK = Settings(points=QUICK_POINTS, rounds=1, pause=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors(f"{NAME}.py"):
        parser = kit.build_parser(__doc__, NAME)
        parser.add_argument("--points", type=list_of(read_point), help="variant:pixels:batch, with commas between")
        parser.add_argument("--rounds", type=positive_int, help=f"timed steps of each (default: {FULL.rounds})")
        parser.add_argument("--precision", type=one_of("fp32", "bf16"), help="default: fp32")
        arguments: Namespace = parser.parse_args(argv)
        settings = kit.choose_settings(arguments, QUICK, FULL)
        study = kit.open_study(NAME, TITLE, arguments, settings, KEYS, ("points", "precision"))
    next_step = "python examples/benchmark.py training adds Hiera and ViT-MAE, and measures on a GPU too."
    return kit.run_study(study, build_cells(settings), lambda: write(study), next_step)


def read_point(text: str) -> tuple[str, int, int]:
    """
    >>> read_point("tiny:224:8")
    ('tiny', 224, 8)
    """
    variant, _, rest = text.partition(":")
    size, _, batch = rest.partition(":")
    try:
        return one_of(*SWIN_VARIANTS)(variant), masked_image_size(size), positive_int(batch)
    except ArgumentTypeError as error:
        raise ArgumentTypeError(f"{text!r} must be variant:pixels:batch such as tiny:224:8; {error}") from None


def build_cells(settings: Settings) -> list[tuple[Row, Callable[[], Row]]]:
    cells: list[tuple[Row, Callable[[], Row]]] = []
    for variant, size, batch in settings.points:
        name = {"variant": variant, "size": size, "batch": batch, "precision": settings.precision}
        cells.append((name, functools.partial(measure, settings, variant, size, batch)))
    return cells


def measure(settings: Settings, variant: str, size: int, batch: int) -> Row:
    """One step of both in turn; with a reason instead of figures where one of them could not run."""
    simmim = Contender(
        "simmim",
        variant,
        size,
        batch,
        settings.precision,
        settings.masks,
        settings.mask_ratio,
        threads=settings.threads,
        config={"window_size": SMALL_WINDOW[size]} if size in SMALL_WINDOW else {},
    )
    schedule = Schedule(settings.rounds, settings.warmup, settings.pause)
    contenders = [replace(simmim, kind="greenswin"), simmim]
    green, dense = measure_interleaved(contenders, schedule, after=AFTER, title=f"{variant}, {size} px, batch {batch}")
    failure = green.failure or dense.failure
    if failure:
        return {"failure": failure}
    return compare(green, dense, kit.clock_key(settings.threads))


def compare(green: Measurement, dense: Measurement, clock: str) -> Row:
    """Seconds and megabytes of each, how many times faster the first is, and its share of the other's memory."""
    speedup = summarize_ratios(dense.values(clock), green.values(clock))
    wall = summarize_ratios(dense.values("seconds"), green.values("seconds"))["median"]
    return {
        "green_s": summarize(green.values(clock))["median"],
        "simmim_s": summarize(dense.values(clock))["median"],
        "speedup": speedup["median"],
        "q1": speedup["q1"],
        "q3": speedup["q3"],
        "wall_speedup": wall,
        "green_MB": step_bytes(green) / MEGABYTE,
        "simmim_MB": step_bytes(dense) / MEGABYTE,
        "memory_ratio": step_bytes(green) / step_bytes(dense),
        "activations_ratio": green.after["activations_bytes"] / dense.after["activations_bytes"],
        "measurements": [green.as_json(), dense.as_json()],
    }


def step_bytes(measurement: Measurement) -> int:
    """Weights, gradients, optimizer state, and activations at their peak: what a GPU would have to hold."""
    parts = ("weights_bytes", "gradients_bytes", "optimizer_bytes", "activations_bytes")
    return sum(measurement.after[part] for part in parts)


# Results


def write(study: Study) -> None:
    order = list(SWIN_VARIANTS)
    rows = sorted(study.rows.all(), key=lambda row: (order.index(row["variant"]), row["size"], row["batch"]))
    done = [row for row in rows if "failure" not in row]
    notes = [
        "times faster: SimMIM's step over GreenSwin's of the same round, median and quartiles",
        "MB: weights, gradients, optimizer state and activations of a step, by an exact account of torch's allocator",
        "windows of 7 tokens, at 192 px of 6; at 320 px SimMIM pads its grids to whole windows, GreenSwin does not",
        f"the paper says about {PAPER_SPEEDUP} times faster and 70 % less GPU memory (abstract), on GPUs, against "
        "SimMIM; this is a CPU and transformers' SwinForMaskedImageModeling",
        *(f"not measured: {row['variant']}, {row['size']} px, batch {row['batch']}: {row['failure']}" for row in rows
          if "failure" in row),
    ]  # fmt: skip
    tables = {"A step of both, in turn": [table_row(row) for row in done]}
    kit.write_results(study, tables, {"ratios": draw(done)} if done else {}, notes)


def table_row(row: Row) -> Row:
    return {
        **{key: row[key] for key in KEYS},
        "GreenSwin s": row["green_s"],
        "SimMIM s": row["simmim_s"],
        "times faster": row["speedup"],
        "quartiles": f"{row['q1']:.2f} - {row['q3']:.2f}",
        "GreenSwin MB": row["green_MB"],
        "SimMIM MB": row["simmim_MB"],
        "memory, share": row["memory_ratio"],
        "activations, share": row["activations_ratio"],
    }


def draw(rows: Sequence[Row]) -> Any:
    """Ratios of time and memory against image size and against batch, with the paper's figures as lines."""
    figure, panels = kit.new_figure(2, 2, 4.8, 3.2)
    for column, axis in enumerate(("size", "batch")):
        other = "batch" if axis == "size" else "size"
        for index, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            line = curve(rows, variant, axis, other)
            fixed = f"batch {line[0][other]}" if axis == "size" else f"{line[0][other]} px"
            label = f"Swin-{variant[0].upper()}, {fixed}"
            x = [row[axis] for row in line]
            draw_speedup(panels[0][column], x, line, index, label)
            kit.draw_line(panels[1][column], x, [row["memory_ratio"] for row in line], index, label)
        for axes, paper in ((panels[0][column], PAPER_SPEEDUP), (panels[1][column], PAPER_MEMORY)):
            axes.axhline(paper, label=f"paper, on GPUs: {paper:g}", **kit.PAPER_STYLE)
            axes.set_ylim(bottom=0)
            if axis == "batch":
                axes.set_xscale("log", base=2)
            kit.plain_ticks(axes, sorted({row[axis] for row in rows}))
            axes.tick_params(axis="x", labelsize=8)
        words = "image size, px" if axis == "size" else "batch"
        kit.finish(panels[0][column], words, "" if column else "SimMIM's time / GreenSwin's")
        kit.finish(panels[1][column], words, "" if column else "GreenSwin's memory / SimMIM's", legend=False)
    return figure


def draw_speedup(axes: Any, x: Sequence[float], line: Sequence[Row], index: int, label: str) -> None:
    kit.draw_line(axes, x, [row["speedup"] for row in line], index, label)
    low, high = [row["q1"] for row in line], [row["q3"] for row in line]
    axes.vlines(x, low, high, color=kit.COLOURS[index % 6], linewidth=3, alpha=0.5)


def curve(rows: Sequence[Row], variant: str, axis: str, other: str) -> list[Row]:
    """The rows of a variant along one axis, at the value of the other that has the most of them."""
    mine = [row for row in rows if row["variant"] == variant]
    values = [row[other] for row in mine]
    at = max(values, key=values.count)
    return sorted((row for row in mine if row[other] == at), key=lambda row: row[axis])


if __name__ == "__main__":
    sys.exit(main())
