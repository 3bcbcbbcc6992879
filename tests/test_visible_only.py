"""Visible-only Swin equals dense Swin whose masked tokens are never keys: outputs and all gradients, in float64."""

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from reference import decode, encode, reconstruction_loss, unit_pixels, visible_latents
from tiny import images, randomised, seeded, tiny_config
from torch import Tensor

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
    SparseGeometry,
    build_sparse_plan,
)

TOLERANCE = 1e-9


@dataclass(frozen=True)
class Case:
    """A model, images and masks. `visible`: units seen, one number for a shared mask, else one for each image."""

    visible: int | tuple[int, ...]
    fields: dict[str, Any] = field(default_factory=dict)
    image_size: tuple[int, int] = (32, 32)
    batch_size: int = 2
    patch_level: bool = False

    @property
    def config(self) -> GreenSwinConfig:
        return tiny_config(**{"decoder_hidden_size": 12, "decoder_num_attention_heads": 3, **self.fields})

    @property
    def unit_grid(self) -> tuple[int, int]:
        unit = self.config.patch_size * 2 ** (len(self.config.depths) - 1)
        return self.image_size[0] // unit, self.image_size[1] // unit

    def masks(self) -> Tensor:
        """[1 or B, units] bool."""
        counts = (self.visible,) if isinstance(self.visible, int) else self.visible
        units, generator = self.unit_grid[0] * self.unit_grid[1], seeded(5)
        rows = torch.ones(len(counts), units, dtype=torch.bool)
        for row, count in enumerate(counts):
            rows[row, torch.randperm(units, generator=generator)[:count]] = False
        return rows

    def mask_argument(self) -> Tensor:
        """As handed to the model: unit masks, or int64 masks of patches as transformers' scripts make them."""
        rows = self.masks()
        if not self.patch_level:
            return rows
        copies = 2 ** (len(self.config.depths) - 1)
        patches = rows.view(-1, *self.unit_grid).repeat_interleave(copies, 1).repeat_interleave(copies, 2)
        return patches.flatten(1).long()

    def images(self) -> Tensor:
        return images(self.batch_size, self.config.num_channels, *self.image_size, seed=7).double()

    def model_arguments(self) -> dict[str, Any]:
        differs = self.image_size != (32, 32) and self.config.use_absolute_embeddings
        return {"bool_masked_pos": self.mask_argument(), **({"interpolate_pos_encoding": True} if differs else {})}


ONE_STAGE = {"depths": (3,), "num_heads": (2,), "patch_size": 4, "window_size": 3}
TWO_STAGES = {"depths": (2, 2), "num_heads": (2, 1)}
FOUR_STAGES = {"depths": (2, 1, 2, 2), "num_heads": (1, 2, 4, 2), "embed_dim": 4}
POSITIONS = {"use_absolute_embeddings": True}
AT_224 = {"image_size": 224, "patch_size": 4, "depths": (2, 2, 2, 1), "num_heads": (1, 2, 2, 4), "embed_dim": 4}

CASES = {
    "shared mask": Case(4, batch_size=3),
    "mask per image": Case((4, 4, 4), batch_size=3),
    "unequal counts": Case((3, 9, 1), batch_size=3),
    "one image": Case(5, batch_size=1),
    "one visible unit": Case((1, 1)),
    "one masked unit": Case(15),
    "an image wholly visible": Case((16, 2)),
    "deep": Case((4, 4), {"depths": (4, 3, 2)}),
    "shift of an odd window": Case((7, 9), {"window_size": 5}),
    "window 1": Case((4, 4), {"window_size": 1}),
    "window larger than the last grids": Case((5, 3), {"window_size": 8}),
    "window larger than every grid": Case((5, 3), {"window_size": 40}),
    "not square": Case((2, 4), {"image_size": (24, 32)}, (24, 32)),
    "not square, shared": Case(3, {"image_size": (40, 16), "window_size": 3}, (40, 16)),
    "smaller than the config's image": Case((2, 3), {"window_size": 7}, (16, 24)),
    "smaller in one direction": Case(5, {"window_size": 7}, (64, 16)),
    "larger than the config's image": Case((7, 5), {"window_size": 7}, (48, 40)),
    "last stage shifts on a larger image": Case(20, {"window_size": 4}, (56, 72)),
    "group size optimal": Case((4, 4), {"group_size": "optimal"}),
    "group size optimal, shared": Case(9, {"group_size": "optimal"}),
    "group size 24": Case((5, 8, 4), {"group_size": 24}, batch_size=3),
    "group size beyond the pool": Case((5, 8), {"group_size": 10000}),
    "grey": Case((4, 4), {"num_channels": 1}),
    "five channels": Case((4, 3), {"num_channels": 5}),
    "absolute positions": Case((4, 4), POSITIONS),
    "absolute positions, shared": Case(4, POSITIONS),
    "absolute positions, resized": Case((3, 6), POSITIONS, (40, 24)),
    "absolute positions, resized, shared": Case(7, POSITIONS, (24, 48)),
    "one stage": Case((20, 13), ONE_STAGE),
    "one stage, shared": Case(20, ONE_STAGE),
    "two stages": Case((20, 20), TWO_STAGES),
    "four stages": Case((2, 2), FOUR_STAGES),
    "four stages, larger": Case((9, 4), FOUR_STAGES, (64, 48)),
    "patch 4": Case((2, 2), {"patch_size": 4, "depths": (2, 2), "num_heads": (1, 2)}),
    "no bias in query, key and value": Case((4, 4), {"qkv_bias": False}),
    "patch-level integer masks": Case((4, 4), patch_level=True),
    "patch-level integer masks, unequal": Case((4, 6), patch_level=True),
    "patch-level integer mask, shared": Case(4, patch_level=True),
    "two decoder layers": Case((4, 4), {"decoder_num_hidden_layers": 2}),
    "two decoder layers, unequal": Case((4, 6), {"decoder_num_hidden_layers": 2}),
    "pixels as they are": Case((4, 4), {"norm_pix_loss": False}),
    "another epsilon": Case((4, 4), {"layer_norm_eps": 1e-2}),
    "wide MLP": Case((4, 4), {"mlp_ratio": 5.3}),
}
LARGE_CASES = {
    "224 px, window 7": Case((12, 12), AT_224, (224, 224)),
    "224 px, window 14": Case((12, 10), {**AT_224, "window_size": 14}, (224, 224)),
    "224 px, window 14, shared": Case(12, {**AT_224, "window_size": 14}, (224, 224)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def random_model(model_class: type, config: GreenSwinConfig) -> Any:
    return randomised(model_class(config).double())


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Copies to differentiate, apart from the model's own."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}


def assert_close(actual: Tensor, expected: Tensor, what: str) -> None:
    assert actual.shape == expected.shape, what
    scale = expected.abs().max().clamp(min=1e-300)
    error = ((actual - expected).abs().max() / scale).item()
    assert error <= TOLERANCE, f"{what}: relative error {error:.1e}"


def assert_gradients_close(model: torch.nn.Module, objective: Tensor, weights: dict[str, Tensor]) -> None:
    """Those that `backward` left on the model against those of the twin's objective, name by name."""
    expected = torch.autograd.grad(objective, list(weights.values()), allow_unused=True, materialize_grads=True)
    # Some gradients are zero by symmetry (a bias of the keys moves all scores alike); rounding errors are no signal.
    floor = 1e-4 * max(gradient.abs().max() for gradient in expected)
    wrong = {}
    for (name, parameter), gradient in zip(model.named_parameters(), expected, strict=True):
        assert parameter.grad is not None, f"{name} has no gradient"
        error = (parameter.grad - gradient).abs().max() / max(gradient.abs().max(), floor)
        if not error <= TOLERANCE:
            wrong[name] = f"{error.item():.1e}"
    assert not wrong


def random_like(tensor: Tensor, seed: int = 11) -> Tensor:
    return torch.randn(tensor.shape, generator=seeded(seed), dtype=tensor.dtype)


# Encoder and pretraining model against their twins


@every_case
def test_encoder_equals_the_twin(case):
    model, pixels = random_model(GreenSwinModel, case.config), case.images()
    masks, weights = case.masks().expand(case.batch_size, -1), weights_of(model)
    output = model(pixels, **case.model_arguments())
    resized = case.image_size != (32, 32)
    expected = visible_latents(encode(weights, case.config, pixels, masks, interpolate_positions=resized)[-1], masks)

    assert output.visible_token_mask.sum(1).tolist() == [len(latents) for latents in expected]
    objective = expected_objective = torch.zeros(())
    for image, latents in enumerate(expected):
        own = output.last_hidden_state[image, : len(latents)]
        assert output.visible_token_mask[image, : len(latents)].all()
        assert_close(own, latents, f"latents of image {image}")
        assert_close(output.pooler_output[image], latents.mean(0), f"mean latent of image {image}")
        assert not output.last_hidden_state[image, len(latents) :].any()
        objective = objective + (own * random_like(latents)).sum() + output.pooler_output[image].square().sum()
        expected_objective = (
            expected_objective + (latents * random_like(latents)).sum() + latents.mean(0).square().sum()
        )
    objective.backward()
    assert_gradients_close(model, expected_objective, weights)


@pytest.mark.parametrize("mode", ["train", "eval"])
@every_case
def test_pretraining_equals_the_twin(case, mode):
    check_pretraining(case, mode)


@pytest.mark.parametrize("case", LARGE_CASES.values(), ids=LARGE_CASES.keys())
def test_pretraining_at_224_px_equals_the_twin(case):
    check_pretraining(case, "train")


def check_pretraining(case: Case, mode: str) -> None:
    model, pixels = random_model(GreenSwinForMaskedImageModeling, case.config), case.images()
    model.train(mode == "train")
    masks, weights = case.masks().expand(case.batch_size, -1), weights_of(model)
    output = model(pixels, **case.model_arguments())
    resized = case.image_size != (32, 32)
    latents = encode(weights, case.config, pixels, masks, "swin.", interpolate_positions=resized)[-1]
    predictions = decode(weights, case.config, latents, masks)
    loss = reconstruction_loss(case.config, predictions, pixels, masks)

    assert torch.equal(output.bool_masked_pos, masks)
    assert_close(output.loss, loss, "loss")
    assert_close(output.logits[masks], predictions[masks], "predictions of masked units")
    # In training visible units need not be predicted (and are zero then), in evaluation all are.
    left_out = mode == "train" and bool((output.logits[~masks] == 0).all())
    if not left_out:
        assert_close(output.logits, predictions, "predictions")
    unit_size = case.config.patch_size * 2 ** (len(case.config.depths) - 1)
    assert output.reconstruction.shape == pixels.shape
    for image, unit in itertools.product(range(case.batch_size), range(masks.shape[1])):
        assert torch.equal(unit_pixels(output.reconstruction, image, unit, unit_size), output.logits[image, unit])

    projection = random_like(predictions) * (masks[..., None] if left_out else 1) / predictions.numel()
    (output.loss + (output.logits * projection).sum()).backward()
    assert_gradients_close(model, loss + (predictions * projection).sum(), weights)


@pytest.mark.parametrize(
    "name", ["shared mask", "mask per image", "unequal counts", "not square", "four stages, larger"]
)
def test_every_stage_equals_the_twin(name):
    case = CASES[name]
    model, pixels = random_model(GreenSwinModel, case.config), case.images()
    masks = case.masks().expand(case.batch_size, -1)
    plan = build_sparse_plan(case.mask_argument(), SparseGeometry.from_config(case.config, case.image_size))
    output = model(pixels, sparse_plan=plan, output_hidden_states=True)
    grids = encode(weights_of(model), case.config, pixels, masks)
    num_stages, columns = len(case.config.depths), case.unit_grid[1]
    for state, grid in zip(output.hidden_states, grids, strict=False):
        side = grid.shape[1] // case.unit_grid[0]  # tokens of a unit
        steps = 2 ** min(side.bit_length() - 1, num_stages - 1)
        assert side == steps
        for image in range(case.batch_size):
            places = [
                (unit // columns * side + row, unit % columns * side + column)
                for unit in (~masks[image]).nonzero().flatten().tolist()
                for row, column in coarse_to_fine(side)
            ]
            expected = torch.stack([grid[image, row, column] for row, column in places])
            assert_close(state[image, : len(places)], expected, f"{len(places)} tokens of image {image}")
            assert not state[image, len(places) :].any()


def coarse_to_fine(side: int) -> list[tuple[int, int]]:
    """Tokens of a square, quarter by quarter: top left, bottom left, top right, bottom right."""
    if side == 1:
        return [(0, 0)]
    half = side // 2
    quarters = [(0, 0), (half, 0), (0, half), (half, half)]
    return [(top + row, left + column) for top, left in quarters for row, column in coarse_to_fine(half)]


def test_the_twin_itself_never_reads_masked_tokens():
    case = CASES["unequal counts"]
    model, pixels, masks = random_model(GreenSwinForMaskedImageModeling, case.config), case.images(), case.masks()
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}
    poisoned = with_masked_pixels(pixels, masks, float("nan"))
    expected = decode(weights, case.config, encode(weights, case.config, pixels, masks, "swin.")[-1], masks)
    latents = encode(weights, case.config, poisoned, masks, "swin.")[-1]
    assert latents.flatten(1, 2)[masks].isnan().any(1).all()
    assert torch.equal(decode(weights, case.config, latents, masks), expected)


def test_sdpa_equals_eager_with_a_mask():
    case = CASES["unequal counts"]
    outputs = []
    for implementation in ("sdpa", "eager"):
        model = GreenSwinModel._from_config(case.config, attn_implementation=implementation).double()
        randomised(model)
        with torch.no_grad():  # sdpa leaves its fused kernels on a CPU while the bias is trained
            outputs.append(model(case.images(), **case.model_arguments()).last_hidden_state)
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["shared mask", "mask per image", "unequal counts"])
def test_attention_probabilities_sum_to_one(name):
    case = CASES[name]
    model = random_model(GreenSwinModel, case.config)
    attentions = model(case.images(), **case.model_arguments(), output_attentions=True).attentions
    assert len(attentions) == len(case.config.depths)
    for probabilities in attentions:
        assert_close(probabilities.sum(-1), torch.ones_like(probabilities[..., 0]), "sums")


# Masked pixels, other samples, whole images


def with_masked_pixels(pixels: Tensor, masks: Tensor, value: float | Tensor) -> Tensor:
    """Images with every pixel of their masked units replaced."""
    unit = int((pixels.shape[2] * pixels.shape[3] / masks.shape[1]) ** 0.5)
    grid = masks.expand(len(pixels), -1).view(len(pixels), 1, pixels.shape[2] // unit, pixels.shape[3] // unit)
    return torch.where(grid.repeat_interleave(unit, 2).repeat_interleave(unit, 3), value, pixels)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", ["shared mask", "mask per image", "unequal counts", "absolute positions", "one stage"])
def test_masked_pixels_do_not_influence_outputs(name, mode):
    case = CASES[name]
    model, pixels, masks = random_model(GreenSwinForMaskedImageModeling, case.config), case.images(), case.masks()
    model.train(mode == "train")
    noise = 1e3 * random_like(pixels)
    variants = [pixels, *(with_masked_pixels(pixels, masks, value) for value in (noise, float("nan"), float("inf")))]
    outputs = [model(variant, bool_masked_pos=masks, output_hidden_states=True) for variant in variants]
    for output in outputs[1:]:
        assert torch.equal(output.logits, outputs[0].logits)
        assert torch.equal(output.reconstruction, outputs[0].reconstruction)
        assert all(map(torch.equal, output.hidden_states, outputs[0].hidden_states))
    assert outputs[0].loss.isfinite()
    assert outputs[2].loss.isnan()  # the target is the masked pixels


@pytest.mark.parametrize("name", ["mask per image", "unequal counts", "an image wholly visible", "shared mask"])
def test_a_sample_does_not_depend_on_the_others(name):
    case = CASES[name]
    model, pixels = random_model(GreenSwinForMaskedImageModeling, case.config), case.images()
    masks = case.masks().expand(case.batch_size, -1)
    together = model(pixels, bool_masked_pos=masks).logits
    hidden = model.swin(pixels, bool_masked_pos=masks).last_hidden_state
    for image in range(case.batch_size):
        alone = model(pixels[image, None], bool_masked_pos=masks[image, None]).logits
        assert_close(together[image], alone[0], f"image {image} alone")
        own = model.swin(pixels[image, None], bool_masked_pos=masks[image, None]).last_hidden_state[0]
        assert_close(hidden[image, : len(own)], own, f"latents of image {image} alone")
    reverse = torch.arange(case.batch_size - 1, -1, -1)
    assert_close(model(pixels[reverse], bool_masked_pos=masks[reverse]).logits[reverse], together, "reversed batch")


@pytest.mark.parametrize("patch_level", [False, True], ids=["unit masks", "patch masks"])
@pytest.mark.parametrize(
    ("fields", "image_size"),
    [({}, (32, 32)), ({"window_size": 8}, (32, 32)), ({}, (32, 64)), (TWO_STAGES, (32, 32)), (POSITIONS, (32, 32))],
    ids=["three stages", "window of a whole grid", "not square", "two stages", "absolute positions"],
)
def test_an_all_visible_mask_equals_the_dense_model(fields, image_size, patch_level):
    case = Case(0, {"image_size": image_size, **fields}, image_size, patch_level=patch_level)
    model = random_model(GreenSwinForMaskedImageModeling, case.config)
    mask = torch.zeros_like(case.mask_argument()).expand(2, -1)
    masked, dense = model(case.images(), bool_masked_pos=mask), model(case.images())
    assert masked.loss.item() == 0
    assert dense.loss is None
    assert_close(masked.logits, dense.logits, "predictions")
    assert_close(masked.reconstruction, dense.reconstruction, "reconstruction")
    latents = [model.swin(case.images(), bool_masked_pos=given).last_hidden_state for given in (mask, None)]
    assert_close(*latents, "latents")


def test_an_all_visible_mask_trains_with_loss_zero():
    case = CASES["mask per image"]
    model = random_model(GreenSwinForMaskedImageModeling, case.config).train()
    for dtype in (torch.bool, torch.int64):
        model.zero_grad()
        output = model(case.images(), bool_masked_pos=torch.zeros(3, 16, dtype=dtype))
        output.loss.backward()
        assert output.loss.item() == 0
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        assert not any(parameter.grad.any() for parameter in model.parameters())


def test_training_without_a_mask_draws_one_for_each_image():
    case = CASES["mask per image"]
    model = random_model(GreenSwinForMaskedImageModeling, case.config).train()
    pixels = images(8, seed=3).double()
    torch.manual_seed(4)
    output = model(pixels)
    assert output.bool_masked_pos.sum(1).tolist() == [12] * 8
    assert len({tuple(row) for row in output.bool_masked_pos.tolist()}) > 1
    assert_close(model(pixels, bool_masked_pos=output.bool_masked_pos).loss, output.loss, "loss")


# Every latent at its own unit


def influence(model: GreenSwinForMaskedImageModeling, pixels: Tensor, masks: Tensor) -> Tensor:
    """[B * units, B * units] bool: whether the reconstruction of the first unit reads pixels of the second."""
    pixels = pixels.clone().requires_grad_()
    reconstruction = model(pixels, bool_masked_pos=masks).reconstruction
    unit = int((pixels.shape[2] * pixels.shape[3] / masks.shape[1]) ** 0.5)
    places = list(itertools.product(range(len(pixels)), range(masks.shape[1])))
    rows = []
    for image, place in places:
        output = unit_pixels(reconstruction, image, place, unit).sum()
        (gradient,) = torch.autograd.grad(output, pixels, retain_graph=True)
        rows.append([bool(unit_pixels(gradient, *source, unit).any()) for source in places])
    return torch.tensor(rows)


@pytest.fixture
def local_model() -> GreenSwinForMaskedImageModeling:
    """A model whose attentions add nothing: what reaches a unit's prediction is its own latent, of its own pixels."""
    model = random_model(GreenSwinForMaskedImageModeling, tiny_config(image_size=(24, 32)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.output.dense" in name or (name.startswith("decoder.layers") and ".output." in name):
                parameter.zero_()
    return model


LOCALITY_MASKS = {
    "shared": Case(5, image_size=(24, 32)),
    "mask per image": Case((5, 5), image_size=(24, 32)),
    "unequal counts": Case((7, 4), image_size=(24, 32)),
    "all visible": Case(12, image_size=(24, 32)),
}


@pytest.mark.parametrize("case", LOCALITY_MASKS.values(), ids=LOCALITY_MASKS.keys())
def test_every_latent_lands_at_its_own_unit(case, local_model):
    masks = case.masks().expand(2, -1)
    assert torch.equal(influence(local_model, case.images(), masks), (~masks).flatten().diag())


@pytest.mark.parametrize("name", ["shared", "mask per image", "unequal counts"])
def test_the_locality_test_notices_misplaced_latents(name, local_model):
    case = LOCALITY_MASKS[name]
    masks = case.masks().expand(2, -1)

    def swap_first_two_latents(module, arguments, output):
        output.last_hidden_state = output.last_hidden_state[:, [1, 0, *range(2, output.last_hidden_state.shape[1])]]
        return output

    local_model.swin.register_forward_hook(swap_first_two_latents)
    found = influence(local_model, case.images(), masks)
    assert not torch.equal(found, (~masks).flatten().diag())
    assert found.sum() == (~masks).sum()  # each latent still lands somewhere


@pytest.mark.parametrize("name", ["shared mask", "mask per image", "unequal counts"])
def test_the_twin_notices_misplaced_latents(name):
    case = CASES[name]
    model, pixels = random_model(GreenSwinForMaskedImageModeling, case.config), case.images()
    masks = case.masks().expand(case.batch_size, -1)
    weights = weights_of(model)
    grid = encode(weights, case.config, pixels, masks, "swin.")[-1]
    predictions = decode(weights, case.config, grid, masks)
    first, second = (~masks[0]).nonzero().flatten()[:2].tolist()
    swapped = list(range(masks.shape[1]))
    swapped[first], swapped[second] = second, first
    moved = grid.flatten(1, 2)[:1, swapped].unflatten(1, grid.shape[1:3])
    output = model(pixels, bool_masked_pos=masks).logits[0]
    assert_close(output, predictions[0], "predictions")
    misplaced = decode(weights, case.config, moved, masks[:1])[0]
    assert (output - misplaced).abs().max() > 1e-3 * output.abs().max()


# Stochastic depth

# Blocks 0, 1 and 2 have the rates 0, 0.25 and 0.5, the first two in a stage of four tokens for each mask unit.
DROP_CONFIG = {**TWO_STAGES, "depths": (2, 1), "patch_size": 4, "window_size": 2, "drop_path_rate": 0.5}
DROP_RATES = {(1, "attention"): 0.25, (1, "mlp"): 0.25, (2, "attention"): 0.5, (2, "mlp"): 0.5}
DROP_MASKS = {
    "dense": None,
    "shared mask": 5,
    "mask per image": (6, 6, 6, 6),
    "unequal counts": (1, 3, 9, 16),
}


@pytest.mark.parametrize("visible", DROP_MASKS.values(), ids=DROP_MASKS.keys())
def test_drop_path_keeps_or_drops_each_branch_for_a_whole_image(visible):
    """Every image is one of the 16 outcomes of keeping (and scaling) or dropping four branches, each at its rate."""
    images_of_batch, rounds = 4, 100
    case = Case(16 if visible is None else visible, DROP_CONFIG, batch_size=images_of_batch)
    model, pixels = random_model(GreenSwinModel, case.config).train(), case.images()
    masks = case.masks().expand(images_of_batch, -1)
    weights = {name: tensor.detach() for name, tensor in model.named_parameters()}

    def expected(kept: tuple[bool, ...]) -> list[Tensor]:
        scales = {key: keep / (1 - rate) for keep, (key, rate) in zip(kept, DROP_RATES.items(), strict=True)}
        grids = encode(weights, case.config, pixels, masks, branch_scale=lambda *key: scales.get(key, 1.0))
        return visible_latents(grids[-1], masks)

    outcomes = list(itertools.product((False, True), repeat=len(DROP_RATES)))
    by_image = list(zip(*map(expected, outcomes), strict=True))
    drawn = []
    with torch.no_grad():
        for _ in range(rounds):
            tokens = model(pixels, bool_masked_pos=None if visible is None else case.masks()).last_hidden_state
            for own, latents in zip(tokens, by_image, strict=True):
                errors = (torch.stack(latents) - own[: len(latents[0])]).abs().amax(dim=(1, 2))
                assert errors.min() < 1e-9, "an image is neither kept nor dropped as a whole"
                drawn.append(outcomes[errors.argmin()])
    kept = torch.tensor(drawn, dtype=torch.float64).view(rounds, images_of_batch, len(DROP_RATES))
    rates = torch.tensor(list(DROP_RATES.values()), dtype=torch.float64)
    # Five standard deviations of a mean of independent draws.
    assert ((kept.mean((0, 1)) - (1 - rates)).abs() < 5 * (rates * (1 - rates) / 400).sqrt()).all(), "rates"
    scores = ((kept - (1 - rates)) / (rates * (1 - rates)).sqrt()).flatten(1)
    correlations = scores.T @ scores / rounds
    assert correlations.triu(1).abs().max() < 0.5, "images and branches are drawn apart"


def test_drop_path_is_off_in_evaluation():
    case = Case((5, 5), {**DROP_CONFIG, "drop_path_rate": 0.9})
    model = random_model(GreenSwinModel, case.config)
    outputs = [model(case.images(), bool_masked_pos=case.masks()).last_hidden_state for _ in range(2)]
    assert torch.equal(*outputs)


# Input that cannot be


def wrong_inputs() -> dict[str, tuple[dict[str, Any], dict[str, Any], str]]:
    """Fields of the config, arguments of the model, and the message."""
    pixels, mask = images(2), torch.zeros(2, 16, dtype=torch.bool)
    plan = build_sparse_plan(torch.eye(16)[:2], SparseGeometry.from_config(tiny_config()))
    return {
        "no images": ({}, {}, "pixel_values is missing: pass images"),
        "three dimensions": (
            {},
            {"pixel_values": pixels[0]},
            r"shape \(3, 32, 32\).*takes \(batch, 3, height, width\)",
        ),
        "wrong channels": ({"num_channels": 5}, {"pixel_values": pixels}, r"shape \(2, 3, 32, 32\).*\(batch, 5,"),
        "masks of too many images": (
            {},
            {"pixel_values": pixels, "bool_masked_pos": torch.zeros(3, 16)},
            "3 rows for 2 images; give one row",
        ),
        "size that is no multiple of the unit": (
            {},
            {"pixel_values": images(2, rows=36), "bool_masked_pos": mask},
            "image_size 36x32 must be a multiple of mask_unit_size 8.*resize or crop",
        ),
        "mask and plan": (
            {},
            {"pixel_values": pixels, "bool_masked_pos": mask, "sparse_plan": plan},
            "bool_masked_pos and sparse_plan are both given; pass only one",
        ),
        "plan of another batch": ({}, {"pixel_values": images(3), "sparse_plan": plan}, "2 images, pixel_values has 3"),
        "plan of another size": (
            {},
            {"pixel_values": images(2, rows=40), "sparse_plan": plan},
            "4x4 mask units, pixel_values have 5x4; build it with SparseGeometry.from_config",
        ),
        "positions without interpolation": (
            POSITIONS,
            {"pixel_values": images(2, rows=40), "bool_masked_pos": torch.zeros(2, 20)},
            "20x16 patches.*16x16; pass interpolate_pos_encoding=True",
        ),
    }


@pytest.mark.parametrize(("fields", "arguments", "message"), wrong_inputs().values(), ids=wrong_inputs().keys())
def test_wrong_input_is_named(fields, arguments, message):
    config = tiny_config(**fields)
    for model in (GreenSwinModel(config), GreenSwinForMaskedImageModeling(config)):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
