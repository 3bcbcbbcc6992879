"""The folder of a study: what keeps its cells of one kind and its files whole."""

from __future__ import annotations

import os
from pathlib import Path

from green_swin_hf.recipe_files import load_recipe

from .recipe import StudyRecipe

WEIGHTS = "model.safetensors"  # arrives last: where it is, the model is whole


def check_same_study(recipe: StudyRecipe, output: Path) -> None:
    """Raise a `ValueError` where a folder holds cells of a study with other settings: they must not be mixed."""
    kept = output / "recipe.yaml"
    if not kept.is_file():
        return
    for name, (now, then) in recipe.differences(load_recipe(kept, type(recipe))).items():
        raise ValueError(f"{output} holds a study with {name} {then}, not {now}; give another --output-dir")


def check_encoder(folder: Path, cells: Path, arm: str, seed: int) -> None:
    """Raise a `ValueError` where a pretrained model that is still needed is not in its folder.

    Args:
        cells: the file that says that it was made.
    """
    if not (folder / WEIGHTS).is_file():
        raise ValueError(
            f"{folder} has no pretrained model, and cells are to be made with it; put the folder back, or remove the "
            f"line of pretraining {arm!r} with seed {seed} from {cells}, so that it is pretrained again"
        )


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
