"""Recipes from files and flags: types, unknown keys, what the published ones say, and the way back to a file."""

import argparse
import dataclasses
from pathlib import Path

import pytest

from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import add_recipe_flags, flag_overrides, load_recipe, save_recipe

RECIPES = Path(__file__).resolve().parents[1] / "examples" / "recipes" / "pretraining"


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def parse(*flags):
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser, PretrainingRecipe)
    return flag_overrides(parser.parse_args([str(flag) for flag in flags]), PretrainingRecipe)


WRONG = {
    "close": ("mask_ration: 0.5", "unknown key 'mask_ration'; the closest valid key is 'mask_ratio'"),
    "far": ("zzz: 1", "unknown key 'zzz'; the closest valid key is"),
    "number key": ("1: 2", "unknown key '1'"),
    "text for a number": ("epochs: many", "epochs 'many' must be a number"),
    "fraction for an integer": ("batch_size: 1.5", "batch_size 1.5 must be an integer"),
    "truth for a number": ("epochs: true", "epochs True must be a number"),
    "number for truth": ("flip: 1", "flip 1 must be true or false"),
    "one for a list": ("depths: 2", "depths 2 must be a list of integers or null"),
    "list of text": ("crop_scale: [a, b]", "must be two numbers"),
    "too long": ("betas: [0.9, 0.95, 1]", "must be two numbers"),
    "empty list": ("depths: []", "must be a list of integers"),
    "null": ("seed: null", "seed None must be an integer"),
    "choice": ("mask_sharing: all", "mask_sharing 'all' must be one of image, batch"),
    "range": ("mask_ratio: 1.0", "mask_ratio 1.0 must be greater than 0 and less than 1"),
    "order": ("crop_scale: [1.0, 0.2]", "the smaller first"),
    "not finite": ("epochs: .inf", "epochs inf must be finite"),
    "not a number": ("learning_rate: .nan", "learning_rate nan must be finite"),
    "channels": ("mean: [0.5]", "one number for each of the 3 channels"),
    "list": ("- 1", "must be a mapping"),
    "empty": ("", "is empty"),
    "key twice": ("seed: 1\nseed: 2", "key 'seed' is given twice"),
    "warm-up": ("epochs: 5\nwarmup_epochs: 5", "warmup_epochs 5.0 must be less than epochs 5.0"),
    "seed": ("seed: 4294967296", "seed 4294967296 must be less than 2^32"),
    "pad": ("pad: 1000", "pad 1000 must be at most image_size 224"),
    "mean": ("mean: [.nan, 0, 0]", "must be finite"),
    "no yaml": ("a: [", "is not valid YAML"),
    # found by tests/fuzz.py
    "aliases": ("data: &a x\nsplit: *a", "aliases (*name) are not allowed"),
    "alias bomb": (
        "\n".join(["seed: &a0 [1, 1]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40))]),
        "aliases",
    ),
    "nested": ("depths: " + "[" * 3000, "it nests too deeply"),
    "no such day": ("seed: 2020-99-99", "is not valid YAML: month must be in 1..12"),
    "no such truth": ("flip: !!bool maybe", "is not valid YAML"),
    "no such time": ("seed: !!timestamp x", "is not valid YAML"),
    "list as a key": ("? [a]\n: 1", "key ['a'] must be a word"),
    "truth as a key": ("true: 1", "unknown key 'True'"),
    "beyond all floats": ("epochs: 1" + "0" * 400, "must be a number"),
    "beyond all machines": ("workers: 1" + "0" * 30, "must be an integer"),
    "thousands of digits": ("data: 0x" + "F" * 9000, "data of thousands of digits must be text in one line"),
    "half a letter": ('data: "\\ud800"', "data '\\ud800' must be text in one line"),
    "NUL in a path": ('data: "a\\0"', "data 'a\\x00' must be text in one line"),
    "long value": ("mask_sharing: " + "x" * 9000, "must be one of image, batch"),
    "long key": ("x" * 9000 + ": 1", "is not valid YAML"),
    "long": ("# " + "x" * 200_000, "has more than 131,072 bytes"),
    "channels beyond all memory": ("num_channels: 1000000000", "num_channels 1000000000 must be at most 4096"),
    "object": ("seed: !!python/object/apply:os.getcwd []", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "message"), WRONG.values(), ids=WRONG.keys())
def test_a_wrong_recipe_is_refused_in_one_line_that_names_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError, match="recipe") as caught:
        load_recipe(path, PretrainingRecipe)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800


def test_a_text_too_long_for_a_path_is_a_name(tmp_path):
    """Found by tests/fuzz.py: the system refuses to look for it."""
    name = "x" * 9000
    recipe = load_recipe(write(tmp_path, f"data: {name}"), PretrainingRecipe)
    assert recipe.data == name


def test_an_absolute_path_that_does_not_exist_stays_as_it_is(tmp_path):
    """Found by tests/fuzz.py: it became relative, and a relative one that does not exist is not read from the file."""
    recipe = PretrainingRecipe(data="/not/there")
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml", PretrainingRecipe).data == "/not/there"


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.yaml is not a file"):
        load_recipe(tmp_path / "none.yaml", PretrainingRecipe)


def test_values_get_the_type_of_their_field(tmp_path):
    recipe = load_recipe(
        write(tmp_path, "learning_rate: 1e-4\nepochs: 3\nimage_size: [64, 96]\ngroup_size: 64"), PretrainingRecipe
    )
    assert recipe.learning_rate == 1e-4  # text to YAML
    assert isinstance(recipe.epochs, float)
    assert recipe.image_size == (64, 96)
    assert recipe.group_size == "64"
    assert recipe.model_config().image_size == (64, 96)


def test_every_key_has_a_flag_and_flags_win():
    changes = parse("--mask-ratio", 0.6, "--depths", 2, 2, "--no-flip", "--image-size", 64, "--data", "x", "--seed", 3)
    assert changes.keys() == {"mask_ratio", "depths", "flip", "image_size", "data", "seed"}
    recipe = PretrainingRecipe().with_flags(changes)
    assert (recipe.mask_ratio, recipe.depths, recipe.flip) == (0.6, (2, 2), False)
    assert (recipe.image_size, recipe.data, recipe.seed) == (64, "x", 3)
    assert parse("--image-size", 64, 96) == {"image_size": ["64", "96"]}
    assert PretrainingRecipe().replace(depths=["2"]).depths == (2,)
    parser = argparse.ArgumentParser()
    add_recipe_flags(parser, PretrainingRecipe)
    flags = {action.dest for action in parser._actions} - {"help"}
    assert flags == {field.name for field in dataclasses.fields(PretrainingRecipe)}


def test_other_data_drops_what_was_said_about_the_former():
    recipe = PretrainingRecipe(
        data="a", split="training", validation_split="test", image_column="png", num_channels=1, mean=(0.3,)
    )
    changed = recipe.with_flags({"data": "b", "image_column": "jpg"})
    assert (changed.data, changed.split, changed.validation_split, changed.image_column) == ("b", "train", None, "jpg")
    assert recipe.with_flags({"num_channels": "3"}).pixel_mean == (0.485, 0.456, 0.406)
    assert recipe.with_flags({"seed": 1}).pixel_mean == (0.3,)


def test_local_data_is_meant_from_the_file_and_a_saved_recipe_is_the_same(tmp_path):
    (tmp_path / "images").mkdir()
    recipe = load_recipe(
        write(tmp_path, "data: images\ndepths: [1, 2]\nnum_heads: [1, 2]\nepochs: 2"), PretrainingRecipe
    )
    assert recipe.data == str(tmp_path / "images")
    elsewhere = tmp_path / "outputs" / "run" / "recipe.yaml"
    elsewhere.parent.mkdir(parents=True)
    save_recipe(recipe, elsewhere)
    assert "data: ../../images" in elsewhere.read_text()
    assert load_recipe(elsewhere, PretrainingRecipe) == recipe
    assert PretrainingRecipe().replace(**recipe.to_dict()) == recipe
    assert load_recipe(write(tmp_path, "data: someone/dataset"), PretrainingRecipe).data == "someone/dataset"


def test_differences_are_of_what_is_trained_only():
    recipe = PretrainingRecipe()
    assert recipe.differences(recipe.replace(workers=4, save_every=1)) == {}
    assert recipe.differences(recipe.replace(seed=1, mask_ratio=0.5)) == {"seed": (0, 1), "mask_ratio": (0.75, 0.5)}


PUBLISHED = {
    # name: embed_dim, window, base learning rate, mask units
    "swin_base_window7": (128, 7, 1.5e-4, (7, 7)),
    "swin_base_window14": (128, 14, 1.5e-4, (7, 7)),
    "swin_large_window14": (192, 14, 1e-4, (7, 7)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_recipes_hold_the_papers_values(name):
    recipe = load_recipe(RECIPES / f"{name}.yaml", PretrainingRecipe)
    config = recipe.model_config()
    found = (config.embed_dim, config.window_size, recipe.learning_rate, config.mask_grid_size)
    assert found == PUBLISHED[name]
    assert tuple(config.depths) == (2, 2, 18, 2)
    assert (config.decoder_hidden_size, config.decoder_num_hidden_layers) == (512, 1)
    assert (config.decoder_num_attention_heads, config.decoder_intermediate_size) == (16, 2048)
    assert (config.drop_path_rate, config.layer_norm_eps, config.mask_ratio, config.norm_pix_loss) == (
        0,
        1e-6,
        0.75,
        True,
    )
    assert (recipe.weight_decay, recipe.betas, recipe.warmup_epochs, recipe.min_lr_ratio) == (0.05, (0.9, 0.95), 40, 0)
    assert (recipe.crop_scale, recipe.flip, recipe.epochs, recipe.mask_sharing) == ((0.2, 1.0), True, 800, "image")


def test_every_recipe_file_loads_and_the_default_has_its_data():
    files = sorted(RECIPES.glob("*.yaml"))
    assert len(files) >= 4
    for path in files:
        load_recipe(path, PretrainingRecipe).model_config()
    assert Path(load_recipe(RECIPES / "fashion_mnist_tiny.yaml", PretrainingRecipe).data).is_dir()


def test_warm_up_keeps_its_share_of_other_epochs(tmp_path):
    recipe = load_recipe(write(tmp_path, "epochs: 20\nwarmup_epochs: 2"), PretrainingRecipe)
    assert recipe.with_flags({"epochs": "5"}).warmup_epochs == 0.5
    assert recipe.with_flags({"epochs": "5", "warmup_epochs": "1"}).warmup_epochs == 1
    assert load_recipe(write(tmp_path, "epochs: 3"), PretrainingRecipe).warmup_epochs == pytest.approx(
        0.3
    )  # a tenth by default
