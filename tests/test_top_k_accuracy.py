"""The metric that the examples load by path, against counting by hand."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

PATH = Path(__file__).resolve().parents[1] / "examples" / "metrics" / "top_k_accuracy"


@pytest.fixture(scope="module")
def metric():
    return evaluate.load(str(PATH), keep_in_memory=True)


def test_counts_images_whose_class_is_among_the_best(metric):
    scores = np.random.default_rng(0).normal(size=(200, 9)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 9, 200)
    found = metric.compute(predictions=scores, references=labels, k=[1, 2, 5])
    for k in (1, 2, 5):
        hits = [
            label in sorted(range(9), key=lambda c, row=row: -row[c])[:k]
            for row, label in zip(scores, labels, strict=True)
        ]
        assert found[f"top_{k}_accuracy"] == pytest.approx(np.mean(hits))


def test_top_5_needs_more_than_five_classes(metric):
    for classes, names in ((6, {"top_1_accuracy", "top_5_accuracy"}), (5, {"top_1_accuracy"}), (2, {"top_1_accuracy"})):
        assert metric.compute(predictions=np.eye(classes), references=np.arange(classes)).keys() == names
    assert metric.compute(predictions=np.eye(6), references=np.arange(6)) == {"top_1_accuracy": 1, "top_5_accuracy": 1}


def test_constant_scores_and_scores_that_are_none_find_nothing(metric):
    for value in (0.0, float("nan")):
        found = metric.compute(predictions=np.full((4, 6), value), references=np.arange(4))
        assert found == {"top_1_accuracy": 0, "top_5_accuracy": 0}


def test_a_class_out_of_range_is_named(metric):
    with pytest.raises(ValueError, match="reference 3 must be a class from 0 to 2"):
        metric.compute(predictions=np.eye(3), references=[0, 1, 3])
