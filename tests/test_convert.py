"""Swin weights into GreenSwin: every published format, folders of transformers, and what changes on request."""

import argparse
import functools
import json
import re
import shlex
import sys

import pytest
import timm
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from test_examples import ROOT, run_command
from tiny import images, randomised, tiny_config
from tiny_swins import (
    GOLDEN,
    PHOTO,
    assert_equal_outputs,
    convert,
    golden,
    microsoft_tensors,
    refused,
    run,
    saved_stock,
    stock_config,
    timm_swin,
)
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    SwinBackbone,
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
from green_swin_hf.weight_conversion_geometry import resize_table
from green_swin_hf.weight_conversion_names import published_names, to_published_names

# timm


@pytest.mark.parametrize(("kind", "labels"), [("pth", 5), ("pth", 0), ("safetensors", 5), ("training", 5)])
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


def test_the_published_greenmim_gives_its_golden_outputs(tmp_path, capsys):
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "out", "--decoder-heads", 4) == 0
    assert "the published GreenMIM" in capsys.readouterr().out
    ours = AutoModelForMaskedImageModeling.from_pretrained(tmp_path / "out").eval()
    expected = load_file(GOLDEN / "img128_win4.expected.safetensors")
    with torch.no_grad():
        output = ours(expected["pixel_values"], bool_masked_pos=expected["mask"][None].bool())
    assert_equal_outputs(output.logits, expected["prediction"])
    assert_equal_outputs(output.loss, expected["loss"].squeeze())


def merged_in_raster_order(merging: torch.nn.Module, grid: torch.Tensor) -> torch.Tensor:
    """Patch merging of the published code before January 2023: siblings left before right, top before bottom."""
    upper, lower = grid[:, 0::2], grid[:, 1::2]
    siblings = [upper[:, :, 0::2], upper[:, :, 1::2], lower[:, :, 0::2], lower[:, :, 1::2]]
    return merging.reduction(merging.norm(torch.cat(siblings, dim=-1)))


def old_encoder() -> torch.nn.Module:
    """The encoder of the published file in timm, with the patch merging of the old code."""
    sizes = {"img_size": 128, "patch_size": 4, "embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 4, 8)}
    encoder = timm_swin(**sizes, num_classes=0)
    moved = {}
    for name, tensor in golden().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) + 1}.downsample", name)
        if name.startswith("encoder.") and not name.endswith(("attn_mask", "position_index")):
            moved[name.removeprefix("encoder.")] = tensor
    encoder.load_state_dict(moved)
    for module in encoder.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
        if type(module).__name__ == "PatchMerging":
            module.forward = functools.partial(merged_in_raster_order, module)
    return encoder.eval()


def test_weights_of_the_old_merge_order_compute_what_they_computed_there(tmp_path, capsys):
    """The published file read as one of the old code: timm's own blocks with the old merging say what it means."""
    heads = ["--decoder-heads", 4]
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "old", *heads, "--legacy-merge-order") == 0
    assert "Changed: patch merging" in capsys.readouterr().out
    assert run(GOLDEN / "img128_win4.pth", tmp_path / "new", *heads) == 0
    old, new = (GreenSwinModel.from_pretrained(tmp_path / name).eval() for name in ("old", "new"))
    pixels = images(2, rows=128, columns=128)
    with torch.no_grad():
        wanted = old_encoder().forward_features(pixels).flatten(1, 2)
        assert_equal_outputs(old(pixels).last_hidden_state, wanted)
        assert (new(pixels).last_hidden_state - wanted).abs().max() > 1e-2


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


@pytest.mark.parametrize(
    ("kind", "file"), [*((kind, "one") for kind in STOCK), ("classifier", "shards"), ("SimMIM", "bin")]
)
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


@pytest.fixture(scope="module")
def stock_folder(tmp_path_factory):
    return saved_stock(tmp_path_factory.mktemp("sources") / "stock")


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
    for what in ("astronaut.png", "astronaut.png, as written"):
        assert re.search(rf"Compared on {what}: largest difference of outputs \d\.\de[-+]0[05-9]", done.stdout)
    files = "code (*.py), config.json, model.safetensors, preprocessor_config.json, run.json"
    assert f"Wrote {tmp_path}/out: {files}" in lines
    assert "Licence of the weights: not known, and the card claims none" in done.stdout
    assert lines[-1].startswith("Next: python examples/evaluate_model.py --model")
