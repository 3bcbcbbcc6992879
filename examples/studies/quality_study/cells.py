"""The numbers of one setting and seed: pretraining, then probes, then fine-tuning, each kept as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from evidence_study.cells import Cell, Cells
from evidence_study.finetuning import build_classifier, finetune_for
from evidence_study.folder import check_encoder
from evidence_study.pretraining import build_masked_model, save_model, train_masked
from evidence_study.probes import feature_function, probe
from evidence_study.tasks import Task
from torch import Tensor

from green_swin_hf.data import seeded_generator
from green_swin_hf.labelled_images import label_budget

from .placement import misplace_latents
from .recipe import QualityRecipe
from .settings import PIXELS, SCRATCH, SETTINGS

_SAMPLER_ORDER = 21  # the stream of random numbers for the order in which masks were drawn


@dataclass(frozen=True)
class Run:
    """What all cells share."""

    recipe: QualityRecipe
    task: Task
    output: Path
    cells: Cells
    device: torch.device

    def recipe_of(self, name: str) -> QualityRecipe:
        return self.recipe.replace(**SETTINGS[name].changes) if name in SETTINGS else self.recipe

    def encoder_folder(self, name: str, seed: int) -> Path | None:
        """Where the pretrained model of a setting is; None for those without one."""
        return self.output / "encoders" / f"{name}-{seed}" if name in SETTINGS else None


def kinds_of(name: str) -> list[str]:
    """The cells of a setting, or of what it is compared with."""
    if name == PIXELS:
        return ["probe"]
    return ["pretraining", "probe", "finetune"] if name in SETTINGS else ["probe", "finetune"]


def check_settings(cells: Cells, output: Path) -> None:
    """Raise a `ValueError` where a folder has cells of a setting that meant something else."""
    for cell in cells.of_kind("pretraining"):
        name = cell["arm"]
        if name not in SETTINGS or cell["setting"] != SETTINGS[name].described():
            raise ValueError(
                f"{output} holds a pretraining {name!r} with settings other than this version's; give another "
                "--output-dir"
            )


def check_encoders(run: Run, work: Sequence[tuple[str, int]]) -> None:
    """Raise a `ValueError` where a pretraining is among the cells, its model is gone, and cells still need it.

    Args:
        work: settings and seeds that are to be completed.
    """
    for name, seed in work:
        folder = run.encoder_folder(name, seed)
        missing = [kind for kind in kinds_of(name) if run.cells.find(kind, name, seed) is None]
        if folder and missing and "pretraining" not in missing:
            check_encoder(folder, run.cells.path, name, seed)


def complete(run: Run, name: str, seed: int) -> list[Cell]:
    """Compute and keep the cells of a setting and a seed that are not there; returns these."""
    make = {"pretraining": _pretraining, "probe": _probe, "finetune": _finetuning}
    found = []
    for kind in kinds_of(name):
        if run.cells.find(kind, name, seed) is None:
            cell = {"kind": kind, "arm": name, "seed": seed, **make[kind](run, name, seed)}
            found.append(run.cells.add(cell))
    return found


def _pretraining(run: Run, name: str, seed: int) -> Cell:
    setting, recipe, folder = SETTINGS[name], run.recipe_of(name), run.encoder_folder(name, seed)
    assert folder is not None
    config = recipe.model_config()
    model = build_masked_model("green", config, seed)
    parameters = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("swin", "decoder")}
    if setting.published_placement:
        misplace_latents(model, seeded_generator(seed, _SAMPLER_ORDER), setting.shares_mask)

    def draw_masks(count: int, generator: torch.Generator) -> Tensor:
        return setting.draw_masks(config, count, generator)

    title = f"pretraining, {name}, seed {seed}"
    result = train_masked(
        model, draw_masks, recipe, run.task, seed, run.device, recipe.epochs, recipe.learning_rate, title
    )
    save_model(model, folder)
    return {"setting": setting.described(), "parameters": parameters, **result}


def _probe(run: Run, name: str, seed: int) -> Cell:
    recipe, rows = run.recipe_of(name), label_budget(run.task.train.labels, run.recipe.probe_labels, seed)
    function = feature_function(name, recipe, seed, run.encoder_folder(name, seed), run.device)
    (result,) = probe(function, run.task, [rows], run.device, f"probes, {name}, seed {seed}")
    return {"labels": len(rows), **result}


def _finetuning(run: Run, name: str, seed: int) -> Cell:
    recipe, rows = run.recipe_of(name), label_budget(run.task.train.labels, run.recipe.finetune_labels, seed)
    model = build_classifier(recipe, len(run.task.class_names), seed, run.encoder_folder(name, seed))
    result = finetune_for(
        recipe.finetune_updates,
        model,
        recipe,
        run.task,
        run.task.train.rows(rows),
        learning_rate=recipe.finetune_learning_rate,
        seed=seed,
        device=run.device,
        title=f"fine-tuning, {name}, seed {seed}",
    )
    return {"labels": len(rows), **result}


def order_of_work(settings: list[str], seeds: tuple[int, ...]) -> list[tuple[str, int]]:
    """Settings and seeds in the order in which they are computed: all with the first seed come first.

    Raw pixels depend on no seed but by the labelled images; once is enough.
    """
    first = 4  # the settings that matter most come before the baselines
    names = [*settings[:first], SCRATCH, PIXELS, *settings[first:]]
    return [(name, seed) for seed in seeds for name in names if name != PIXELS or seed == seeds[0]]
