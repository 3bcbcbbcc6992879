"""Publishing to a Hub on loopback, and reading back what was published."""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from hub_server import TOKEN, HubServer, Repository
from huggingface_hub import ModelCard
from test_remote_code import run_without
from tiny import images
from tiny_results import PICTURES, run_record, save_picture, save_result
from tiny_swins import run as run_conversion
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
    publish,
)
from green_swin_hf.hub_upload import open_hub, prepare_upload
from green_swin_hf.redaction import redacted
from green_swin_hf.run_record import write_record

ROOT = Path(__file__).resolve().parents[1]
OTHER_RESULTS = (
    "grey", "pretrained without processor", "classification without processor", "converted", "converted encoder"
)  # fmt: skip


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path)
        monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, for another endpoint
        yield server


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    """A folder of each kind, and a classifier of grey images."""
    parent = tmp_path_factory.mktemp("published")
    folders = {kind: save_result(kind, parent / kind) for kind in PICTURES}
    folders["grey"] = save_result("classification", parent / "grey", is_grey=True)
    for kind in ("pretrained", "classification"):
        folders[f"{kind} without processor"] = shutil.copytree(folders[kind], parent / f"bare_{kind}")
        (folders[f"{kind} without processor"] / "preprocessor_config.json").unlink()
    for name, head in (("converted", []), ("converted encoder", ["--drop-head"])):
        folders[name] = parent / name.replace(" ", "_")
        assert run_conversion(folders["classification"], folders[name], *head) == 0
    return folders


def push(folder, name, *flags):
    return publish.main([str(folder), "--repo-id", f"someone/{name}", *flags])


def fingerprint(folder):
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def test_what_is_pushed_loads_again_and_is_what_was_listed(hub, results, capsys):
    folder = results["classification"]
    before = fingerprint(folder)
    assert push(folder, "shapes") == 0
    said = capsys.readouterr().out
    repository = hub.repositories["someone/shapes"]
    assert repository.is_private
    assert len(repository.commits) == 2  # the one that makes the repository, and ours
    assert set(hub.files("someone/shapes")) == set(re.findall(r"^ +[\d,]+  (\S+)$", said, flags=re.MULTILINE)) | {
        ".gitattributes"
    }
    assert hub.files("someone/shapes")["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert fingerprint(folder) == before

    model = AutoModelForImageClassification.from_pretrained("someone/shapes")
    local = GreenSwinForImageClassification.from_pretrained(folder)
    assert type(model) is GreenSwinForImageClassification
    torch.testing.assert_close(model(images(2)).logits, local(images(2)).logits, rtol=0, atol=0)
    assert type(AutoModel.from_pretrained("someone/shapes")) is GreenSwinModel
    assert AutoImageProcessor.from_pretrained("someone/shapes").size == {"height": 32, "width": 32}
    assert TOKEN in hub.tokens_seen
    backbone = transformers.AutoBackbone.from_pretrained("someone/shapes", out_features=["stage2"])
    assert backbone(images(1)).feature_maps[0].shape == (1, 16, 8, 8)


@pytest.mark.parametrize("result", [*PICTURES, *OTHER_RESULTS])
def test_every_snippet_of_a_card_runs_as_written(hub, results, tmp_path, monkeypatch, result):
    name = result.replace(" ", "-")
    assert push(results[result], name) == 0
    save_picture(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    card = hub.files(f"someone/{name}")["README.md"].decode()
    blocks = re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 1
    names = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)
    if result == "detection":
        assert set(names["found"]) == {"boxes", "labels", "scores", "masks"}
    elif result == "segmentation":
        assert names["classes"].shape == (64, 72)
    elif result == "pretrained":
        assert names["output"].reconstruction.shape == (1, 3, 32, 32)
    elif result == "backbone":
        expected = GreenSwinBackbone.from_pretrained(results[result])(names["pixel_values"]).feature_maps
        for one, other in zip(names["maps"], expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    elif "features" in names:
        assert names["features"].shape[-1] == 32 if "without" in result else len(names["features"][0]) == 16
    elif "answers" not in names:
        assert names["pixel_values"].shape == (1, 3, 64, 64)
    else:
        assert {answer["label"] for answer in names["answers"]} == {"circle", "square", "triangle"}


def test_pipelines_work_on_pushed_folders_and_ask_nothing(hub, results, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda question: asked.append(question) or "n")
    picture = str(save_picture(tmp_path / "picture.jpg"))
    assert push(results["pretrained"], "pretrained") == push(results["grey"], "grey") == 0
    features = pipeline("image-feature-extraction", model="someone/pretrained")(picture)
    assert (len(features[0]), len(features[0][0])) == (16, 32)
    answers = pipeline("image-classification", model="someone/grey")(picture)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)
    assert asked == []


def test_remote_code_runs_straight_from_the_hub_where_the_package_is_not_installed(hub, results, tmp_path, monkeypatch):
    """All snippets that need no package, pipelines included, with a model of grey images and a pinned revision."""
    kinds = ("pretrained", "backbone", "grey")
    assert [push(results[kind], kind) for kind in kinds] == [0, 0, 0]
    save_picture(tmp_path / "picture.jpg")
    cards = [hub.files(f"someone/{kind}")["README.md"].decode() for kind in kinds]
    blocks = [block for card in cards for block in re.findall(r"^```python\n(.*?)^```", card, flags=re.DOTALL | re.M)]
    code = "\n".join(block for block in blocks if "green_swin_hf" not in block)
    assert code.count("from_pretrained") == 5
    for name, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    sha = hub.repositories["someone/grey"].commits[-1][0]
    code += f"""
pinned = {{"revision": {sha!r}, "code_revision": {sha!r}, "trust_remote_code": True}}
model = AutoModelForImageClassification.from_pretrained("someone/grey", **pinned)
remote = [type(each).__module__.startswith("transformers_modules") for each in (model, backbone)]
print(*remote, sorted(answer["label"] for answer in answers))
"""
    said = run_without(code, {"green_swin_hf"}, tmp_path, offline=False)
    assert said.splitlines()[-1] == "True True ['circle', 'square', 'triangle']"


def test_a_pinned_revision_stays_what_it_was(hub, results, tmp_path):
    folder = shutil.copytree(results["pretrained"], tmp_path / "model")
    assert push(folder, "model") == 0
    first = hub.repositories["someone/model"].commits[-1][0]
    model = GreenSwinForMaskedImageModeling.from_pretrained(folder)
    expected = model(images(1)).reconstruction
    torch.nn.init.zeros_(model.decoder.predictor.weight)
    model.save_pretrained(folder)
    assert push(folder, "model") == 0
    load = transformers.AutoModelForMaskedImageModeling.from_pretrained
    assert torch.equal(load("someone/model", revision=first)(images(1)).reconstruction, expected)
    assert not torch.equal(load("someone/model")(images(1)).reconstruction, expected)


def test_files_of_an_earlier_result_go_with_the_commit_of_the_next(hub, results, tmp_path):
    assert push(results["classification"], "model") == 0
    hub.repositories["someone/model"].add({"of_the_user.txt": b"stays"})
    model = GreenSwinForImageClassification.from_pretrained(results["classification"])
    torch.nn.init.constant_(model.classifier.bias, 7.0)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    assert push(tmp_path / "shards", "model") == 0
    files = set(hub.files("someone/model"))
    assert "model.safetensors" not in files
    assert "predictions.png" not in files
    assert "of_the_user.txt" in files
    read = AutoModelForImageClassification.from_pretrained("someone/model")
    assert torch.equal(read.classifier.bias, model.classifier.bias)


def test_names_of_classes_are_published_as_they_are(hub, results, tmp_path):
    names = ["/m/01g317", "../x", "C:\\x"]
    model = GreenSwinForImageClassification.from_pretrained(results["classification"])
    model.config.id2label = dict(enumerate(names))
    model.config.label2id = {name: index for index, name in enumerate(names)}
    model.save_pretrained(tmp_path / "model")
    assert push(tmp_path / "model", "model") == 0
    config = AutoModelForImageClassification.from_pretrained("someone/model").config
    assert list(config.id2label.values()) == names
    assert config.label2id == {name: index for index, name in enumerate(names)}


def test_a_private_repository_needs_a_token_and_a_public_one_none(hub, results, monkeypatch):
    assert push(results["pretrained"], "hidden") == push(results["pretrained"], "shown", "--public") == 0
    monkeypatch.delenv("HF_TOKEN")
    assert not hub.repositories["someone/shown"].is_private
    assert type(AutoModel.from_pretrained("someone/shown")) is GreenSwinModel
    with pytest.raises(OSError, match="someone/hidden"):
        AutoModel.from_pretrained("someone/hidden")


@pytest.mark.parametrize(
    ("method", "part", "status"),
    [("PUT", "/lfs/", 500), ("PUT", "/lfs/", 403), ("POST", "/commit/", 500), ("POST", "/objects/batch", 503)],
)
def test_an_upload_that_breaks_off_leaves_the_repository_whole_and_can_be_repeated(
    hub, results, tmp_path, capfd, method, part, status
):
    folder = shutil.copytree(results["classification"], tmp_path / "model")
    assert push(folder, "model") == 0
    before = dict(hub.files("someone/model"))
    commits = len(hub.repositories["someone/model"].commits)
    model = GreenSwinForImageClassification.from_pretrained(folder)
    torch.nn.init.ones_(model.classifier.bias)
    model.save_pretrained(folder)
    capfd.readouterr()

    hub.break_at(method, part, status)
    assert push(folder, "model") == 1
    said = capfd.readouterr()
    last = said.err.strip().splitlines()[-1]
    assert last.startswith("publish: the upload failed: ")
    assert "repeat the command" in last
    assert TOKEN not in said.out + said.err  # which the broken server repeats
    assert hub.files("someone/model") == before
    assert len(hub.repositories["someone/model"].commits) == commits
    assert type(AutoModel.from_pretrained("someone/model")) is GreenSwinModel  # still a whole model

    hub.mend()
    assert push(folder, "model") == 0
    assert hub.files("someone/model")["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_pushing_the_same_again_makes_no_commit(hub, results):
    assert push(results["pretrained"], "model") == push(results["pretrained"], "model") == 0
    assert len(hub.repositories["someone/model"].commits) == 2


def test_a_dry_run_shows_all_and_contacts_nobody(hub, results, capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    before = fingerprint(results["segmentation"])
    assert push(results["segmentation"], "model", "--dry-run", "--license", "mit") == 0
    said = capsys.readouterr().out
    assert hub.requests == []
    assert fingerprint(results["segmentation"]) == before
    size = (results["segmentation"] / "model.safetensors").stat().st_size
    assert re.search(rf"^ +{size:,}  model.safetensors$", said, flags=re.MULTILINE)
    assert "Would upload" in said
    assert "private" in said
    listed, _, card = said.partition("The card (README.md), as it would be uploaded:\n\n")
    assert "README.md" in listed
    assert ModelCard(card).data.to_dict()["license"] == "mit"
    assert "## Licence and origin" in card
    assert set(temporary.iterdir()) == set()


def test_a_name_without_a_user_is_ones_own(hub, results):
    assert publish.main([str(results["pretrained"]), "--repo-id", "model"]) == 0
    assert "someone/model" in hub.files("someone/model")["README.md"].decode()


WRONG_INPUT = {
    "no folder": ("{folder}/none --repo-id someone/a", "is no folder; give the output folder of a run"),
    "nothing there": ("{folder} --repo-id someone/a", "holds no config.json"),
    "unfinished run": ("{run} --repo-id someone/a", "its run has not finished"),
    "another model": ("{bert} --repo-id someone/a", "holds no GreenSwin but a BertModel of type 'bert'"),
    "no weights": ("{empty} --repo-id someone/a", "holds no weights (model.safetensors)"),
    "damaged config": ("{damaged} --repo-id someone/a", "config.json cannot be read"),
    "damaged record": ("{model} --repo-id someone/a", "run.json cannot be read"),
    "no repository": ("{good}", "--repo-id"),
    "name": ("{good} --repo-id some/one/a", "has no valid name"),
    "name, dry run": ("{good} --repo-id my+model! --dry-run", "has no valid name"),
    "index that names another file": ("{index} --repo-id someone/a", "names '../../secret.safetensors'"),
    "a link": ("{link} --repo-id someone/a", "outside the folder"),
    "two sets of weights": ("{both} --repo-id someone/a", "holds both model.safetensors and"),
    "other weights than recorded": ("{changed} --repo-id someone/a", "not those that its run.json was written for"),
    "strange record": ("{strange} --repo-id someone/a", "does not hold what a run writes"),
    "strange config": ("{list} --repo-id someone/a", "does not hold what a run writes"),
    "another user": ("{good} --repo-id other/a", "refuses 'other/a'"),
    "public already": ("{good} --repo-id someone/shown", "is a public repository already"),
    "flag": ("{good} --repo-id someone/a --pubic", "unrecognized arguments: --pubic"),
}


def spoiled(good, parent):
    """Copies of a folder with one thing wrong in each."""
    names = ("index", "link", "both", "changed", "strange", "list")
    folders = {name: Path(shutil.copytree(good, parent / "spoiled" / name)) for name in names}
    (folders["index"] / "model.safetensors").unlink()
    index = json.dumps({"weight_map": {"x": "../../secret.safetensors"}})
    (folders["index"] / "model.safetensors.index.json").write_text(index)
    (folders["both"] / "model.safetensors.index.json").write_text(index)
    (parent / "secret").write_text("secret")
    (folders["link"] / "log.jsonl").unlink()
    (folders["link"] / "log.jsonl").symlink_to(parent / "secret")
    write_record(folders["changed"], {**run_record("pretrained"), "weights": {"model.safetensors": "0" * 64}})
    write_record(folders["strange"], run_record("pretrained", starts=5))
    (folders["list"] / "config.json").write_text("[]")
    return folders


@pytest.mark.parametrize(("words", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2_and_uploads_nothing(hub, results, tmp_path, capfd, words, message):
    folders = {name: tmp_path / name for name in ("folder", "run", "bert", "empty", "damaged", "model")}
    for folder in folders.values():
        folder.mkdir()
    (folders["run"] / "checkpoints").mkdir()
    (folders["bert"] / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    shutil.copy(results["pretrained"] / "config.json", folders["empty"])
    (folders["damaged"] / "config.json").write_text("{")
    shutil.copytree(results["pretrained"], folders["model"], dirs_exist_ok=True)
    (folders["model"] / "run.json").write_text("{")
    folders |= spoiled(results["pretrained"], tmp_path)
    hub.repositories["someone/shown"] = Repository(is_private=False)
    hub.repositories["someone/shown"].add({})
    with pytest.raises(SystemExit) as stopped:
        publish.main(words.format(good=results["pretrained"], **folders).split())
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("publish: error: ")
    assert message in lines[0]
    assert all(len(repository.commits) == 1 for repository in hub.repositories.values())
    assert hub.large_files == {}


def test_no_credential_is_ever_printed(hub, monkeypatch, capfd):
    """Not the token in use, which errors of a server or a proxy may repeat, nor any other, nor a password."""
    hub.break_at("GET", "whoami", 418)
    with pytest.raises(ValueError, match="refuses") as refused:
        prepare_upload("someone/model")
    assert "***" in str(refused.value)
    assert TOKEN not in str(refused.value)
    text = redacted(f"a {TOKEN} b https://me:pass@host/x?Signature=ab%2F&Expires=1 Bearer abc.def hf_abcdefghijkl")
    assert text == "a *** b https://***@host/x?*** Bearer *** ***"
    monkeypatch.setenv("HF_TOKEN", "a.token+of(no)known*form")
    assert redacted("x a.token+of(no)known*form y") == "x *** y"


def test_whatever_goes_wrong_in_asking_reaches_every_process(monkeypatch, tmp_path):
    """The others wait for the answer of the first."""
    sent = []
    monkeypatch.setattr("green_swin_hf.hub_upload.broadcast_object_list", sent.append)
    monkeypatch.setattr("green_swin_hf.hub_upload.get_token", lambda: (tmp_path / "no token").read_text())
    arguments = argparse.Namespace(push_to_hub=True, hub_model_id="model", hub_public=False)
    with pytest.raises(ValueError, match=r"cannot be prepared \(FileNotFoundError: .*publish later") as caught:
        open_hub(arguments, tmp_path)
    assert sent == [[None, str(caught.value)]]


@pytest.mark.parametrize("token", [None, "hf_" + "wrong" * 6], ids=["none", "wrong"])
def test_without_a_good_token_nothing_is_made(hub, results, monkeypatch, capfd, token):
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit, match="2"):
        push(results["pretrained"], "model")
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert "HF_TOKEN" in line
    assert not token or token not in line
    assert hub.repositories == {}


def test_the_command_of_an_installed_wheel_as_a_user_gives_it(hub, results, tmp_path):
    """The templates of cards travel with the package; a detector needs no remote code."""
    pytest.importorskip("setuptools", minversion="77")
    source, installed = tmp_path / "source", tmp_path / "installed"
    for name in ("green_swin_hf", "hub_cards"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True)
    with zipfile.ZipFile(source / done.stdout.splitlines()[-1]) as wheel:
        wheel.extractall(installed)
    shutil.rmtree(source)
    command = [sys.executable, "-m", "green_swin_hf.publish", results["detection"], "--repo-id", "someone/detector"]
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", **hub.environment(tmp_path)}
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Uploaded to http://127.0.0.1" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    assert {"detector.json", "README.md"} <= set(hub.files("someone/detector"))
    assert "modeling_green_swin.py" not in hub.files("someone/detector")
