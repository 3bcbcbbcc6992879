"""Where converted weights come from and whose they are: on the Hub, in `run.json`, in the card of every target."""

import json
import re

import pytest
import torch
from hub_server import HubServer, Repository
from huggingface_hub import ModelCard, ModelCardData
from tiny import randomised, tiny_config
from tiny_results import save_picture
from tiny_swins import refused, run, saved_stock, stock_config, timm_swin
from transformers import SwinBackbone, SwinForImageClassification, SwinModel

from green_swin_hf import GreenSwinForImageClassification
from green_swin_hf.publish import collect_files, find_result
from green_swin_hf.run_record import read_record

TARGETS = ("green-swin", "swin", "timm")


def card_of(folder, target) -> ModelCard:
    if target == "green-swin":  # whose card is made when it is published
        return ModelCard(collect_files(find_result(folder), "someone/model")["README.md"].decode())
    return ModelCard.load(folder / "README.md")


def write_card(folder, **entries) -> None:
    (folder / "README.md").write_text(f"---\n{ModelCardData(**entries).to_yaml()}\n---\n# Swin\n")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "clients")
        yield server


def test_a_source_on_the_hub_keeps_its_licence_through_every_conversion(hub, tmp_path, capsys):
    stock = saved_stock(tmp_path / "stock", SwinModel)
    write_card(stock, license="other", license_name="swin-licence", license_link="https://a.b/c")
    hub.repositories["someone/swin"] = Repository(is_private=False)
    hub.repositories["someone/swin"].add({path.name: path.read_bytes() for path in stock.iterdir()})
    hub.repositories["someone/swin"].add({"training_data.bin": b"not wanted"})
    for target in TARGETS:
        assert run("someone/swin", tmp_path / target, "--to", target) == 0
        assert "Licence of the weights: other" in capsys.readouterr().out
        card = card_of(tmp_path / target, target)
        entries = card.data.to_dict()
        assert (entries["license"], entries["license_name"]) == ("other", "swin-licence")
        assert entries["base_model"] == "someone/swin"
        assert "Licence of the weights: other (swin-licence), https://a.b/c." in card.text
        assert "derive from [someone/swin]" in card.text
    assert not any("training_data" in path for _, path in hub.requests)
    assert run(tmp_path / "green-swin", tmp_path / "again", "--to", "timm") == 0
    assert card_of(tmp_path / "again", "timm").data.to_dict()["base_model"] == "someone/swin"
    assert "does not exist here and cannot be fetched from the Hub" in refused(capsys, "some/swin", tmp_path / "other")


def test_a_conversion_is_pushed_with_its_card(hub, tmp_path, capsys):
    folder = saved_stock(tmp_path / "stock")
    assert run(folder, tmp_path / "out", "--push-to-hub", "--hub-model-id", "swin", "--license", "mit") == 0
    assert "Uploaded to" in capsys.readouterr().out
    card = ModelCard(hub.files("someone/swin")["README.md"].decode())
    assert card.data.to_dict()["license"] == "mit"
    assert hub.repositories["someone/swin"].is_private
    hub.break_at("POST", "/commit/")
    assert run(folder, tmp_path / "again", "--push-to-hub", "--hub-model-id", "swin") == 1
    assert "send it later: python -m green_swin_hf.publish" in capsys.readouterr().err
    assert (tmp_path / "again" / "model.safetensors").is_file()
    error = refused(capsys, folder, tmp_path / "timm", "--to", "timm", "--push-to-hub")
    assert "--push-to-hub is for GreenSwin folders; upload one for timm by: hf upload" in error


@pytest.mark.parametrize("target", TARGETS)
def test_an_unknown_licence_is_said_to_be_unknown_and_none_is_claimed(target, tmp_path, capsys):
    torch.save(timm_swin().state_dict(), tmp_path / "swin.pth")
    words = [tmp_path / "swin.pth", "--image-size", 32, "--to", target]
    assert run(*words, tmp_path / "out") == 0
    assert "Licence of the weights: not known, and the card claims none" in capsys.readouterr().out
    card = card_of(tmp_path / "out", target)
    assert not {"license", "base_model"} & set(card.data.to_dict())
    assert "The weights derive from `swin.pth`." in card.text
    assert "The licence of these weights is not known" in card.text
    record = read_record(tmp_path / "out")
    assert (record["kind"], record["start_from"]) == ("conversion", {"name": "swin.pth", "on_hub": False})
    assert record["weights"].keys() == {"model.safetensors"}

    assert run(*words, tmp_path / "stated", "--license", "mit") == 0
    card = card_of(tmp_path / "stated", target)
    assert card.data.to_dict()["license"] == "mit"
    assert "Licence of the weights: mit." in card.text


def test_a_licence_that_contradicts_the_sources_own_is_refused(tmp_path, capsys):
    folder = saved_stock(tmp_path / "stock")
    write_card(folder, license="cc-by-nc-4.0")
    error = refused(capsys, folder, tmp_path / "out", "--license", "mit")
    assert f"--license mit: the card of {folder} says cc-by-nc-4.0" in error
    assert "must be one word" in refused(capsys, folder, tmp_path / "out", "--license", "do what you like")
    assert run(folder, tmp_path / "out", "--license", "cc-by-nc-4.0") == 0
    assert run(tmp_path / "out", tmp_path / "timm", "--to", "timm") == 0  # the licence is that of the record now
    assert card_of(tmp_path / "timm", "timm").data.to_dict()["license"] == "cc-by-nc-4.0"
    assert not (tmp_path / "other").exists()


EXPORTS = {
    "classifier of transformers": ("classifier", "swin", {}),
    "encoder of transformers": ("encoder", "swin", {"num_channels": 1}),
    "backbone of transformers": ("backbone", "swin", {}),
    "classifier of timm": ("classifier", "timm", {}),
    "encoder of timm": ("encoder", "timm", {"num_channels": 2}),
}


@pytest.mark.parametrize("case", EXPORTS)
def test_the_snippet_of_an_exported_card_runs_as_written(case, tmp_path, monkeypatch):
    kind, target, changes = EXPORTS[case]
    if kind == "backbone":
        randomised(SwinBackbone(stock_config(out_features=["stage1"]))).save_pretrained(tmp_path / "source")
    else:
        randomised(GreenSwinForImageClassification(tiny_config(**changes))).save_pretrained(tmp_path / "source")
    head = ["--drop-head"] if kind == "encoder" else []
    assert run(tmp_path / "source", tmp_path / "out", "--to", target, *head) == 0
    monkeypatch.chdir(tmp_path / "out")
    save_picture(tmp_path / "out" / "picture.jpg")
    card = card_of(tmp_path / "out", target)
    assert card.data.to_dict()["library_name"] == ("timm" if target == "timm" else "transformers")
    assert re.search(r": largest difference of outputs \d\.\de[-+]\d\d", card.text, flags=re.MULTILINE)
    assert not re.search(r"None|Undefined|[{}]%|\{\{|\}\}|\n\n\n\n", card.text)
    (block,) = re.findall(r"^```python\n(.*?)^```", card.text, flags=re.DOTALL | re.MULTILINE)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    if kind == "backbone":
        assert names["maps"][0].shape == (1, 8, 16, 16)
    elif target == "timm":
        assert names["output"].shape == (1, 5 if kind == "classifier" else 32)
    elif kind == "encoder":
        assert names["features"].shape == (1, 16, 32)
    else:
        assert names["output"].logits.shape == (1, 5)


def test_a_folder_that_stock_swin_saved_again_is_mended_by_an_export(tmp_path):
    """It keeps our `auto_map`, which names code that is not beside it."""
    randomised(GreenSwinForImageClassification(tiny_config())).save_pretrained(tmp_path / "ours")
    SwinForImageClassification.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "again")
    assert run(tmp_path / "again", tmp_path / "out", "--to", "swin") == 0
    entries = json.loads((tmp_path / "out" / "config.json").read_text())
    assert entries["model_type"] == "swin"
    assert "auto_map" not in entries
