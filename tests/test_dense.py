"""Whole images: GreenSwin equals stock Swin with the same files, in both directions, stage by stage.

A fresh stock model for each case: stock Swin shrinks its windows for good after one small input.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import encode
from safetensors.torch import load_file
from tiny import images, randomised, seeded, tiny_config
from torch import Tensor
from transformers import SwinBackbone, SwinConfig, SwinForImageClassification, SwinModel

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinConfig,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)

TOLERANCE = 1e-5
CLASSES = {
    "model": (SwinModel, GreenSwinModel),
    "classifier": (SwinForImageClassification, GreenSwinForImageClassification),
    "backbone": (SwinBackbone, GreenSwinBackbone),
}
# Grids of 32x32, 16x16 and 8x8 tokens at 64 px: every stage has more than one window of 4, so every stage shifts.
FIELDS = {
    "image_size": 64,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2, 2],
    "num_heads": [1, 2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
    "num_labels": 5,
    "out_features": ["stem", "stage1", "stage2", "stage3"],
}
# Fields that differ, image size.
CASES: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "size of the config": ({}, (64, 64)),
    "patches padded": ({}, (63, 61)),
    "windows padded": ({}, (56, 72)),
    "odd merging": ({}, (52, 44)),
    "all padded": ({}, (51, 37)),
    "larger": ({}, (80, 98)),
    "odd window": ({"window_size": 5}, (47, 66)),
    "one window in the last stage": ({"window_size": 8}, (64, 64)),
    "deep": ({"depths": [4, 3, 1]}, (64, 48)),
    "grey": ({"num_channels": 1}, (64, 48)),
    "five channels": ({"num_channels": 5}, (64, 48)),
    "no bias in query, key and value": ({"qkv_bias": False}, (64, 48)),
    "absolute positions": ({"use_absolute_embeddings": True}, (64, 64)),
    "two stages": ({"depths": [2, 2], "num_heads": [2, 4], "out_features": ["stage1", "stage2"]}, (64, 50)),
    "ReLU and a wide MLP": ({"hidden_act": "relu", "mlp_ratio": 5.3}, (64, 48)),
}
every_case = pytest.mark.parametrize(("fields", "image_size"), CASES.values(), ids=CASES.keys())
each_direction = pytest.mark.parametrize("from_stock", [True, False], ids=["stock to green", "green to stock"])
each_attention = pytest.mark.parametrize("attention", ["eager", "sdpa"])


def load(model_class: type, folder: Path | str, attention: str) -> Any:
    """A model from a folder, eval mode, when the folder holds exactly its weights."""
    model, report = model_class.from_pretrained(folder, output_loading_info=True, attn_implementation=attention)
    assert not any(report.values()), report
    return model.eval()


def twins(kind: str, fields: dict[str, Any], folder: Path | str, from_stock: bool, attention: str = "eager") -> tuple:
    """A stock and a GreenSwin model with the same random weights, one of them loaded from the other's folder."""
    stock_class, green_class = CLASSES[kind]
    if from_stock:
        stock = stock_class._from_config(SwinConfig(**{**FIELDS, **fields}), attn_implementation=attention)
        randomised(stock).save_pretrained(folder)
        return stock, load(green_class, folder, attention)
    green = green_class._from_config(GreenSwinConfig(**{**FIELDS, **fields}), attn_implementation=attention)
    randomised(green).save_pretrained(folder)
    return load(stock_class, folder, attention), green


def assert_close(actual: Tensor, expected: Tensor, what: str = "output") -> None:
    assert actual.shape == expected.shape, what
    error = (actual - expected).abs().max().item()
    assert error <= TOLERANCE, f"{what}: error {error:.1e}"


def assert_all_close(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    assert len(actual) == len(expected), what
    for stage, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert_close(ours, theirs, f"{what}[{stage}]")


def pixels_for(fields: dict[str, Any], image_size: tuple[int, int]) -> Tensor:
    return images(2, fields.get("num_channels", 3), *image_size)


@each_direction
@each_attention
@every_case
@torch.no_grad()
def test_model_equals_stock(fields, image_size, attention, from_stock, tmp_path):
    stock, green = twins("model", fields, tmp_path, from_stock, attention)
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected, actual = (model(pixels_for(fields, image_size), **wanted) for model in (stock, green))
    assert_close(actual.last_hidden_state, expected.last_hidden_state)
    assert_close(actual.pooler_output, expected.pooler_output)
    assert_all_close(actual.hidden_states, expected.hidden_states, "hidden_states")
    assert_all_close(actual.reshaped_hidden_states, expected.reshaped_hidden_states, "reshaped_hidden_states")
    if attention == "eager":
        assert_all_close(actual.attentions, expected.attentions, "attentions")


@each_direction
@each_attention
@pytest.mark.parametrize("name", ["size of the config", "all padded"])
@torch.no_grad()
def test_classifier_equals_stock(name, attention, from_stock, tmp_path):
    fields, image_size = CASES[name]
    stock, green = twins("classifier", fields, tmp_path, from_stock, attention)
    labels = torch.tensor([3, 1])
    expected, actual = (model(pixels_for(fields, image_size), labels=labels) for model in (stock, green))
    assert_close(actual.logits, expected.logits)
    assert_close(actual.loss, expected.loss)


@each_direction
@each_attention
@pytest.mark.parametrize(
    ("fields", "image_size"),
    [*CASES.values(), ({}, (24, 40)), ({"window_size": 7}, (20, 26)), ({"out_features": ["stage2"]}, (64, 64))],
    ids=[*CASES.keys(), "grids below the window", "grids far below the window", "one of the stages"],
)
@torch.no_grad()
def test_backbone_equals_stock(fields, image_size, attention, from_stock, tmp_path):
    stock, green = twins("backbone", fields, tmp_path, from_stock, attention)
    assert green.channels == stock.channels
    assert green.out_features == stock.out_features
    wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    expected, actual = (model(pixels_for(fields, image_size), **wanted) for model in (stock, green))
    assert_all_close(actual.feature_maps, expected.feature_maps, "feature_maps")
    assert_all_close(actual.hidden_states, expected.hidden_states, "hidden_states")
    if attention == "eager":
        assert_all_close(actual.attentions, expected.attentions, "attentions")


@pytest.mark.parametrize(
    "name", ["size of the config", "all padded", "odd window", "one window in the last stage", "absolute positions"]
)
def test_gradients_equal_stock(name, tmp_path):
    fields, image_size = CASES[name]
    # In float64, so that sdpa: stock's eager attention computes its softmax in float32.
    models = [model.double().train() for model in twins("classifier", fields, tmp_path / "weights", True, "sdpa")]
    gradients = []
    for number, model in enumerate(models):
        model(pixels_for(fields, image_size).double(), labels=torch.tensor([3, 1])).loss.backward()
        with torch.no_grad():  # saved as if they were weights, gradients get the names of files
            for parameter in model.parameters():
                parameter.copy_(parameter.grad)
        model.save_pretrained(tmp_path / str(number))
        gradients.append(load_file(tmp_path / str(number) / "model.safetensors"))
    expected, actual = gradients
    assert actual.keys() == expected.keys()
    assert len(actual) == len(list(models[1].parameters()))
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        error = (actual[name] - gradient).abs().max() / max(gradient.abs().max(), 1e-4 * largest)
        assert error <= 1e-9, f"{name}: relative error {error:.1e}"


def moderate(model: torch.nn.Module) -> Any:
    """Random weights that keep activations of a model of real width near one."""
    generator = seeded(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(0.1 * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                fan_in = 1 if "table" in name else parameter[0].numel()
                parameter.copy_(0.5 * noise / fan_in**0.5)
    return model.eval()


@each_direction
@torch.no_grad()
def test_swin_tiny_at_224_px_equals_stock(from_stock):
    source = (
        SwinForImageClassification(SwinConfig()) if from_stock else GreenSwinForImageClassification(GreenSwinConfig())
    )
    with tempfile.TemporaryDirectory() as folder:  # not `tmp_path`, which keeps its 110 MB
        moderate(source).save_pretrained(folder)
        loaded = load(GreenSwinForImageClassification if from_stock else SwinForImageClassification, folder, "sdpa")
    pixels = images(1, 3, 224, 224)
    expected, actual = (model(pixels, output_hidden_states=True) for model in (source, loaded))
    assert_close(actual.logits, expected.logits)
    assert [tuple(state.shape[1:]) for state in actual.reshaped_hidden_states] == [
        (96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7), (768, 7, 7)
    ]  # fmt: skip
    assert_all_close(actual.hidden_states, expected.hidden_states, "hidden_states")
    assert_all_close(actual.reshaped_hidden_states, expected.reshaped_hidden_states, "reshaped_hidden_states")


# Where stock Swin is no oracle


@pytest.mark.parametrize(
    ("image_size", "window_size"),
    [((64, 64), 4), ((32, 32), 4), ((16, 16), 4), ((8, 16), 4), ((64, 64), 16), ((16, 32), 16), ((8, 8), 16)],
    ids=str,
)
def test_small_images_equal_the_naive_twin(image_size, window_size):
    """Grids down to a single token, all multiples of their window (the twin has no padding).

    Stock Swin crashes where a grid is smaller than the window.
    """
    config = tiny_config(image_size=64, window_size=window_size)
    model = randomised(GreenSwinModel(config).double())
    weights, pixels = dict(model.named_parameters()), images(2, 3, *image_size).double()
    unmasked = torch.zeros(2, image_size[0] * image_size[1] // 64, dtype=torch.bool)
    *stages, latents = encode(weights, config, pixels, unmasked)
    output = model(pixels, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state, latents.flatten(1, 2), rtol=1e-9, atol=1e-9)
    for actual, expected in zip(output.reshaped_hidden_states, stages, strict=True):
        torch.testing.assert_close(actual.permute(0, 2, 3, 1), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_small_image_leaves_no_trace():
    model = randomised(GreenSwinModel(GreenSwinConfig(**FIELDS)))
    pixels = images(2, 3, 64, 64)
    before = model(pixels).last_hidden_state
    for size in (8, 20, 32):
        model(images(1, 3, size, size))
    assert torch.equal(model(pixels).last_hidden_state, before)


@torch.no_grad()
def test_eager_equals_sdpa():
    outputs = []
    for attention in ("eager", "sdpa"):
        model = GreenSwinModel._from_config(GreenSwinConfig(**FIELDS), attn_implementation=attention)
        outputs.append(randomised(model.double())(images(2, 3, 51, 37).double()).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


# Folders of one kind in models of another


def test_a_pretraining_folder_starts_a_classifier_of_either_kind(tmp_path):
    source = randomised(GreenSwinForMaskedImageModeling(GreenSwinConfig(**FIELDS)))
    source.save_pretrained(tmp_path)
    logits = []
    for model_class in (GreenSwinForImageClassification, SwinForImageClassification):
        model, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
        assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
        # ours knows that the decoder of a pretrained file is for pretraining; stock Swin names it
        named = {name.split(".")[0] for name in report["unexpected_keys"]}
        assert named == (set() if model_class is GreenSwinForImageClassification else {"decoder"})
        assert not report["mismatched_keys"]
        logits.append(model.eval().swin(images(2, 3, 64, 64)).last_hidden_state)
    assert_close(*logits)


def test_a_model_from_a_stock_folder_is_saved_as_its_own_kind(tmp_path):
    _, green = twins("model", {}, tmp_path / "stock", True)
    assert green.config.model_type == "green_swin"
    green.save_pretrained(tmp_path / "green")
    again = load(GreenSwinModel, tmp_path / "green", "eager")
    stock = load(SwinModel, tmp_path / "green", "eager")
    assert again.config.model_type == "green_swin"
    pixels = images(2, 3, 64, 64)
    assert torch.equal(again(pixels).last_hidden_state, green(pixels).last_hidden_state)
    assert_close(stock(pixels).last_hidden_state, green(pixels).last_hidden_state)
