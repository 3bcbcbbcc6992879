"""COCO's mean average precision of a detector, for boxes and masks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.detection import MeanAveragePrecision

from .coco_data import CocoData, CocoImages, decode_mask, encode_mask

MASK_THRESHOLD = 0.5
# COCO's figures, by our names: averages over IoU 0.50 … 0.95, at 0.50 and 0.75, and by size of the objects.
_FIGURES = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")


@dataclass(frozen=True)
class Detections:
    """What was found on one image, on the CPU.

    Attributes:
        index: row of the image in its data set.
        boxes: [n, 4] float32, x1, y1, x2, y2 in pixels.
        labels: [n] int64, from 1.
        scores: [n] float32, falling.
        masks: n run-length codes.
    """

    index: int
    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: tuple[dict[str, Any], ...]

    def dense_masks(self, height: int, width: int) -> Tensor:
        """[n, height, width] bool."""
        masks = [decode_mask(code, height, width).bool() for code in self.masks]
        return torch.stack(masks) if masks else torch.zeros(0, height, width, dtype=torch.bool)


@torch.no_grad()
def detect(model: nn.Module, batches: Iterable[dict[str, Any]], device: torch.device) -> list[Detections]:
    """What a detector finds on the images of batches (of `collate_detection`)."""
    was_training = model.training
    model.eval()
    found = []
    for batch in batches:
        outputs = model([image.to(device) for image in batch["images"]])
        found += [_detections(output, index) for output, index in zip(outputs, batch["indices"], strict=True)]
    model.train(was_training)
    return found


def _detections(output: dict[str, Tensor], index: int) -> Detections:
    masks = output["masks"][:, 0] > MASK_THRESHOLD
    boxes, labels, scores = (output[name].cpu() for name in ("boxes", "labels", "scores"))
    return Detections(index, boxes.float(), labels, scores.float(), tuple(encode_mask(mask) for mask in masks))


def mean_average_precision(images: CocoImages, found: Sequence[Detections]) -> dict[str, float]:
    """COCO's figures for detections on all or some images of a data set.

    Detections on a crowd count neither way, as COCO has it. Areas are those annotated.

    Returns:
        `box_map` and `mask_map` (over IoU 0.50 … 0.95), `…_50`, `…_75`, `…_small`, `…_medium`, `…_large`, in 0 … 1;
        of sizes that no object has, nothing.
    """
    # One process has all detections: nothing is to be gathered.
    metric = MeanAveragePrecision(iou_type=("bbox", "segm"), sync_on_compute=False)
    metric.warn_on_many_detections = False
    for detections in found:
        target = images.target(detections.index)
        height, width = target["masks"].shape[1:]
        prediction = {
            "boxes": detections.boxes,
            "labels": detections.labels,
            "scores": detections.scores,
            "masks": detections.dense_masks(height, width),
        }
        metric.update([prediction], [{**target, "masks": target["masks"].bool()}])
    values = metric.compute()
    figures = {
        f"{kind}_{name}": float(values[f"{key}_{name}"])
        for kind, key in (("box", "bbox"), ("mask", "segm"))
        for name in _FIGURES
    }
    return {name: value for name, value in figures.items() if value >= 0}


def coco_results(data: CocoData, found: Sequence[Detections]) -> list[dict[str, Any]]:
    """Detections as entries of COCO's results format, as evaluation servers take them."""
    results = []
    for detections in found:
        image_id = data.images[detections.index]["id"]
        columns = (detections.boxes.tolist(), detections.labels.tolist(), detections.scores.tolist(), detections.masks)
        for (left, top, right, bottom), label, score, mask in zip(*columns, strict=True):
            results.append(
                {
                    "image_id": image_id,
                    "category_id": data.category_ids[label - 1],
                    "bbox": [round(value, 2) for value in (left, top, right - left, bottom - top)],
                    "score": round(score, 5),
                    "segmentation": mask,
                }
            )
    return results


__all__ = ["MASK_THRESHOLD", "Detections", "coco_results", "detect", "mean_average_precision"]
