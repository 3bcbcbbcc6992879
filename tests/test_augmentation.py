"""Augmentation for fine-tuning: what it does to pixels and targets, and that its randomness belongs to the sample."""

import pytest
import torch

from green_swin_hf.augmentation import FinetuningTransform, MixingCollator, stack_samples, torch_seed
from green_swin_hf.data import PretrainingTransform, seeded_generator

PLAIN = {"image_size": (16, 16), "crop_scale": (0.5, 1.0), "mean": (0.5,) * 3, "std": (0.25,) * 3}
AUGMENTED = {"rand_augment": 9, "rand_augment_std": 0.5, "random_erasing": 0.5}


def picture(channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (channels, 20, 24), dtype=torch.uint8, generator=generator)


def samples(count, classes=4):
    return [
        {"pixel_values": torch.full((1, 8, 8), float(row)), "labels": row % classes, "batch_seed": 17 + row}
        for row in range(count)
    ]


def test_without_augmentation_it_is_the_transform_of_pretraining():
    for seed in range(5):
        ours = FinetuningTransform(**PLAIN)(picture(), seeded_generator(seed))
        assert torch.equal(ours, PretrainingTransform(**PLAIN)(picture(), seeded_generator(seed)))


def test_a_sample_depends_on_its_generator_alone_and_the_global_one_is_not_touched():
    transform = FinetuningTransform(**PLAIN, **AUGMENTED)
    before = torch.get_rng_state()
    first = [transform(picture(), seeded_generator(seed)) for seed in range(20)]
    assert torch.equal(before, torch.get_rng_state())
    torch.rand(5)
    again = [transform(picture(), seeded_generator(seed)) for seed in range(20)]
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert len({image.sum().item() for image in first}) == 20
    assert all(image.shape == (3, 16, 16) and image.isfinite().all() for image in first)


def test_grey_images_are_augmented_too():
    grey = {**PLAIN, "num_channels": 1, "mean": (0.5,), "std": (0.25,)}
    for extra in (AUGMENTED, {"color_jitter": 0.4}):
        transform = FinetuningTransform(**grey, **extra)
        for seed in range(20):
            assert transform(picture(1), seeded_generator(seed)).shape == (1, 16, 16)


def test_strength_grows_with_the_magnitude():
    whole = {**PLAIN, "crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2), "flip": 0.0}
    plain = FinetuningTransform(**whole)(picture(), seeded_generator(0))

    def change(magnitude):
        transform = FinetuningTransform(**whole, rand_augment=magnitude)
        images = [transform(picture(), seeded_generator(seed)) for seed in range(60)]
        return torch.stack([(image - plain).abs().mean() for image in images]).mean().item()

    assert change(1) < change(5) < change(10)


def test_each_operation_is_applied_with_its_probability():
    whole = {**PLAIN, "crop_scale": (1.0, 1.0), "crop_ratio": (1.2, 1.2), "flip": 0.0}
    plain = FinetuningTransform(**whole)(picture(), seeded_generator(0))

    def unchanged(probability):
        transform = FinetuningTransform(**whole, rand_augment=9, rand_augment_probability=probability)
        images = [transform(picture(), seeded_generator(seed)) for seed in range(80)]
        return sum(torch.equal(image, plain) for image in images) / 80

    assert unchanged(0.0) == 1
    assert unchanged(1.0) < 0.1 < 0.2 < unchanged(0.5) < 0.5


def test_colour_jitter_gives_way_to_rand_augment_and_erasing_fills_a_rectangle_with_noise():
    both = FinetuningTransform(**PLAIN, rand_augment=5, color_jitter=0.4)
    one = FinetuningTransform(**PLAIN, rand_augment=5)
    assert torch.equal(both(picture(), seeded_generator(1)), one(picture(), seeded_generator(1)))
    jitter = FinetuningTransform(**PLAIN, color_jitter=0.4)
    assert not torch.equal(
        jitter(picture(), seeded_generator(1)), FinetuningTransform(**PLAIN)(picture(), seeded_generator(1))
    )

    flat = torch.full((3, 16, 16), 128, dtype=torch.uint8)
    erased = FinetuningTransform(**PLAIN, random_erasing=1.0)(flat, seeded_generator(3))
    changed = (erased != erased.mode(dim=-1).values.mode().values[:, None, None]).any(0)
    rows, columns = changed.any(1).sum().item(), changed.any(0).sum().item()
    assert 0 < changed.sum().item() == rows * columns < 16 * 16
    assert erased[:, changed].unique().numel() == 3 * rows * columns


def test_mixed_targets_follow_the_pixels():
    for kind in ("mixup", "cutmix"):
        collate = MixingCollator(8, **{kind: 1.0})
        for lead in range(4):
            given = samples(8, classes=8)[lead:] + samples(8, classes=8)[:lead]
            batch = collate(given)
            assert batch["labels"].dtype == torch.float32
            # Images are constant and of the value of their class: the mean of the pixels is the mean of the target.
            means = (batch["labels"] * torch.arange(8.0)).sum(1)
            torch.testing.assert_close(batch["pixel_values"].mean((1, 2, 3)), means, atol=1e-5, rtol=0)
            torch.testing.assert_close(batch["labels"].sum(1), torch.ones(8))
            assert (batch["labels"] > 0).sum(1).max() <= 2


def test_targets_are_smoothed_once():
    batch = MixingCollator(4, label_smoothing=0.2)(samples(4))
    torch.testing.assert_close(batch["labels"], torch.eye(4) * 0.8 + 0.05)
    mixed = MixingCollator(4, label_smoothing=0.2, mixup=0.8)(samples(4))["labels"]
    plain = MixingCollator(4, mixup=0.8)(samples(4))["labels"]
    torch.testing.assert_close(mixed, plain * 0.8 + 0.05)
    # as PyTorch smooths
    logits = torch.randn(4, 4)
    loss = torch.nn.functional.cross_entropy(logits, torch.arange(4), label_smoothing=0.2)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, batch["labels"]), loss)


def test_mixing_is_of_the_batch_and_takes_each_kind_half_of_the_time():
    collate = MixingCollator(4, mixup=0.8, cutmix=1.0)
    state = torch.get_rng_state()
    batches = []
    for seed in range(40):
        given = [{**sample, "batch_seed": seed} for sample in samples(4)]
        batches.append(collate(given)["pixel_values"])
        assert torch.equal(batches[-1], collate(given)["pixel_values"])
    assert torch.equal(state, torch.get_rng_state())
    cut = sum(all(value in (0, 1, 2, 3) for value in batch.flatten().tolist()) for batch in batches)
    assert 10 <= cut <= 30


@pytest.mark.parametrize(
    ("options", "message"),
    [({"mixup": -1.0}, "mixup -1.0"), ({"label_smoothing": 1.0}, "label_smoothing 1.0")],
)
def test_values_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixingCollator(4, **options)
    with pytest.raises(ValueError, match="rand_augment 11"):
        FinetuningTransform(**PLAIN, rand_augment=11)


def test_the_seed_is_put_back_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(RuntimeError), torch_seed(1):  # noqa: PT012
        torch.rand(1)
        raise RuntimeError
    assert torch.equal(state, torch.get_rng_state())


def test_batches_for_evaluation_are_as_they_are():
    batch = stack_samples(samples(5))
    assert batch["labels"].tolist() == [0, 1, 2, 3, 0]
    assert batch["pixel_values"].shape == (5, 1, 8, 8)
