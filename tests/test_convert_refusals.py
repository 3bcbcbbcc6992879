"""What conversions of weights refuse: files that would run code, or are not whole, and wrong input."""

import json
import os
import pickle
import shutil
import sys
import tarfile
import types
import warnings

import pytest
import torch
from tiny import images, randomised, tiny_config
from tiny_swins import GOLDEN, PHOTO, microsoft_tensors, refused, run, saved_stock, stock_config, timm_swin
from transformers import SwinForMaskedImageModeling, SwinModel

import green_swin_hf.weight_conversion as conversion
import green_swin_hf.weight_conversion_export as export
from green_swin_hf import GreenSwinForImageClassification, GreenSwinForMaskedImageModeling


@pytest.fixture(scope="module")
def state_dict():
    return timm_swin().state_dict()


@pytest.fixture(scope="module")
def saved_folder(tmp_path_factory):
    return saved_stock(tmp_path_factory.mktemp("sources") / "stock")


@pytest.fixture
def stock_folder(saved_folder, tmp_path):
    """A folder of stock Swin to spoil."""
    return shutil.copytree(saved_folder, tmp_path / "stock")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["file", "folder", "beside the weights"])
def test_a_malicious_pickle_is_refused_in_one_line_and_not_run(place, tmp_path, capsys):
    trap, folder = tmp_path / "trap", tmp_path / "folder"
    folder.mkdir()
    content = {"model": timm_swin().state_dict(), "args": Malicious(trap)}
    source = folder / "pytorch_model.bin" if place == "folder" else tmp_path / "swin.pth"
    torch.save(Malicious(trap) if place == "file" else content, source)
    error = refused(capsys, folder if place == "folder" else source, tmp_path / "out", "--image-size", 32)
    assert f"{source} is refused: opening it would run posix.mkdir" in error
    assert "ask for a .safetensors file" in error
    assert not trap.exists()
    assert not (tmp_path / "out").exists()


def test_settings_of_yacs_are_read_as_values(tmp_path, monkeypatch):
    """Microsoft's training script saves its configuration beside the weights; yacs need not be installed."""
    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    data, config = module.CfgNode(IMG_SIZE=32), module.CfgNode(BASE=[""])
    data.__dict__["__deprecated_keys__"] = set()
    config["DATA"] = data
    torch.save({"model": timm_swin().state_dict(), "config": config, "max_accuracy": 1.0}, tmp_path / "swin.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    assert run(tmp_path / "swin.pth", tmp_path / "out") == 0
    assert GreenSwinForImageClassification.from_pretrained(tmp_path / "out").config.image_size == 32


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


QKV = "layers.0.blocks.0.attn.qkv.weight"
BROKEN = {
    "missing": (without("norm.weight"), "lacks 1 tensors of timm's Swin: norm.weight"),
    "bias missing": (without("layers.0.blocks.0.attn.qkv.bias"), "lacks 1 tensors of timm's Swin: layers.0.blocks.0"),
    "table missing": (without("layers.1.blocks.0.attn.relative_position_bias_table"), "lacks 1 tensors"),
    "unexpected": (lambda t: {**t, "extra.weight": torch.ones(1)}, "1 tensors that timm's Swin has not: extra.weight"),
    "no norm after the patches": (lambda t: {k: v for k, v in t.items() if "embed.norm" not in k}, "lacks 2 tensors"),
    "other shape": (lambda t: {**t, "norm.weight": torch.ones(31)}, "do not fit their configuration"),
    "table of no window": (
        lambda t: {k: v[:-1] if "bias_table" in k else v for k, v in t.items()},
        "the position table of stage 1 has 48 rows",
    ),
    "not a number": (lambda t: {**t, "norm.bias": torch.full((32,), torch.nan)}, "the conversion is refused"),
    "Swin V2": (lambda t: {**t, "layers.0.blocks.0.attn.logit_scale": torch.ones(1)}, "the file holds a Swin V2"),
    "no Swin": (lambda t: {"conv.weight": torch.ones(1)}, "has no names of a Swin"),
    "nothing": (lambda t: {}, "holds no weights"),
    "no tensor": (lambda t: {**t, "epoch": 3}, "'epoch' is no tensor"),
    "whole numbers": (lambda t: {k: v.int() for k, v in t.items()}, "is strided int32; weights must be dense"),
    "complex": (lambda t: {k: v.to(torch.complex64) for k, v in t.items()}, "is strided complex64; weights must be"),
    "sparse": (lambda t: {**t, QKV: t[QKV].to_sparse()}, "is sparse_coo float32; weights must be dense"),
    "without memory": (lambda t: {**t, QKV: t[QKV].to("meta")}, f"{QKV} is meta float32; weights must be dense"),
    "scalar": (lambda t: {**t, QKV: torch.tensor(1.0)}, f"{QKV} has shape (); in a Swin it has 2 dimensions"),
    "not queries, keys and values": (lambda t: {**t, QKV: t[QKV][:-1]}, "which are not queries, keys and values"),
    "flat table": (lambda t: {k: v[:, 0] if "bias_table" in k else v for k, v in t.items()}, "it has 2 dimensions"),
    "flat patches": (
        lambda t: {**t, "patch_embed.proj.weight": t["patch_embed.proj.weight"].flatten(1)},
        "patch_embed.proj.weight has shape (8, 12); in a Swin it has 4 dimensions",
    ),
    "block of any number": (
        lambda t: {**t, "layers.0.blocks.99999999999.norm1.weight": torch.ones(8)},
        "are not numbered one after another",
    ),
    "zeros": (lambda t: {k: torch.zeros_like(v) for k, v in t.items()}, "the outputs are the same for two pictures"),
    "infinite": (lambda t: {**t, "norm.bias": torch.full((32,), torch.inf)}, "the conversion is refused"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_understood_to_the_last_tensor_is_refused(case, state_dict, tmp_path, capsys):
    change, message = BROKEN[case]
    torch.save(change(dict(state_dict)), tmp_path / "swin.pth")
    assert message in refused(capsys, tmp_path / "swin.pth", tmp_path / "out", "--image-size", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["swin.pth"]


def plain_pickle(path):
    path.write_bytes(pickle.dumps(timm_swin().state_dict(), protocol=4))


def old_pickle(path):
    path.write_bytes(pickle.dumps({"norm.weight": [1.0]}, protocol=0))


def old_archive(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))


def script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own: scripting is deprecated
        torch.jit.save(torch.jit.trace(torch.nn.Linear(1, 1), torch.ones(1, 1)), path)


@pytest.mark.parametrize("write", [plain_pickle, old_pickle, old_archive, script])
def test_a_file_that_is_no_state_dict_is_refused_without_torchs_advice(write, tmp_path, capsys):
    write(tmp_path / "swin.pth")
    error = refused(capsys, tmp_path / "swin.pth", tmp_path / "out")
    assert "ask for a .safetensors file, or a state dict saved by torch.save" in error
    assert "weights_only" not in error


def test_names_of_tensors_cannot_break_the_line(tmp_path):
    """Found by tests/fuzz.py."""
    torch.save({**timm_swin().state_dict(), "no\nline": torch.zeros(1), "x" * 5000: torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no line") as refusal:
        conversion.convert_to_green_swin(tmp_path / "a.pth", PHOTO)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) <= 800


@pytest.mark.parametrize(
    "shards", [None, [], {}, ["a"], {"a": 1}, {"a": {}}, {"a": "../b"}, {"a": "/etc/b"}, {"a": ""}]
)
def test_an_index_lists_files_beside_it_only(shards, stock_folder, tmp_path, capsys):
    folder = tmp_path / "stock"
    (folder / "model.safetensors").rename(tmp_path / "b")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    error = refused(capsys, folder, tmp_path / "out")
    assert f"{folder / 'model.safetensors.index.json'}: weight_map" in error


def test_settings_that_contain_themselves_are_read(tmp_path):
    settings = {"img_size": 32}
    settings["again"] = settings
    torch.save({"model": timm_swin().state_dict(), "config": settings}, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "out") == 0


ENTRIES = {
    "labels": ({"id2label": ["a"] * 5}, {}, "id2label must be a JSON object"),
    "labels that leave a number out": ({"id2label": {"0": "a", "2": "b"}}, {}, "id2label must be a JSON object"),
    "problem": ({"problem_type": 3}, {}, "problem_type 3 must be one of regression"),
    "rate": ({"drop_path_rate": "a"}, {}, "config.json: drop_path_rate 'a' must be a number"),
    "numbers": ({"label2id": [0]}, {}, "label2id must be a JSON object"),
    "count": ({"id2label": None, "num_labels": 10**10}, {}, "num_labels 10000000000 must be"),
    "depths": ({"depths": [2, 2, 10**9]}, {}, "depths [2, 2, 1000000000], but the weights have blocks for [2, 2, 2]"),
    "epsilon": ({"layer_norm_eps": float("inf")}, {}, "layer_norm_eps is inf, which is no finite number"),
    "width": ({"embed_dim": 2**24}, {}, "do not fit their configuration"),
    "image": ({"image_size": 10**9}, {}, "give an --image-size of at most 4096 pixels"),
    "timm": ({"pretrained_cfg": [1]}, {}, "pretrained_cfg must be a JSON object"),
    "mean": ({}, {"image_mean": ["a"]}, "its image processor says image_mean ['a']"),
    "deviation": ({}, {"image_std": [1, 0, 1]}, "its image processor says image_std [1, 0, 1]"),
    "size": ({}, {"size": "big"}, "its image processor says size 'big'"),
    "activation": ({"hidden_act": {}}, {}, "hidden_act {} m"),
}


@pytest.mark.parametrize("case", ENTRIES)
def test_entries_of_a_folder_that_nobody_can_mean_are_one_line(case, stock_folder, tmp_path, capsys):
    config, processor, message = ENTRIES[case]
    file = tmp_path / "stock" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **config}))
    file.with_name("preprocessor_config.json").write_text(json.dumps(processor))
    error = refused(capsys, tmp_path / "stock", tmp_path / "out")
    assert message in error
    assert str(tmp_path / "stock") in error or case in ("width", "image")
    assert not (tmp_path / "out").exists()


def test_only_known_entries_of_a_folder_are_taken_over(stock_folder, tmp_path):
    file = tmp_path / "stock" / "config.json"
    strange = {"quantization_config": {"quant_method": "bitsandbytes"}, "custom_pipelines": {"x": {}}, "note": "hello"}
    strange |= {"auto_map": {"AutoModel": "theirs.Model"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **strange}))
    file.with_name("preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5, "auto_map": {}}))
    assert run(tmp_path / "stock", tmp_path / "out") == 0
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert not strange.keys() & written.keys() - {"auto_map"}
    assert "theirs.Model" not in str(written)
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.5, 0.5]


def test_what_nobody_foresaw_is_one_line_that_names_the_file(tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise StopIteration("weights_only")

    monkeypatch.setattr("green_swin_hf.weight_conversion.recognise_format", fails)
    torch.save(timm_swin().state_dict(), tmp_path / "swin.pth")
    error = refused(capsys, tmp_path / "swin.pth", tmp_path / "out")
    assert f"{tmp_path / 'swin.pth'} cannot be converted" in error
    assert "weights_only" not in error


def exchanged(tensors):
    """Queries and values exchanged, which fit every shape."""
    return {name: tensors[name.replace("query", "value")] for name in tensors if "query.weight" in name}


def halved(tensors):
    return {name: tensor / 2 if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def test_a_conversion_whose_outputs_differ_is_refused(state_dict, tmp_path, monkeypatch, capsys):
    """As a mistake in the key tables would make it."""
    rename = conversion.to_our_names
    monkeypatch.setattr(conversion, "to_our_names", lambda *given: {**rename(*given), **exchanged(rename(*given))})
    torch.save(state_dict, tmp_path / "swin.pth")
    error = refused(capsys, tmp_path / "swin.pth", tmp_path / "out", "--image-size", 32)
    assert "the conversion is refused, nothing is written: largest difference of outputs" in error
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def own_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own") / "model"
    randomised(GreenSwinForImageClassification(tiny_config())).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("target", ["green-swin", "swin", "timm"])
@pytest.mark.parametrize("stage", ["reading", "writing"])
def test_a_greenswin_folder_is_compared_with_what_is_read_and_written(
    stage, target, own_folder, tmp_path, monkeypatch, capsys
):
    """As a mistake on the way in, which reads other weights than the folder's, or on the way out would make it."""
    if stage == "reading":
        rename = conversion.to_our_names
        monkeypatch.setattr(conversion, "to_our_names", lambda *given: {**rename(*given), **exchanged(rename(*given))})
    elif target == "green-swin":
        save = GreenSwinForImageClassification.save_pretrained
        monkeypatch.setattr(
            GreenSwinForImageClassification,
            "save_pretrained",
            lambda model, folder: save(model, folder, state_dict=halved(model.state_dict())),
        )
    else:
        save = export._save
        monkeypatch.setattr(export, "_save", lambda tensors, folder: save(halved(tensors), folder))
    error = refused(capsys, own_folder, tmp_path / "out", "--to", target)
    assert "the conversion is refused, nothing is written: largest difference of outputs" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["green-swin", "swin", "timm"])
def test_a_greenswin_folder_of_zeros_proves_nothing_and_is_refused(target, tmp_path, capsys):
    model = GreenSwinForMaskedImageModeling(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.save_pretrained(tmp_path / "zeros")
    error = refused(capsys, tmp_path / "zeros", tmp_path / "out", "--to", target)
    assert "the outputs are the same for two pictures, which proves nothing" in error
    assert [path.name for path in tmp_path.iterdir()] == ["zeros"]


def test_the_four_siblings_have_the_order_of_stock_swin(tmp_path, capsys):
    """Microsoft's order read as the old GreenMIM order is noticed by nobody but stock Swin: both are consistent."""
    theirs = timm_swin()
    torch.save(microsoft_tensors(theirs), tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "wrong", "--legacy-merge-order") == 0
    ours = GreenSwinForImageClassification.from_pretrained(tmp_path / "wrong").eval()
    with torch.no_grad():
        assert (ours(images(2)).logits - theirs(images(2))).abs().max() > 1e-2


WRONG_INPUT = {
    "no source": ("./nowhere {tmp}/out", "nowhere does not exist; give a file"),
    "no weights": ("{tmp} {tmp}/out", "holds neither of model.safetensors, pytorch_model.bin"),
    "output in a file": ("{stock} {timm}/out", "is a file; give another OUTPUT"),
    "output in use": ("{stock} {stock}", "exists; give a folder that does not, or is empty"),
    "photo": ("{stock} {tmp}/out --photo nowhere.png", "--photo nowhere.png is no file"),
    "image size unknown": ("{timm} {tmp}/out", "does not tell its image size"),
    "wrong image size": (
        "{timm} {tmp}/out --image-size 16",
        "position tables are of windows 4 4 4, but image_size 16 16 with window_size 4 gives 4 4 2",
    ),
    "three sides": ("{stock} {tmp}/out --image-size 1 2 3", "--image-size takes one or two numbers, not 3"),
    "zero window": ("{stock} {tmp}/out --window-size 0", "0 must be at least 1"),
    "format": ("{timm} {tmp}/out --source-format greenmim", "the published GreenMIM"),
    "format of a folder": ("{timm} {tmp}/out --source-format swin", "comes without a config.json"),
    "legacy order of a stock folder": ("{stock} {tmp}/out --legacy-merge-order", "is for weights of the published"),
    "no head": ("{simmim} {tmp}/out --keep-head", "no head with a counterpart"),
    "head both ways": ("{stock} {tmp}/out --keep-head --drop-head", "not allowed with"),
    "decoder heads": ("{golden} {tmp}/out", "does not tell the attention heads of its decoder of width 32"),
    "decoder heads of another": ("{stock} {tmp}/out --decoder-heads 4", "--decoder-heads is for published GreenMIM"),
    "channels of a decoder": (
        "{golden} {tmp}/out --decoder-heads 4 --num-channels 1",
        "the decoder predicts 3 channels; leave it out with --drop-head",
    ),
    "image that patches do not fill": (
        "{timm} {tmp}/out --image-size 33",
        "image_size 33 33 must be a multiple of the patch of 2 pixels; give such a --image-size, for example 32",
    ),
    "huge image": ("{stock} {tmp}/out --image-size 99999999", "give an --image-size of at most 4096 pixels"),
    "huge image of a file": ("{timm} {tmp}/out --image-size 99999998", "give an --image-size of at most 4096 pixels"),
    "infinite epsilon": ("{timm} {tmp}/out --image-size 32 --layer-norm-eps inf", "inf must be a finite number"),
    "huge epsilon": ("{timm} {tmp}/out --image-size 32 --layer-norm-eps 1e30", "same for two pictures"),
    "image of a decoder": (
        "{golden} {tmp}/out --decoder-heads 4 --image-size 100",
        "image_size 100 must be a multiple of mask_unit_size 32 (patch_size 4 times 2^3); give such a --image-size",
    ),
    "epsilon of a folder": ("{stock} {tmp}/out --layer-norm-eps 1e-6", "is for files of weights alone"),
    "other architecture": ("{swinv2} {tmp}/out", "model_type 'swinv2'"),
    "damaged file": ("{damaged} {tmp}/out", "is no readable checkpoint of torch"),
    "damaged safetensors": ("{damaged_safetensors} {tmp}/out", "is no readable safetensors file"),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory, saved_folder, state_dict):
    """Paths of files and folders, right and wrong, by name."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = {name: folder / name for name in ("simmim", "swinv2", "timm", "damaged", "damaged_safetensors")}
    SwinForMaskedImageModeling(stock_config()).save_pretrained(paths["simmim"])
    SwinModel(stock_config()).save_pretrained(paths["swinv2"])
    config = json.loads((paths["swinv2"] / "config.json").read_text())
    (paths["swinv2"] / "config.json").write_text(json.dumps({**config, "model_type": "swinv2"}))
    torch.save(state_dict, paths["timm"])
    paths["damaged"].write_bytes(paths["timm"].read_bytes()[:1000])
    paths["damaged_safetensors"] = folder / "damaged.safetensors"
    paths["damaged_safetensors"].write_bytes(b"\x08\0\0\0\0\0\0\0nothing.")
    return {**paths, "stock": saved_folder, "golden": GOLDEN / "img128_win4.pth"}


@pytest.mark.parametrize("case", WRONG_INPUT)
def test_wrong_input_is_one_line_and_writes_nothing(case, sources, tmp_path, capsys):
    words, message = WRONG_INPUT[case]
    places = (tmp_path, sources["timm"].parent, sources["stock"].parent)
    before = [sorted(place.rglob("*")) for place in places]
    assert message in refused(capsys, *words.format(**sources, tmp=tmp_path).split())
    assert [sorted(place.rglob("*")) for place in places] == before
