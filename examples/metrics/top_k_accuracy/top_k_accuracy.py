"""Top-k accuracy as a metric of `evaluate`, loaded by its path: no network is needed.

metric = evaluate.load("examples/metrics/top_k_accuracy")
metric.compute(predictions=logits, references=labels)  # {"top_1_accuracy": 0.91, "top_5_accuracy": 0.99}
"""

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Share of images whose class is among the k classes with the highest scores."
_CITATION = ""
_INPUTS = """
Args:
    predictions: scores of all classes for each image, [N, classes]; the larger the better.
    references: class of each image, [N] integers from 0 on.
    k: numbers of classes to look at, 1 and 5 by default. One that is not below the number of classes is left out, since
        it would always give 1; 1 is always there.
Returns:
    `top_{k}_accuracy` in 0 … 1 for each k. Classes with equal scores: a class counts as found only if fewer than k
    others have a score at least as high, so that a model with constant scores finds nothing. No score, no hit: an image
    with a NaN among its scores is not found.
"""


class TopKAccuracy(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float32")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, k: Sequence[int] = (1, 5)) -> dict[str, float]:
        scores = np.asarray(predictions, dtype=np.float32)  # [N, classes]
        classes = np.asarray(references)  # [N]
        num_classes = scores.shape[1]
        if classes.min() < 0 or classes.max() >= num_classes:
            wrong = classes.min() if classes.min() < 0 else classes.max()
            raise ValueError(f"reference {wrong} must be a class from 0 to {num_classes - 1}")
        own = np.take_along_axis(scores, classes[:, None], axis=1)  # [N, 1]
        ahead = (~(scores < own)).sum(axis=1) - 1  # other classes that are not behind; NaN is behind nothing
        return {f"top_{n}_accuracy": float((ahead < n).mean()) for n in k if n == 1 or n < num_classes}
