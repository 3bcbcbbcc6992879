"""Measure what pretraining is worth: frozen features and fine-tuning against converged training from scratch.

    python examples/evidence.py --quick                                            # does it run? a minute, no evidence
    python examples/evidence.py                                                    # embedded images, hours on two cores
    python examples/evidence.py --recipe examples/recipes/evidence/placed_60k.yaml --data /path/to/fashion-mnist
    python examples/evidence.py --output-dir outputs/evidence                      # goes on where it was stopped

Every number stands beside its baselines (raw pixels, an encoder with random weights, training from scratch until its
validation curve is flat) and is repeated for each seed. Each finished number is kept in `cells.jsonl` at once and never
computed again; a training under way is kept every five minutes in `unfinished/`. Tables, picture and `results.json`
follow after every seed. Every key of a recipe is a flag as well.
Exit codes: 0 done, 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from benchmarking.report import describe_run
from evidence_study import report
from evidence_study.arms import ARMS, Arm
from evidence_study.cells import Cell, Cells
from evidence_study.finetuning import build_classifier, check_compiles, finetune
from evidence_study.folder import check_encoder, check_same_study, replace_text
from evidence_study.interruption import until_interrupted
from evidence_study.pretraining import pretrain
from evidence_study.probes import feature_function, probe
from evidence_study.recipe import EvidenceRecipe
from evidence_study.tasks import Task, load_task
from evidence_study.unfinished import KEPT_EVERY, Unfinished
from transformers.utils import logging as transformers_logging

from green_swin_hf.labelled_images import label_budget
from green_swin_hf.recipe_files import add_recipe_flags, flag_overrides, load_recipe, save_recipe
from green_swin_hf.training import OneLineParser, check_output_folder, one_line_errors

KEPT_ON_CTRL_C = f"Finished cells are kept, and a training under way as it was up to {KEPT_EVERY / 60:g} minutes ago"
DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "evidence" / "placed_embedded.yaml"
QUICK_RECIPE = DEFAULT_RECIPE.with_name("quick.yaml")
DEFAULT_OUTPUT, QUICK_OUTPUT = Path("outputs/evidence"), Path("outputs/evidence_quick")


@dataclass(frozen=True)
class Study:
    """What the steps of a study share."""

    recipe: EvidenceRecipe
    task: Task
    output: Path
    cells: Cells
    device: torch.device

    def encoder_folder(self, arm: str, seed: int) -> Path | None:
        """Where the pretrained model of an arm is; None for arms without one."""
        has_one = arm in ARMS and ARMS[arm].method is not None
        return self.output / "encoders" / f"{arm}-{seed}" if has_one else None

    def labelled_rows(self, budget: float, seed: int) -> list[int]:
        return label_budget(self.task.train.labels, budget, seed)


def main(argv: list[str] | None = None) -> int:
    return until_interrupted(functools.partial(run_study, argv), lambda: KEPT_ON_CTRL_C)


def run_study(argv: list[str] | None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("evidence.py"):
        arguments = parse_arguments(argv)
        recipe = read_recipe(arguments)
        check_output_folder(arguments.output_dir)
        check_same_study(recipe, arguments.output_dir)
        device = recipe.choose_device()
        torch.set_num_threads(recipe.threads)
        if recipe.compile:
            check_compiles(device)
        task = load_task(recipe)
        cells = Cells(arguments.output_dir / "cells.jsonl")
        study = Study(recipe, task, arguments.output_dir, cells, device)
        check_encoders(study)
    transformers_logging.set_verbosity_error()  # the report of missing and left-over weights at every load
    study.output.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, study.output / "recipe.yaml")
    print_heading(study)
    for seed in recipe.seeds:
        run_seed(study, seed)
        write_results(study)
    print(report.tables(cells))
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes. Wrote to {study.output}: {', '.join(RESULTS)}")
    print(f"Next, more seeds for example: python examples/evidence.py --output-dir {study.output} --seeds 0 1 2 3 4")
    return 0


# Input


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, metavar="FILE", help="default: that of the output folder, if it has one")
    parser.add_argument("--output-dir", type=Path, help=f"default: {DEFAULT_OUTPUT}; a study there is gone on with")
    parser.add_argument("--quick", action="store_true", help="every part once with tiny numbers; shows that it runs")
    add_recipe_flags(parser.add_argument_group("keys of the recipe"), EvidenceRecipe)
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.recipe:
        raise ValueError("--quick has a recipe of its own; leave out --recipe or --quick")
    arguments.output_dir = arguments.output_dir or (QUICK_OUTPUT if arguments.quick else DEFAULT_OUTPUT)
    return arguments


def read_recipe(arguments: Namespace) -> EvidenceRecipe:
    """The recipe that is named, else that of the output folder, else the default; with flags on top."""
    kept = arguments.output_dir / "recipe.yaml"
    default = QUICK_RECIPE if arguments.quick else DEFAULT_RECIPE
    path = arguments.recipe or (kept if kept.is_file() else default)
    return load_recipe(path, EvidenceRecipe).with_flags(flag_overrides(arguments, EvidenceRecipe))


def check_encoders(study: Study) -> None:
    """Raise a `ValueError` where a pretraining is among the cells, its model is gone, and cells still need it."""
    for seed in study.recipe.seeds:
        for arm in study.recipe.arms:
            folder = study.encoder_folder(arm, seed)
            is_made = study.cells.find("pretraining", arm, seed) is not None
            if folder and is_made and needs_encoder(study, arm, seed):
                check_encoder(folder, study.cells.path, arm, seed)


def needs_encoder(study: Study, arm: str, seed: int) -> bool:
    """Whether a probe or a fine-tuning of an arm and seed is missing, or may prove to be."""
    find = study.cells.find
    return any(
        find("probe", arm, seed, budget) is None
        or any(find("finetune", arm, seed, budget, rate) is None for rate in possible_rates(study, arm, budget, seed))
        for budget in study.recipe.budgets
    )


# Cells


def run_seed(study: Study, seed: int) -> None:
    """All cells of a seed: encoders first, then probes, then fine-tuning from the smallest budget to the largest."""
    arms = [arm for arm in ARMS if arm in study.recipe.arms]
    for arm in arms:
        if ARMS[arm].method:
            run_cell(study, functools.partial(pretraining_cell, study, arm, seed), "pretraining", arm, seed)
    for arm in ("pixels", *arms):
        run_probes(study, arm, seed)
    for budget in sorted(study.recipe.budgets):
        for arm in arms:
            for rate in learning_rates(study, arm, budget, seed):
                make = functools.partial(finetuning_cell, study, arm, seed, budget, rate)
                run_cell(study, make, "finetune", arm, seed, budget, rate)


def run_cell(
    study: Study,
    make: Callable[[Unfinished], Cell],
    kind: str,
    arm: str,
    seed: int,
    budget: float | None = None,
    learning_rate: float | None = None,
) -> Cell:
    """The cell as it was kept, or a new one, whose training goes on where it was interrupted."""
    numbers = {"seed": seed, "budget": budget, "rate": learning_rate}
    parts = [f"{name} {number:g}" for name, number in numbers.items() if number is not None]
    title = ", ".join([f"{kind} {arm}", *parts])
    unfinished = Unfinished(study.output / "unfinished" / title.replace(", ", "-").replace(" ", "-"), title)
    cell = study.cells.find(kind, arm, seed, budget, learning_rate)
    if cell is None:
        cell = keep(study, {"kind": kind, "arm": arm, "seed": seed, "budget": budget, **make(unfinished)})
    unfinished.remove()
    return cell


def keep(study: Study, cell: Cell) -> Cell:
    study.cells.add(cell)
    said = {key: cell[key] for key in ("knn", "linear", "validation", "test", "steps", "cpu_seconds") if key in cell}
    rounded = [f"{key} {value:.4g}" for key, value in said.items()]
    of = [f"{cell['labels']:,} labels" if "labels" in cell else "", f"seed {cell['seed']}"]
    rate = [f"learning rate {cell['learning_rate']:g}"] if "learning_rate" in cell else []
    print(f"  {cell['kind']:<12} {cell['arm']:<12} {', '.join(filter(None, of + rate + rounded))}", flush=True)
    return cell


def pretraining_cell(study: Study, arm: str, seed: int, unfinished: Unfinished) -> Cell:
    folder, method = study.encoder_folder(arm, seed), ARMS[arm].method
    assert folder is not None
    assert method is not None
    epochs = epochs_of(study, ARMS[arm], seed)
    return pretrain(method, study.recipe, study.task, seed, folder, study.device, epochs, unfinished)


def epochs_of(study: Study, arm: Arm, seed: int) -> float:
    """The recipe's epochs, or as many as fit in the arm's share of the time of the dense one with the same seed.

    What an epoch takes is known from arm "green" with that seed.
    """
    if arm.time_of_dense is None:
        return study.recipe.epochs
    green, dense = (study.cells.find("pretraining", name, seed) for name in ("green", "dense"))
    assert green is not None
    assert dense is not None
    key = "cpu_seconds" if study.device.type == "cpu" else "seconds"
    return green["epochs"] * arm.time_of_dense * dense[key] / green[key]


def run_probes(study: Study, arm: str, seed: int) -> None:
    budgets = [budget for budget in study.recipe.budgets if not study.cells.find("probe", arm, seed, budget)]
    if not budgets:
        return
    function = feature_function(arm, study.recipe, seed, study.encoder_folder(arm, seed), study.device)
    subsets = [study.labelled_rows(budget, seed) for budget in budgets]
    results = probe(function, study.task, subsets, study.device, f"probes, {arm}, seed {seed}")
    for budget, subset, result in zip(budgets, subsets, results, strict=True):
        cell = {"kind": "probe", "arm": arm, "seed": seed, "budget": budget, "labels": len(subset)}
        keep(study, {**cell, **result})


def learning_rates(study: Study, arm: str, budget: float, seed: int) -> Iterable[float]:
    """All of the grid for the first seed; for the others the one that was best on its validation images."""
    first = study.recipe.seeds[0]
    best = study.cells.best_finetuning(arm, first, budget)
    return study.recipe.finetune_learning_rates if seed == first or best is None else [best["learning_rate"]]


def possible_rates(study: Study, arm: str, budget: float, seed: int) -> Iterable[float]:
    """`learning_rates`; while the first seed has not tried all of the grid, all of it: any may become its best."""
    first, grid = study.recipe.seeds[0], study.recipe.finetune_learning_rates
    is_chosen = all(study.cells.find("finetune", arm, first, budget, rate) for rate in grid)
    return learning_rates(study, arm, budget, seed) if is_chosen else grid


def finetuning_cell(
    study: Study, arm: str, seed: int, budget: float, learning_rate: float, unfinished: Unfinished
) -> Cell:
    recipe, rows = study.recipe, study.labelled_rows(budget, seed)
    model = build_classifier(recipe, len(study.task.class_names), seed, study.encoder_folder(arm, seed))
    result = finetune(
        model,
        recipe,
        study.task,
        study.task.train.rows(rows),
        learning_rate=learning_rate,
        layer_decay=recipe.layer_decay if ARMS[arm].method else 1.0,
        seed=seed,
        device=study.device,
        title=f"fine-tuning, {arm}, {len(rows):,} labels, seed {seed}, rate {learning_rate:g}",
        unfinished=unfinished,
    )
    return {"labels": len(rows), "learning_rate": learning_rate, **result}


# Results

RESULTS = ("cells.jsonl", "recipe.yaml", "tables.md", "results.json", "accuracy.png")


def write_results(study: Study) -> None:
    """Tables, picture and a summary of all cells so far; each file whole or not at all."""
    described = describe_run(Namespace(device=study.device.type))
    summary = {name: described[name] for name in ("machine", "versions", "date")}
    counts = {name: len(getattr(study.task, name)) for name in ("unlabelled", "train", "validation", "test")}
    recipe = study.recipe.to_dict()
    recipe |= {key: Path(recipe[key]).name for key in study.recipe.path_keys if key in recipe}  # not of this machine
    summary |= {"recipe": recipe, "images": counts, "gains": report.gains(study.cells)}
    replace_text(study.output / "results.json", json.dumps(summary, indent=2) + "\n")
    replace_text(study.output / "tables.md", report.tables(study.cells))
    report.draw(study.cells, study.output / "accuracy.png", describe(study))


def describe(study: Study) -> str:
    recipe, task = study.recipe, study.task
    seeds = f"{len(recipe.seeds)} seed{'s' * (len(recipe.seeds) > 1)}"
    return f"{recipe.task} images, {recipe.image_size} px, {len(task.unlabelled):,} unlabelled, {seeds}"


def print_heading(study: Study) -> None:
    recipe, task = study.recipe, study.task
    parameters = sum(parameter.numel() for parameter in build_classifier(recipe, 10, 0, None).parameters())
    lines = {
        "images": f"{describe(study)}; {len(task.train):,} to label, {len(task.validation):,} validation, "
        f"{len(task.test):,} test, {len(task.class_names)} classes",
        "encoder": f"{parameters / 1e6:.2f} M parameters",
        "pretraining": f"{recipe.epochs:g} epochs, mask ratio {recipe.mask_ratio} (dense {recipe.dense_mask_ratio})",
        "arms": ", ".join(ARMS[arm].title for arm in recipe.arms),
        "device": f"{study.device}, {recipe.threads} thread{'s' * (recipe.threads > 1)}",
        "output": str(study.output),
    }
    print("What pretraining is worth")
    for name, text in lines.items():
        print(f"  {name:<12} {text}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
