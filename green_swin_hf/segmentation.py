"""Semantic segmentation: UperNet on a GreenSwin backbone, its training with `Trainer`, and what its masks score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate
from torch.utils.data import Sampler
from torchmetrics.functional.classification import multiclass_confusion_matrix
from transformers import EvalPrediction, UperNetConfig, UperNetForSemanticSegmentation

from .data import EpochSampler
from .modeling_green_swin import GreenSwinBackbone
from .segmentation_data import IGNORED_LABEL
from .trainer_runs import ResumableTrainer

_AUXILIARY_STAGE = 3  # UperNet's auxiliary head reads the third feature map


def build_upernet(
    backbone: GreenSwinBackbone,
    class_names: Sequence[str],
    *,
    hidden_size: int = 512,
    pool_scales: Sequence[int] = (1, 2, 3, 6),
    auxiliary_channels: int = 256,
    auxiliary_loss_weight: float = 0.4,
) -> UperNetForSemanticSegmentation:
    """UperNet with new heads on the weights of `backbone`; `config.backbone_config` is the backbone's.

    Args:
        backbone: with at least three stages in its output.
        class_names: become the labels of the config.
        hidden_size: channels of the decode head.
        pool_scales: rows (and columns) that the last feature map is pooled to.
        auxiliary_channels: channels of the auxiliary head, which reads the third stage.
        auxiliary_loss_weight: of the auxiliary head's loss; 0: no such head.

    Raises:
        ValueError: the backbone gives fewer feature maps.
    """
    if len(backbone.channels) < _AUXILIARY_STAGE:
        raise ValueError(f"UperNet takes {_AUXILIARY_STAGE} stages or more, this backbone has {len(backbone.channels)}")
    config = UperNetConfig(
        backbone_config=backbone.config,
        hidden_size=hidden_size,
        pool_scales=list(pool_scales),
        use_auxiliary_head=auxiliary_loss_weight > 0,
        auxiliary_channels=auxiliary_channels,
        auxiliary_loss_weight=float(auxiliary_loss_weight),
        loss_ignore_index=IGNORED_LABEL,
        id2label=dict(enumerate(class_names)),
        label2id={name: number for number, name in enumerate(class_names)},
    )
    model = UperNetForSemanticSegmentation(config)
    model.backbone.load_state_dict(backbone.state_dict())
    return model


def enlarged_logits(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, classes, rows, columns] float32 logits at another size, as the image processor's post-processing has it."""
    return interpolate(logits.float(), size=size, mode="bilinear", align_corners=False)


def count_pixels(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """[classes, classes] int64: pixels by true class (rows) and predicted class; pixels labelled 255 do not count."""
    return multiclass_confusion_matrix(predicted, labels, num_classes, ignore_index=IGNORED_LABEL)


def segmentation_scores(counts: Tensor) -> dict[str, Any]:
    """What the masks score, from `count_pixels` summed over all images.

    >>> segmentation_scores(torch.tensor([[6, 2], [0, 4]]))
    {'mean_iou': 0.708..., 'pixel_accuracy': 0.833..., 'class_iou': [0.75, 0.666...]}

    Returns:
        `mean_iou`, the mean of the intersections over union of the classes that occur in labels or predictions;
        `pixel_accuracy`; `class_iou`, of each class, None for one that does not occur.
    """
    counts = counts.double()
    hits = counts.diag()
    union = counts.sum(0) + counts.sum(1) - hits
    occurs = union > 0
    iou = torch.where(occurs, hits / union.clamp(min=1), 0.0)
    return {
        "mean_iou": (iou.sum() / occurs.sum().clamp(min=1)).item(),
        "pixel_accuracy": (hits.sum() / counts.sum().clamp(min=1)).item(),
        "class_iou": [value if known else None for value, known in zip(iou.tolist(), occurs.tolist(), strict=True)],
    }


def commonest_class_scores(pixels: Tensor) -> dict[str, Any]:
    """What predicting the commonest class everywhere scores, from the pixels of each class, [classes]."""
    counts = torch.zeros(len(pixels), len(pixels), dtype=torch.int64)
    counts[:, pixels.argmax()] = pixels
    return segmentation_scores(counts)


class PixelCounter:
    """Sums the counts of an evaluation, batch by batch, as `Trainer` calls with `batch_eval_metrics`.

    Attributes:
        scores: of the last evaluation that came to its end, with `class_iou`.
    """

    def __init__(self) -> None:
        self.scores: dict[str, Any] = {}
        self._counts: Tensor | None = None

    def __call__(self, prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        batch = cast(Tensor, prediction.predictions).sum(0).cpu()
        self._counts = batch if self._counts is None else self._counts + batch
        if not compute_result:
            return {}
        self.scores, self._counts = segmentation_scores(self._counts), None
        return {name: self.scores[name] for name in ("mean_iou", "pixel_accuracy")}


class SegmentationTrainer(ResumableTrainer):
    """`Trainer` for models of semantic segmentation.

    - Evaluation takes images one by one, whole, at sizes of their own; predictions are judged at the size of the
      labels. What is gathered is a matrix of counts for each image, never its logits.
    - Samples are read by the keys of `EpochSampler`, so that a resumed run reads those that an uninterrupted one reads.
    - A batch without any labelled pixel has loss 0 (the model's own would be NaN).
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        # UperNet takes any keyword but makes nothing of the number of items: accumulated losses must be averaged.
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        return EpochSampler(cast(Any, train_dataset or self.train_dataset), seed=self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        is_labelled = (labels != IGNORED_LABEL).any()
        outputs = model(pixel_values=inputs["pixel_values"], labels=torch.where(is_labelled, labels, 0))
        loss = outputs.loss * is_labelled
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss, and counts `[B, classes, classes]` in place of logits and of labels."""
        inputs = cast(dict[str, Any], self._prepare_inputs(inputs))
        labels = inputs["labels"]
        with torch.no_grad(), self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits
        logits = enlarged_logits(logits, labels.shape[1:])
        labelled = (labels != IGNORED_LABEL).sum().clamp(min=1)
        loss = cross_entropy(logits, labels, ignore_index=IGNORED_LABEL, reduction="sum") / labelled
        pairs = zip(logits.argmax(1), labels, strict=True)
        counts = torch.stack([count_pixels(predicted, truth, logits.shape[1]) for predicted, truth in pairs])
        return loss, counts, counts


__all__ = [
    "PixelCounter",
    "SegmentationTrainer",
    "build_upernet",
    "commonest_class_scores",
    "count_pixels",
    "enlarged_logits",
    "segmentation_scores",
]
