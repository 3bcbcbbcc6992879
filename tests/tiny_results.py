"""Tiny result folders of each kind, as the scripts leave them, for the tests of cards and of the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from tiny import backbone_config, tiny_config
from transformers import SegformerImageProcessor, ViTImageProcessor

from green_swin_hf import GreenSwinBackbone, GreenSwinForImageClassification, GreenSwinForMaskedImageModeling
from green_swin_hf.detection import DetectorSettings, GreenSwinMaskRCNN, new_backbone
from green_swin_hf.image_processing_green_swin import GreenSwinImageProcessor
from green_swin_hf.run_record import metric, write_record
from green_swin_hf.segmentation import build_upernet

CLASSES = ("circle", "square", "triangle")
PICTURES = {
    "pretrained": ("reconstructions.png", "loss_curve.png"),
    "classification": ("predictions.png", "training_curve.png"),
    "detection": ("detections.png", "training_curves.png"),
    "segmentation": ("predictions.png", "curve.png"),
    "backbone": (),
}
SECRET_FOLDER = "/home/somebody/private"


def run_record(result: str, **changes: Any) -> dict[str, Any]:
    """A record with everything in it; numbers that occur nowhere else."""
    record = {
        "kind": {"pretrained": "pretraining"}.get(result, result),
        "script": "a_script.py",
        "starts": [
            {
                "started": "2031-05-06T07:08:09+00:00",
                "seconds": 754.3,
                "device": "cpu",
                "precision": "fp32",
                "processes": 1,
                "threads": 2,
                "machine": {"processor": "Abacus 9", "cores": 3, "memory_gib": 5.5, "system": "Linux"},
                "versions": {"python": "3.99", "torch": "9.8.7"},
                "energy": {
                    "kwh": 0.0123,
                    "co2_eq_grams": 4.56,
                    "country": "ISL",
                    "source": "codecarbon 0, an estimate",
                },
            }
        ],
        "data": {"name": "shapes", "on_hub": False, "train_images": 1234, "validation_images": 56, "classes": 3},
        "model": {"parameters": 78901},
        "training": {"updates": 321, "epochs": 2.5, "images_per_update": 64, "learning_rate": 3.21e-4},
        "metrics": [metric("Accuracy of shapes", "accuracy", 0.6543, "test", 78, standard_error=0.0321)],
    }
    return {**record, **changes}


def save_result(kind: str, folder: Path, *, is_grey: bool = False) -> Path:
    """A folder with a model, its processor, pictures, recipe and record."""
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    _save_model(kind, folder, is_grey)
    for name in PICTURES[kind]:
        Image.new("RGB", (8, 8)).save(folder / name)
    (folder / "log.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    (folder / "metrics.json").write_text(json.dumps({"model": f"{SECRET_FOLDER}/pretrained", "seed": 0}))
    recipe = {"data": f"../../..{SECRET_FOLDER}/shapes", "epochs": 2.5, "betas": [0.9, 0.95]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "training_state.pt").write_bytes(b"not for others")
    (folder / "notes.txt").write_text("not for others")
    write_record(folder, run_record(kind))
    return folder


def _save_model(kind: str, folder: Path, is_grey: bool) -> None:
    channels = 1 if is_grey else 3
    if kind == "detection":
        backbone = new_backbone(backbone_config(num_channels=channels))
        statistics = {"image_mean": (0.5,) * channels, "image_std": (0.5,) * channels}
        small = {"pyramid_channels": 8, "box_head_width": 8, "mask_head_widths": (8,), "short_sides": (64,)}
        settings = DetectorSettings(CLASSES, long_side=96, proposals=(20, 10), **statistics, **small)
        GreenSwinMaskRCNN(backbone, settings).save_pretrained(folder)
        return
    if kind == "segmentation":
        heads = {"hidden_size": 8, "pool_scales": (1, 2), "auxiliary_channels": 8}
        build_upernet(GreenSwinBackbone(backbone_config()), CLASSES, **heads).save_pretrained(folder)
        SegformerImageProcessor(do_resize=False).save_pretrained(folder)
        return
    if kind == "backbone":
        GreenSwinBackbone(backbone_config()).save_pretrained(folder)
        return
    names = {
        "num_labels": len(CLASSES),
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: i for i, name in enumerate(CLASSES)},
    }
    model_class = GreenSwinForMaskedImageModeling if kind == "pretrained" else GreenSwinForImageClassification
    model_class(tiny_config(num_channels=channels, **names)).save_pretrained(folder)
    processor_class = GreenSwinImageProcessor if is_grey else ViTImageProcessor
    size = {"height": 32, "width": 32}
    processor_class(size=size, image_mean=[0.5] * channels, image_std=[0.5] * channels).save_pretrained(folder)


def save_picture(path: Path) -> Path:
    """A picture in colour."""
    channels = [Image.linear_gradient("L"), Image.radial_gradient("L"), Image.new("L", (256, 256), 90)]
    Image.merge("RGB", channels).resize((72, 64)).save(path)
    return path
