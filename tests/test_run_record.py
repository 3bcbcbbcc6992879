"""What a run records of itself."""

import json

import pytest
import torch
from hub_server import HubServer, Repository
from huggingface_hub import ModelCardData

from green_swin_hf import energy, run_record
from green_swin_hf.energy import NO_COUNTRY, EnergyMeter, check_energy
from green_swin_hf.run_record import (
    RunRecord,
    describe_data,
    describe_start,
    read_record,
    total_energy,
    total_seconds,
    write_record,
)


def start(folder, **changes):
    options = {"is_resumed": False, "device": torch.device("cpu"), "precision": "no", **changes}
    return RunRecord(folder, "pretraining", "pretrain.py", **options)


class Meter:
    def __init__(self, country):
        self.country = country

    def stop(self):
        return {"kwh": 0.5, "source": "a meter", "co2_eq_grams": 7.0, "country": self.country}


def test_a_record_holds_machine_versions_time_and_what_was_noted(tmp_path):
    record = start(tmp_path)
    assert read_record(tmp_path)["starts"][0].keys() == {
        "started", "device", "precision", "processes", "threads", "machine", "versions",
    }  # fmt: skip
    record.note(model={"parameters": 7}, start_from=None)
    record.stop(training={"updates": 3, "epochs": None}, metrics=[])
    found = read_record(tmp_path)
    assert (found["kind"], found["script"], found["model"]) == ("pretraining", "pretrain.py", {"parameters": 7})
    assert found["training"] == {"updates": 3}
    assert "start_from" not in found
    (only,) = found["starts"]
    assert (only["device"], only["precision"], only["processes"]) == ("cpu", "fp32", 1)
    assert only["threads"] == torch.get_num_threads()
    assert only["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert only["machine"]["cores"] >= 1
    assert total_seconds(found) == only["seconds"] >= 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_a_run_that_goes_on_adds_up(tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "EnergyMeter", Meter)
    start(tmp_path, track_energy="DEU").stop(model={"parameters": 7})
    start(tmp_path, is_resumed=True, track_energy="ISL").stop()
    found = read_record(tmp_path)
    assert found["model"] == {"parameters": 7}
    assert len(found["starts"]) == 2
    assert total_energy(found) == {"kwh": 1.0, "source": "a meter", "co2_eq_grams": 14.0, "country": "DEU, ISL"}
    found["starts"][0].pop("seconds")
    assert total_seconds(found) is None


def test_a_start_that_was_cut_off_leaves_the_total_open(tmp_path):
    start(tmp_path)  # and no stop
    start(tmp_path, is_resumed=True).stop()
    assert total_seconds(read_record(tmp_path)) is None
    assert total_energy(read_record(tmp_path)) == {}


def test_going_on_without_a_record_says_that_something_is_missing(tmp_path):
    start(tmp_path, is_resumed=True).stop()
    found = read_record(tmp_path)
    assert found["starts"][0] == {}
    assert total_seconds(found) is None


def test_a_damaged_record_is_named(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match="is no record of a run"):
        read_record(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        start(tmp_path, is_resumed=True)


def test_only_names_of_local_data_are_kept(tmp_path):
    (tmp_path / "pictures").mkdir()
    assert describe_data(str(tmp_path / "pictures"), train_images=3) == {
        "name": "pictures", "on_hub": False, "train_images": 3,
    }  # fmt: skip
    assert describe_data("someone/pictures") == {"name": "someone/pictures", "on_hub": True}
    assert describe_data("/moved/away/pictures") == {"name": "pictures", "on_hub": False}
    for name in ("file:///home/me/pictures", "\\\\server\\share\\pictures", "~/pictures", "../pictures/"):
        assert describe_data(name) == {"name": "pictures", "on_hub": False}
    for name in ("s3://key:se/cr=et@bucket/pictures", "https://me:pass@host/pictures?signature=abc"):
        described = str(describe_data(name))
        assert "***" in described
        assert not any(secret in described for secret in ("key", "cr=et", "me:", "pass", "abc"))


def test_no_credential_reaches_a_record(tmp_path):
    write_record(tmp_path, {"kind": "x", "data": {"name": "s3://AKIAKEY@bucket/x"}, "more": ["hf_" + 20 * "a"]})
    text = (tmp_path / "run.json").read_text()
    assert "AKIAKEY" not in text
    assert "hf_" not in text
    assert "s3://***@bucket/x" in text


def card_text(**entries):
    return f"---\n{ModelCardData(**entries).to_yaml()}\n---\n"


def test_what_weights_of_the_hub_come_from_is_read_from_their_card(tmp_path, monkeypatch):
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path)
        hub.repositories["someone/swin"] = Repository(is_private=False)
        hub.repositories["someone/swin"].add({"README.md": card_text(license="mit", base_model="a/b").encode()})
        known = {"name": "someone/swin", "on_hub": True, "base_model": "someone/swin"}
        assert describe_start("someone/swin") == {**known, "license": "mit"}
        missing = {"name": "no/swin", "on_hub": True, "base_model": "no/swin"}
        assert describe_start("no/swin") == missing
        assert describe_start("no/swin", tmp_path) == missing
        (tmp_path / "README.md").write_text(card_text(license=["mit"]))
        assert describe_start("no/swin", tmp_path) == {**missing, "license": "mit"}
        for strange in ("---\n- a\n---\n", "---\nlicense: [a, b]\n---\n", "---\n}{\n---\n", "\xff"):
            (tmp_path / "README.md").write_bytes(strange.encode("latin-1"))
            assert describe_start("no/swin", tmp_path) == missing


def test_what_weights_come_from_is_read_from_their_folder(tmp_path):
    assert describe_start(None) is None
    stock = {"name": "microsoft/swin-x", "on_hub": True, "base_model": "microsoft/swin-x"}
    folder = tmp_path / "model"
    folder.mkdir()
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False}
    (folder / "README.md").write_text(card_text(license="mit", base_model="a/b"))
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False, "license": "mit", "base_model": "a/b"}
    start = {"started": "2031-05-06T07:08:09+00:00"}
    write_record(folder, {"kind": "pretraining", "starts": [start]})  # published by hand since: the card knows more
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False, "license": "mit", "base_model": "a/b"}
    (folder / "README.md").unlink()
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False, "is_own": True}
    write_record(folder, {"kind": "pretraining", "starts": [{}, start]})  # the first start left no record
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False}
    write_record(folder, {"kind": "pretraining", "start_from": {**stock, "license": "mit"}})
    expected = {"name": "model", "on_hub": False, "license": "mit", "base_model": "microsoft/swin-x"}
    assert describe_start(str(folder)) == expected
    write_record(folder, {"kind": "conversion", "license": "cc-by-nc-4.0"})
    assert describe_start(str(folder)) == {"name": "model", "on_hub": False, "license": "cc-by-nc-4.0"}
    assert json.loads((folder / "run.json").read_text())["kind"] == "conversion"


def test_energy_is_estimated_and_says_so():
    pytest.importorskip("codecarbon")
    meter = EnergyMeter("deu")
    torch.randn(600, 600).matrix_power(30)
    found = meter.stop()
    assert found["kwh"] > 0
    assert found["country"] == "DEU"
    assert 0.05 < found["co2_eq_grams"] / found["kwh"] / 1000 < 1.5  # kg for a kWh
    assert "estimate" in found["source"]
    without = EnergyMeter(NO_COUNTRY).stop()
    assert not {"co2_eq_grams", "country"} & set(without)


def test_energy_that_cannot_be_estimated_is_refused_before_the_work(monkeypatch):
    check_energy(None)
    if energy.importlib.util.find_spec("codecarbon"):
        with pytest.raises(ValueError, match="XYZ is no country"):
            check_energy("XYZ")
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(ValueError, match="sees one machine"):
        check_energy(NO_COUNTRY)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package codecarbon"):
        check_energy(NO_COUNTRY)
