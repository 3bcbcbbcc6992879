"""GreenSwin weights as folders for those who have transformers or timm and not this package."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BitImageProcessor, SwinConfig, ViTImageProcessor

from .configuration_green_swin import VARIANTS, GreenSwinConfig, as_pair, stage_grid_sizes
from .modeling_green_swin import GreenSwinBackbone, GreenSwinForImageClassification, GreenSwinPreTrainedModel
from .weight_conversion import accepted, stock_comparison, told_epsilon
from .weight_conversion_check import (
    Comparison,
    compare_outputs,
    outputs_of,
    photo_pixels,
    position_index,
    published_outputs,
)
from .weight_conversion_geometry import STOCK_EPSILON, with_embedding_epsilon
from .weight_conversion_images import timm_description
from .weight_conversion_names import published_names, to_published_names

_SHARED_FIELDS = (
    "image_size",
    "patch_size",
    "num_channels",
    "embed_dim",
    "depths",
    "num_heads",
    "window_size",
    "mlp_ratio",
    "qkv_bias",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "hidden_act",
    "use_absolute_embeddings",
    "initializer_range",
    "layer_norm_eps",
    "encoder_stride",
)


@dataclass(frozen=True)
class Export:
    """What was written, and how its outputs compare with the model's.

    Attributes:
        kind: of the exported part, "encoder", "classifier" or "backbone".
        num_tensors: tensors in the file.
        left_out: what of the model has no counterpart there, in words.
        changes: what differs in the weights, in words.
        comparison: outputs on the picture.
    """

    kind: str
    num_tensors: int
    left_out: list[str]
    changes: list[str]
    comparison: Comparison


def export_to_swin(model: GreenSwinPreTrainedModel, processor: Mapping[str, Any], folder: Path, photo: Path) -> Export:
    """Write a folder of stock Swin (`model_type` "swin", published names) that any transformers loads.

    Args:
        model: an encoder, classifier, backbone, or pretraining model, whose encoder is written.
        processor: options of its image processor.
        folder: to write to; it exists.
        photo: the outputs of transformers' own class on it are compared.

    Raises:
        ValueError: stock Swin cannot have this geometry, or the outputs differ.
    """
    check_stock_geometry(model.config)
    kind, tensors, left_out = _exported(model)
    tensors, changes = with_embedding_epsilon(tensors, model.config.layer_norm_eps, STOCK_EPSILON)
    if kind != "classifier":  # stock files name the encoder of a bare model and of a backbone without a prefix
        tensors = {name.removeprefix("swin."): tensor for name, tensor in tensors.items()}
    # transformers 4.x keeps the index of the tables in its files, and memory that nobody filled where one lacks it
    index = position_index(model.config.window_size)
    end = "relative_position_bias_table"
    buffers = {name.replace(end, "relative_position_index"): index for name in tensors if name.endswith(end)}
    _save({**tensors, **buffers}, folder)
    stock_config(model.config, kind).save_pretrained(folder)
    stock_processor(processor).save_pretrained(folder)
    pixels = photo_pixels(photo, as_pair(model.config.image_size), model.config.num_channels)
    ours = _outputs(model, kind, pixels)
    if model.config.num_channels == 1:
        left_out = [*left_out, "turning pictures grey, which the stock image processor does not do"]
    comparison = stock_comparison(folder, kind, model.config, pixels, ours)
    return Export(kind, len(tensors), left_out, changes, comparison)


def stock_processor(options: Mapping[str, Any]) -> ViTImageProcessor | BitImageProcessor:
    """The processor of transformers 4.x and 5.x with these options.

    ViT's of 4.x knows neither a shortest edge nor a crop; BiT's has both, and in 5.x the results of ViT's.
    """
    cropped = options.get("do_center_crop") or "shortest_edge" in options["size"]
    return (BitImageProcessor if cropped else ViTImageProcessor)(**options)


def check_stock_geometry(config: GreenSwinConfig) -> None:
    """Raise a `ValueError` where stock Swin, whose stages all have tables of one window, cannot have the geometry."""
    for stage, window in enumerate(config.stage_window_sizes, start=1):
        if window != config.window_size:
            large = config.window_size * config.mask_unit_size
            raise ValueError(
                f"stock Swin cannot have stage {stage}: its grid at image_size {config.image_size} is smaller than "
                f"window_size {config.window_size}, where stock Swin keeps a table for the whole window and fails; "
                f"give --window-size {min(config.stage_window_sizes)} or --image-size {large}, or use timm, "
                "which clamps windows (--to timm)"
            )


def stock_config(config: GreenSwinConfig, kind: str) -> SwinConfig:
    """The configuration of the stock class for a kind of model (encoder, classifier, backbone)."""
    fields = {name: getattr(config, name) for name in _SHARED_FIELDS}
    if kind == "classifier":
        fields |= {"id2label": config.id2label, "label2id": config.label2id}
    if kind == "backbone":
        fields["out_features"] = list(config.out_features)
    names = {"encoder": "SwinModel", "classifier": "SwinForImageClassification", "backbone": "SwinBackbone"}
    return SwinConfig(**fields, architectures=[names[kind]])


def export_to_timm(model: GreenSwinPreTrainedModel, processor: Mapping[str, Any], folder: Path, photo: Path) -> Export:
    """Write a state dict for timm's Swin, with the `config.json` that `timm.create_model("local-dir:…")` reads.

    Args: those of `export_to_swin`. The outputs are compared with Swin's definition on the tensors of the written file.

    Raises:
        ValueError: timm's Swin cannot have this geometry or kind, or the outputs differ.
    """
    check_timm_geometry(model.config)
    kind, ours, left_out = _exported(model)
    ours, changes = with_embedding_epsilon(ours, model.config.layer_norm_eps, STOCK_EPSILON)
    if kind == "backbone":
        raise ValueError("timm's Swin has a final norm, a backbone has none; export the encoder or a classifier")
    names = published_names("timm", tuple(model.config.depths))
    tensors = to_published_names(ours, names)
    _save(tensors, folder)
    description = timm_config(model.config, kind, processor)
    (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    pixels = photo_pixels(photo, as_pair(model.config.image_size), model.config.num_channels)
    written = load_file(folder / "model.safetensors")
    return Export(kind, len(tensors), left_out, changes, _timm_comparison(written, model, kind, pixels))


def check_timm_geometry(config: GreenSwinConfig) -> None:
    """Raise a `ValueError` where timm's Swin cannot have the geometry of a configuration."""
    if config.use_absolute_embeddings:
        raise ValueError("timm's Swin has no absolute position embeddings; this model has, and cannot go there")
    if config.hidden_act != "gelu":
        raise ValueError(f"timm's Swin has the activation gelu, this model {config.hidden_act}; it cannot go there")
    rows, columns = as_pair(config.image_size)
    if rows % config.patch_length or columns % config.patch_length:
        raise ValueError(
            f"image_size {config.image_size} is no multiple of patch_size {config.patch_length}, which timm asks for; "
            "give another --image-size"
        )
    for stage, grid in enumerate(stage_grid_sizes(config.grid_size, config.num_layers), start=1):
        if grid[0] != grid[1] and min(grid) <= config.window_size:
            raise ValueError(
                f"the {grid[0]}x{grid[1]} grid of stage {stage} is no larger than window_size {config.window_size}: "
                "timm clamps window and shift of each side by itself, Swin both by the smaller side, so the outputs "
                "would differ; give a square or larger --image-size, or a smaller --window-size"
            )


def timm_config(config: GreenSwinConfig, kind: str, processor: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a timm folder: the nearest named Swin and every size as an argument of it."""
    sizes = {name: (fields.get("embed_dim", 96), tuple(fields.get("depths", ()))) for name, fields in VARIANTS.items()}
    own = (config.embed_dim, tuple(config.depths) if tuple(config.depths) != (2, 2, 6, 2) else ())
    variant = next((name for name, size in sizes.items() if size == own), "tiny")
    count = int(config.num_labels or 0) if kind == "classifier" else 0
    rows, columns = as_pair(config.image_size)
    description: dict[str, Any] = {
        "architecture": f"swin_{variant}_patch4_window7_224",
        "num_classes": count,
        "num_features": config.hidden_size,
        "global_pool": "avg",
        "model_args": {
            "img_size": [rows, columns],
            "patch_size": config.patch_length,
            "in_chans": config.num_channels,
            "embed_dim": config.embed_dim,
            "depths": list(config.depths),
            "num_heads": list(config.num_heads),
            "window_size": config.window_size,
            "mlp_ratio": config.mlp_ratio,
            "qkv_bias": config.qkv_bias,
        },
        "pretrained_cfg": {
            "num_classes": count,
            "first_conv": "patch_embed.proj",
            "classifier": "head.fc",
            **timm_description(processor, config),
        },
    }
    labels: Any = config.id2label
    if count and labels != {index: f"LABEL_{index}" for index in range(count)}:
        description["label_names"] = [labels[index] for index in range(count)]
    return description


def _exported(model: GreenSwinPreTrainedModel) -> tuple[str, dict[str, Tensor], list[str]]:
    """What stock Swin would call the model, its tensors with the prefix `swin.`, and what it cannot have."""
    tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if not any(name.startswith("swin.") for name in tensors):
        tensors = {f"swin.{name}": tensor for name, tensor in tensors.items()}
    if isinstance(model, GreenSwinForImageClassification) and model.num_labels:
        return "classifier", tensors, []
    if isinstance(model, GreenSwinBackbone):
        return "backbone", tensors, []
    encoder = {name: tensor for name, tensor in tensors.items() if name.startswith("swin.")}
    rest = len(tensors) - len(encoder)
    return "encoder", encoder, [f"{rest} tensors of the decoder, which has no counterpart there"] if rest else []


def _save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    own = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(own, folder / "model.safetensors", metadata={"format": "pt"})


def _outputs(model: GreenSwinPreTrainedModel, kind: str, pixels: Tensor) -> list[Tensor]:
    """Outputs of the part that is exported, in float32."""
    whole: Any = copy.deepcopy(model).float().eval()
    return outputs_of(whole.swin if kind == "encoder" and hasattr(whole, "swin") else whole, pixels)


def _timm_comparison(
    tensors: Mapping[str, Tensor], model: GreenSwinPreTrainedModel, kind: str, pixels: Tensor
) -> Comparison:
    theirs = published_outputs(tensors, model.config, pixels, merging_offset=1, epsilon=STOCK_EPSILON)
    wanted = [theirs[name] for name in ("last_hidden_state", "logits") if name in theirs]
    against = f"from Swin's definition on the written tensors, with timm's epsilon {STOCK_EPSILON:g}"
    return accepted(compare_outputs(_outputs(model, kind, pixels), wanted, against), told_epsilon(model.config))


__all__ = [
    "Export",
    "check_stock_geometry",
    "check_timm_geometry",
    "export_to_swin",
    "export_to_timm",
    "stock_config",
    "stock_processor",
    "timm_config",
]
