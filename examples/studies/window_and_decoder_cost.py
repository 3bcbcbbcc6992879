"""What windows of 7 or 14 tokens and decoders of several depths and widths cost: time, memory, parameters, operations.

    python examples/studies/window_and_decoder_cost.py --quick     # does it run? a minute or two
    python examples/studies/window_and_decoder_cost.py             # the study; goes on where it was stopped

Each model takes training steps in turn with the one that it is compared with (window 7, or one decoder block of width
512), each in a process of its own. The quality that they reach is the matter of `quality.py`. Exit codes: 0 done, 1
a model was not measured (the others are, and it is tried again at the next start), 2 wrong input, nothing written, 130
interrupted.
"""

from __future__ import annotations

import functools
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.contenders import Contender, build_model
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import list_of, one_of, positive_int
from benchmarking.report import MEGABYTE
from benchmarking.statistics_of_rounds import summarize, summarize_ratios

from green_swin_hf import sample_masks
from green_swin_hf.training import one_line_errors
from studies import study_kit as kit
from studies.study_kit import Row, Study
from studies.time_and_memory import step_bytes

NAME, TITLE = "window_and_decoder_cost", "Cost of window size and of the decoder"
KEYS = ("kind", "variant", "size", "value")
HEAD_CHANNELS = 32  # of a decoder, as in one of width 512 with 16 heads
DEFAULTS = {"window": 7, "decoder depth": 1, "decoder width": 512}
BATCHES = {"tiny": 4, "base": 2, "micro": 1}  # at 224 px
AFTER = ({"do": "memory"},)


@dataclass(frozen=True)
class Settings:
    variants: tuple[str, ...] = ("tiny", "base")
    sizes: tuple[int, ...] = (224, 448)
    windows: tuple[int, ...] = (14,)
    depths: tuple[int, ...] = (2, 4, 8)
    widths: tuple[int, ...] = (128, 256, 1024)
    mask_ratio: float = 0.75
    precision: str = "fp32"
    rounds: int = 5
    warmup: int = 1
    pause: float = 0.3
    threads: int = 1


FULL = Settings()
QUICK = Settings(variants=("tiny",), sizes=(224,), depths=(8,), widths=(), rounds=1, pause=0.0)


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors(f"{NAME}.py"):
        parser = kit.build_parser(__doc__, NAME)
        parser.add_argument("--variants", type=list_of(one_of(*BATCHES)), help="default: tiny,base")
        parser.add_argument("--rounds", type=positive_int, help=f"timed steps of each (default: {FULL.rounds})")
        arguments: Namespace = parser.parse_args(argv)
        settings = kit.choose_settings(arguments, QUICK, FULL)
        free = ("variants", "sizes", "windows", "depths", "widths")
        study = kit.open_study(NAME, TITLE, arguments, settings, KEYS, free)
    next_step = "python examples/studies/quality.py measures what the decoder's depth and width are worth."
    return kit.run_study(study, build_cells(settings), lambda: write(study), next_step)


def build_cells(settings: Settings) -> list[tuple[Row, Callable[[], Row]]]:
    """Windows at every size; decoders at the first."""
    cells: list[tuple[Row, Callable[[], Row]]] = []
    for variant in settings.variants:
        values = {"decoder depth": settings.depths, "decoder width": settings.widths}
        points = [("window", size, window) for size, window in product(settings.sizes, settings.windows)]
        points += [(kind, settings.sizes[0], value) for kind in values for value in values[kind]]
        for kind, size, value in points:
            name = {"kind": kind, "variant": variant, "size": size, "value": value}
            cells.append((name, functools.partial(measure, settings, kind, variant, size, value)))
    return cells


def config_of(kind: str, value: int) -> dict[str, Any]:
    """The fields of a configuration that say it."""
    if kind == "window":
        return {"window_size": value}
    if kind == "decoder depth":
        return {"decoder_num_hidden_layers": value}
    heads = max(1, value // HEAD_CHANNELS)
    return {"decoder_hidden_size": value, "decoder_num_attention_heads": heads, "decoder_intermediate_size": 4 * value}


def contender_for(settings: Settings, kind: str, variant: str, size: int, value: int) -> Contender:
    batch = max(1, BATCHES[variant] * 224**2 // size**2)
    return Contender(
        "greenswin",
        variant,
        size,
        batch,
        settings.precision,
        mask_ratio=settings.mask_ratio,
        threads=settings.threads,
        config=config_of(kind, value),
    )


def measure(settings: Settings, kind: str, variant: str, size: int, value: int) -> Row:
    """The model and the default one in turn; with a reason instead of figures where one of them could not run."""
    default, model = (contender_for(settings, kind, variant, size, each) for each in (DEFAULTS[kind], value))
    schedule = Schedule(settings.rounds, settings.warmup, settings.pause)
    title = f"{variant}, {size} px, {kind} {value}"
    base, changed = measure_interleaved([default, model], schedule, after=AFTER, title=title)
    failure = base.failure or changed.failure
    if failure:
        return {"failure": failure}
    clock = kit.clock_key(settings.threads)
    ratios = summarize_ratios(changed.values(clock), base.values(clock))
    return {
        "batch": model.batch,
        "default": figures_of(base, clock),
        "changed": figures_of(changed, clock),
        "time_ratio": ratios["median"],
        "q1": ratios["q1"],
        "q3": ratios["q3"],
    }


def figures_of(measurement: Measurement, clock: str) -> Row:
    sizes = measurement.description
    return {
        "step_s": summarize(measurement.values(clock))["median"],
        "MB": step_bytes(measurement) / MEGABYTE,
        "parameters": sizes["parameters"],
        "encoder_parameters": sizes["encoder_parameters"],
        "multiply_adds": count_multiply_adds(measurement.contender),
    }


def count_multiply_adds(contender: Contender) -> int:
    """Multiply-adds of all matrix products of one image's forward pass under one mask."""
    model, _ = build_model(replace(contender, attention="eager"))  # torch does not count those of its CPU kernel
    side = contender.image_size // 32
    masks = sample_masks(1, (side, side), contender.mask_ratio, torch.Generator().manual_seed(0))
    images = torch.zeros(1, 3, contender.image_size, contender.image_size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.train()(pixel_values=images, bool_masked_pos=masks)
    return counter.get_total_flops() // 2


# Results


def write(study: Study) -> None:
    rows = study.rows.all()
    done = [row for row in rows if "failure" not in row]
    kinds = list(dict.fromkeys(row["kind"] for row in done))
    tables = {}
    for kind in kinds:
        tables[f"{kind.capitalize()}, against {DEFAULTS[kind]}"] = [table_row(r) for r in done if r["kind"] == kind]
    notes = [
        "time: of a training step over the default's of the same round, median and quartiles",
        "MB: weights, gradients, optimizer state and activations of a step; G: multiply-adds of one image's forward "
        "pass, matrix products only, of the default and of the model",
        f"decoder width: {HEAD_CHANNELS} channels to a head, an MLP four times as wide",
        *(f"not measured: {row['variant']}, {row['size']} px, {row['kind']} {row['value']}: {row['failure']}"
          for row in rows if "failure" in row),
    ]  # fmt: skip
    kit.write_results(study, tables, {"cost": draw(done)} if done else {}, notes)


def table_row(row: Row) -> Row:
    default, changed = row["default"], row["changed"]
    return {
        **{key: row[key] for key in ("variant", "size", "batch")},
        row["kind"]: row["value"],
        "time": row["time_ratio"],
        "quartiles": f"{row['q1']:.2f} - {row['q3']:.2f}",
        "s default": default["step_s"],
        "s": changed["step_s"],
        "MB default": default["MB"],
        "MB": changed["MB"],
        "M parameters default": default["parameters"] / 1e6,
        "M parameters": changed["parameters"] / 1e6,
        "G default": default["multiply_adds"] / 1e9,
        "G": changed["multiply_adds"] / 1e9,
    }


def draw(rows: Sequence[Row]) -> Any:
    """Time, memory, parameters and multiply-adds over those of the default, a panel for each kind."""
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    figure, panels = kit.new_figure(1, len(kinds), 4.6, 3.6)
    for axes, kind in zip(panels[0], kinds, strict=True):
        mine = [row for row in rows if row["kind"] == kind]
        if kind == "window":
            draw_bars(axes, mine)
        else:
            draw_lines(axes, kind, mine)
        axes.axhline(1, color="#000000", linewidth=0.8, linestyle=":")
        axes.set_ylim(bottom=0)
        title = "window 14" if kind == "window" else f"{kind}, {mine[0]['size']} px"
        label = "" if kind == "window" else kind
        kit.finish(axes, label, f"times that of {kind} {DEFAULTS[kind]}", title, True)
    return figure


def ratios_of(row: Row) -> dict[str, float]:
    default, changed = row["default"], row["changed"]
    keys = {"multiply-adds": "multiply_adds", "memory": "MB", "parameters": "parameters"}
    return {"time": row["time_ratio"], **{name: changed[key] / default[key] for name, key in keys.items()}}


def draw_bars(axes: Any, rows: Sequence[Row]) -> None:
    for index, name in enumerate(ratios_of(rows[0])):
        places = [at + 0.2 * (index - 1.5) for at in range(len(rows))]
        style = {"color": kit.COLOURS[index], "hatch": kit.HATCHES[index], "edgecolor": "white"}
        axes.bar(places, [ratios_of(row)[name] for row in rows], width=0.2, label=name, **style)
    axes.set_xticks(range(len(rows)), [f"Swin-{row['variant'][0].upper()}\n{row['size']} px" for row in rows])
    axes.margins(y=0.6)  # room for the legend


def draw_lines(axes: Any, kind: str, rows: Sequence[Row]) -> None:
    for offset, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        mine = sorted((row for row in rows if row["variant"] == variant), key=lambda row: row["value"])
        for index, name in enumerate(("time", "multiply-adds")):
            points = sorted([(DEFAULTS[kind], 1.0), *((row["value"], ratios_of(row)[name]) for row in mine)])
            x, y = zip(*points, strict=True)
            kit.draw_line(axes, x, y, 2 * offset + index, f"{name}, Swin-{variant[0].upper()}")
    axes.set_xscale("log", base=2)
    kit.plain_ticks(axes, sorted({DEFAULTS[kind], *(row["value"] for row in rows)}))


if __name__ == "__main__":
    sys.exit(main())
