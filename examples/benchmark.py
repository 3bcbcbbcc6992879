"""Measure GreenSwin on this machine: `python examples/benchmark.py [PART] [options]`.

Parts: `training` (one step against SimMIM, Hiera and ViT-MAE: time and memory), `dense` (whole images against stock
Swin), `floor` (distance from the time of all matrix products, profile by category), `attention` (its implementations
against each other), `scaling` (time against visible tokens), `plans` (host time of masks and plans), `compile`
(torch.compile against eager) and `grouping` (the solver against exact bin packing). Without a part, all of them one
after another (a forecast of the time comes first); `--quick` only checks that everything runs. Tables are printed;
`--output FILE.json` keeps every raw time as well, with machine, versions and date, and draws a picture of each part
beside it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarking import attention, compilation, dense, floor, grouping, plans, scaling, training
from benchmarking.duration import describe_duration, forecast_seconds
from benchmarking.options import OneLineParser, WrongInput, add_common, set_defaults
from benchmarking.part import Part
from benchmarking.report import describe_run, read_version, write_json

PARTS = (
    training.PART,
    dense.PART,
    floor.PART,
    attention.PART,
    scaling.PART,
    plans.PART,
    compilation.PART,
    grouping.PART,
)
ALL = "all"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for part in PARTS:
        part.add_arguments(commands.add_parser(part.name, help=part.help))
    add_common(commands.add_parser(ALL, help="every part; the default"))
    return parser


def run_part(part: Part, arguments: argparse.Namespace) -> int:
    results = part.measure(arguments)
    if arguments.output is not None:
        write_json({**describe_run(arguments), "results": results}, arguments.output)
        draw(part, results, arguments.output.with_suffix(".png"))
    return 0


def draw(part: Part, results: dict[str, Any], path: Path) -> None:
    if part.draw is None:
        return
    if read_version("matplotlib") is None:
        print("No picture: matplotlib is not installed (pip install green-swin-hf[examples])", file=sys.stderr)
        return
    part.draw(results, path)


def run_all(arguments: argparse.Namespace, argv: Sequence[str]) -> int:
    """Every part with the options that it shares with the others; the report is written after each part."""
    set_defaults(arguments, sizes=[224], precision=["fp32", "bf16"])
    length = "one or two minutes" if arguments.quick else describe_duration(forecast_seconds(arguments))
    print(f"All parts, one after another: {length}. Each is a command of its own, see --help.\n", flush=True)
    report: dict[str, Any] = {**describe_run(arguments), "results": {}}
    for part in PARTS:
        results = report["results"][part.name] = part.measure(arguments_of(part, arguments, argv))
        if arguments.output is not None:
            write_json(report, arguments.output)
            draw(part, results, arguments.output.with_name(f"{arguments.output.stem}_{part.name}.png"))
    return 0


def arguments_of(part: Part, arguments: argparse.Namespace, argv: Sequence[str]) -> argparse.Namespace:
    """The part's own options as if it had been called with the common ones; the solver has none of them."""
    if part.name != "grouping":
        return build_parser().parse_args([part.name, *argv])
    words = ["--masks", "5", "--images-in-pool", "4"] if arguments.quick else []
    return build_parser().parse_args([part.name, *words, *(["--no-exact"] if read_version("ortools") is None else [])])


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words.insert(0, ALL)
    parser = build_parser()
    arguments = parser.parse_args(words)
    try:
        if arguments.command == ALL:
            return run_all(arguments, words[1:])
        return run_part(next(part for part in PARTS if part.name == arguments.command), arguments)
    except WrongInput as wrong:
        print(f"{parser.prog}: error: {wrong}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
