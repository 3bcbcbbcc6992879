"""torch.compile takes the models as they are, and compiles once for all masks.

The backends are those that stop before code generation: what is captured and when it is captured anew is the same.
"""

import pickle

import pytest
import torch
from tiny import images, masks, randomised, seeded, tiny_config
from torch._dynamo.utils import counters

from green_swin_hf import (
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    SparseGeometry,
    build_sparse_plan,
    sample_masks,
)

BATCH_SIZE = 4


@pytest.fixture(autouse=True)
def nothing_compiled_yet():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


# Windows of 3 tokens on grids of 16 and 8: counts and number of groups differ from mask to mask.
@pytest.mark.parametrize("num_masks", [1, BATCH_SIZE], ids=["shared", "per image"])
def test_training_on_new_masks_compiles_once(num_masks):
    config = tiny_config(window_size=3, drop_path_rate=0.2)
    model = GreenSwinForMaskedImageModeling(config).train()
    compiled = torch.compile(model, backend="aot_eager")
    geometry = SparseGeometry.from_config(config)
    generator, pixels, num_groups = seeded(), images(BATCH_SIZE), set()
    for _ in range(25):
        plan = build_sparse_plan(sample_masks(num_masks, geometry.unit_grid_size, 0.6, generator), geometry)
        num_groups.add(tuple(part.num_groups for stage in plan.stages for part in (stage.regular, stage.shifted)))
        compiled(pixel_values=pixels, sparse_plan=plan).loss.backward()
        assert compiled_graphs() == 1
    assert len(num_groups) > 3
    assert not counters["graph_break"]


def test_plans_from_another_process_compile_once_too():
    config = tiny_config(window_size=3)
    compiled = torch.compile(GreenSwinForMaskedImageModeling(config).train(), backend="eager")
    geometry = SparseGeometry.from_config(config)
    for seed in range(10):
        plan = build_sparse_plan(sample_masks(1, geometry.unit_grid_size, 0.6, seeded(seed)), geometry)
        received = pickle.loads(pickle.dumps(plan))  # as a loader's worker sends it
        compiled(pixel_values=images(BATCH_SIZE), sparse_plan=received)
    assert compiled_graphs() == 1


@pytest.mark.parametrize("kind", ["shared", "per_image"])
def test_compiled_training_equals_eager(kind):
    config = tiny_config(window_size=3)
    model = GreenSwinForMaskedImageModeling(config).train()
    plan = build_sparse_plan(masks(kind, BATCH_SIZE), SparseGeometry.from_config(config))

    def loss_and_gradients(forward):
        loss = forward(pixel_values=images(BATCH_SIZE), sparse_plan=plan).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    expected = loss_and_gradients(model)
    for actual, value in zip(loss_and_gradients(torch.compile(model, backend="aot_eager")), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6)


def test_whole_images_compile_once_in_training_and_evaluation():
    config = tiny_config(problem_type="single_label_classification")
    model = GreenSwinForImageClassification(config).train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for seed in range(3):
        labels = torch.randint(0, 5, (BATCH_SIZE,), generator=seeded(seed))
        compiled(pixel_values=images(BATCH_SIZE, seed=seed), labels=labels).loss.backward()
    assert compiled_graphs() == 1
    model.eval()
    with torch.no_grad():
        logits = compiled(pixel_values=images(BATCH_SIZE)).logits
        torch.testing.assert_close(logits, model(pixel_values=images(BATCH_SIZE)).logits, rtol=1e-5, atol=1e-6)
        compiled(pixel_values=images(BATCH_SIZE, seed=1))
    assert compiled_graphs() == 2


def test_the_compiled_classifier_equals_eager_and_another_batch_size_compiles_it_once_more():
    config = tiny_config(depths=(2, 1), num_heads=(1, 2), problem_type="single_label_classification")
    model = randomised(GreenSwinForImageClassification(config))
    compiled = torch.compile(model, backend="aot_eager")

    def loss_and_gradients(forward, batch_size, seed):
        labels = torch.arange(batch_size) % 5
        loss = forward(pixel_values=images(batch_size, seed=seed), labels=labels).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    graphs = []
    for seed, batch_size in enumerate((4, 4, 3, 7)):  # from the second size on the batch is free
        expected = loss_and_gradients(model, batch_size, seed)
        for actual, value in zip(loss_and_gradients(compiled, batch_size, seed), expected, strict=True):
            torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6)
        graphs.append(compiled_graphs())
    assert graphs == [1, 1, 2, 2]
    assert not counters["graph_break"]
