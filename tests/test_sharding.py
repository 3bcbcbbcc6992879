"""Pretraining with the parameters divided among processes (FSDP): the same numbers, and checkpoints like any other.

accelerate offers FSDP for accelerators only; here it is told that the CPU is one, and does all that it does on them.
"""

import accelerate.state
import pytest
from accelerate.utils import DistributedType
from test_examples import (
    TINY,
    _fresh_accelerator,  # noqa: F401
    assert_same,
    grey_images,  # noqa: F401
    run_pretrain,
    training_losses,
    weights,
)
from test_survival import pretrain_in_child, starter, wait_for

from green_swin_hf import GreenSwinForMaskedImageModeling
from green_swin_hf.checkpointing import list_checkpoints, read_training_state

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def pretrain_sharded_in_child(flags, output, variables):
    start = accelerate.state.PartialState.__init__

    def start_as_on_accelerators(self, *arguments, **options):
        start(self, *arguments, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    accelerate.state.PartialState.__init__ = start_as_on_accelerators
    pretrain_in_child(flags, output, {**variables, **FSDP})


def test_a_sharded_run_trains_saves_and_goes_on_as_one_process_does(grey_images, tmp_path):  # noqa: F811
    shared = ["--data", grey_images, *TINY, "--max-steps", 4, "--save-every", 2, "--keep-checkpoints", 9]
    shared += ["--validate-every", 2]
    one, two, shown = tmp_path / "one", tmp_path / "two", tmp_path / "shown.txt"
    assert run_pretrain("--output-dir", one, *shared) == 0

    flags = [str(word) for word in (*shared, "--batch-size", 4, "--output-dir", two)]
    for more in (["--stop-after", "2"], ["--resume", "auto"]):
        start = starter([*flags, *more], shown, 2, pretrain_sharded_in_child)
        assert [wait_for(child) for child in start()] == [0, 0], shown.read_text()
    assert "Warning" not in shown.read_text()
    assert_close(weights(one), weights(two))
    pairs = zip(training_losses(one), training_losses(two), strict=True)
    for (_, loss, norm), (_, other_loss, other_norm) in pairs:
        assert (loss, norm) == pytest.approx((other_loss, other_norm), rel=1e-5)
    assert_same(dict(GreenSwinForMaskedImageModeling.from_pretrained(two).state_dict()), weights(two))

    # What a sharded run saved, one process goes on from.
    first, last = list_checkpoints(two / "checkpoints")
    assert set(read_training_state(last)["optimizer"]["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    other = ["--resume", first, "--override", "--batch-size", 8, "--output-dir", tmp_path / "other"]
    assert run_pretrain(*other) == 0
    assert_close(weights(one), weights(tmp_path / "other"))


def assert_close(left, right):
    assert left.keys() == right.keys()
    worst = max((left[name] - right[name]).abs().max().item() for name in left)
    assert worst < 1e-6, worst
