"""The folder of a study: what keeps its cells of one kind and its files whole."""

from __future__ import annotations

import os
from pathlib import Path

from green_swin_hf.recipe_files import load_recipe

from .recipe import StudyRecipe


def check_same_study(recipe: StudyRecipe, output: Path) -> None:
    """Raise a `ValueError` where a folder holds cells of a study with other settings: they must not be mixed."""
    kept = output / "recipe.yaml"
    if not kept.is_file():
        return
    for name, (now, then) in recipe.differences(load_recipe(kept, type(recipe))).items():
        raise ValueError(f"{output} holds a study with {name} {then}, not {now}; give another --output-dir")


def replace_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    partial = Path(f"{path}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
