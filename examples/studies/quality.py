"""Does it matter for what is learned? Placement of latents, masks, decoder and windows under one fixed budget.

    python examples/studies/quality.py --quick                       # does it run? minutes on one core, no evidence
    python examples/studies/quality.py                               # all studies, three seeds: hours on one core
    python examples/studies/quality.py --only placement masks        # some of them
    python examples/studies/quality.py                               # goes on where it was stopped

Every setting is pretrained for the same number of epochs on the embedded garments, placed over photographs, and judged
by k-NN, a linear probe and fine-tuning for a fixed number of updates, next to raw pixels and random weights. Each
finished number is kept in `cells.jsonl` at once and never computed again; tables and pictures follow after every
setting. Exit codes: 0 done, 2 wrong input, nothing written, 130 interrupted.
"""

# ruff: noqa: E402 (imports after the line that finds them)

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (0, 1)]  # for the folders beside it

import torch
from benchmarking.report import describe_run
from evidence_study.cells import Cells
from evidence_study.folder import check_same_study, replace_text
from evidence_study.interruption import until_interrupted
from evidence_study.tasks import load_task
from quality_study import report
from quality_study.cells import Run, check_encoders, check_settings, complete, order_of_work
from quality_study.recipe import QualityRecipe
from quality_study.settings import DEFAULT, SETTINGS, STUDIES, Study, settings_of
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from green_swin_hf.recipe_files import load_recipe, save_recipe
from green_swin_hf.training import OneLineParser, check_output_folder, one_line_errors

FULL_RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "studies" / "quality.yaml"
QUICK_RECIPE = FULL_RECIPE.with_name("quality_quick.yaml")
DEFAULT_OUTPUT, QUICK_OUTPUT = Path("outputs/studies/quality"), Path("outputs/studies/quality_quick")


def main(argv: list[str] | None = None) -> int:
    return until_interrupted(functools.partial(run_study, argv), lambda: "Finished cells are kept")


def run_study(argv: list[str] | None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("quality.py"):
        arguments = parse_arguments(argv)
        output = arguments.output_dir
        recipe = read_recipe(arguments)
        check_output_folder(output)
        check_same_study(recipe, output)
        cells = Cells(output / "cells.jsonl")
        check_settings(cells, output)
        device = recipe.choose_device()
        torch.set_num_threads(recipe.threads)
        run = Run(recipe, load_task(recipe), output, cells, device)
        work = order_of_work(settings_of(arguments.only), recipe.seeds)
        check_encoders(run, work)
    transformers_logging.set_verbosity_error()  # the report of missing and left-over weights at every load
    output.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, output / "recipe.yaml")
    print(f"Quality under a fixed budget: {len(work)} settings with their seeds")
    print(f"  images   {describe(run)}\n  output   {output}", flush=True)
    for name, seed in tqdm(work, desc="settings", mininterval=1):
        new = complete(run, name, seed)
        for cell in new:
            tqdm.write(report.one_line(cell))
        if new:
            write_results(run)
    written = write_results(run)
    print((output / "table.md").read_text(encoding="utf-8"))
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. Wrote to {output}: {', '.join(written)}")
    print(f"Next, {next_step(arguments, recipe)}")
    return 0


def next_step(arguments: Namespace, recipe: QualityRecipe) -> str:
    if arguments.quick:
        return "the full study, hours on one core: python examples/studies/quality.py"
    seeds = " ".join(map(str, range(max(recipe.seeds) + 3)))
    return f"more seeds: python examples/studies/quality.py --output-dir {arguments.output_dir} --seeds {seeds}"


# Input


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, help=f"default: {DEFAULT_OUTPUT}; a study there is gone on with")
    parser.add_argument("--quick", action="store_true", help="every setting once with tiny numbers; shows that it runs")
    parser.add_argument("--only", nargs="+", metavar="STUDY", help=f"some of the studies: {', '.join(STUDIES)}")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="default: those of the recipe")
    parser.add_argument("--threads", metavar="THREADS", help="of CPU computation (default: 1)")
    arguments = parser.parse_args(argv)
    arguments.output_dir = arguments.output_dir or (QUICK_OUTPUT if arguments.quick else DEFAULT_OUTPUT)
    arguments.only = arguments.only or list(STUDIES)
    for study in arguments.only:
        if study not in STUDIES:
            raise ValueError(f"--only {study!r} must be one of {', '.join(STUDIES)}")
    return arguments


def read_recipe(arguments: Namespace) -> QualityRecipe:
    """The recipe of the mode, with the seeds and threads that are asked for."""
    recipe = load_recipe(QUICK_RECIPE if arguments.quick else FULL_RECIPE, QualityRecipe)
    given = {name: value for name in ("seeds", "threads") if (value := getattr(arguments, name)) is not None}
    return recipe.replace(**given)


# Results


def write_results(run: Run) -> list[str]:
    """Tables, pictures and a summary of all cells so far, each file whole or not at all; returns their names."""
    cells, heading = run.cells, describe(run)
    studies = {name: study for name, study in STUDIES.items() if has_more_than_default(cells, study)}
    described = describe_run(Namespace(device=run.device.type))
    recipe = run.recipe.to_dict()
    recipe |= {key: Path(recipe[key]).name for key in run.recipe.path_keys}  # not of this machine
    summary = {
        **{name: described[name] for name in ("machine", "versions", "date")},
        "recipe": recipe,
        "images": {name: len(getattr(run.task, name)) for name in ("unlabelled", "train", "validation", "test")},
        "settings": {name: setting.described() for name, setting in SETTINGS.items()},
        "studies": {name: report.differences(cells, study) for name, study in studies.items()},
        "cells": cells.all(),
    }
    replace_text(run.output / "results.json", json.dumps(summary, indent=2) + "\n")
    replace_text(run.output / "table.md", report.tables(cells, list(studies.values()), heading))
    for name, study in studies.items():
        report.draw(cells, study, run.output / f"{name}.png", heading)
    return ["cells.jsonl", "recipe.yaml", "results.json", "table.md", *(f"{name}.png" for name in studies)]


def has_more_than_default(cells: Cells, study: Study) -> bool:
    """Whether there is something of a study to show: the default alone belongs to all of them."""
    return any(cell["arm"] in study.labels and cell["arm"] != DEFAULT for cell in cells.of_kind("probe"))


def describe(run: Run) -> str:
    recipe, task = run.recipe, run.task
    seeds = f"{len(recipe.seeds)} seed{'s' * (len(recipe.seeds) > 1)}"
    return (
        f"{len(task.unlabelled):,} {recipe.task} images of {recipe.image_size} px, {recipe.epochs:g} epochs; "
        f"fine-tuning for {recipe.finetune_updates:,} updates; {len(task.test):,} test images; {seeds}"
    )


if __name__ == "__main__":
    sys.exit(main())
