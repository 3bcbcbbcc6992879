"""Weights between files and classes: stock Swin both ways, SimMIM, pretraining to tasks, Auto classes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import images, randomised, tiny_config
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinForMaskedImageModeling,
    SwinModel,
    ViTImageProcessor,
)

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)

PAIRS = {
    "model": (SwinModel, GreenSwinModel),
    "classifier": (SwinForImageClassification, GreenSwinForImageClassification),
    "backbone": (SwinBackbone, GreenSwinBackbone),
}
each_pair = pytest.mark.parametrize("pair", PAIRS)


def stock_config(**changes) -> SwinConfig:
    fields = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2, 2],
        "num_heads": [1, 2, 4],
        "window_size": 4,
        "drop_path_rate": 0.0,
        "encoder_stride": 8,
        "num_labels": 5,
        "out_features": ["stage1", "stage2", "stage3"],
    }
    return SwinConfig(**{**fields, **changes})


def saved(model, folder: Path) -> None:
    randomised(model).save_pretrained(folder)


def load(cls, folder: Path):
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    return model.eval(), {key: set(map(str, value)) for key, value in info.items() if value}


def main_output(model) -> torch.Tensor:
    outputs = model(images(2))
    for key in ("logits", "last_hidden_state"):
        if outputs.get(key) is not None:
            return outputs[key]
    return torch.cat([feature_map.flatten(1) for feature_map in outputs.feature_maps], dim=1)


def file_keys(folder: Path) -> set[str]:
    """Names in a file, from the encoder on: stock Swin's backbone leaves out the prefix."""
    return {key.removeprefix("swin.") for key in load_file(folder / "model.safetensors")}


# Stock Swin's backbone holds a final norm that it does not use; ours does not.
UNUSED_BY_BACKBONES = {"layernorm.weight", "layernorm.bias"}


def unused(pair: str) -> set[str]:
    return UNUSED_BY_BACKBONES if pair == "backbone" else set()


# Stock Swin


@each_pair
@pytest.mark.parametrize(
    "changes", [{}, {"use_absolute_embeddings": True, "qkv_bias": False}], ids=["plain", "options"]
)
def test_a_stock_folder_loads_into_our_class_and_back(pair, changes, tmp_path):
    stock_class, our_class = PAIRS[pair]
    stock = stock_class(stock_config(**changes))
    saved(stock, tmp_path / "stock")
    ours, info = load(our_class, tmp_path / "stock")
    assert info == {}
    assert ours.config.model_type == "green_swin"
    torch.testing.assert_close(main_output(ours), main_output(stock), atol=1e-5, rtol=1e-5)

    ours.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "green_swin"
    assert file_keys(tmp_path / "ours") == file_keys(tmp_path / "stock") - unused(pair)
    back, info = load(stock_class, tmp_path / "ours")
    assert set(info) <= {"missing_keys"}
    assert info.get("missing_keys", set()) <= unused(pair)
    assert torch.equal(main_output(back), main_output(stock))


@each_pair
def test_names_in_memory_are_those_of_published_files(pair, tmp_path):
    stock_class, our_class = PAIRS[pair]
    saved(stock_class(stock_config()), tmp_path)
    block = "encoder.layers.0.blocks.0."
    published = {
        "embeddings.patch_embeddings.projection.weight",
        "embeddings.norm.weight",
        f"{block}layernorm_before.weight",
        f"{block}attention.self.relative_position_bias_table",
        f"{block}attention.self.query.weight",
        f"{block}attention.self.key.bias",
        f"{block}attention.self.value.weight",
        f"{block}attention.output.dense.weight",
        f"{block}layernorm_after.bias",
        f"{block}intermediate.dense.weight",
        f"{block}output.dense.weight",
        "encoder.layers.0.downsample.reduction.weight",
        "encoder.layers.0.downsample.norm.weight",
    }
    in_memory = our_class(tiny_config(out_features=["stage1", "stage2", "stage3"])).state_dict()
    if pair != "model":
        assert all(key.startswith(("swin.", "classifier.", "hidden_states_norms.")) for key in in_memory)
    assert published <= {key.removeprefix("swin.") for key in in_memory}
    assert {key.removeprefix("swin.") for key in in_memory} == file_keys(tmp_path) - unused(pair)


@each_pair
def test_files_load_with_plain_load_state_dict_as_trainer_resumes(pair, tmp_path):
    ours = PAIRS[pair][1](tiny_config())
    saved(ours, tmp_path)
    other = PAIRS[pair][1](tiny_config())
    report = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not report.missing_keys
    assert not report.unexpected_keys
    assert torch.equal(main_output(other.eval()), main_output(ours))


def test_pretraining_resumes_with_plain_load_state_dict(tmp_path):
    ours = GreenSwinForMaskedImageModeling(tiny_config())
    saved(ours, tmp_path)
    GreenSwinForMaskedImageModeling(tiny_config()).load_state_dict(
        load_file(tmp_path / "model.safetensors"), strict=True
    )


def test_a_stock_classifier_becomes_an_encoder_and_a_backbone(tmp_path):
    stock = SwinForImageClassification(stock_config())
    saved(stock, tmp_path)
    encoder, info = load(GreenSwinModel, tmp_path)
    assert set(info) <= {"unexpected_keys"}
    assert info.get("unexpected_keys", set()) <= {"classifier.weight", "classifier.bias"}
    torch.testing.assert_close(main_output(encoder), stock.swin(images(2)).last_hidden_state, atol=1e-5, rtol=1e-5)
    _, info = load(GreenSwinBackbone, tmp_path)
    assert info["missing_keys"] == {
        f"hidden_states_norms.stage{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")
    }


def test_position_tables_of_another_size_raise(tmp_path):
    """Stock Swin does not clamp the tables of stages whose grid is smaller than the window (and cannot run there)."""
    saved(SwinModel(stock_config(window_size=8)), tmp_path)
    with pytest.raises(RuntimeError, match="mismatched_sizes"):
        GreenSwinModel.from_pretrained(tmp_path)


# SimMIM


def test_a_simmim_folder_gives_the_encoder(tmp_path):
    stock = SwinForMaskedImageModeling(stock_config())
    saved(stock, tmp_path)
    encoder, info = load(GreenSwinModel, tmp_path)
    assert "missing_keys" not in info
    torch.testing.assert_close(main_output(encoder), stock.swin(images(2)).last_hidden_state, atol=1e-5, rtol=1e-5)
    pretraining, info = load(GreenSwinForMaskedImageModeling, tmp_path)
    assert {key.split(".")[0] for key in info["missing_keys"]} == {"decoder"}
    assert info["missing_keys"] == {key for key in pretraining.state_dict() if key.startswith("decoder.")}
    assert all(parameter.isfinite().all() for parameter in pretraining.parameters())


# Pretraining to tasks


def test_a_pretrained_folder_gives_every_task(tmp_path):
    pretrained = GreenSwinForMaskedImageModeling(tiny_config(out_features=["stage2", "stage3"]))
    saved(pretrained, tmp_path)
    expected = pretrained.swin(images(2)).last_hidden_state

    classifier, info = load(GreenSwinForImageClassification, tmp_path)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert torch.equal(classifier.swin(images(2)).last_hidden_state, expected)
    assert all(key.startswith("decoder.") for key in info.get("unexpected_keys", ()))

    backbone, info = load(GreenSwinBackbone, tmp_path)
    assert info["missing_keys"] == {
        f"hidden_states_norms.stage{i}.{part}" for i in (2, 3) for part in ("weight", "bias")
    }
    assert backbone.hidden_states_norms["stage2"].weight.eq(1).all()

    for cls in (GreenSwinModel, AutoModel):
        encoder, info = load(cls, tmp_path)
        assert "missing_keys" not in info
        assert torch.equal(encoder(images(2)).last_hidden_state, expected)


def test_encoders_and_classifiers_go_back_to_pretraining(tmp_path):
    classifier = GreenSwinForImageClassification(tiny_config())
    saved(classifier, tmp_path / "classifier")
    classifier.swin.save_pretrained(tmp_path / "encoder")
    for folder in ("classifier", "encoder"):
        model, info = load(GreenSwinForMaskedImageModeling, tmp_path / folder)
        assert {key.split(".")[0] for key in info["missing_keys"]} == {"decoder"}
        torch.testing.assert_close(
            model.swin(images(2)).last_hidden_state, classifier.swin(images(2)).last_hidden_state
        )


def test_another_number_of_labels_starts_a_new_head(tmp_path):
    saved(GreenSwinForImageClassification(tiny_config()), tmp_path)
    model = GreenSwinForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
    assert model(images(2)).logits.shape == (2, 7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_load_in_a_smaller_dtype(dtype, tmp_path):
    saved(GreenSwinForMaskedImageModeling(tiny_config()), tmp_path)
    model = GreenSwinForMaskedImageModeling.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


def test_weights_are_saved_as_safetensors_in_shards_too(tmp_path):
    model = GreenSwinForMaskedImageModeling(tiny_config())
    saved(model, tmp_path / "whole")
    code = {path.name for path in (tmp_path / "whole").glob("*.py")}
    assert {path.name for path in (tmp_path / "whole").iterdir()} - code == {"config.json", "model.safetensors"}
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    names = {path.name for path in (tmp_path / "shards").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 1
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
    loaded, info = load(GreenSwinForMaskedImageModeling, tmp_path / "shards")
    assert info == {}
    assert torch.equal(main_output(loaded), main_output(model))


# Auto classes


def test_auto_classes_map_to_ours():
    config = tiny_config(out_features=["stage1", "stage3"])
    assert type(AutoConfig.for_model("green_swin")) is type(config)
    assert type(AutoModel.from_config(config)) is GreenSwinModel
    assert type(AutoModelForMaskedImageModeling.from_config(config)) is GreenSwinForMaskedImageModeling
    assert type(AutoModelForImageClassification.from_config(config)) is GreenSwinForImageClassification
    backbone = AutoBackbone.from_config(config)
    assert type(backbone) is GreenSwinBackbone
    assert backbone.channels == [8, 32]


SUBPROCESS = """
import sys
import torch
import green_swin_hf
import transformers

folder = sys.argv[1]
inputs = torch.load(folder + "/inputs.pt")
results = {}
with torch.no_grad():
    for task, auto_class, key in (
        ("pretraining", "AutoModelForMaskedImageModeling", "reconstruction"),
        ("pretraining", "AutoModel", "last_hidden_state"),
        ("classifier", "AutoModelForImageClassification", "logits"),
    ):
        model = getattr(transformers, auto_class).from_pretrained(f"{folder}/{task}").eval()
        results[f"{task} {auto_class}"] = model(inputs)[key]
    config = transformers.AutoConfig.from_pretrained(folder + "/pretraining")
    torch.manual_seed(0)
    results["backbone"] = transformers.AutoBackbone.from_config(config).eval()(inputs).feature_maps[-1]
processor = transformers.AutoImageProcessor.from_pretrained(folder + "/pretraining")
results["processor"] = type(processor).__name__
results["size"] = dict(processor.size)
torch.save(results, folder + "/results.pt")
"""


def test_auto_classes_load_our_folders_in_another_process(tmp_path):
    pretraining = randomised(GreenSwinForMaskedImageModeling(tiny_config()))
    classifier = randomised(GreenSwinForImageClassification(tiny_config()))
    pretraining.save_pretrained(tmp_path / "pretraining")
    classifier.save_pretrained(tmp_path / "classifier")
    ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(tmp_path / "pretraining")
    torch.save(images(2), tmp_path / "inputs.pt")

    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", SUBPROCESS, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = torch.load(tmp_path / "results.pt")

    with torch.no_grad():
        torch.manual_seed(0)
        backbone = GreenSwinBackbone(tiny_config()).eval()
        expected = {
            "pretraining AutoModelForMaskedImageModeling": pretraining(images(2)).reconstruction,
            "pretraining AutoModel": pretraining.swin(images(2)).last_hidden_state,
            "classifier AutoModelForImageClassification": classifier(images(2)).logits,
            "backbone": backbone(images(2)).feature_maps[-1],
        }
    for key, value in expected.items():
        torch.testing.assert_close(results[key], value, atol=1e-5, rtol=1e-5)
    assert results["processor"].startswith("ViTImageProcessor")
    assert results["size"] == {"height": 32, "width": 32}


def test_image_processors_are_found_in_both_kinds(tmp_path):
    tiny_config().save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(tmp_path)
    for kind in ("torchvision", "pil"):
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend=kind)
        picture = torch.randint(0, 256, (40, 50, 3), dtype=torch.uint8).numpy()
        pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, 32, 32)
        assert processor.do_convert_rgb is True


def test_backbone_loads_from_a_local_folder(tmp_path):
    backbone = GreenSwinBackbone(tiny_config(out_features=["stage1", "stage3"]))
    saved(backbone, tmp_path)
    loaded, info = load(GreenSwinBackbone, tmp_path)
    assert info == {}
    assert (loaded.out_features, loaded.channels) == (["stage1", "stage3"], [8, 32])
    assert torch.equal(main_output(loaded), main_output(backbone))
