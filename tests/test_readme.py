"""The README's Python runs as written, and its commands are those of the package."""

import re
from pathlib import Path

import pytest

from green_swin_hf import GreenSwinForMaskedImageModeling
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import load_recipe

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def pretrained(tmp_path, monkeypatch):
    """The working directory after the default run, as far as the README uses it."""
    config = load_recipe(
        ROOT / "examples" / "recipes" / "pretraining" / "fashion_mnist_tiny.yaml", PretrainingRecipe
    ).model_config()
    GreenSwinForMaskedImageModeling(config).save_pretrained(tmp_path / "outputs" / "pretrain")
    (tmp_path / "examples").symlink_to(ROOT / "examples")  # for the photographs
    monkeypatch.chdir(tmp_path)


def test_python_blocks_run_in_order(pretrained):
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 5
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    assert [tuple(feature_map.shape) for feature_map in names["maps"]] == [
        (2, 32, 32, 48),
        (2, 64, 16, 24),
        (2, 128, 8, 12),
    ]


def test_what_it_names_exists():
    for path in re.findall(r"(?:examples|tests)/[\w./-]*\w", README):
        assert (ROOT / path).exists(), path
    rows = re.findall(r"^\| `(\w+\.yaml)`", README, flags=re.MULTILINE)
    assert sorted(rows) == sorted(path.name for path in (ROOT / "examples" / "recipes" / "pretraining").glob("*.yaml"))
    assert "@@" not in README
