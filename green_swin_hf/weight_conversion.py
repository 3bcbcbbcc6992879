"""Weights of other Swins as GreenSwin models: every tensor accounted for, the outputs compared on a picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from .configuration_green_swin import GreenSwinConfig, as_pair
from .modeling_green_swin import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
    GreenSwinPreTrainedModel,
)
from .weight_conversion_check import (
    LEGACY_MERGE_ORDER,
    SWIN_MERGE_ORDER,
    Comparison,
    compare_outputs,
    outputs_of,
    photo_pixels,
    published_outputs,
)
from .weight_conversion_files import Checkpoint, open_checkpoint, refusal_in_one_line
from .weight_conversion_geometry import (
    STOCK_EPSILON,
    adapt_weights,
    check_image_size,
    check_windows,
    config_of_shapes,
    folder_config,
    own_entries,
    table_windows,
    with_embedding_epsilon,
)
from .weight_conversion_names import (
    FORMATS,
    count_blocks,
    count_decoder_blocks,
    missing_names,
    our_names_of_folder,
    published_names,
    recognise_format,
    split_unused,
    to_our_names,
    undo_legacy_merge_order,
)

MODELS: dict[str, type[GreenSwinPreTrainedModel]] = {
    "encoder": GreenSwinModel,
    "classifier": GreenSwinForImageClassification,
    "pretraining": GreenSwinForMaskedImageModeling,
    "backbone": GreenSwinBackbone,
}
_STOCK = {"encoder": "SwinModel", "classifier": "SwinForImageClassification", "backbone": "SwinBackbone"}
_HEADS = {"classifier": "classifier.", "pretraining": "decoder.", "backbone": "hidden_states_norms."}


@dataclass(frozen=True)
class ConversionOptions:
    """What the file does not tell, and what is to become different.

    Attributes:
        source_format: key of `FORMATS`; `None` recognises it by its names.
        legacy_merge_order: the weights come from published GreenMIM code before January 2023.
        keep_head: keep the head (classifier, decoder) and fail without one; `False` leaves it out; `None` keeps what
            there is.
        image_size: in pixels, of the result; also of the source where that does not tell its own.
        window_size: of the result.
        num_channels: of the result.
        decoder_heads: attention heads of a GreenMIM decoder.
        layer_norm_eps: of a published file, where it is not the published recipe's.
    """

    source_format: str | None = None
    legacy_merge_order: bool = False
    keep_head: bool | None = None
    image_size: int | tuple[int, int] | None = None
    window_size: int | None = None
    num_channels: int | None = None
    decoder_heads: int | None = None
    layer_norm_eps: float | None = None


@dataclass(frozen=True)
class Conversion:
    """A converted model and how it came about.

    Attributes:
        model: in evaluation mode, in the type that the source's weights have.
        checkpoint: the source.
        source_format: key of `FORMATS`.
        num_tensors: tensors of the source that were converted.
        left_out: what was not, in words.
        changes: what differs on request, in words.
        is_adapted: whether its sizes were changed, after the comparison.
        comparison: outputs on the picture.
    """

    model: GreenSwinPreTrainedModel
    checkpoint: Checkpoint
    source_format: str
    num_tensors: int
    left_out: list[str]
    changes: list[str]
    is_adapted: bool
    comparison: Comparison


@dataclass(frozen=True)
class _Source:
    """A checkpoint under our names; kind is a key of `MODELS`, changes say how its weights were made to fit ours."""

    checkpoint: Checkpoint
    source_format: str
    tensors: dict[str, Tensor]
    config: GreenSwinConfig
    kind: str
    changes: list[str]


def convert_to_green_swin(source: Path, photo: Path, options: ConversionOptions = ConversionOptions()) -> Conversion:
    """A GreenSwin model with the weights of another Swin, its outputs on a photograph compared with the other's.

    A stock folder is compared with transformers' own model, a published file with Swin's definition computed on the
    file's own tensors, a GreenSwin folder with the model that it loads as.

    Raises:
        ValueError: the source is not readable or not understood to the last tensor, or the outputs differ.
        OSError: the photograph is not readable.
    """
    with refusal_in_one_line(source):
        return _converted(open_checkpoint(source), photo, options)


def _converted(checkpoint: Checkpoint, photo: Path, options: ConversionOptions) -> Conversion:
    source_format = options.source_format or recognise_format(checkpoint.tensors, checkpoint.config)
    tensors, left_out = _renamed(checkpoint, source_format, options)
    num_tensors = len(checkpoint.tensors) - sum(note.count for note in left_out)
    source_ = _read_source(checkpoint, source_format, tensors, options)
    model = build_model(source_.kind, source_.config, source_.tensors)
    comparison = _compared(source_, model, photo, options)
    changed, config, adapted = adapt_weights(
        source_.tensors,
        source_.config,
        image_size=options.image_size,
        window_size=options.window_size,
        num_channels=options.num_channels,
    )
    if adapted:
        model = build_model(source_.kind, config, changed)
    dtypes = {tensor.dtype for tensor in source_.tensors.values()}
    if len(dtypes) == 1:
        model = _in_type(model, dtypes.pop())
    notes = [f"{note.count} {note.what}" for note in left_out]
    changes = source_.changes + adapted
    return Conversion(model, checkpoint, source_format, num_tensors, notes, changes, bool(adapted), comparison)


def _in_type(model: Any, dtype: torch.dtype) -> GreenSwinPreTrainedModel:
    return model.to(dtype)


@dataclass(frozen=True)
class _LeftOut:
    count: int
    what: str


def _renamed(
    checkpoint: Checkpoint, source_format: str, options: ConversionOptions
) -> tuple[dict[str, Tensor], list[_LeftOut]]:
    """The parameters under our names, and what of the file is not among them.

    Raises:
        ValueError: a parameter is missing or unknown.
    """
    found = checkpoint.tensors
    if source_format in ("swin", "green-swin"):
        if not checkpoint.config:
            raise ValueError(f"{checkpoint.path} comes without a config.json; give the folder that has both")
        names = our_names_of_folder(found)
    else:
        names = published_names(source_format, count_blocks(found), count_decoder_blocks(found))
    is_backbone = any(name.startswith("hidden_states_norms.") for name in found)
    buffers, unused = split_unused(found, source_format, is_backbone)
    tensors = to_our_names({name: found[name] for name in found if name not in {*buffers, *unused}}, names)
    left_out = [_LeftOut(len(buffers), "buffers that follow from the sizes")] if buffers else []
    if unused:
        left_out.append(_LeftOut(len(unused), f"tensors without a counterpart here: {_some(unused)}"))
    unknown = [name for name in found if name not in names and name not in {*buffers, *unused}]
    if unknown:
        raise ValueError(
            f"{checkpoint.path} has {len(unknown)} tensors that {FORMATS[source_format]} has not: {_some(unknown)}; "
            "if it is of another kind, say which with --source-format"
        )
    missing = missing_names(names, found)
    if missing:
        raise ValueError(
            f"{checkpoint.path} lacks {len(missing)} tensors of {FORMATS[source_format]}: {_some(missing)}"
        )
    head = next((prefix for prefix in _HEADS.values() if any(name.startswith(prefix) for name in tensors)), None)
    if options.keep_head and head is None:
        raise ValueError(f"{checkpoint.path} has no head with a counterpart in GreenSwin; leave out --keep-head")
    if options.keep_head is not False or head is None:
        return tensors, left_out
    if head == _HEADS["backbone"]:
        raise ValueError(f"{checkpoint.path} is a backbone without a final norm; its norms cannot be left out")
    dropped = [theirs for theirs in found if theirs in names and names[theirs][0].startswith(head)]
    left_out.append(_LeftOut(len(dropped), f"tensors of the head, as asked: {_some(dropped)}"))
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(head)}, left_out


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, …"


def _read_source(
    checkpoint: Checkpoint, source_format: str, tensors: dict[str, Tensor], options: ConversionOptions
) -> _Source:
    """Kind and configuration of renamed weights."""
    changes: list[str] = []
    if options.decoder_heads is not None and source_format != "greenmim":
        raise ValueError(f"--decoder-heads is for published GreenMIM files; this is {FORMATS[source_format]}")
    if options.legacy_merge_order:
        if source_format not in ("greenmim", "simmim", "microsoft"):
            raise ValueError(
                f"--legacy-merge-order is for weights of the published GreenMIM code; {checkpoint.path} is "
                f"{FORMATS[source_format]}"
            )
        tensors = undo_legacy_merge_order(tensors)
        changes.append("patch merging: siblings 00, 01, 10, 11 reordered to Swin's 00, 10, 01, 11")
    if source_format in ("swin", "green-swin"):
        if options.layer_norm_eps is not None:
            raise ValueError("--layer-norm-eps is for files of weights alone; this folder's config.json tells it")
        config = folder_config(checkpoint)
        if source_format == "swin":
            tensors, changes = with_embedding_epsilon(tensors, STOCK_EPSILON, config.layer_norm_eps)
    else:
        config = config_of_shapes(
            tensors,
            checkpoint,
            source_format,
            image_size=options.image_size,
            decoder_heads=options.decoder_heads,
            layer_norm_eps=options.layer_norm_eps,
        )
    if options.image_size is not None and table_windows(tensors, config.num_layers) != config.stage_window_sizes:
        config.image_size = options.image_size  # what the file says of it cannot be true
    check_image_size(config)
    check_windows(tensors, config)
    kinds = (kind for kind, prefix in _HEADS.items() if any(name.startswith(prefix) for name in tensors))
    return _Source(checkpoint, source_format, tensors, config, next(kinds, "encoder"), changes)


def build_model(kind: str, config: GreenSwinConfig, tensors: Mapping[str, Tensor]) -> GreenSwinPreTrainedModel:
    """A model of a kind with these weights, strictly, in float32 and evaluation mode.

    Args:
        kind: key of `MODELS`.
        tensors: under our names, the encoder with its prefix `swin.`.

    Raises:
        ValueError: names or shapes are not those of the model.
    """
    named = {name.removeprefix("swin.") if kind == "encoder" else name: tensor for name, tensor in tensors.items()}
    try:
        with torch.device("meta"):  # first without memory: a configuration may claim any size
            _load(MODELS[kind](config), {name: tensor.to("meta") for name, tensor in named.items()})
        model: Any = MODELS[kind](config)
        _load(model, named)
    except RuntimeError as error:
        lines = str(error).split("\n\t")[1:]
        raise ValueError(f"the weights do not fit their configuration: {' '.join(lines)[:300]}") from None
    return model.eval()


def _load(model: Any, tensors: Mapping[str, Tensor]) -> None:
    model.load_state_dict(tensors)


def _compared(source: _Source, model: GreenSwinPreTrainedModel, photo: Path, options: ConversionOptions) -> Comparison:
    """Our outputs beside those of an independent computation on the source.

    Raises:
        ValueError: they differ by more than rounding.
    """
    config = source.config
    pixels = photo_pixels(photo, _size(config), config.num_channels)
    ours = outputs_of(model, pixels)
    if source.source_format == "green-swin":
        loaded = loaded_outputs(MODELS[source.kind], source.checkpoint.path, config, pixels)
        return accepted(compare_outputs(ours, loaded, "from the folder's own model"))
    if source.source_format == "swin":
        return stock_comparison(source.checkpoint.path, source.kind, config, pixels, ours)
    published = published_outputs(
        source.checkpoint.tensors,
        config,
        pixels,
        merging_offset=int(source.source_format == "timm"),
        merge_order=LEGACY_MERGE_ORDER if options.legacy_merge_order else SWIN_MERGE_ORDER,
    )
    wanted = [published["last_hidden_state"]]
    wanted += [published["logits"]] if source.kind == "classifier" else []
    wanted += [published["predictions"]] if source.kind == "pretraining" else []
    return accepted(compare_outputs(ours, wanted, "from Swin's definition on the file's own tensors"))


def _size(config: GreenSwinConfig) -> tuple[int, int]:
    return as_pair(config.image_size)


def loaded_outputs(
    kind: type[GreenSwinPreTrainedModel], folder: Path, config: GreenSwinConfig, pixels: Tensor
) -> list[Tensor]:
    """Outputs of the model that a GreenSwin folder loads as, in float32.

    Raises:
        ValueError: it does not load.
    """
    own = copy.deepcopy(config)  # loading notes in it where from
    try:
        model: Any = kind.from_pretrained(folder, config=own, dtype=torch.float32)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{folder} does not load: {' '.join(str(error).split())[:300]}") from None
    return outputs_of(model.eval(), pixels)


def written_comparison(model: GreenSwinPreTrainedModel, folder: Path, photo: Path) -> Comparison:
    """The outputs of a model on a picture beside those of the folder that it was saved to.

    Raises:
        ValueError: they differ by more than rounding, or the folder does not load.
    """
    config: Any = model.config
    pixels = photo_pixels(photo, _size(config), config.num_channels)
    whole: Any = copy.deepcopy(model).float().eval()
    written = loaded_outputs(type(model), folder, GreenSwinConfig.from_pretrained(folder), pixels)
    return accepted(compare_outputs(outputs_of(whole, pixels), written, "from the folder that was written"))


def stock_comparison(
    folder: Path, kind: str, config: GreenSwinConfig, pixels: Tensor, ours: list[Tensor]
) -> Comparison:
    """Our outputs beside those of the stock class that loads a folder.

    Raises:
        ValueError: they differ by more than rounding, or the folder does not load.
    """
    stock_class = getattr(transformers, _STOCK[kind])
    try:
        # of a stranger's config.json only what our own model takes over
        entries = own_entries(transformers.SwinConfig.get_config_dict(folder)[0])
        stock_config = transformers.SwinConfig.from_dict(entries)
        stock = stock_class.from_pretrained(folder, config=stock_config, dtype=torch.float32).eval()
        compared = compare_outputs(ours, outputs_of(stock, pixels), f"from transformers' {_STOCK[kind]}")
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"transformers' {_STOCK[kind]} does not run on {folder}: {reason}") from None
    return accepted(compared, told_epsilon(config))


def told_epsilon(config: GreenSwinConfig) -> str:
    """What may be the reason of a difference from Swins that have an epsilon of their own; empty where it cannot."""
    if config.layer_norm_eps == STOCK_EPSILON:
        return ""
    own = config.layer_norm_eps
    return f" (some norms there have epsilon {STOCK_EPSILON:g} whatever the configuration says; here: {own:g})"


def accepted(comparison: Comparison, reason: str = "") -> Comparison:
    """The comparison itself, or a `ValueError` where the outputs differ by more than rounding, or prove nothing.

    Args:
        reason: what may be behind a difference.
    """
    if not comparison.agrees:
        raise ValueError(f"the conversion is refused, nothing is written: {comparison}{reason}")
    if not comparison.depends_on_the_picture:
        raise ValueError(
            "the conversion is refused, nothing is written: the outputs are the same for two pictures, which proves "
            f"nothing ({comparison}); give trained weights, and the epsilon they were trained with"
        )
    return comparison


__all__ = [
    "MODELS",
    "Conversion",
    "ConversionOptions",
    "accepted",
    "build_model",
    "convert_to_green_swin",
    "stock_comparison",
    "told_epsilon",
    "written_comparison",
]
