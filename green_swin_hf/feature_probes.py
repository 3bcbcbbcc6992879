"""How good frozen features are: weighted k-NN and a linear probe, beside raw pixels and an untrained encoder.

Features come from an encoder that does not change (`frozen_features`), one pass over the images for all of them
(`extract_features`). A probe sees the features of a bank of labelled images and predicts the labels of others:
`weighted_knn` has nothing to fit, `fit_linear_probe` chooses its regularisation on images of neither. Every accuracy
carries its standard error (`Accuracy`), and two of the same images are compared pairwise (`paired_difference`).
scikit-learn is needed by the linear probe alone.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from .configuration_green_swin import GreenSwinConfig
from .modeling_green_swin import GreenSwinModel

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

# What features of an encoder there are, and their names in tables.
FEATURE_KINDS = {
    "pooled": "last stage, mean of all tokens",
    "map": "last stage, all tokens",
    "stages": "all stages, mean of tokens",
}
# k-NN as in the self-supervised literature, see `weighted_knn`.
NEIGHBOURS, TEMPERATURE = 20, 0.07
# Inverse strengths of L2 regularisation that the linear probe chooses from.
INVERSE_STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
PIXELS_AT_MOST = 32

FeatureFunction = Callable[[Tensor], Mapping[str, Tensor]]


# Features


@dataclass(frozen=True)
class LabelledFeatures:
    """Features `[N, D]` float32 of N images by name, and their labels `[N]` int64, on the CPU."""

    features: dict[str, Tensor]
    labels: Tensor


@torch.no_grad()
def frozen_features(encoder: GreenSwinModel, pixel_values: Tensor, kinds: Sequence[str]) -> dict[str, Tensor]:
    """Features of whole images by kind, `[B, D]` float32: keys of `FEATURE_KINDS`.

    "pooled" is the mean of the last stage's tokens, "map" all of them in their order, which keeps the position of
    things, and "stages" the means of every stage, each scaled to length one, beside each other.

    Args:
        encoder: in eval mode, as features do not depend on the rest of the batch then.
        pixel_values: [B, C, H, W], on the encoder's device; D depends on H and W for "map".
        kinds: which to return.
    """
    output = encoder(
        pixel_values,
        output_hidden_states="stages" in kinds,
        output_hidden_states_before_downsampling=True,
        return_dict=True,
    )
    last = output.last_hidden_state.float()  # [B, L, C]
    features: dict[str, Tensor] = {}
    for kind in kinds:
        if kind == "pooled":
            features[kind] = last.mean(dim=1)
        elif kind == "map":
            features[kind] = last.flatten(1)
        elif kind == "stages":
            earlier = [state.float() for state in output.hidden_states[1:-1]]  # the first one is the patch embedding
            features[kind] = torch.cat([normalize(state.mean(dim=1)) for state in (*earlier, last)], dim=1)
        else:
            raise ValueError(f"features {kind!r} must be one of {', '.join(FEATURE_KINDS)}")
    return features


def pixel_features(pixel_values: Tensor) -> Tensor:
    """The pixels themselves as features, `[B, C·h·w]` float32, of images scaled down to at most 32 px a side."""
    size = [min(side, PIXELS_AT_MOST) for side in pixel_values.shape[2:]]
    if list(pixel_values.shape[2:]) != size:
        pixel_values = interpolate(pixel_values.float(), size, mode="bilinear", antialias=True)
    return pixel_values.float().flatten(1)


def random_encoder(config: GreenSwinConfig, seed: int) -> GreenSwinModel:
    """An untrained encoder of a configuration, in eval mode; torch's random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return GreenSwinModel(config).eval()


def extract_features(
    images: Dataset[Any],
    functions: Sequence[FeatureFunction],
    *,
    batch_size: int = 128,
    workers: int = 0,
    device: torch.device | str = "cpu",
    progress: str | None = None,
) -> LabelledFeatures:
    """Features of all images by name and their labels, in order, on the CPU. No random state is touched.

    Args:
        images: map-style, of `{"pixel_values": [C, H, W] float32, "labels": int}`.
        functions: each gives named features `[B, D]` of a batch; names of all functions are distinct.
        batch_size: images of a batch; the last one may be smaller.
        workers: processes that read images.
        device: where the functions compute.
        progress: what the progress bar says; none without it.
    """
    # A generator of its own: a loader draws from the global one otherwise, and the training beside would change.
    loader = DataLoader(images, batch_size, num_workers=workers, generator=torch.Generator(), collate_fn=_stack)
    features: dict[str, list[Tensor]] = {}
    labels: list[Tensor] = []
    for batch in tqdm(loader, desc=progress, disable=progress is None, unit="batch", leave=False, dynamic_ncols=True):
        pixel_values = batch["pixel_values"].to(device, non_blocking=True)
        for function in functions:
            for name, values in function(pixel_values).items():
                features.setdefault(name, []).append(values.cpu())
        labels.append(batch["labels"])
    return LabelledFeatures({name: torch.cat(parts) for name, parts in features.items()}, torch.cat(labels))


def _stack(samples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([int(sample["labels"]) for sample in samples]),
    }


# Accuracies


@dataclass(frozen=True)
class Accuracy:
    """A share of images with what it is known to.

    Attributes:
        value: in 0 … 1.
        standard_error: of the share as an estimate for all images like these, √(p·(1 - p) / n). It says nothing of
            other random seeds.
        num_images: n.
    """

    value: float
    standard_error: float
    num_images: int

    @classmethod
    def of(cls, is_right: Tensor) -> Accuracy:
        """Of `[N]` bool, True = the image was predicted right."""
        return cls.from_share(is_right.sum().item() / len(is_right), len(is_right))

    @classmethod
    def from_share(cls, share: float, num_images: int) -> Accuracy:
        return cls(share, math.sqrt(share * (1 - share) / num_images), num_images)

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.standard_error:.3f}"


def is_among_top(scores: Tensor, labels: Tensor, k: int = 1) -> Tensor:
    """`[N]` bool: whether the label is among the k classes with the highest scores.

    Among equal scores the class with the smaller number is the higher one.

    Args:
        scores: [N, classes].
        labels: [N] int64.
        k: with as many classes or fewer all are right.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (order == labels[:, None]).any(dim=1)


def paired_difference(is_right: Tensor, baseline_is_right: Tensor) -> tuple[float, float]:
    """How much larger a share is than another on the same images, and the standard error of that.

    Most images are easy or hard for both, so that it is known better than from the two standard errors.

    Args:
        is_right, baseline_is_right: [N] bool, of the same images in the same order.
    """
    difference = is_right.double() - baseline_is_right.double()
    return difference.mean().item(), difference.std(correction=0).item() / math.sqrt(len(difference))


# Probes


def weighted_knn(
    bank: Tensor,
    bank_labels: Tensor,
    features: Tensor,
    num_classes: int,
    *,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    chunk_size: int = 512,
) -> Tensor:
    """Votes of the nearest images of a bank as shares, `[N, num_classes]` float32.

    A neighbour's vote counts exp(cosine similarity / temperature).

    Args:
        bank: [M, D] float32, features of labelled images.
        bank_labels: [M] int64.
        features: [N, D] float32, of the images to classify, none of which is in the bank.
        num_classes: classes there are.
        neighbours: how many vote; all of the bank where it has fewer. 20 by default.
        temperature: greater than 0; a smaller one gives the nearest more weight. 0.07 by default.
        chunk_size: images classified at a time; it bounds the memory.

    Source: Wu et al., "Unsupervised Feature Learning via Non-Parametric Instance Discrimination", CVPR 2018, section
    3.4 (temperature 0.07, 200 neighbours); Caron et al., "Emerging Properties in Self-Supervised Vision Transformers",
    ICCV 2021 (20 neighbours).
    """
    bank, features = normalize(bank.float()), normalize(features.float())
    neighbours = min(neighbours, len(bank))
    shares = []
    for chunk in features.split(chunk_size):
        similarity, index = (chunk @ bank.T).topk(neighbours, dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # less the largest: no overflow
        votes = weight.new_zeros(len(chunk), num_classes).scatter_add_(1, bank_labels[index], weight)
        shares.append(votes / weight.sum(dim=1, keepdim=True))
    return torch.cat(shares)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear classifier on standardised features.

    Attributes:
        scaler: mean and deviation of each feature of the bank.
        classifier: scikit-learn's.
        num_classes: of the scores, also where the bank lacks some.
        inverse_strength: of the regularisation that was chosen.
        validation: accuracy with it on the images it was chosen on.
    """

    scaler: StandardScaler
    classifier: LogisticRegression
    num_classes: int
    inverse_strength: float
    validation: Accuracy

    def scores(self, features: Tensor) -> Tensor:
        """Probabilities `[N, num_classes]` float32 of features `[N, D]`."""
        known = self.classifier.predict_proba(self.scaler.transform(features.numpy()))
        scores = torch.zeros(len(features), self.num_classes)
        scores[:, self.classifier.classes_] = torch.from_numpy(known).float()
        return scores


def fit_linear_probe(
    bank: Tensor,
    bank_labels: Tensor,
    validation: Tensor,
    validation_labels: Tensor,
    num_classes: int,
    *,
    inverse_strengths: Sequence[float] = INVERSE_STRENGTHS,
    progress: str | None = None,
) -> LinearProbe:
    """Multinomial logistic regression on standardised features; its regularisation is chosen on validation images.

    Of strengths that do equally well there, the stronger one is taken.

    Args:
        bank: [M, D] float32, features of labelled images, to fit.
        bank_labels: [M] int64.
        validation, validation_labels: [V, D] and [V], images that are neither in the bank nor tested on.
        num_classes: classes there are.
        inverse_strengths: to choose from, scikit-learn's C, weakest last.
        progress: what the progress bar says; none without it.

    Raises:
        ValueError: all images of the bank are of one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    if len(bank_labels.unique()) < 2:
        raise ValueError("a linear probe needs labelled images of at least 2 classes; give more of them")
    scaler = StandardScaler().fit(bank.numpy())
    features = scaler.transform(bank.numpy())
    # Each fit starts from the one before, which saves most of its work. One that has not converged is judged on
    # validation images like any other, so scikit-learn's warning is of no use here.
    classifier = LogisticRegression(warm_start=True, max_iter=200, tol=1e-3)
    best: LinearProbe | None = None
    for strength in tqdm(sorted(inverse_strengths), desc=progress, disable=progress is None, leave=False, unit="fit"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            classifier.set_params(C=strength).fit(features, bank_labels.numpy())
        fitted = LinearProbe(scaler, copy.deepcopy(classifier), num_classes, strength, Accuracy(0.0, 0.0, 0))
        validated = Accuracy.of(is_among_top(fitted.scores(validation), validation_labels))
        if best is None or validated.value > best.validation.value:
            best = replace(fitted, validation=validated)
    assert best is not None
    return best


# All of it


@dataclass(frozen=True)
class Judgement:
    """What both probes say of one kind of features on the test images.

    Attributes:
        dimension: of the features.
        knn, linear: accuracy of weighted k-NN and of the linear probe.
        inverse_strength: of the linear probe's regularisation.
        validation: accuracy of the linear probe on the images that chose it.
        knn_is_right, linear_is_right: [N] bool, image by image.
    """

    dimension: int
    knn: Accuracy
    linear: Accuracy
    inverse_strength: float
    validation: Accuracy
    knn_is_right: Tensor
    linear_is_right: Tensor


def judge_features(
    bank: LabelledFeatures,
    validation: LabelledFeatures,
    test: LabelledFeatures,
    num_classes: int,
    *,
    name: str,
    neighbours: int = NEIGHBOURS,
    temperature: float = TEMPERATURE,
    progress: bool = False,
) -> Judgement:
    """Both probes on the features `name`: the bank teaches, validation chooses the regularisation, test counts once."""
    train = bank.features[name], bank.labels
    tested = test.features[name]
    shares = weighted_knn(*train, tested, num_classes, neighbours=neighbours, temperature=temperature)
    linear = fit_linear_probe(
        *train,
        validation.features[name],
        validation.labels,
        num_classes,
        progress=f"linear probe, {name}" if progress else None,
    )
    knn_is_right = is_among_top(shares, test.labels)
    linear_is_right = is_among_top(linear.scores(tested), test.labels)
    return Judgement(
        tested.shape[1],
        Accuracy.of(knn_is_right),
        Accuracy.of(linear_is_right),
        linear.inverse_strength,
        linear.validation,
        knn_is_right,
        linear_is_right,
    )


def count_shared_images(bank: Tensor, tested: Tensor) -> int:
    """How many rows of `tested` `[N, D]` are rows of `bank` `[M, D]` as well, number for number."""
    known = {row.tobytes() for row in bank.numpy()}
    return sum(row.tobytes() in known for row in tested.numpy())


__all__ = [
    "FEATURE_KINDS",
    "INVERSE_STRENGTHS",
    "NEIGHBOURS",
    "TEMPERATURE",
    "Accuracy",
    "FeatureFunction",
    "Judgement",
    "LabelledFeatures",
    "LinearProbe",
    "count_shared_images",
    "extract_features",
    "fit_linear_probe",
    "frozen_features",
    "is_among_top",
    "judge_features",
    "paired_difference",
    "pixel_features",
    "random_encoder",
    "weighted_knn",
]
