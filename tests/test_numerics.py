"""Mixed precision on extreme images: finite throughout; what is skipped is counted, and a lost run says so and stops.

`pytest tests/test_numerics.py --soak-steps 3000` soaks for longer; the results are printed with `-s`.
"""

import itertools

import pytest
import torch
from tiny import images, masks, seeded, tiny_config

from green_swin_hf import GreenSwinForMaskedImageModeling
from green_swin_hf.numerics import COLLAPSED_LOSS_SCALE, loss_scale
from green_swin_hf.optimization import build_optimizer
from green_swin_hf.training import DivergenceError, RunState, is_finite

UNIT = 8  # pixels of a mask unit of the tiny configuration


def constant_units():
    """Every mask unit of one colour: its variance is exactly 0."""
    return images(2, rows=4, columns=4, seed=3).repeat_interleave(UNIT, 2).repeat_interleave(UNIT, 3)


def one_pixel():
    pixels = torch.zeros(2, 3, 32, 32)
    pixels[:, :, 5, 7] = 1e4
    return pixels


EXTREME = {
    "ordinary": lambda: images(2),
    "black": lambda: torch.full((2, 3, 32, 32), -2.1),
    "zeros": lambda: torch.zeros(2, 3, 32, 32),
    "saturated": lambda: torch.full((2, 3, 32, 32), 2.6),
    "constant units": constant_units,
    "bytes as they are": lambda: torch.randint(0, 256, (2, 3, 32, 32), generator=seeded(4)).float(),
    "two values": lambda: images(2, seed=5).sign() * 2.6,
    "hardly any contrast": lambda: 1 + 1e-7 * images(2, seed=6),
    "tiny": lambda: images(2, seed=7) * 1e-30,
    "one bright pixel": one_pixel,
    "half black": lambda: torch.cat([images(1, seed=8), torch.full((1, 3, 32, 32), -2.1)]),
}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Trainer:
    """Updates as `examples/pretrain.py` makes them, in a precision that accelerate offers on a GPU only."""

    def __init__(self, precision, learning_rate=1e-3):
        torch.manual_seed(0)
        self.model = GreenSwinForMaskedImageModeling(tiny_config(mask_ratio=0.5)).train()
        self.optimizer = build_optimizer(self.model, learning_rate)
        self.dtype = PRECISIONS[precision]
        self.scaler = torch.amp.GradScaler("cpu") if precision == "fp16" else None
        self.state = RunState()

    def update(self, pixels, mask, limit=20):
        with torch.autocast("cpu", self.dtype, enabled=self.dtype is not None):
            loss = self.model(pixel_values=pixels, bool_masked_pos=mask).loss
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.scaler:
            self.scaler.unscale_(self.optimizer)
        finite = is_finite(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 5.0))
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.record_update(finite, limit, loss=loss, scale=loss_scale(self.scaler))
        return loss.item(), finite

    def train(self, batches, limit):
        for pixels, mask in batches:
            self.update(pixels, mask, limit)


def every_number(trainer):
    states = (value for state in trainer.optimizer.state.values() for value in state.values())
    return itertools.chain(trainer.model.parameters(), states)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_extreme_images_leave_every_number_finite_and_what_is_skipped_is_counted(precision, request):
    steps = request.config.getoption("soak_steps")
    trainer, skipped, losses = Trainer(precision), 0, []
    kinds = {name: make() for name, make in EXTREME.items()}
    for step, name in zip(range(steps), itertools.cycle(kinds), strict=False):
        kind = ("shared", "per_image", "unequal")[step % 3]
        loss, finite = trainer.update(kinds[name], masks(kind, 2, seed=step))
        assert loss == loss
        assert abs(loss) < float("inf"), name
        losses.append(loss)
        skipped += not finite
    assert trainer.state.update == steps
    assert trainer.state.skipped_updates == skipped
    assert all(torch.isfinite(number).all() for number in every_number(trainer))
    if precision != "fp16":
        assert skipped == 0
    else:  # the scaler tries ever larger scales and steps back
        assert skipped <= 16 + steps / 50
        assert loss_scale(trainer.scaler) >= COLLAPSED_LOSS_SCALE
    print(f"{precision}: {steps} steps, {skipped} skipped, loss {losses[0]:.3f} to {losses[-1]:.3f}, no NaN")


def overflowing(trainer):
    """The model with weights whose products no half-precision number holds."""
    with torch.no_grad():
        trainer.model.swin.embeddings.patch_embeddings.projection.weight.mul_(1e7)
    return trainer


def test_a_loss_scale_that_collapses_ends_the_run_with_the_remedy_and_changes_no_weight():
    trainer = overflowing(Trainer("fp16"))
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    batches = [(images(2), masks("shared", 2, seed=step)) for step in range(30)]
    with pytest.raises(DivergenceError, match=r"fp16 has collapsed to 0\.5 .*17 skipped .*--precision bf16"):
        trainer.train(batches, limit=1000)
    assert trainer.state.skipped_updates == trainer.state.update == 17
    assert all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True))


def test_a_loss_scale_that_sinks_slowly_is_noticed_although_updates_between_are_good():
    trainer, broken = Trainer("fp16"), torch.full((2, 3, 32, 32), 1e30)
    batches = [(broken if update % 3 else images(2), masks("shared", 2)) for update in range(60)]
    with pytest.raises(DivergenceError, match="loss scale of fp16 has collapsed"):
        trainer.train(batches, limit=10)
    assert trainer.state.skipped_in_a_row <= 2
    assert trainer.state.skipped_updates == 17
    assert trainer.state.update > 20
    assert all(torch.isfinite(number).all() for number in every_number(trainer))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_loss_that_is_no_number_ends_the_run_and_changes_no_weight(precision):
    trainer = Trainer(precision)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    broken = images(2)
    broken[0, 0, 0, 0] = float("nan")
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 5] = True
    with pytest.raises(
        DivergenceError, match=r"3 updates in a row, up to update 3, had a loss of nan .*--learning-rate"
    ):
        trainer.train([(broken, mask)] * 10, limit=3)
    assert all(torch.equal(now, then) for now, then in zip(trainer.model.parameters(), before, strict=True))
