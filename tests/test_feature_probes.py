"""Probes against independent oracles, on features whose answer is known, and on images without reading a label."""

import math

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from tiny import images, randomised, seeded, tiny_config

from green_swin_hf import GreenSwinModel
from green_swin_hf.feature_probes import (
    Accuracy,
    LabelledFeatures,
    count_shared_images,
    extract_features,
    fit_linear_probe,
    frozen_features,
    is_among_top,
    judge_features,
    paired_difference,
    pixel_features,
    random_encoder,
    weighted_knn,
)

CLASSES = 4


def blobs(count, spread, seed=0, dimension=6):
    """Features around one centre for each class, and their classes."""
    centres = 3 * torch.eye(CLASSES, dimension)
    labels = torch.arange(count) % CLASSES
    return centres[labels] + spread * torch.randn(count, dimension, generator=seeded(seed)), labels


def labelled(count, spread, seed):
    features, labels = blobs(count, spread, seed)
    return LabelledFeatures({"some": features}, labels)


class Samples(torch.utils.data.Dataset):
    def __init__(self, pixel_values):
        self.pixel_values = pixel_values

    def __len__(self):
        return len(self.pixel_values)

    def __getitem__(self, index):
        return {"pixel_values": self.pixel_values[index], "labels": index % 3}


# Weighted k-NN


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("neighbours", [1, 5, 20])
def test_weighted_knn_equals_scikit_learns(neighbours, temperature):
    bank, labels = blobs(60, 1.5)
    queries, _ = blobs(30, 1.5, seed=1)
    oracle = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / temperature)
    ).fit(bank.double().numpy(), labels.numpy())
    shares = weighted_knn(bank, labels, queries, CLASSES, neighbours=neighbours, temperature=temperature, chunk_size=7)
    expected = torch.from_numpy(oracle.predict_proba(queries.double().numpy())).float()
    torch.testing.assert_close(shares, expected, atol=1e-4, rtol=0)


def test_weighted_knn_counts_votes_one_by_one():
    bank = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    shares = weighted_knn(bank, torch.tensor([0, 1, 1]), torch.tensor([[5.0, 0.0]]), 3, temperature=0.5)
    votes = [math.exp(1 / 0.5), math.exp(0) + math.exp(math.sqrt(0.5) / 0.5), 0.0]
    assert shares[0].tolist() == pytest.approx([vote / sum(votes) for vote in votes])


def test_weighted_knn_stays_finite_at_a_tiny_temperature():
    bank, labels = blobs(20, 0.1)
    shares = weighted_knn(bank, labels, bank, CLASSES, temperature=1e-4)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(20))


# Linear probe


def test_both_probes_separate_what_is_separable_and_not_noise():
    good = judge_features(labelled(80, 0.3, 0), labelled(40, 0.3, 1), labelled(40, 0.3, 2), CLASSES, name="some")
    assert good.knn.value == good.linear.value == 1
    sets = [labelled(count, 0.3, seed) for count, seed in ((400, 0), (200, 1), (200, 2))]
    noise = [LabelledFeatures({"some": torch.randn(len(s.labels), 6, generator=seeded(9))}, s.labels) for s in sets]
    noise[2] = LabelledFeatures({"some": torch.randn(200, 6, generator=seeded(10))}, sets[2].labels)
    bad = judge_features(*noise, CLASSES, name="some")
    assert bad.knn.value == pytest.approx(1 / CLASSES, abs=0.12)
    assert bad.linear.value == pytest.approx(1 / CLASSES, abs=0.12)


def test_the_linear_probe_is_scikit_learns_and_chosen_on_validation():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    bank, labels = blobs(60, 2.0)
    bank = bank * torch.tensor([1e3, 1, 1, 1, 1, 1e-3])  # features of very different scales
    chosen_on, chosen_labels = bank[40:], labels[40:]
    bank, labels = bank[:40], labels[:40]
    strengths = (1e-3, 1e-1, 10.0)
    probe = fit_linear_probe(bank, labels, chosen_on, chosen_labels, CLASSES, inverse_strengths=strengths)
    scores = {}
    for strength in strengths:
        oracle = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-8))
        oracle.fit(bank.double().numpy(), labels.numpy())
        scores[strength] = oracle.score(chosen_on.double().numpy(), chosen_labels.numpy())
        if strength == probe.inverse_strength:
            expected = torch.from_numpy(oracle.predict_proba(chosen_on.double().numpy())).float()
            torch.testing.assert_close(probe.scores(chosen_on), expected, atol=0.02, rtol=0)
    assert scores[probe.inverse_strength] == max(scores.values()) == pytest.approx(probe.validation.value)


def test_what_is_tested_on_does_not_change_what_is_fitted():
    bank, validation = labelled(60, 2.0, 0), labelled(30, 2.0, 1)
    first = judge_features(bank, validation, labelled(30, 2.0, 2), CLASSES, name="some")
    other = judge_features(bank, validation, labelled(30, 9.0, 3), CLASSES, name="some")
    assert (first.inverse_strength, first.validation) == (other.inverse_strength, other.validation)


@pytest.mark.parametrize("present", [(0, 1), (1, 3), (0, 2, 3)])
def test_classes_that_the_bank_lacks_get_no_probability(present):
    features, labels = blobs(60, 0.3)
    rows = torch.isin(labels, torch.tensor(present))
    probe = fit_linear_probe(features[rows], labels[rows], features, labels, CLASSES)
    scores = probe.scores(features)
    assert scores.shape == (60, CLASSES)
    absent = [index for index in range(CLASSES) if index not in present]
    assert (scores[:, absent] == 0).all()
    assert is_among_top(scores[rows], labels[rows]).all()


def test_a_bank_of_one_class_is_refused():
    features, labels = blobs(8, 0.3)
    with pytest.raises(ValueError, match="at least 2 classes"):
        fit_linear_probe(features, torch.zeros_like(labels), features, labels, CLASSES)


# Accuracies


def test_the_standard_error_is_that_of_repeated_draws():
    draws = torch.rand(4000, 100, generator=seeded()) < 0.3
    accuracies = [Accuracy.of(draw) for draw in draws]
    spread = torch.tensor([accuracy.value for accuracy in accuracies]).std().item()
    assert accuracies[0].num_images == 100
    mean_error = sum(accuracy.standard_error for accuracy in accuracies) / len(accuracies)
    assert mean_error == pytest.approx(spread, rel=0.05)


def test_paired_differences_vary_as_the_images_on_which_two_differ():
    is_right = torch.tensor([1, 1, 1, 0, 1, 0, 0, 1]).bool()
    baseline = torch.tensor([1, 1, 0, 0, 0, 1, 0, 1]).bool()
    difference, error = paired_difference(is_right, baseline)
    assert difference == pytest.approx(1 / 8)
    assert error == pytest.approx(np.std([0, 0, 1, 0, 1, -1, 0, 0]) / math.sqrt(8))
    assert paired_difference(is_right, is_right) == (0, 0)


def test_top_k_counts_the_label_among_the_highest_scores():
    scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.5, 0.0]])
    assert is_among_top(scores, torch.tensor([2, 1])).tolist() == [False, False]
    assert is_among_top(scores, torch.tensor([2, 1]), 2).tolist() == [True, True]
    assert is_among_top(scores, torch.tensor([0, 2]), 5).tolist() == [True, True]


# Features


@pytest.fixture(scope="module")
def encoder():
    return randomised(GreenSwinModel(tiny_config()))


def test_features_are_those_of_the_model(encoder):
    pixel_values = images(3, rows=32, columns=48)
    features = frozen_features(encoder, pixel_values, ["map", "pooled", "stages"])
    with torch.no_grad():
        output = encoder(pixel_values, output_hidden_states=True, output_hidden_states_before_downsampling=True)
    tokens = output.last_hidden_state
    assert features["map"].shape == (3, 4 * 6 * 32)
    torch.testing.assert_close(features["map"].view(3, 24, 32), tokens)
    torch.testing.assert_close(features["pooled"], output.pooler_output)
    maps = [*output.reshaped_hidden_states[1:-1], tokens.transpose(1, 2).unflatten(2, (4, 6))]
    parts = [feature_map.mean(dim=(2, 3)) for feature_map in maps]
    assert features["stages"].shape == (3, 8 + 16 + 32)
    torch.testing.assert_close(features["stages"], torch.cat([part / part.norm(dim=1)[:, None] for part in parts], 1))


def test_unknown_features_are_refused(encoder):
    with pytest.raises(ValueError, match="'mean' must be one of pooled, map, stages"):
        frozen_features(encoder, images(1), ["mean"])


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_features_come_in_the_order_of_the_images_whatever_the_batches(encoder, batch_size):
    pixel_values = images(7)
    state = torch.get_rng_state()
    found = extract_features(
        Samples(pixel_values), [lambda x: {"own": x.flatten(1)}, lambda x: frozen_features(encoder, x, ["pooled"])],
        batch_size=batch_size,
    )  # fmt: skip
    assert torch.equal(torch.get_rng_state(), state)
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert torch.equal(found.features["own"], pixel_values.flatten(1))
    expected = frozen_features(encoder, pixel_values, ["pooled"])["pooled"]
    torch.testing.assert_close(found.features["pooled"], expected, atol=1e-5, rtol=1e-5)


def test_pixels_of_large_images_are_scaled_down():
    small = images(2, rows=28, columns=32)
    assert torch.equal(pixel_features(small), small.flatten(1))
    flat = torch.full((1, 3, 224, 20), 0.25)
    torch.testing.assert_close(pixel_features(flat), torch.full((1, 3 * 32 * 20), 0.25))


def test_a_random_encoder_is_that_of_its_seed_and_leaves_the_random_state():
    state = torch.get_rng_state()
    first, again, other = (random_encoder(tiny_config(), seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    name = "encoder.layers.0.blocks.0.attention.self.query.weight"
    assert torch.equal(first[name], again[name])
    assert not torch.equal(first[name], other[name])


def test_images_in_both_sets_are_counted():
    bank, tested = torch.randn(5, 3), torch.randn(4, 3)
    assert count_shared_images(bank, tested) == 0
    tested[1], tested[3] = bank[2], bank[2]
    assert count_shared_images(bank, tested) == 2
