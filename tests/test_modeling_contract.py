"""What transformers and its users ask of every model: gradients, initialisation, outputs, dtypes, files, errors."""

import contextlib
import copy
import io
import math
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import images, masks, randomised, seeded, tiny_config
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import green_swin_hf.modeling_green_swin as modeling
import green_swin_hf.sparse_plan as sparse_plan_module
from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
    SparseGeometry,
    build_sparse_plan,
)

# transformers 5.23 renames gradient checkpointing, 5.17 does not know the new name yet
pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")

CLASSES = {
    "model": GreenSwinModel,
    "pretraining": GreenSwinForMaskedImageModeling,
    "classifier": GreenSwinForImageClassification,
    "backbone": GreenSwinBackbone,
}
MASKABLE = ("model", "pretraining")
MASK_KINDS = ("shared", "per_image", "unequal")
# (class, kind of mask): every class on whole images, and those that take a mask with each kind
CALLS = [(name, None) for name in CLASSES] + [(name, kind) for name in MASKABLE for kind in MASK_KINDS]

each_class = pytest.mark.parametrize("name", CLASSES)
each_call = pytest.mark.parametrize(("name", "kind"), CALLS, ids=[f"{name}-{kind or 'dense'}" for name, kind in CALLS])
each_mask = pytest.mark.parametrize("kind", MASK_KINDS)


def make(name: str, **changes):
    if name == "backbone":
        changes.setdefault("out_features", ["stage1", "stage2", "stage3"])
    return randomised(CLASSES[name](tiny_config(**changes)))


def inputs(name: str, kind: str | None = None, batch_size: int = 3, **image_changes) -> dict:
    given = {"pixel_values": images(batch_size, **image_changes)}
    if kind is not None:
        given["bool_masked_pos"] = masks(kind, batch_size)
    if name == "classifier":
        given["labels"] = torch.arange(batch_size)
    return given


def tensors(outputs) -> list[torch.Tensor]:
    """Every tensor of an output, those in tuples too."""
    values = outputs.to_tuple() if hasattr(outputs, "to_tuple") else outputs
    flat = [item for value in values for item in (value if isinstance(value, tuple) else (value,))]
    return [value for value in flat if isinstance(value, torch.Tensor)]


def assert_same(ours, theirs, atol: float = 0.0) -> None:
    first, second = tensors(ours), tensors(theirs)
    assert len(first) == len(second) > 0
    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right, atol=atol, rtol=0)


def scalar(outputs) -> torch.Tensor:
    """A loss that every parameter takes part in."""
    loss = getattr(outputs, "loss", None)
    if loss is not None:
        return loss
    return sum((value.float() ** 2).mean() for value in tensors(outputs) if value.is_floating_point())


def gradients(model: nn.Module, given: dict) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    scalar(model(**given)).backward()
    return {name: None if value.grad is None else value.grad.clone() for name, value in model.named_parameters()}


# Attention implementations


@pytest.fixture
def fused_calls(monkeypatch):
    calls, fused = [], nn.functional.scaled_dot_product_attention

    def counted(*args, **kwargs):
        calls.append(1)
        return fused(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", counted)
    return calls


@each_call
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_sdpa_equals_eager(name, kind, dtype, fused_calls):
    # fresh weights in float32 as in transformers' own test; in float64 weights that make every parameter matter
    model = make(name).double() if dtype == torch.float64 else CLASSES[name](tiny_config()).eval()
    given = inputs(name, kind)
    results = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results[implementation] = model(**given)
        assert bool(fused_calls) == (implementation == "sdpa")
    assert_same(results["sdpa"], results["eager"], atol=1e-6 if dtype == torch.float32 else 1e-11)


@each_call
@pytest.mark.parametrize("learned_tables", [True, False], ids=["learned_tables", "frozen_tables"])
def test_gradients_of_sdpa_equal_those_of_eager(name, kind, learned_tables):
    model = make(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(learned_tables or "bias_table" not in parameter_name)
    found = {}
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        found[implementation] = gradients(model, inputs(name, kind))
    for parameter_name, gradient in found["eager"].items():
        torch.testing.assert_close(found["sdpa"][parameter_name], gradient, atol=2e-5, rtol=1e-4)


def test_an_unknown_attention_implementation_raises():
    with pytest.raises((ValueError, ImportError)):
        GreenSwinModel._from_config(tiny_config(), attn_implementation="nonsense")


# Gradients


@each_call
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
def test_every_parameter_gets_a_gradient(name, kind, checkpointing):
    model = make(name, use_absolute_embeddings=True, hidden_dropout_prob=0.1).train()
    given = inputs(name, kind)
    torch.manual_seed(0)
    plain = gradients(model, given)
    assert [key for key, value in plain.items() if value is None or not value.isfinite().all()] == []
    # `key.bias` shifts all scores of a softmax alike: its true gradient is zero
    assert [key for key, value in plain.items() if not value.any() and "key.bias" not in key] == []
    if checkpointing is None:
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    assert model.is_gradient_checkpointing
    torch.manual_seed(0)
    for key, value in gradients(model, given).items():
        torch.testing.assert_close(value, plain[key], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["plain", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("per", ["patch", "unit"])
def test_an_all_visible_integer_mask_trains_with_loss_zero(checkpointing, per):
    model = make("pretraining").train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    mask = torch.zeros(2, 256 if per == "patch" else 16, dtype=torch.int64)
    outputs = model(images(2), bool_masked_pos=mask)
    assert outputs.loss == 0
    assert outputs.reconstruction.shape == (2, 3, 32, 32)
    outputs.loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    assert all(bool((parameter.grad == 0).all()) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "keys"), [("model", ("last_hidden_state", "pooler_output")), ("pretraining", ("logits",))]
)
def test_an_all_visible_mask_equals_whole_images(name, keys):
    model = make(name)
    dense, masked = model(images(2)), model(images(2), bool_masked_pos=torch.zeros(2, 16))
    for key in keys:
        torch.testing.assert_close(masked[key], dense[key], atol=2e-5, rtol=1e-4)


def test_frozen_encoder_trains_the_head_only():
    model = make("pretraining").train()
    model.swin.requires_grad_(False)
    found = gradients(model, inputs("pretraining", "per_image"))
    assert {name.split(".")[0] for name, value in found.items() if value is not None} == {"decoder"}


@pytest.mark.parametrize("name", MASKABLE)
@pytest.mark.parametrize("kind", [None, *MASK_KINDS])
def test_stochastic_depth_drops_both_branches_of_whole_images(name, kind):
    model = make(name, drop_path_rate=0.5).train()
    given = inputs(name, kind or "per_image", batch_size=8)
    if kind is None:
        del given["bool_masked_pos"]
        model = model.swin if name == "pretraining" else model  # which would draw masks
    factors = {}

    def record(module, arguments, output):
        ratio = output.detach() / arguments[0].detach()
        factors.setdefault(module, []).append(ratio.nanmedian(dim=-1).values)  # [R, T]

    for module in model.modules():
        if type(module).__name__ == "GreenSwinDropPath":
            module.register_forward_hook(record)
    model(**given)
    rates = torch.linspace(0, 0.5, 6).tolist()
    assert len(factors) == 6
    for rate, both_branches in zip(rates, factors.values(), strict=True):
        assert len(both_branches) == 2
        for ratio in both_branches:
            for tokens in tokens_of_images(ratio, kind, 8):
                assert tokens.max() - tokens.min() < 1e-5, "a branch is dropped for part of an image"
                kept = tokens[0].item()
                assert kept == 0 or kept == pytest.approx(1 / (1 - rate))
    dropped = torch.cat([ratio.flatten() for branches in factors.values() for ratio in branches]) == 0
    assert 0 < dropped.float().mean() < 0.6


def tokens_of_images(rows: torch.Tensor, kind: str | None, batch_size: int):
    """Rows of the pool, [R, T], cut into the tokens of each image."""
    if len(rows) == batch_size:
        return list(rows)
    visible = (~masks(kind, batch_size)).sum(dim=1)
    return rows[0].split((visible * (rows.shape[1] // visible.sum())).tolist())


def test_stochastic_depth_acts_in_training_only():
    model = make("model", drop_path_rate=0.5)
    given = inputs("model", "per_image")
    assert_same(model(**given), model(**given))
    model.train()
    torch.manual_seed(3)
    first = model(**given).last_hidden_state
    torch.manual_seed(3)
    assert_same((first,), (model(**given).last_hidden_state,))
    assert not torch.equal(first, model(**given).last_hidden_state)


@pytest.mark.parametrize("dropout", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@pytest.mark.parametrize("learned_tables", [True, False], ids=["learned_tables", "frozen_tables"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@each_call
def test_dropout_acts_in_training_only(name, kind, implementation, learned_tables, dropout):
    model, without = make(name, **{dropout: 0.5}), make(name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(learned_tables or "bias_table" not in parameter_name)
    model.set_attn_implementation(implementation)
    given = inputs(name, kind or ("unequal" if name == "pretraining" else None))  # else it draws masks in training
    assert_same(model(**given), without(**given), atol=1e-4)
    model.train()
    first, second = (torch.cat([value.flatten() for value in tensors(model(**given))]) for _ in range(2))
    assert not torch.equal(first, second)


# Memory


@pytest.mark.parametrize("kind", [None, "shared", "per_image"])
def test_activations_of_mlps_are_not_kept_for_backward(kind):
    model = make("pretraining").train()
    activated = []

    def note(module: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
        activated.append(weakref.ref(output))

    activations = [module for module in model.modules() if type(module) is type(model.decoder.layers[0].activation)]
    assert len(activations) == sum(model.config.depths) + model.config.decoder_num_hidden_layers
    for module in activations:
        module.register_forward_hook(note)
    output = model(**inputs("pretraining", kind))
    kept = [reference() for reference in activated if reference() is not None]
    assert len(activated) == len(activations)
    assert not kept
    output.logits.square().sum().backward()  # called again for their gradients
    assert len(activated) == 2 * len(activations)


@pytest.mark.parametrize("owner", ["gradient checkpointing", "hooks of the user", "torch.compile"])
def test_what_is_kept_is_left_to_who_decides_it_already(owner, monkeypatch):
    asked, hooks = [], torch.autograd.graph.saved_tensors_hooks
    monkeypatch.setattr(modeling, "weakref", SimpleNamespace(ref=asked.append))  # the first thing the context does
    model = make("pretraining").train()
    arguments = inputs("pretraining", "shared")
    if owner == "gradient checkpointing":
        model.gradient_checkpointing_enable()
        model(**arguments).loss.backward()
    elif owner == "hooks of the user":
        with hooks(lambda tensor: tensor, lambda tensor: tensor):
            model(**arguments).loss.backward()
    else:
        torch.compile(model, backend="eager")(**arguments).loss.backward()
    assert not asked


@pytest.mark.parametrize("hidden_act", ["relu", "silu", "gelu_new"])
def test_other_activations_are_kept_as_torch_does(hidden_act):
    model = make("pretraining", hidden_act=hidden_act).train()
    calls = []
    for module in model.modules():
        if type(module) is type(model.decoder.layers[0].activation):
            module.register_forward_hook(lambda *_: calls.append(1))
    loss = model(**inputs("pretraining", "shared")).loss
    forward_calls = len(calls)
    loss.backward()
    assert len(calls) == forward_calls


def test_a_layer_may_keep_the_activation_in_another_shape():
    source = torch.randn(2, 6, 8, generator=seeded(), dtype=torch.float64).requires_grad_()
    gelu = make("pretraining").decoder.layers[0].activation
    convolution = nn.Conv1d(8, 3, 1).double()

    def gradient(context) -> torch.Tensor:
        activated = gelu(source)
        with context(activated, gelu, source):
            output = convolution(activated.transpose(1, 2)) + activated.chunk(2)[0].square().sum()
        return torch.autograd.grad(output.square().sum(), source)[0]

    expected = gradient(lambda *_: contextlib.nullcontext())
    assert torch.equal(gradient(modeling.recomputed_in_backward), expected)


@pytest.mark.parametrize("kind", [None, "per_image"])
def test_functional_gradients(kind):
    model = make("pretraining" if kind else "classifier").train()
    arguments = inputs("pretraining" if kind else "classifier", kind)
    parameters = dict(model.named_parameters())

    def loss(parameters):
        output = torch.func.functional_call(model, parameters, (), arguments)
        return output.logits.square().sum()

    expected = torch.autograd.grad(loss(parameters), list(parameters.values()), allow_unused=True)
    actual = torch.func.grad(loss)(parameters)
    for value, name in zip(expected, parameters, strict=True):
        if value is not None:
            torch.testing.assert_close(actual[name], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_with_recomputed_activations_are_the_same_to_the_last_bit(dtype, monkeypatch):
    model = make("pretraining").train()

    def gradients() -> list[torch.Tensor]:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = model(**inputs("pretraining", "shared")).loss
        return torch.autograd.grad(loss, list(model.parameters()))

    recomputed = gradients()
    monkeypatch.setattr(modeling, "recomputed_in_backward", lambda *_: contextlib.nullcontext())
    for actual, expected in zip(recomputed, gradients(), strict=True):
        assert torch.equal(actual, expected)


def test_unit_statistics_are_torchs():
    units = torch.randn(5, 48, generator=seeded(), dtype=torch.float64) * 3 + 7
    units[2] = 0.25  # a flat unit
    mean, deviation = modeling.unit_statistics(units)
    torch.testing.assert_close(mean, units.mean(-1, keepdim=True))
    torch.testing.assert_close(deviation, (units.var(-1, keepdim=True) + 1e-6).sqrt())


# Initialisation


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory reads as NaN, so that what nobody initialises shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def expected_initial(name: str, config) -> tuple[float, float]:
    """(mean, standard deviation) of a freshly initialised parameter."""
    is_norm = any(part in name for part in ("norm", "layernorm"))
    if name.endswith("bias") or "bias_table" in name or "position_embeddings" in name:
        return 0.0, 0.0
    return (1.0, 0.0) if is_norm else (0.0, config.initializer_range)


def assert_freshly_initialised(model: nn.Module) -> None:
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        mean, deviation = expected_initial(name, model.config)
        tolerance = 5 * max(deviation, 1e-9) / math.sqrt(value.numel())
        assert value.isfinite().all(), name
        assert abs(value.double().mean().item() - mean) <= tolerance, name
        if deviation == 0:
            assert value.unique().tolist() == [mean], name
        elif value.numel() > 50:
            assert 0.7 * deviation < value.double().std().item() < 1.3 * deviation, name


@each_class
def test_init_weights_initialises_every_parameter_and_buffer(name, poisoned_memory):
    config = tiny_config(use_absolute_embeddings=True, initializer_range=0.05)
    assert_freshly_initialised(CLASSES[name](config))
    loaded, info = CLASSES[name].from_pretrained(None, config=config, state_dict={}, output_loading_info=True)
    assert set(info["missing_keys"]) == set(loaded.state_dict())
    assert_freshly_initialised(loaded)
    with torch.device("meta"):
        hollow = CLASSES[name](config)
    hollow.to_empty(device="cpu")
    for module in hollow.modules():
        hollow._init_weights(module)
    assert_freshly_initialised(hollow)


@each_class
def test_there_are_no_tensors_beside_the_parameters(name):
    """So nothing can be lost between the meta device and a file."""
    model = CLASSES[name](tiny_config())
    assert dict(model.named_buffers()) == {}
    for module in model.modules():
        assert [key for key, value in vars(module).items() if isinstance(value, torch.Tensor)] == []


# Signature and outputs


@each_class
def test_pixel_values_come_first(name):
    model = make(name)
    assert model.main_input_name == "pixel_values"
    assert_same(model(images(2)), model(pixel_values=images(2)))


def test_pretraining_without_a_mask_in_eval_reconstructs_without_loss():
    outputs = make("pretraining")(images(2))
    assert outputs.loss is None
    assert outputs.bool_masked_pos is None
    assert outputs.reconstruction.shape == (2, 3, 32, 32)
    assert outputs.logits.shape == (2, 16, 8 * 8 * 3)


def test_pretraining_without_a_mask_in_training_draws_one_for_each_image():
    outputs = make("pretraining").train()(images(8))
    assert outputs.loss.isfinite()
    assert outputs.bool_masked_pos.shape == (8, 16)
    assert outputs.bool_masked_pos.sum(dim=1).tolist() == [12] * 8
    assert len(outputs.bool_masked_pos.unique(dim=0)) > 1


@each_mask
def test_outputs_besides_the_loss_have_the_batch_first(kind):
    outputs = make("pretraining")(**inputs("pretraining", kind))
    assert outputs.loss.shape == ()
    others = [value for key, value in outputs.items() if key != "loss"]
    assert all(isinstance(value, torch.Tensor) and len(value) == 3 for value in others)


@each_mask
def test_reconstruction_lays_out_the_logits(kind):
    outputs = make("pretraining")(**inputs("pretraining", kind))
    for unit in range(16):
        row, column = divmod(unit, 4)
        square = outputs.reconstruction[:, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
        assert torch.equal(square.permute(0, 2, 3, 1).flatten(1), outputs.logits[:, unit])


@each_mask
@pytest.mark.parametrize("norm_pix_loss", [True, False], ids=["normalised", "raw"])
def test_loss_is_the_error_over_masked_pixels(kind, norm_pix_loss):
    model = make("pretraining", norm_pix_loss=norm_pix_loss)
    given = inputs("pretraining", kind)
    outputs = model(**given)
    errors = []
    for image, predicted, mask in zip(given["pixel_values"], outputs.logits, outputs.bool_masked_pos, strict=True):
        for unit in mask.nonzero().flatten().tolist():
            row, column = divmod(unit, 4)
            target = image[:, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8].permute(1, 2, 0).flatten().double()
            if norm_pix_loss:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            errors.append((predicted[unit].double() - target).square())
    torch.testing.assert_close(outputs.loss.double(), torch.cat(errors).mean(), atol=1e-5, rtol=1e-5)


@each_mask
def test_training_and_eval_agree_on_masked_units(kind):
    model = make("pretraining")
    given = inputs("pretraining", kind)
    evaluated, trained = model(**given), model.train()(**given)
    torch.testing.assert_close(trained.loss, evaluated.loss, atol=1e-5, rtol=1e-5)
    masked = evaluated.bool_masked_pos
    torch.testing.assert_close(trained.logits[masked], evaluated.logits[masked], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_masked_pixels_reach_no_output_but_the_loss(name, kind, training):
    model = make(name).train(training)
    given = inputs(name, kind)
    hidden = masks(kind, 3).expand(3, -1).view(3, 1, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    clean = model(**given)
    poisoned = model(**{**given, "pixel_values": given["pixel_values"].masked_fill(hidden, float("nan"))})
    for key in clean:
        if key != "loss":
            assert torch.equal(poisoned[key], clean[key]), key


@each_call
def test_a_sample_does_not_depend_on_its_batch(name, kind):
    model = make(name)
    given = inputs(name, kind, batch_size=4)
    given.pop("labels", None)
    together = model(**given)
    for image in range(4):
        alone = {key: value[image : image + 1] if len(value) == 4 else value for key, value in given.items()}
        for whole, part in zip(tensors(together), tensors(model(**alone)), strict=True):
            if whole.ndim == 0:
                continue
            row = whole[image, : part.shape[1]] if part.ndim == 3 or part.dtype == torch.bool else whole[image]
            torch.testing.assert_close(row, part[0], atol=2e-5, rtol=1e-4)


# Hidden states and attentions


@each_class
def test_hidden_states_of_whole_images(name):
    outputs = make(name)(images(2), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    if name == "backbone":
        sides, channels = (16, 16, 8, 4), (8, 8, 16, 32)  # before patch merging
        assert [state.shape for state in outputs.hidden_states] == [
            (2, channel, side, side) for channel, side in zip(channels, sides, strict=True)
        ]
        return
    assert [state.shape for state in outputs.hidden_states] == [(2, 256, 8), (2, 64, 16), (2, 16, 32), (2, 16, 32)]
    for state, feature_map in zip(outputs.hidden_states, outputs.reshaped_hidden_states, strict=True):
        assert torch.equal(feature_map.flatten(2).transpose(1, 2), state)


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
def test_hidden_states_of_visible_tokens(name, kind):
    outputs = make(name)(**inputs(name, kind), output_hidden_states=True)
    longest = (~masks(kind, 3)).sum(dim=1).max().item()
    expected = [(3, longest * 16, 8), (3, longest * 4, 16), (3, longest, 32), (3, longest, 32)]
    assert [state.shape for state in outputs.hidden_states] == expected
    assert outputs.reshaped_hidden_states is None


def test_unequal_counts_are_padded_with_zeros_and_say_so():
    outputs = make("model")(**inputs("model", "unequal"), output_hidden_states=True)
    counts = (~masks("unequal", 3)).sum(dim=1)
    assert outputs.visible_token_mask.sum(dim=1).tolist() == counts.tolist()
    assert outputs.last_hidden_state[~outputs.visible_token_mask].eq(0).all()
    for image, count in enumerate(counts.tolist()):
        assert outputs.visible_token_mask[image, :count].all()
        tokens = outputs.last_hidden_state[image, :count]
        torch.testing.assert_close(outputs.pooler_output[image], tokens.mean(dim=0), atol=1e-6, rtol=1e-5)


@each_class
def test_attentions_of_whole_images_are_probabilities(name):
    model = make(name)
    model.set_attn_implementation("eager")
    outputs = model(images(2), output_attentions=True)
    expected = [(2 * 16, 1, 16, 16), (2 * 4, 2, 16, 16), (2, 4, 16, 16)]
    assert [attention.shape for attention in outputs.attentions] == expected
    for attention in outputs.attentions:
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
def test_attentions_of_visible_tokens_are_probabilities(name, kind):
    outputs = make(name)(**inputs(name, kind), output_attentions=True)
    assert [attention.shape[1] for attention in outputs.attentions] == [1, 2, 4]
    for attention in outputs.attentions:
        assert attention.shape[2] == attention.shape[3]
        torch.testing.assert_close(attention.sum(dim=-1), torch.ones(attention.shape[:-1]), atol=1e-6, rtol=0)


@each_call
def test_asking_for_more_outputs_changes_none(name, kind):
    model = make(name)
    given = inputs(name, kind)
    plain, full = model(**given), model(**given, output_attentions=True, output_hidden_states=True)
    for key, value in plain.items():
        assert_same(
            (value,) if isinstance(value, torch.Tensor) else value,
            (full[key],) if isinstance(value, torch.Tensor) else full[key],
            atol=1e-5,
        )


@each_class
def test_outputs_can_be_asked_for_in_the_config(name):
    model = make(name)
    plain = model(images(2))
    assert plain.get("hidden_states") is None
    assert plain.get("attentions") is None
    model.set_attn_implementation("eager")
    model.config.output_hidden_states = model.config.output_attentions = True
    asked = model(images(2))
    assert (len(asked.hidden_states), len(asked.attentions)) == (4, 3)
    refused = model(images(2), output_hidden_states=False, output_attentions=False)
    assert refused.get("hidden_states") is None
    assert refused.get("attentions") is None


@each_call
def test_tuples_hold_what_the_output_holds(name, kind):
    model = make(name)
    given = inputs(name, kind)
    named, plain = (
        model(**given, output_hidden_states=True),
        model(**given, output_hidden_states=True, return_dict=False),
    )
    assert isinstance(plain, tuple)
    assert_same(plain, named)
    model.config.return_dict = False
    assert_same(model(**given, output_hidden_states=True), named)


# Sizes and channels


@pytest.mark.parametrize("channels", [1, 5])
@each_call
def test_any_number_of_channels(name, kind, channels):
    model = make(name, num_channels=channels)
    outputs = model(**inputs(name, kind, channels=channels))
    assert all(value.isfinite().all() for value in tensors(outputs))
    if name == "pretraining":
        assert outputs.reconstruction.shape == (3, channels, 32, 32)


@pytest.mark.parametrize(
    "size", [(32, 48), (33, 41), (5, 7), (70, 26), (1, 1)], ids=lambda size: f"{size[0]}x{size[1]}"
)
@each_class
def test_whole_images_of_any_size(name, size):
    model = make(name)
    outputs = model(images(2, rows=size[0], columns=size[1]), output_hidden_states=True)
    assert all(value.isfinite().all() for value in tensors(outputs))
    if name == "pretraining":
        assert outputs.reconstruction.shape == (2, 3, *size)
    if name == "backbone":
        grid = tuple(-(-side // 2) for side in size)
        for feature_map in outputs.feature_maps:
            assert feature_map.shape[2:] == grid
            grid = tuple(-(-side // 2) for side in grid)


@pytest.mark.parametrize("size", [(32, 48), (16, 64), (8, 16)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", MASKABLE)
@each_mask
def test_masked_images_of_other_sizes(name, size, kind):
    grid = (size[0] // 8, size[1] // 8)
    given = {"pixel_values": images(2, rows=size[0], columns=size[1]), "bool_masked_pos": masks(kind, 2, grid)}
    outputs = make(name)(**given)
    assert all(value.isfinite().all() for value in tensors(outputs))
    if name == "pretraining":
        assert outputs.reconstruction.shape == (2, 3, *size)


@each_class
def test_a_small_image_leaves_the_model_as_it_was(name):
    model = make(name)
    before = model(images(2))
    config = model.config.to_dict()
    model(images(2, rows=8, columns=10))
    model(images(1, rows=64, columns=64))
    assert_same(model(images(2)), before)
    assert model.config.to_dict() == config


@each_call
def test_absolute_positions_are_resized_on_demand(name, kind):
    model = make(name, use_absolute_embeddings=True)
    given = {"pixel_values": images(3, rows=48, columns=32)}
    if kind is not None:
        given["bool_masked_pos"] = masks(kind, 3, (6, 4))
    with pytest.raises(ValueError, match=r"24x16 patches.*16x16.*interpolate_pos_encoding=True"):
        model(**given)
    outputs = model(**given, interpolate_pos_encoding=True)
    assert all(value.isfinite().all() for value in tensors(outputs))
    same_size = inputs(name, kind)
    assert_same(model(**same_size, interpolate_pos_encoding=True), model(**same_size))


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@each_call
def test_autocast_keeps_the_loss_in_float32(name, kind, dtype):
    model = make(name).train()
    given = inputs(name, kind)
    exact = model(**given)
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(**given)
        loss = scalar(outputs)
    loss.backward()
    assert all(value.isfinite().all() for value in tensors(outputs))
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.grad is not None)
    if name == "pretraining":
        assert outputs.loss.dtype == torch.float32
    torch.testing.assert_close(loss.float(), scalar(exact), atol=0.02, rtol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@each_call
def test_models_run_in_the_dtype_of_their_parameters(name, kind, dtype, implementation):
    model = make(name)
    model.set_attn_implementation(implementation)
    given = inputs(name, kind)
    exact = model(**given)
    with torch.no_grad():
        outputs = model.to(dtype)(**given)
    first = next(value for value in tensors(outputs) if value.ndim > 0)
    assert first.dtype == dtype
    if name == "pretraining" and kind is not None:
        assert outputs.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    reference = next(value for value in tensors(exact) if value.ndim > 0)
    tolerance = 1e-4 if dtype == torch.float64 else 0.1
    assert (first.float() - reference).abs().mean() <= tolerance * reference.abs().mean().clamp(min=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_targets_are_not_rounded_to_the_dtype_of_the_model(dtype):
    """The loss of a model that predicts zero is the mean square of the float32 pixels, whatever the model's dtype."""
    model = make("pretraining", norm_pix_loss=False)
    nn.init.zeros_(model.decoder.predictor.weight)
    nn.init.zeros_(model.decoder.predictor.bias)
    given = inputs("pretraining", "per_image")
    exact = model(**given).loss
    torch.testing.assert_close(model.to(dtype)(**given).loss, exact, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_the_loss_of_half_precision_images_is_computed_in_float32(dtype):
    model = make("pretraining").to(dtype)
    given = inputs("pretraining", "per_image")
    given["pixel_values"] = given["pixel_values"].to(dtype)
    loss = model(**given).loss
    assert loss.dtype == torch.float32
    same_pixels = {**given, "pixel_values": given["pixel_values"].float()}
    torch.testing.assert_close(loss, model(**same_pixels).loss, atol=1e-6, rtol=1e-6)


# Files, copies, export


@each_class
def test_saved_and_loaded_models_are_the_same(name, tmp_path):
    model = make(name, use_absolute_embeddings=True)
    model.save_pretrained(tmp_path)
    beside_code = sorted(path.name for path in tmp_path.iterdir() if path.suffix != ".py")
    assert beside_code == ["config.json", "model.safetensors"]
    loaded, info = CLASSES[name].from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert_same(loaded(images(2)), model(images(2)))


@each_call
def test_deep_copies_and_pickles_are_the_same(name, kind):
    model = make(name)
    given = inputs(name, kind)
    before = model(**given)
    assert_same(copy.deepcopy(model)(**given), before)
    assert_same(pickle.loads(pickle.dumps(model))(**given), before)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(torch.load(buffer, weights_only=False)(**given), before)


@pytest.mark.filterwarnings("ignore")
@each_class
def test_export_reproduces_the_outputs_for_batches_of_any_size(name):
    model = make(name)
    any_batch = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    exported = torch.export.export(model, (), {"pixel_values": images(2)}, dynamic_shapes=any_batch, strict=False)
    with torch.no_grad():
        for batch_size in (2, 5, 1):
            pixel_values = images(batch_size, seed=batch_size)
            assert_same(exported.module()(pixel_values=pixel_values), model(pixel_values), atol=1e-5)


# Plans


def plan_for(model: nn.Module, kind: str, batch_size: int = 3, image_size=None):
    geometry = SparseGeometry.from_config(model.config, image_size)
    return build_sparse_plan(masks(kind, batch_size, geometry.unit_grid_size), geometry)


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
@pytest.mark.parametrize("group_size", ["window", "optimal", 40])
def test_a_plan_equals_its_mask(name, kind, group_size):
    model = make(name, group_size=group_size)
    assert_same(model(images(3), sparse_plan=plan_for(model, kind)), model(**inputs(name, kind)))


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
def test_the_group_size_does_not_change_the_outputs(name, kind):
    outputs = [make(name, group_size=size)(**inputs(name, kind)) for size in ("window", "optimal", 16, 1000)]
    for other in outputs[1:]:
        assert_same(other, outputs[0], atol=2e-5)


class NoDeviceSynchronisation(TorchDispatchMode):
    """Fails on every operation whose result's size or value the host would have to wait for on an accelerator."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "item",
        "nonzero",
        "nonzero_numpy",
        "is_nonzero",
        "masked_select",
        "equal",
        "unique_dim",
        "_unique",
        "_unique2",
        "unique_consecutive",
        "bincount",
        "argwhere",
        "allclose",
        "repeat_interleave.Tensor",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        full_name = f"{name}.{function._overloadname}"
        if name in self.FORBIDDEN or full_name in self.FORBIDDEN:
            raise AssertionError(f"{full_name} synchronises the device")
        if name in ("index", "index_put", "index_put_"):
            for index in args[1]:
                assert index is None or index.dtype != torch.bool, f"{full_name} with a boolean index"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_host_solving(monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("forward solved on the host although it was given a plan")

    monkeypatch.setattr(modeling, "build_sparse_plan", fail)
    monkeypatch.setattr(modeling, "sample_masks", fail)
    for name in ("build_sparse_plan", "choose_grouping", "unit_masks", "_build_stage_plan"):
        monkeypatch.setattr(sparse_plan_module, name, fail)


def test_the_oracle_for_synchronisation_works():
    values = torch.tensor([1.0, 0.0])
    guilty = (
        lambda: values.sum().item(),
        lambda: values.nonzero(),
        lambda: values[values > 0],
        lambda: values.unique(),
        lambda: bool(values.any()),
    )
    for function in guilty:
        with pytest.raises(AssertionError), NoDeviceSynchronisation():
            function()


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "changes", [{}, {"drop_path_rate": 0.2, "use_absolute_embeddings": True}], ids=["", "drop_path"]
)
def test_with_a_plan_forward_neither_solves_nor_synchronises(request, name, kind, training, changes):
    model = make(name, **changes).train(training)
    plan = plan_for(model, kind)
    pixel_values = images(3)
    request.getfixturevalue("no_host_solving")
    with NoDeviceSynchronisation():
        scalar(model(pixel_values, sparse_plan=plan, output_hidden_states=True)).backward()


@pytest.mark.parametrize("name", MASKABLE)
@each_mask
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_with_a_plan_no_value_on_the_device_is_read(name, kind, training):
    """On the meta device there are no values: whatever reads one raises."""
    model = make(name).train(training)
    plan = plan_for(model, kind).to("meta")
    outputs = model.to("meta")(torch.empty(3, 3, 32, 32, device="meta"), sparse_plan=plan)
    scalar(outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_plan_of_a_shared_mask_serves_any_batch_size():
    model = make("pretraining")
    plan = plan_for(model, "shared")
    for batch_size in (1, 4):
        given = images(batch_size)
        assert_same(model(given, sparse_plan=plan), model(given, bool_masked_pos=masks("shared", 1)))


# Errors


def call(**changes):
    model = make("pretraining")
    return model, {"pixel_values": images(3), **changes}


def other_plan(**changes):
    return plan_for(make("pretraining"), **{"kind": "per_image", **changes})


def uneven_mask():
    mask = torch.zeros(3, 256, dtype=torch.int64)
    mask[1, 7] = 1
    return mask


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda: {"pixel_values": None}, r"pixel_values is missing"),
        (lambda: {"pixel_values": images(3, channels=1)}, r"\(3, 1, 32, 32\).*\(batch, 3, height, width\)"),
        (lambda: {"pixel_values": images(3)[0]}, r"\(3, 32, 32\).*\(batch, 3, height, width\)"),
        (
            lambda: {"bool_masked_pos": masks("per_image", 3), "sparse_plan": other_plan()},
            r"bool_masked_pos and sparse_plan are both given; pass only one",
        ),
        (lambda: {"bool_masked_pos": masks("per_image", 2)}, r"bool_masked_pos has 2 rows for 3 images"),
        (lambda: {"bool_masked_pos": torch.zeros(3, 15)}, r"\(3, 15\).*\(batch, 16\).*\(batch, 256\)"),
        (lambda: {"bool_masked_pos": torch.zeros(16)}, r"\(16,\).*\(batch, 16\)|16 rows for 3 images"),
        (lambda: {"bool_masked_pos": torch.full((3, 16), 2)}, r"bool_masked_pos must hold 0 .* and 1"),
        (lambda: {"bool_masked_pos": uneven_mask()}, r"changes inside a mask unit: mask squares of a multiple of 4x4"),
        (lambda: {"bool_masked_pos": torch.ones(3, 16)}, r"masks every unit of image 0; leave at least one visible"),
        (
            lambda: {"pixel_values": images(3, rows=36), "bool_masked_pos": masks("shared", 1)},
            r"image_size 36x32 must be a multiple of mask_unit_size 8.*resize or crop",
        ),
        (
            lambda: {"pixel_values": images(3, rows=40), "sparse_plan": other_plan()},
            r"sparse_plan is for images of 4x4 mask units, pixel_values have 5x4; build it with SparseGeometry",
        ),
        (lambda: {"sparse_plan": other_plan(batch_size=2)}, r"masks of 2 images, pixel_values has 3; build one plan"),
    ],
    ids=[
        "no_images",
        "wrong_channels",
        "no_batch",
        "mask_and_plan",
        "wrong_rows",
        "wrong_columns",
        "flat_mask",
        "wrong_values",
        "uneven_mask",
        "nothing_visible",
        "size_not_whole_units",
        "plan_of_other_size",
        "plan_of_other_batch",
    ],
)
@pytest.mark.parametrize("name", MASKABLE)
def test_errors_name_value_and_remedy(name, changes, message):
    with pytest.raises(ValueError, match=message):
        make(name)(**{"pixel_values": images(3), **changes()})


def test_training_on_images_of_no_whole_units_without_a_mask_says_so():
    with pytest.raises(ValueError, match=r"image_size 36x32 must be a multiple of mask_unit_size 8"):
        make("pretraining").train()(images(2, rows=36))


def test_an_image_of_one_unit_cannot_be_masked():
    with pytest.raises(ValueError, match=r"at least 2.*larger images"):
        make("pretraining").train()(images(2, rows=8, columns=8))


def test_a_plan_of_a_model_with_other_stages_raises():
    other = make("pretraining", depths=(2, 2), num_heads=(1, 2), patch_size=4, image_size=32)
    with pytest.raises(ValueError, match="sparse_plan"):
        make("pretraining")(images(3), sparse_plan=plan_for(other, "per_image"))


def test_a_plan_of_a_model_with_another_window_raises():
    other = make("pretraining", window_size=2)
    with pytest.raises(ValueError, match="sparse_plan"):
        make("pretraining")(images(3), sparse_plan=plan_for(other, "per_image"))


def test_labels_set_the_problem_type():
    single = make("classifier", num_labels=1)(images(3), labels=torch.rand(3, generator=seeded()))
    assert single.loss.isfinite()
    several = make("classifier", problem_type="multi_label_classification")(images(3), labels=torch.ones(3, 5))
    assert several.loss.isfinite()
    assert make("classifier")(images(3)).loss is None


@pytest.mark.parametrize("model_class", [GreenSwinModel, GreenSwinForMaskedImageModeling], ids=["model", "pretraining"])
@pytest.mark.parametrize("name", ["mask", "bool_mask", "masks", "bool_masked_positions"])
def test_a_mask_under_another_name_is_refused(model_class, name):
    model = model_class(tiny_config()).train()
    with pytest.raises(ValueError, match=f"{name} is no argument of this model.*bool_masked_pos"):
        model(images(2), **{name: masks("shared", 2)})


def test_classifiers_see_whole_images():
    model = GreenSwinForImageClassification(tiny_config()).eval()
    with pytest.raises(ValueError, match="bool_masked_pos is no argument of this model"):
        model(images(2), bool_masked_pos=masks("shared", 2))
