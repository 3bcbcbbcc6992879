"""Latents, predictions, loss and gradients of the published implementation (`fixtures/golden/README.md`)."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from green_swin_hf import GreenSwinConfig, GreenSwinForMaskedImageModeling, SparseGeometry, build_sparse_plan
from green_swin_hf.weight_conversion_names import published_names, to_our_names

GOLDEN = Path(__file__).parent / "fixtures" / "golden"

# Parameters of the fixture: four stages of two blocks, a decoder of one.
NAMES = published_names("greenmim", (2, 2, 2, 2), decoder_blocks=1)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "img128_win4.expected.safetensors")


@pytest.fixture
def model() -> GreenSwinForMaskedImageModeling:
    sizes = json.loads((GOLDEN / "img128_win4.json").read_text())
    config = GreenSwinConfig(
        image_size=sizes["img"],
        window_size=sizes["win"],
        embed_dim=sizes["dim"],
        depths=sizes["depths"],
        num_heads=sizes["heads"],
        drop_path_rate=0.0,
        layer_norm_eps=1e-6,
        mask_ratio=sizes["ratio"],
        norm_pix_loss=sizes["norm_pix"],
        decoder_hidden_size=sizes["dec"],
        decoder_num_attention_heads=sizes["dech"],
        decoder_num_hidden_layers=sizes["decd"],
        decoder_intermediate_size=4 * sizes["dec"],
    )
    model = GreenSwinForMaskedImageModeling(config)
    with torch.serialization.safe_globals([argparse.Namespace]):
        published = torch.load(GOLDEN / "img128_win4.pth", weights_only=True)["model"]
    model.load_state_dict(to_our_names(published, NAMES), strict=True)
    return model.eval()


@pytest.fixture
def mask(expected: dict[str, torch.Tensor]) -> torch.Tensor:
    return expected["mask"][None].bool()


def largest_error(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    assert actual.shape == wanted.shape
    return (actual - wanted).abs().max().item()


@pytest.mark.parametrize("shared", [True, False], ids=["shared plan", "packed plan"])
def test_encoder_stages_and_latents(model, expected, mask, shared):
    images = expected["pixel_values"]
    plan = build_sparse_plan(mask, SparseGeometry.from_config(model.config))
    if shared:
        output = model.swin(images, sparse_plan=plan, output_hidden_states=True)
        states, latent = output.hidden_states, output.last_hidden_state
    else:  # the golden mask for the second image only: the pool of the batch is packed
        other = mask.roll(1, dims=1)
        output = model.swin(images, bool_masked_pos=torch.cat([other, mask]), output_hidden_states=True)
        states, latent = [state[1:] for state in output.hidden_states], output.last_hidden_state[1:]
        expected = {name: tensor[1:] for name, tensor in expected.items()}
    assert largest_error(latent, expected["latent"]) <= 1e-5
    for stage in range(1, 5):
        raster_order = plan.stages[min(stage, 3)].position.argsort()
        assert largest_error(states[stage][:, raster_order], expected[f"stage{stage}"]) <= 1e-5, stage


def test_predictions_and_loss(model, expected, mask):
    output = model(expected["pixel_values"], bool_masked_pos=mask)
    assert largest_error(output.logits, expected["prediction"]) <= 1e-5
    assert largest_error(output.loss[None], expected["loss"]) <= 1e-5


def test_training_predicts_the_masked_units(model, expected, mask):
    output = model.train()(expected["pixel_values"], bool_masked_pos=mask)
    assert largest_error(output.logits[:, mask[0]], expected["prediction"][:, mask[0]]) <= 1e-5
    assert not output.logits[:, ~mask[0]].any()
    assert largest_error(output.loss[None], expected["loss"]) <= 1e-5


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients(model, expected, mask, training):
    model.train(training)(expected["pixel_values"], bool_masked_pos=mask).loss.backward()
    parameters = dict(model.named_parameters())
    published = {name.removeprefix("grad."): g for name, g in expected.items() if name.startswith("grad.")}
    gradients = to_our_names(published, NAMES)
    assert len(gradients) == 15  # twelve published tensors and mask token, one of them a `qkv` in three
    for name, gradient in gradients.items():
        assert largest_error(parameters[name].grad, gradient) <= 1e-5, name


def test_published_misplacement_would_not_pass(model, expected, mask):
    """The published decoder puts latents, which are in raster order, where its random order of units says."""
    latents = model.swin(expected["pixel_values"], bool_masked_pos=mask).last_hidden_state
    unit_of_latent = expected["ids_restore_published"].argsort()[: latents.shape[1]]  # where they are put
    assert unit_of_latent.sort().values.tolist() == (~mask[0]).nonzero().flatten().tolist()
    misplaced = latents[:, unit_of_latent.argsort()]  # our decoder takes them in raster order of those units
    plan = build_sparse_plan(mask, SparseGeometry.from_config(model.config))
    prediction = model.decoder(misplaced, plan.geometry.unit_grid_size, plan, masked_only=False)
    assert largest_error(prediction, expected["prediction"]) > 100 * 1e-5  # the tolerance of the tests above
