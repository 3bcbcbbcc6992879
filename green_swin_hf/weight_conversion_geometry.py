"""The configuration that weights were trained with, read from their shapes, and weights made to fit another one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .configuration_green_swin import GreenSwinConfig, as_pair
from .weight_conversion_files import Checkpoint
from .weight_conversion_names import count_blocks, count_decoder_blocks

# LayerNorm's epsilon is in no file. GreenMIM's is that of its pretraining scripts; the others keep torch's default.
_EPSILON = {"greenmim": 1e-6}
_PUBLISHED_DECODER = (512, 16)  # width and heads of every published GreenMIM
_LARGEST_SIDE = 4096  # of an image, in pixels: a comparison takes some 10 GB of memory there
_PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")
_MOST_LABELS = 1_000_000
# What is taken over of somebody's config.json: what we define, and nothing that changes how a folder is loaded.
_OWN_FIELDS = {
    *(name for name in GreenSwinConfig.__annotations__ if name != "attribute_map" and not name.startswith("_")),
    *("id2label", "label2id", "num_labels", "problem_type", "out_features", "out_indices"),
}
_TABLE = "attention.self.relative_position_bias_table"
_POSITIONS = "swin.embeddings.position_embeddings"
_PROJECTION = "swin.embeddings.patch_embeddings.projection.weight"
# Of stock Swin's norms behind the patch embedding, in patch merging and of a backbone's maps, whatever its
# `layer_norm_eps`, and of every norm of timm's Swin.
STOCK_EPSILON = 1e-5


def folder_config(checkpoint: Checkpoint) -> GreenSwinConfig:
    """Our configuration from the `config.json` of a stock Swin or a GreenSwin: what our own fields and labels say.

    Raises:
        ValueError: an entry is out of range, or not that of the weights.
    """
    file = checkpoint.path / "config.json"
    entries = own_entries(checkpoint.config)
    for key, value in entries.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{file}: {key} is {value}, which is no finite number")
    _check_labels(file, entries)
    try:
        config = GreenSwinConfig.from_dict(entries)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    found = count_blocks(checkpoint.tensors)
    if tuple(config.depths) != found:
        raise ValueError(f"{file}: depths {list(config.depths)}, but the weights have blocks for {list(found)}")
    return config


def own_entries(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a `config.json` that are taken over."""
    return {key: value for key, value in entries.items() if key in _OWN_FIELDS and value is not None}


def _check_labels(file: Path, entries: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless the names of classes are a JSON object of numbers and names, as transformers' are."""
    names, numbers, count = (entries.get(key) for key in ("id2label", "label2id", "num_labels"))
    if names is not None and not (
        isinstance(names, dict)
        and set(names) == {str(number) for number in range(len(names))}
        and all(isinstance(name, str) for name in names.values())
    ):
        raise ValueError(f'{file}: id2label must be a JSON object from numbers (0, 1, …) to names, as {{"0": "cat"}}')
    if numbers is not None and not (isinstance(numbers, dict) and all(type(key) is int for key in numbers.values())):
        raise ValueError(f'{file}: label2id must be a JSON object from names to numbers, such as {{"cat": 0}}')
    if entries.get("problem_type") not in (None, *_PROBLEM_TYPES):
        raise ValueError(f"{file}: problem_type {entries['problem_type']!r} must be one of {', '.join(_PROBLEM_TYPES)}")
    if count is not None and not (type(count) is int and 0 <= count <= _MOST_LABELS):
        raise ValueError(f"{file}: num_labels {count!r} must be a whole number of at most {_MOST_LABELS}")


def check_image_size(config: GreenSwinConfig) -> None:
    """Raise a `ValueError` where images are too large for comparing outputs on one."""
    if max(as_pair(config.image_size)) > _LARGEST_SIDE:
        raise ValueError(
            f"image_size {_listed(as_pair(config.image_size))} is too large to compare outputs on; give an "
            f"--image-size of at most {_LARGEST_SIDE} pixels a side"
        )


def config_of_shapes(
    tensors: Mapping[str, Tensor],
    checkpoint: Checkpoint,
    source_format: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    decoder_heads: int | None = None,
    layer_norm_eps: float | None = None,
) -> GreenSwinConfig:
    """The configuration of a published file.

    Args:
        tensors: its parameters under our names.
        checkpoint: the file; buffers and stored settings may tell the image size.
        source_format: key of `FORMATS`.
        image_size: in pixels, needed where the file does not tell it.
        decoder_heads: needed for a decoder of another width than the published 512.
        layer_norm_eps: another than the published one.

    Raises:
        ValueError: something is neither in the file nor given, or the shapes are not those of a Swin.
    """
    depths = count_blocks(tensors)
    if _PROJECTION not in tensors:
        raise ValueError(f"{checkpoint.path} lacks the patch embedding (patch_embed.proj.weight)")
    embed_dim, channels, patch, _ = tensors[_PROJECTION].shape
    windows = table_windows(tensors, len(depths))
    fields: dict[str, Any] = {
        "patch_size": patch,
        "num_channels": channels,
        "embed_dim": embed_dim,
        "depths": list(depths),
        "num_heads": [_table(tensors, stage).shape[1] for stage in range(len(depths))],
        "window_size": max(windows),
        "mlp_ratio": _first_block(tensors, "intermediate.dense.weight").shape[0] / embed_dim,
        "qkv_bias": any(name.endswith("attention.self.query.bias") for name in tensors),
        "use_absolute_embeddings": _POSITIONS in tensors,
        "layer_norm_eps": layer_norm_eps or _EPSILON.get(source_format, 1e-5),
    }
    if "classifier.weight" in tensors:
        fields |= label_fields(checkpoint, len(tensors["classifier.weight"]))
    if "decoder.embed.weight" in tensors:
        fields |= _decoder_fields(tensors, checkpoint, decoder_heads)
    size = told_image_size(checkpoint, windows, patch) or image_size
    if size is None:
        raise ValueError(
            f"{checkpoint.path} does not tell its image size (no buffer or setting does); give the size it was trained "
            f"with, such as --image-size {max(windows) * patch * 2 ** (len(depths) - 1)}"
        )
    config = GreenSwinConfig.from_dict({**fields, "image_size": size})
    rows, columns = as_pair(config.image_size)
    if rows % patch or columns % patch:
        nearest = max(min(rows, columns) // patch, 1) * patch
        raise ValueError(
            f"image_size {_listed((rows, columns))} must be a multiple of the patch of {patch} pixels; give such a "
            f"--image-size, for example {nearest}"
        )
    return config


def _decoder_fields(tensors: Mapping[str, Tensor], checkpoint: Checkpoint, heads: int | None) -> dict[str, Any]:
    width = tensors["decoder.embed.weight"].shape[0]
    if heads is None and width != _PUBLISHED_DECODER[0]:
        raise ValueError(
            f"{checkpoint.path} does not tell the attention heads of its decoder of width {width}; give "
            "--decoder-heads, or leave the decoder out: --drop-head"
        )
    settings = checkpoint.settings
    told: dict[str, Any] = {name: settings[name] for name in ("norm_pix_loss", "mask_ratio") if name in settings}
    return {
        "decoder_hidden_size": width,
        "decoder_num_hidden_layers": count_decoder_blocks(checkpoint.tensors),
        "decoder_num_attention_heads": heads or _PUBLISHED_DECODER[1],
        "decoder_intermediate_size": tensors["decoder.layers.0.up.weight"].shape[0],
        "drop_path_rate": 0.0,  # of the published pretraining; fine-tuning sets its own
        **told,
    }


def label_fields(checkpoint: Checkpoint, count: int) -> dict[str, Any]:
    """Fields of the configuration for a classifier: the names of its classes where the folder has them."""
    names = checkpoint.config.get("label_names") or checkpoint.config.get("pretrained_cfg", {}).get("label_names")
    if isinstance(names, list) and len(names) == count:
        return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}
    return {"num_labels": count}


def _table(tensors: Mapping[str, Tensor], stage: int) -> Tensor:
    name = f"swin.encoder.layers.{stage}.blocks.0.{_TABLE}"
    if name not in tensors:
        raise ValueError(f"stage {stage + 1} lacks its relative_position_bias_table")
    return tensors[name]


def _first_block(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    key = f"swin.encoder.layers.0.blocks.0.{name}"
    if key not in tensors:
        raise ValueError(f"the first block lacks {name}")
    return tensors[key]


def table_windows(tensors: Mapping[str, Tensor], num_stages: int) -> tuple[int, ...]:
    """Side of each stage's window, from its position table of `(2 w - 1)²` rows.

    Raises:
        ValueError: a table has another number of rows.
    """
    windows = []
    for stage in range(num_stages):
        rows = _table(tensors, stage).shape[0]
        side = math.isqrt(rows)
        if side**2 != rows or side % 2 == 0:
            raise ValueError(f"the position table of stage {stage + 1} has {rows} rows, not (2 w - 1)² of a window")
        windows.append((side + 1) // 2)
    return tuple(windows)


def told_image_size(checkpoint: Checkpoint, windows: tuple[int, ...], patch: int) -> int | list[int] | None:
    """Image size in pixels as the file tells it: by shapes, by a setting, or (`None`) not at all."""
    for stage, window in enumerate(windows):
        if window < max(windows):  # only a grid smaller than the window makes it so
            return window * patch * 2**stage
    by_shape = _side_from_buffers(checkpoint.tensors, windows[0], patch, len(windows))
    if by_shape is not None:
        return by_shape
    described = {**checkpoint.settings, **checkpoint.config.get("model_args", {})}
    pretrained = checkpoint.config.get("pretrained_cfg", {}).get("input_size", [])[1:]  # timm's: channels first
    for size in (described.get("img_size"), described.get("input_size"), pretrained):
        if isinstance(size, int) or (isinstance(size, (list, tuple)) and len(size) == 2):
            return size if isinstance(size, int) else list(size)
    return None


def _side_from_buffers(tensors: Mapping[str, Tensor], window: int, patch: int, num_stages: int) -> int | None:
    """Side of a square image from a buffer with a row for each window, patch or mask unit of it."""
    unit = patch * 2 ** (num_stages - 1)
    lengths = (
        ("layers.0.blocks.1.attn_mask", 0, window * patch),
        ("absolute_pos_embed", 1, patch),
        ("decoder_pos_embed", 1, unit),
    )
    for name, axis, length in lengths:
        for found in (name, f"encoder.{name}"):
            if found in tensors and tensors[found].ndim == 3:
                side = math.isqrt(tensors[found].shape[axis])
                if side**2 == tensors[found].shape[axis]:
                    return side * length
    return None


def check_windows(tensors: Mapping[str, Tensor], config: GreenSwinConfig) -> None:
    """Raise a `ValueError` unless the position tables are those of the configuration's windows."""
    found, wanted = table_windows(tensors, config.num_layers), config.stage_window_sizes
    if found != wanted:
        raise ValueError(
            f"position tables are of windows {_listed(found)}, but image_size {_listed(as_pair(config.image_size))} "
            f"with window_size {config.window_size} gives {_listed(wanted)}: the weights were trained with another "
            "image size; give it as --image-size"
        )


def _listed(values: tuple[int, ...]) -> str:
    return " ".join(map(str, values))


# Another window, image size or number of channels


def adapt_weights(
    tensors: Mapping[str, Tensor],
    config: GreenSwinConfig,
    *,
    image_size: int | tuple[int, int] | None = None,
    window_size: int | None = None,
    num_channels: int | None = None,
) -> tuple[dict[str, Tensor], GreenSwinConfig, list[str]]:
    """Weights and configuration for another image size, window or number of channels, and what was done, in words.

    Position tables: where `window_size` changes or a stage's window grows, resized bicubically as pictures of offsets
    (align_corners=False); where only a smaller image clamps a stage's window, the middle of the table, which is what
    the model reads of it on such an image anyway. Absolute positions: resized bicubically. Channels: `adapt_channels`.

    Raises:
        ValueError: the new configuration contradicts itself, or channels change while there is a decoder.
    """
    if num_channels not in (None, config.num_channels) and "decoder.predictor.weight" in tensors:
        raise ValueError(
            f"--num-channels {num_channels}: the decoder predicts {config.num_channels} channels; leave it out with "
            "--drop-head"
        )
    changes: dict[str, Any] = {"image_size": image_size, "window_size": window_size, "num_channels": num_channels}
    changes = {name: value for name, value in changes.items() if value is not None}
    adapted = GreenSwinConfig.from_dict({**config.to_dict(), **changes})
    check_image_size(adapted)
    if changes and "decoder.predictor.weight" in tensors:
        try:
            adapted.validate_geometry()  # pretraining takes whole mask units only
        except ValueError as error:
            raise ValueError(f"{error}; give such a --image-size, or leave the decoder out: --drop-head") from None
    result, notes = dict(tensors), []
    old_size, new_size = as_pair(config.image_size), as_pair(adapted.image_size)
    if old_size != new_size:
        notes.append(f"image size: {_listed(old_size)} to {_listed(new_size)}")
    for stage in range(config.num_layers):
        old, new = config.stage_window_sizes[stage], adapted.stage_window_sizes[stage]
        if old == new:
            continue
        crop = adapted.window_size == config.window_size and new < old
        for name, tensor in tensors.items():
            if name.startswith(f"swin.encoder.layers.{stage}.") and name.endswith(_TABLE):
                result[name] = crop_table(tensor, new) if crop else resize_table(tensor, new)
        how = "their middle taken (the image is smaller)" if crop else "resized bicubically"
        notes.append(f"position tables of stage {stage + 1}: window {old} to {new}, {how}")
    if _POSITIONS in tensors and adapted.grid_size != config.grid_size:
        result[_POSITIONS] = resize_positions(tensors[_POSITIONS], config.grid_size, adapted.grid_size)
        notes.append(f"absolute positions: {config.grid_size} to {adapted.grid_size} patches, resized bicubically")
    if adapted.num_channels != config.num_channels:
        result[_PROJECTION] = adapt_channels(tensors[_PROJECTION], adapted.num_channels)
        rule = "summed" if adapted.num_channels == 1 else "repeated in turn and rescaled"
        notes.append(f"patch embedding: {config.num_channels} to {adapted.num_channels} channels, {rule}")
    return result, adapted, notes


def resize_table(table: Tensor, window: int) -> Tensor:
    """A position table for another window, [(2 w - 1)², heads], resized bicubically as a picture for each head."""
    picture = _as_picture(table)
    side = 2 * window - 1
    resized = nn.functional.interpolate(picture.float(), size=(side, side), mode="bicubic", align_corners=False)
    return resized[0].flatten(1).T.contiguous().to(table.dtype)


def crop_table(table: Tensor, window: int) -> Tensor:
    """The part of a position table that windows no larger than `window` read: the offsets below it, unchanged."""
    picture = _as_picture(table)[0]
    cut = (picture.shape[1] - (2 * window - 1)) // 2
    return picture[:, cut : picture.shape[1] - cut, cut : picture.shape[2] - cut].flatten(1).T.contiguous()


def _as_picture(table: Tensor) -> Tensor:
    side = math.isqrt(table.shape[0])
    return table.T.unflatten(1, (side, side))[None]  # [1, heads, 2 w - 1, 2 w - 1]


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Absolute position embeddings [1, patches, C] for another grid (rows, columns), resized bicubically."""
    picture = positions.float().unflatten(1, old).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(picture, size=new, mode="bicubic", align_corners=False)
    return resized.flatten(2).transpose(1, 2).contiguous().to(positions.dtype)


def with_embedding_epsilon(
    tensors: Mapping[str, Tensor], trained: float, computed: float
) -> tuple[dict[str, Tensor], list[str]]:
    """Weights for another epsilon in the norm behind the patch embedding: `computed`, not `trained`.

    That norm sees what the projection of patches makes, which may be small enough for its epsilon to matter (the other
    norms see the residual stream). LayerNorm of k x with epsilon k² e is LayerNorm of x with epsilon e, so the
    projection is multiplied by k = √(computed / trained).

    Args:
        tensors: under our names, the encoder with its prefix `swin.`.

    Returns:
        The weights, and what was changed, in words; nothing where the epsilons are equal.
    """
    if computed == trained:
        return dict(tensors), []
    names, factor = (_PROJECTION, _PROJECTION.replace("weight", "bias")), math.sqrt(computed / trained)
    # In float32: half precision would round every product.
    scaled = {name: tensor.float() * factor if name in names else tensor for name, tensor in tensors.items()}
    return scaled, [
        f"patch embedding: times {factor:.3g}, for a norm behind it with epsilon {computed:g}, not {trained:g}"
    ]


def adapt_channels(weight: Tensor, num_channels: int) -> Tensor:
    """Weight of a patch embedding, [C, channels, p, p], for another number of channels, by timm's rule.

    One channel: the sum over the old ones, so that a grey image gives what it gave as equal channels. More: the old
    ones in turn, scaled by old / new number, so that the embedding keeps its size.
    """
    if num_channels == 1:
        return weight.float().sum(dim=1, keepdim=True).to(weight.dtype)
    old = weight.shape[1]
    repeated = weight.repeat(1, -(-num_channels // old), 1, 1)[:, :num_channels]
    return repeated * (old / num_channels)


__all__ = [
    "STOCK_EPSILON",
    "adapt_channels",
    "adapt_weights",
    "check_image_size",
    "check_windows",
    "config_of_shapes",
    "crop_table",
    "folder_config",
    "label_fields",
    "own_entries",
    "resize_positions",
    "resize_table",
    "table_windows",
    "told_image_size",
    "with_embedding_epsilon",
]
