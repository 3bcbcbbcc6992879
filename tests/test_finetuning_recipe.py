"""Fine-tuning recipes: what the published ones say, what a flag drops, and what is refused."""

from pathlib import Path

import pytest

from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.recipe_files import load_recipe, save_recipe

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "finetuning"

PUBLISHED = {
    # name: width, window, base learning rate, layer decay, drop path, learning rate at the end
    "swin_base_window7": (128, 7, 1.25e-3, 0.9, 0.1, 2.5e-7),
    "swin_large_window14": (192, 14, 1e-3, 0.8, 0.3, 2.5e-7),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_hold_the_papers_values(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", FinetuningRecipe)
    config = recipe.model_config()
    ends = recipe.learning_rate * recipe.min_lr_ratio
    found = (config.embed_dim, config.window_size, recipe.learning_rate, recipe.layer_decay, config.drop_path_rate)
    assert (*found, pytest.approx(ends)) == PUBLISHED[name]
    assert (recipe.epochs, recipe.warmup_epochs, recipe.weight_decay, recipe.image_size) == (100, 20, 0.05, 224)
    assert (recipe.mixup, recipe.cutmix, recipe.label_smoothing) == (0.8, 1.0, 0.1)
    assert (recipe.rand_augment, recipe.rand_augment_std) == (9, 0.5)
    assert (recipe.random_erasing, recipe.color_jitter) == (0.25, 0.4)


def test_every_recipe_file_loads_and_the_default_has_its_data():
    for path in RECIPES.glob("*.yaml"):
        load_recipe(path, FinetuningRecipe).model_config()
    default = load_recipe(RECIPES / "fashion_mnist_tiny.yaml", FinetuningRecipe)
    assert Path(default.data).is_dir()
    assert default.model == "outputs/pretrain"


def test_another_model_or_other_data_drop_what_was_said_about_the_former():
    recipe = load_recipe(RECIPES / "fashion_mnist_tiny.yaml", FinetuningRecipe)
    other = recipe.with_flags({"model": "folder"})
    assert (other.model, other.embed_dim, other.image_size, other.mean) == ("folder", None, None, None)
    scratch = recipe.with_flags({"model": "none", "epochs": "16"})
    assert (scratch.from_scratch, scratch.embed_dim, scratch.mean) == (True, 32, (0.286,))
    assert scratch.warmup_epochs == 2
    assert recipe.with_flags({"data": "x"}).test_split is None
    assert recipe.with_flags({"label_budget": "80"}).label_limit == 80
    assert recipe.with_flags({"labels_share": "1"}).label_limit == 1.0


def test_a_saved_recipe_is_the_same_and_names_local_models_relative_to_itself(tmp_path):
    (tmp_path / "model").mkdir()
    recipe = FinetuningRecipe(model=str(tmp_path / "model"), data="someone/dataset", image_size=(64, 96))
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert "model: model" in (tmp_path / "recipe.yaml").read_text()
    assert load_recipe(tmp_path / "recipe.yaml", FinetuningRecipe) == recipe


WRONG = {
    "share": ({"labels_share": 1.5}, "labels_share 1.5 must be at most 1"),
    "both limits": ({"labels_share": 0.5, "label_budget": 3}, "give one of them"),
    "magnitude": ({"rand_augment": 11}, "rand_augment 11.0 must be at most 10"),
    "smoothing": ({"label_smoothing": 1}, "label_smoothing 1.0 must be at least 0 and less than 1"),
    "mixup": ({"mixup": -1}, "mixup -1.0 must be at least 0"),
    "layer decay": ({"layer_decay": 0}, "layer_decay 0.0 must be greater than 0"),
    "warm-up": ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs 5.0 must be less than epochs 5.0"),
    "crop": ({"crop_scale": [1, 0.5]}, "the smaller first"),
    "not a number": ({"learning_rate": float("nan")}, "must be finite"),
    "key": ({"mixupp": 1}, "the closest valid key is 'mixup'"),
}


@pytest.mark.parametrize(("entries", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_values_are_refused(entries, message):
    with pytest.raises(ValueError, match=r".") as caught:
        FinetuningRecipe().with_flags(entries)
    assert message in str(caught.value)
