"""Nothing of a stranger's runs here, nothing of a stranger's reaches out of its folder, and no token is shown."""

import ast
import contextlib
import json
import os
import re
from pathlib import Path

import pytest
import torch
import yaml
from test_examples import (
    TINY,
    _fresh_accelerator,  # noqa: F401
    grey_images,  # noqa: F401
    run_pretrain,
)
from tiny import tiny_config

from green_swin_hf import GreenSwinForImageClassification
from green_swin_hf.evaluation import load_processor, read_config
from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.pretrained_start import load_for_finetuning
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import load_recipe
from green_swin_hf.training import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(
    path for folder in ("green_swin_hf", "examples", "hub_cards") for path in (ROOT / folder).rglob("*.py")
)
TOKEN = "hf_" + "s3cret" * 5

# Calls that run what they read, unless said otherwise by a keyword (name: value that it must have).
REFUSED_CALLS = {
    **dict.fromkeys(("eval", "exec", "compile", "__import__", "os.system", "os.popen"), "it runs what it is given"),
    **dict.fromkeys(("pickle.load", "pickle.loads", "joblib.load", "dill.load", "shelve.open"), "pickles run code"),
    **dict.fromkeys(("yaml.unsafe_load", "yaml.full_load", "yaml.load_all"), "YAML of strangers makes objects"),
    **dict.fromkeys(("tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive"), "members may lead out of a folder"),
}
NEEDED_KEYWORDS = {"torch.load": ("weights_only", True)}
REFUSED_KEYWORDS = (("trust_remote_code", True), ("allow_pickle", True), ("shell", True), ("weights_only", False))


def calls(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            constants = {word.arg: getattr(word.value, "value", word.value) for word in node.keywords}
            yield ast.unparse(node.func), constants, node


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_source_calls_what_could_run_a_strangers_code(path):
    for name, keywords, node in calls(path):
        place = f"{path.name}:{node.lineno}: {name}"
        assert name not in REFUSED_CALLS, f"{place}: {REFUSED_CALLS[name]}"
        if name in NEEDED_KEYWORDS:
            keyword, value = NEEDED_KEYWORDS[name]
            assert keywords.get(keyword) is value, f"{place} needs {keyword}={value}"
        if name == "yaml.load":
            assert ast.unparse(node.args[1]) == "_RecipeLoader", place
        if re.fullmatch(r"Auto(Config|ImageProcessor)\.from_pretrained", name):
            assert keywords.get("trust_remote_code") is False, f"{place} would ask about a folder's code"
        for keyword, value in REFUSED_KEYWORDS:
            assert keywords.get(keyword, not value) is not value, f"{place} has {keyword}={value}"


def test_the_reader_of_recipes_is_the_safe_one():
    from green_swin_hf.recipe_files import _RecipeLoader

    assert issubclass(_RecipeLoader, yaml.SafeLoader)
    assert not issubclass(_RecipeLoader, yaml.FullLoader | yaml.UnsafeLoader)


@pytest.fixture
def strangers_folder(tmp_path):
    """A classifier whose files name code beside them, which leaves a trace when it runs."""
    folder, trace = tmp_path / "model", tmp_path / "ran"
    GreenSwinForImageClassification(tiny_config()).save_pretrained(folder)
    code = f"open({str(trace)!r}, 'w').write('x')\nclass Any: pass\n"
    for name in ("evil", *(path.stem for path in folder.glob("*.py"))):
        (folder / f"{name}.py").write_text(code)
    names = {f"Auto{kind}": "evil.Any" for kind in ("Config", "Model", "ImageProcessor", "ModelForImageClassification")}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": names}))
    processor = {"image_processor_type": "Any", "auto_map": {"AutoImageProcessor": "evil.Any"}}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder, trace


@pytest.mark.parametrize("model_type", ["green_swin", "swin", "unheard-of"])
def test_code_in_a_strangers_model_folder_never_runs_and_nobody_is_asked(strangers_folder, model_type, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: pytest.fail("asked about code"))
    folder, trace = strangers_folder
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": model_type}))
    for load in (read_config, load_processor, lambda name: load_for_finetuning(name, ["a", "b"])):
        with contextlib.suppress(ValueError):
            load(str(folder))
    assert not trace.exists()


def test_a_script_among_the_data_does_not_run(tmp_path):
    from green_swin_hf.image_sources import load_images

    data, trace = tmp_path / "data", tmp_path / "ran"
    data.mkdir()
    (data / "data.py").write_text(f"open({str(trace)!r}, 'w').write('x')\n")
    (data / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="data set"):
        load_images(data)
    assert not trace.exists()


def test_a_checkpoint_of_a_run_that_holds_code_is_refused(tmp_path):
    from green_swin_hf.checkpointing import read_training_state

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"optimizer": Evil()}, tmp_path / "training_state.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        read_training_state(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_key_of_a_recipe_says_where_results_are_written(tmp_path):
    """They go to --output-dir, which only the command line gives."""
    path = tmp_path / "recipe.yaml"
    path.write_text("output_dir: ../../elsewhere\n")
    for kind in (PretrainingRecipe, FinetuningRecipe):
        with pytest.raises(ValueError, match="unknown key 'output_dir'"):
            load_recipe(path, kind)


def test_a_token_is_in_nothing_that_a_run_leaves_or_says(grey_images, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", f"https://me:{TOKEN}@hub.invalid")
    flags = ["--data", grey_images, *TINY, "--max-steps", 1, "--save-every", 1, "--report-to", "tensorboard"]
    assert run_pretrain("--output-dir", tmp_path / "run", *flags) == 0
    assert TOKEN not in "".join(capfd.readouterr())
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 10
    assert [path.name for path in files if TOKEN.encode() in path.read_bytes()] == []


@pytest.mark.parametrize(
    "text",
    [f"cannot open https://me:{TOKEN}@host/x", f"401 for Bearer {TOKEN}", f"{TOKEN} is refused", "?sign=secret1"],
)
def test_an_error_in_one_line_shows_no_credential(text, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"), one_line_errors("a.py"):
        raise ValueError(text)
    shown = capsys.readouterr().err
    assert "***" in shown
    assert TOKEN not in shown
    assert "secret1" not in shown


def test_an_error_in_one_line_keeps_names_that_are_no_credentials(capsys):
    with pytest.raises(SystemExit, match="2"), one_line_errors("a.py"):
        raise ValueError("folder '/data/green_swin_hf_images/hf_images' does not exist")
    assert "'/data/green_swin_hf_images/hf_images'" in capsys.readouterr().err


def test_an_address_with_a_password_as_data_is_refused_without_it(tmp_path, capfd):
    with pytest.raises(SystemExit, match="2"):
        run_pretrain("--data", f"https://me:{TOKEN}@host/set/x", "--output-dir", tmp_path / "run")
    shown = capfd.readouterr()
    assert shown.err.count("\n") == 1
    assert "folder 'https://***@host/set/x' does not exist" in shown.err
    assert TOKEN not in shown.out + shown.err
    assert not (tmp_path / "run").exists()
