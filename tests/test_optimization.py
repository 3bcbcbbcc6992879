"""Parameter groups by name, the schedule at its corners, and the scaling rule."""

import doctest

import pytest
import torch

from green_swin_hf import GreenSwinConfig, GreenSwinForMaskedImageModeling, optimization
from green_swin_hf.optimization import (
    build_optimizer,
    cosine_factor,
    cosine_schedule,
    layer_depth,
    parameter_groups,
    scaled_learning_rate,
)


@pytest.fixture(scope="module")
def model():
    config = GreenSwinConfig(
        image_size=32, patch_size=2, num_channels=1, embed_dim=8, depths=(2, 1), num_heads=(1, 2), window_size=4,
        use_absolute_embeddings=True, decoder_hidden_size=16, decoder_num_attention_heads=2,
    )  # fmt: skip
    return GreenSwinForMaskedImageModeling(config)


def decay_of(model, **options):
    groups = parameter_groups(model, 0.05, **options)
    return {name: group["weight_decay"] for group in groups for name in group["names"]}


def test_examples_in_the_docstrings_hold():
    assert doctest.testmod(optimization).failed == 0


def test_every_parameter_is_in_one_group_and_only_weight_matrices_decay(model):
    names = [name for group in parameter_groups(model, 0.05) for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    decay = decay_of(model)
    free = ("bias", "layernorm", "norm.", "relative_position_bias_table", "position_embeddings", "mask_token")
    for name, value in decay.items():
        assert value == (0.0 if any(part in name for part in free) else 0.05), name
    assert {"decoder.mask_token", "swin.embeddings.position_embeddings"} <= decay.keys()


def test_frozen_parameters_are_left_out(model):
    model.decoder.mask_token.requires_grad_(False)
    assert "decoder.mask_token" not in decay_of(model)
    model.decoder.mask_token.requires_grad_(True)


DEPTHS = {
    "swin.embeddings.patch_embeddings.projection.weight": 0,
    "swin.encoder.layers.0.blocks.0.layernorm_before.weight": 1,
    "swin.encoder.layers.0.blocks.1.output.dense.bias": 2,
    "swin.encoder.layers.0.downsample.reduction.weight": 2,
    "swin.encoder.layers.1.blocks.0.attention.self.query.weight": 3,
    "swin.layernorm.weight": 4,
    "decoder.mask_token": 4,
    "classifier.weight": 4,
}


@pytest.mark.parametrize(("name", "depth"), DEPTHS.items(), ids=DEPTHS.keys())
def test_depth_of_a_parameter(name, depth):
    assert layer_depth(name, (2, 1)) == depth


def test_layer_decay_scales_the_learning_rate_from_the_last_layer_down(model):
    optimizer = build_optimizer(model, 1.0, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rate[id(parameter)] == 0.5 ** (4 - layer_depth(name, (2, 1)))


def test_the_optimizer_is_fused_and_its_state_loads_without_pickle(model, tmp_path):
    optimizer = build_optimizer(model, 1e-3)
    assert all(group["fused"] for group in optimizer.param_groups)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    torch.load(tmp_path / "state.pt", weights_only=True)


@pytest.mark.parametrize(("warmup", "total", "floor"), [(0, 10, 0.0), (3, 10, 0.1), (10, 10, 0.0)])
def test_schedule_warms_up_linearly_and_falls_to_its_floor(warmup, total, floor):
    factors = [cosine_factor(step, warmup, total, floor) for step in range(total + 1)]
    assert factors[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])
    assert factors[warmup:] == sorted(factors[warmup:], reverse=True)
    assert max(factors) == 1.0
    assert warmup == total or factors[-1] == pytest.approx(floor)


def test_scheduler_sets_the_rate_of_each_update_without_a_warning_when_the_first_is_skipped(model, recwarn):
    optimizer = build_optimizer(model, 2.0)
    scheduler = cosine_schedule(optimizer, 2, 4)
    rates = []
    for _ in range(4):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step()
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0])
    assert not recwarn.list


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: parameter_groups(m, 0.05, 0.0), "layer_decay 0.0"),
        (lambda m: parameter_groups(m, -1.0), "weight_decay -1.0"),
        (lambda m: cosine_schedule(build_optimizer(m, 1.0), 5, 4), "warmup_steps 5"),
        (lambda m: cosine_schedule(build_optimizer(m, 1.0), 1, 4, 2.0), "min_lr_ratio 2.0"),
    ],
)
def test_values_out_of_range_are_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_learning_rate_is_proportional_to_the_batch():
    assert scaled_learning_rate(1.5e-4, 4096) == pytest.approx(2.4e-3)
