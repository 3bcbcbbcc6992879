"""Swin weights into GreenSwin: every published format, what is refused, and what changes on request."""

import argparse
import json
import os
import pickle
import re
import shlex
import sys
import tarfile
import types
import warnings
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from test_examples import ROOT, load_script, run_command
from tiny import images, randomised, tiny_config
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    pipeline,
)

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)
from green_swin_hf.modeling_green_swin import position_encoding
from green_swin_hf.publish import collect_files, find_result
from green_swin_hf.run_record import read_record
from green_swin_hf.weight_conversion import convert_to_green_swin
from green_swin_hf.weight_conversion_geometry import resize_table
from green_swin_hf.weight_conversion_names import published_names, to_published_names

convert = load_script(ROOT / "examples" / "convert.py")
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
PHOTO = ROOT / "examples" / "data" / "photos" / "chelsea.png"


def timm_swin(**changes) -> torch.nn.Module:
    """timm's own model of the sizes of `tiny_config`."""
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", **{**sizes, "window_size": 4, "num_classes": 5, **changes}
    )
    return randomised(model)


def stock_config(**changes) -> SwinConfig:
    fields = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}
    fields |= {"window_size": 4, "encoder_stride": 8, "num_labels": 5}
    return SwinConfig(**{**fields, **changes})


def microsoft_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """timm's weights as Microsoft's files have them: merging at the end of a stage, plain head, buffers."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        tensors[name.replace("head.fc", "head")] = tensor
    for name, window in (("layers.0", 16), ("layers.1", 4)):
        tensors[f"{name}.blocks.1.attn_mask"] = torch.zeros(window, 16, 16)
        tensors[f"{name}.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return tensors


def run(*words) -> int:
    return convert.main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line that a refused command leaves."""
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    error = capsys.readouterr().err
    assert error.startswith("convert.py: error: ")
    assert error.count("\n") == 1
    return error


@torch.no_grad()
def assert_equal_outputs(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# timm


@pytest.mark.parametrize("labels", [5, 0], ids=["classifier", "encoder"])
@pytest.mark.parametrize("kind", ["pth", "safetensors", "training"])
def test_a_state_dict_of_timm_equals_timms_own_forward(kind, labels, tmp_path):
    theirs = timm_swin(num_classes=labels)
    source = tmp_path / f"swin.{'safetensors' if kind == 'safetensors' else 'pth'}"
    if kind == "safetensors":
        save_file(theirs.state_dict(), source)
    elif kind == "pth":
        torch.save(theirs.state_dict(), source)
    else:  # as timm's training script saves
        settings = argparse.Namespace(model="swin", img_size=32)
        torch.save({"epoch": 3, "args": settings, "state_dict": theirs.state_dict()}, source)
    size = [] if kind == "training" else ["--image-size", 32]
    assert run(source, tmp_path / "out", *size) == 0
    with torch.no_grad():
        if labels:
            ours = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
            assert type(ours) is GreenSwinForImageClassification
            assert_equal_outputs(ours(images(2)).logits, theirs(images(2)))
        else:
            ours = AutoModel.from_pretrained(tmp_path / "out").eval()
            assert_equal_outputs(ours(images(2)).last_hidden_state, theirs.forward_features(images(2)).flatten(1, 2))


def test_a_window_clamped_by_timm_tells_the_image_size(tmp_path):
    theirs = timm_swin(window_size=8)
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "out") == 0
    ours = GreenSwinForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert (ours.config.image_size, ours.config.stage_window_sizes) == (32, (8, 8, 4))
    with torch.no_grad():
        assert_equal_outputs(ours(images(2)).logits, theirs(images(2)))


def test_a_folder_of_timm_tells_image_size_normalisation_crop_and_labels(tmp_path):
    theirs = timm_swin(qkv_bias=False)
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(theirs.state_dict(), folder / "model.safetensors")
    labels = ["ant", "bee", "cat", "dog", "eel"]
    described = {"input_size": [3, 32, 32], "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1], "crop_pct": 0.8}
    described |= {"interpolation": "bilinear"}
    (folder / "config.json").write_text(
        json.dumps({"architecture": "swin_tiny", "pretrained_cfg": described, "label_names": labels})
    )
    assert run(folder, tmp_path / "out") == 0
    ours = GreenSwinForImageClassification.from_pretrained(tmp_path / "out")
    assert list(ours.config.id2label.values()) == labels
    assert ours.config.qkv_bias is False
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert processor.resample == 2
    assert processor.size == {"shortest_edge": 40}
    assert processor.crop_size == {"height": 32, "width": 32}


# Microsoft, SimMIM, GreenMIM


@pytest.mark.parametrize("simmim", [False, True], ids=["Swin", "SimMIM"])
def test_files_of_microsoft_equal_timms_own_forward(simmim, tmp_path, capsys):
    theirs = timm_swin(num_classes=0 if simmim else 5)
    tensors = microsoft_tensors(theirs)
    if simmim:
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
        tensors |= {"encoder.mask_token": torch.ones(1, 1, 8), "decoder.0.weight": torch.ones(192, 32, 1, 1)}
        tensors["decoder.0.bias"] = torch.ones(192)
    torch.save({"model": tensors, "epoch": 1}, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert ("Microsoft's SimMIM" if simmim else "Microsoft's Swin") in printed
    assert "Left out: 4 buffers" in printed
    assert ("3 tensors without a counterpart here: encoder.mask_token, decoder.0.weight" in printed) is simmim
    ours = (GreenSwinModel if simmim else GreenSwinForImageClassification).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        if simmim:
            assert_equal_outputs(ours(images(2)).last_hidden_state, theirs.forward_features(images(2)).flatten(1, 2))
        else:
            assert_equal_outputs(ours(images(2)).logits, theirs(images(2)))


def golden() -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "img128_win4.pth", weights_only=True)["model"]


def test_the_published_greenmim_gives_its_golden_outputs(tmp_path, capsys):
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "out", "--decoder-heads", 4) == 0
    assert "the published GreenMIM" in capsys.readouterr().out
    ours = AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "out").eval()
    expected = load_file(GOLDEN / "img128_win4.expected.safetensors")
    with torch.no_grad():
        output = ours(expected["pixel_values"], bool_masked_pos=expected["mask"][None].bool())
    assert_equal_outputs(output.logits, expected["prediction"])
    assert_equal_outputs(output.loss, expected["loss"].squeeze())


def test_legacy_merge_order_is_undone(tmp_path, capsys):
    """Weights of the old code: the second and third sibling of every patch merging stand the other way round."""
    tensors = golden()
    for name in tensors:
        if ".downsample." in name:
            tensors[name] = torch.cat([tensors[name].chunk(4, dim=-1)[part] for part in (0, 2, 1, 3)], dim=-1)
    torch.save({"model": tensors}, tmp_path / "old.pth")
    heads = ["--decoder-heads", 4]
    assert run(tmp_path / "old.pth", tmp_path / "legacy", *heads, "--legacy-merge-order") == 0
    assert "Changed: patch merging" in capsys.readouterr().out
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "today", *heads) == 0
    assert run(tmp_path / "old.pth", tmp_path / "wrong", *heads) == 0
    legacy, today, wrong = (load_file(tmp_path / name / "model.safetensors") for name in ("legacy", "today", "wrong"))
    assert all(torch.equal(legacy[name], today[name]) for name in today)
    assert not torch.equal(
        wrong["swin.encoder.layers.0.downsample.norm.weight"], today["swin.encoder.layers.0.downsample.norm.weight"]
    )


def test_a_decoder_is_left_out_on_request(tmp_path, capsys):
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "out", "--drop-head") == 0
    assert "Left out: 19 tensors of the head, as asked: mask_token, decoder_embed.weight" in capsys.readouterr().out
    ours = AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(ours) is GreenSwinModel
    assert ours.config.layer_norm_eps == 1e-6
    assert not any("decoder" in name for name in load_file(tmp_path / "out" / "model.safetensors"))


# Folders of transformers

STOCK = {
    "encoder": (SwinModel, GreenSwinModel),
    "classifier": (SwinForImageClassification, GreenSwinForImageClassification),
    "SimMIM": (SwinForMaskedImageModeling, GreenSwinModel),
    "backbone": (SwinBackbone, GreenSwinBackbone),
}


def outputs(model) -> torch.Tensor:
    with torch.no_grad():
        found = (model.swin if isinstance(model, SwinForMaskedImageModeling) else model)(images(2))
    if found.get("feature_maps") is not None:
        return torch.cat([maps.flatten(1) for maps in found.feature_maps], dim=1)
    return found.logits if found.get("logits") is not None else found.last_hidden_state


@pytest.mark.parametrize("file", ["one", "shards", "bin"])
@pytest.mark.parametrize("kind", STOCK)
def test_a_stock_folder_gives_the_same_outputs(kind, file, tmp_path):
    stock_class, our_class = STOCK[kind]
    stock = randomised(stock_class(stock_config(out_features=["stage1", "stage3"], use_absolute_embeddings=True)))
    folder = tmp_path / "stock"
    stock.save_pretrained(folder, max_shard_size="20KB" if file == "shards" else "1GB")
    if file == "bin":  # as transformers 4.x wrote
        tensors = load_file(folder / "model.safetensors")
        tables = [name for name in tensors if name.endswith("bias_table")]
        tensors |= {name.replace("bias_table", "index"): torch.zeros(16, 16, dtype=torch.int64) for name in tables}
        torch.save(tensors, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    assert run(folder, tmp_path / "out") == 0
    ours = our_class.from_pretrained(tmp_path / "out").eval()
    assert ours.config.model_type == "green_swin"
    assert_equal_outputs(outputs(ours), outputs(stock))


def test_the_processor_of_a_stock_folder_is_taken_over(tmp_path):
    SwinForImageClassification(stock_config()).save_pretrained(tmp_path / "stock")
    # as in the folders of 2021
    entries = {"feature_extractor_type": "ViTFeatureExtractor", "size": 32, "resample": 2, "do_normalize": True}
    entries |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_resize": True}
    (tmp_path / "stock" / "preprocessor_config.json").write_text(json.dumps(entries))
    assert run(tmp_path / "stock", tmp_path / "out") == 0
    assert run(tmp_path / "stock", tmp_path / "larger", "--image-size", 64, "--num-channels", 1) == 0
    processor, larger = (AutoImageProcessor.from_pretrained(tmp_path / name) for name in ("out", "larger"))
    assert (list(processor.image_mean), processor.resample) == ([0.1, 0.2, 0.3], 2)
    assert processor.size == {"height": 32, "width": 32}
    assert larger.size == {"height": 64, "width": 64}
    assert list(larger.image_mean) == pytest.approx([0.2])


def test_pipelines_take_the_folder(tmp_path):
    torch.save(microsoft_tensors(timm_swin()), tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "out") == 0
    scores = pipeline("image-classification", model=str(tmp_path / "out"))(str(PHOTO), top_k=5)
    assert sum(score["score"] for score in scores) == pytest.approx(1, abs=1e-4)
    features = pipeline("image-feature-extraction", model=str(tmp_path / "out"))(str(PHOTO))
    assert torch.tensor(features).shape == (1, 16, 32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_types_stay_as_they_are(dtype, tmp_path):
    tensors = {name: tensor.to(dtype) for name, tensor in timm_swin().state_dict().items()}
    torch.save(tensors, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "out", "--image-size", 32) == 0
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {dtype}
    assert torch.equal(saved["classifier.weight"], tensors["head.fc.weight"])
    assert GreenSwinForImageClassification.from_pretrained(tmp_path / "out").dtype == dtype


# Changes on request


@pytest.fixture
def stock_folder(tmp_path):
    randomised(SwinForImageClassification(stock_config())).save_pretrained(tmp_path / "stock")
    return tmp_path / "stock"


def test_position_tables_are_resized_as_pictures_of_offsets(stock_folder, tmp_path, capsys):
    assert run(stock_folder, tmp_path / "out", "--window-size", 8, "--image-size", 64) == 0
    printed = capsys.readouterr().out
    assert printed.count("window 4 to 8, resized bicubically") == 3
    name = "swin.encoder.layers.1.blocks.1.attention.self.relative_position_bias_table"
    old, new = (load_file(folder / "model.safetensors")[name] for folder in (stock_folder, tmp_path / "out"))
    picture = old.T.reshape(2, 7, 7)
    bicubic = torchvision.transforms.v2.InterpolationMode.BICUBIC
    wanted = torchvision.transforms.v2.functional.resize(picture, [15, 15], bicubic, antialias=False)
    torch.testing.assert_close(new, wanted.reshape(2, 225).T, atol=1e-6, rtol=1e-6)
    assert GreenSwinForImageClassification.from_pretrained(tmp_path / "out").config.window_size == 8


def test_a_resized_table_keeps_constants_and_mirrors():
    torch.testing.assert_close(resize_table(torch.full((49, 3), 0.7), 7), torch.full((169, 3), 0.7))
    table = torch.randn(49, 1)
    torch.testing.assert_close(resize_table(table.flip(0), 6), resize_table(table, 6).flip(0))


def test_a_smaller_image_changes_nothing_that_the_model_computes_on_it(tmp_path, capsys):
    """Its last stage has a grid smaller than the window, whose table is cut instead of resized."""
    randomised(GreenSwinForImageClassification(tiny_config())).save_pretrained(tmp_path / "large")
    assert run(tmp_path / "large", tmp_path / "small", "--image-size", 16) == 0
    assert "stage 3: window 4 to 2, their middle taken" in capsys.readouterr().out
    large, small = (GreenSwinForImageClassification.from_pretrained(tmp_path / n).eval() for n in ("large", "small"))
    assert small.config.stage_window_sizes == (4, 4, 2)
    with torch.no_grad():
        pixels = images(2, rows=16, columns=16)
        assert_equal_outputs(small(pixels).logits, large(pixels).logits)


def test_absolute_positions_follow_the_image_size(tmp_path):
    SwinModel(stock_config(use_absolute_embeddings=True)).save_pretrained(tmp_path / "stock")
    assert run(tmp_path / "stock", tmp_path / "out", "--image-size", 32, 64) == 0
    ours = GreenSwinModel.from_pretrained(tmp_path / "out").eval()
    assert ours(images(1, columns=64)).last_hidden_state.shape == (1, 32, 32)


def test_channels_are_summed_for_grey_and_repeated_for_more(stock_folder, tmp_path):
    grey, more = tmp_path / "grey", tmp_path / "more"
    assert run(stock_folder, grey, "--num-channels", 1) == 0
    assert run(stock_folder, more, "--num-channels", 6) == 0
    stock = SwinForImageClassification.from_pretrained(stock_folder).eval()
    picture = images(2, channels=1)
    with torch.no_grad():
        wanted = stock(picture.expand(-1, 3, -1, -1)).logits
        assert_equal_outputs(GreenSwinForImageClassification.from_pretrained(grey).eval()(picture).logits, wanted)
        twice = images(2).repeat(1, 2, 1, 1)
        six = GreenSwinForImageClassification.from_pretrained(more).eval()(twice).logits
        assert_equal_outputs(six, stock(images(2)).logits)
    pixels = AutoImageProcessor.from_pretrained(grey)(Image.open(PHOTO), return_tensors="pt").pixel_values
    assert pixels.shape == (1, 1, 32, 32)


def test_channels_of_a_timm_model_are_adapted_as_by_timm(tmp_path):
    theirs = timm_swin()
    torch.save(theirs.state_dict(), tmp_path / "swin.pth")
    for channels in (1, 4):
        assert run(tmp_path / "swin.pth", tmp_path / str(channels), "--image-size", 32, "--num-channels", channels) == 0
        wanted = timm.models.adapt_input_conv(channels, theirs.patch_embed.proj.weight.detach())
        ours = load_file(tmp_path / str(channels) / "model.safetensors")
        torch.testing.assert_close(ours["swin.embeddings.patch_embeddings.projection.weight"], wanted)


def test_a_stock_folder_whose_image_size_cannot_be_true_takes_the_one_given(tmp_path, capsys):
    """Stock Swin keeps tables of the whole window for a stage whose grid is smaller, on which it cannot run."""
    stock = randomised(SwinModel(stock_config(window_size=8)))
    stock.save_pretrained(tmp_path / "stock")
    error = refused(capsys, tmp_path / "stock", tmp_path / "out")
    assert "position tables are of windows 8 8 8, but image_size 32 32 with window_size 8 gives 8 8 4" in error
    assert run(tmp_path / "stock", tmp_path / "out", "--image-size", 64) == 0
    pixels = images(1, rows=64, columns=64)
    with torch.no_grad():
        ours = GreenSwinModel.from_pretrained(tmp_path / "out").eval()(pixels).last_hidden_state
        assert_equal_outputs(ours, stock(pixels).last_hidden_state)


def test_a_backbone_changes_its_image_size_and_keeps_its_stages(tmp_path):
    ours = randomised(GreenSwinBackbone(tiny_config(out_features=["stage2"])))
    ours.save_pretrained(tmp_path / "ours")
    assert run(tmp_path / "ours", tmp_path / "out", "--image-size", 48) == 0
    larger = GreenSwinBackbone.from_pretrained(tmp_path / "out").eval()
    assert larger.out_features == ["stage2"]
    assert_equal_outputs(outputs(larger), outputs(ours))


# What is refused


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
def test_a_file_that_is_not_understood_to_the_last_tensor_is_refused(case, tmp_path, capsys):
    change, message = BROKEN[case]
    torch.save(change(timm_swin().state_dict()), tmp_path / "swin.pth")
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
        convert_to_green_swin(tmp_path / "a.pth", PHOTO)
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
    "activation": ({"hidden_act": {}}, {}, "cannot be converted"),
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


def test_a_conversion_whose_outputs_differ_is_refused(tmp_path, monkeypatch, capsys):
    """As a mistake in the key tables would make it: queries and keys exchanged fit every shape."""
    import green_swin_hf.weight_conversion as conversion

    rename = conversion.to_our_names

    def exchanged(tensors, names):
        ours = rename(tensors, names)
        return {**ours, **{name: ours[name.replace("query", "value")] for name in ours if "query.weight" in name}}

    monkeypatch.setattr(conversion, "to_our_names", exchanged)
    torch.save(timm_swin().state_dict(), tmp_path / "swin.pth")
    error = refused(capsys, tmp_path / "swin.pth", tmp_path / "out", "--image-size", 32)
    assert "the conversion is refused, nothing is written: largest difference of outputs" in error
    assert not (tmp_path / "out").exists()


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


@pytest.mark.parametrize("case", WRONG_INPUT)
def test_wrong_input_is_one_line_and_writes_nothing(case, tmp_path, capsys):
    words, message = WRONG_INPUT[case]
    names = ("stock", "simmim", "swinv2", "timm", "damaged", "damaged_safetensors")
    paths = {name: tmp_path / "sources" / name for name in names}
    SwinForImageClassification(stock_config()).save_pretrained(paths["stock"])
    SwinForMaskedImageModeling(stock_config()).save_pretrained(paths["simmim"])
    SwinModel(stock_config()).save_pretrained(paths["swinv2"])
    config = json.loads((paths["swinv2"] / "config.json").read_text())
    (paths["swinv2"] / "config.json").write_text(json.dumps({**config, "model_type": "swinv2"}))
    torch.save(timm_swin().state_dict(), paths["timm"])
    paths["damaged"].write_bytes(paths["timm"].read_bytes()[:1000])
    paths["damaged_safetensors"] = tmp_path / "sources" / "damaged.safetensors"
    paths["damaged_safetensors"].write_bytes(b"\x08\0\0\0\0\0\0\0nothing.")
    paths |= {"golden": GOLDEN / "img128_win4.pth", "tmp": tmp_path}
    before = sorted(tmp_path.rglob("*"))
    assert message in refused(capsys, *words.format(**paths).split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_on_the_hub_is_fetched(tmp_path, monkeypatch, capsys):
    import green_swin_hf.weight_conversion_files as files

    SwinModel(stock_config()).save_pretrained(tmp_path / "snapshot")
    wanted = []
    monkeypatch.setattr(files, "snapshot_download", lambda name, **_: wanted.append(name) or str(tmp_path / "snapshot"))
    assert run("somebody/swin-tiny", tmp_path / "out") == 0
    assert wanted == ["somebody/swin-tiny"]

    def offline(name, **_):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(files, "snapshot_download", offline)
    assert "cannot be fetched from the Hub (ConnectionError)" in refused(capsys, "some/swin", tmp_path / "other")


def test_the_commands_of_the_help_text_work_as_written(tmp_path, monkeypatch):
    torch.save({"model": microsoft_tensors(timm_swin())}, tmp_path / "swin_tiny.pth")
    SwinModel(stock_config()).save_pretrained(tmp_path / "path" / "to" / "swin")
    wide = GreenSwinForMaskedImageModeling(tiny_config(decoder_hidden_size=512, decoder_num_attention_heads=16))
    names = published_names("greenmim", (2, 2, 2), decoder_blocks=1)
    positions = {"decoder_pos_embed": position_encoding((4, 4), 512, torch.zeros(1))[None]}
    torch.save({"model": {**to_published_names(wide.state_dict(), names), **positions}}, tmp_path / "green_mim.pth")
    GreenSwinForImageClassification(tiny_config()).save_pretrained(tmp_path / "outputs" / "finetune")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^    python examples/convert.py (.*)$", convert.__doc__, flags=re.MULTILINE)
    assert len(commands) == 6
    for command in commands:
        assert run(*shlex.split(command, comments=True)) == 0
    assert GreenSwinModel.from_pretrained("outputs/window14").config.window_size == 14
    legacy = load_file("outputs/from_greenmim/model.safetensors")["swin.encoder.layers.0.downsample.reduction.weight"]
    assert torch.equal(legacy[:, 8:16], wide.swin.encoder.layers[0].downsample.reduction.weight[:, 16:24])


def test_the_command_as_a_user_gives_it(tmp_path):
    torch.save({"model": microsoft_tensors(timm_swin())}, tmp_path / "swin.pth")
    done = run_command(sys.executable, ROOT / "examples" / "convert.py", tmp_path / "swin.pth", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert lines[0] == f"Source: {tmp_path}/swin.pth, Microsoft's Swin"
    assert re.search(r"Compared on astronaut.png: largest difference of outputs \d\.\de-0[5-9]", done.stdout)
    files = "code (*.py), config.json, model.safetensors, preprocessor_config.json, run.json"
    assert f"Wrote {tmp_path}/out: {files}." in done.stdout
    record = read_record(tmp_path / "out")
    assert (record["kind"], record["start_from"]) == ("conversion", {"name": "swin.pth", "on_hub": False})
    card = collect_files(find_result(tmp_path / "out"), "someone/swin")["README.md"].decode()
    assert "The weights derive from `swin.pth`." in card
    assert "that of what they derive from holds" in card
    assert lines[-1].startswith("Next: python examples/evaluate_model.py --model")
