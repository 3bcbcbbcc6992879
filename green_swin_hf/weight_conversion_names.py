"""Parameter names of published Swin checkpoints and ours, in both directions.

Names are facts read from checkpoints and from the state dicts of timm and transformers; the published GreenMIM's are
those of `tests/fixtures/golden`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

FORMATS: dict[str, str] = {
    "green-swin": "GreenSwin",
    "swin": "transformers' Swin",
    "timm": "timm's Swin",
    "microsoft": "Microsoft's Swin",
    "simmim": "Microsoft's SimMIM",
    "greenmim": "the published GreenMIM",
}


@dataclass(frozen=True)
class _Style:
    """How a kind of published file names what all of them have.

    Attributes:
        prefix: in front of the encoder's names.
        merging_offset: 1 where a stage begins with the patch merging of the one before.
        head: of the classifier, `None` where there is none.
    """

    prefix: str
    merging_offset: int
    head: str | None


_STYLES = {
    "timm": _Style("", 1, "head.fc"),
    "microsoft": _Style("", 0, "head"),
    "simmim": _Style("encoder.", 0, None),
    "greenmim": _Style("encoder.", 0, None),
}
_BLOCK_MODULES = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DECODER_MODULES = {
    "norm1": "layernorm_before",
    "attn.proj": "output",
    "norm2": "layernorm_after",
    "mlp.fc1": "up",
    "mlp.fc2": "down",
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NO_SWIN = "the file has no names of a Swin (layers.0.blocks.0.…); give a Swin's weights"
_BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.blocks\.(\d+)\.")
# Computed from the geometry, not trained. `decoder_pos_embed` is: the comparison of outputs reads it.
_BUFFERS = re.compile(r"(?:^|\.)(?:relative_position_index|attn_mask)$|^decoder_pos_embed$")
_SIMMIM_ONLY = re.compile(r"(?:^|\.)mask_token$|^decoder\.0\.")


def recognise_format(names: Iterable[str], config: Mapping[str, object]) -> str:
    """Key of `FORMATS`: what kind of file has these names, and this `config.json` if there is one.

    Raises:
        ValueError: none of them.
    """
    model_type = config.get("model_type")
    if model_type is not None and model_type not in ("green_swin", "swin"):
        raise ValueError(f"config.json says model_type {model_type!r}, which is another architecture than Swin")
    names = set(names)
    if any("logit_scale" in name for name in names):
        raise ValueError("the file holds a Swin V2 (logit_scale), which is another architecture than Swin")
    if not any(_BLOCK.search(name) for name in names):
        raise ValueError(_NO_SWIN)
    if any(name.endswith("attention.self.query.weight") for name in names):
        return "green-swin" if model_type == "green_swin" else "swin"
    if any(name.startswith("encoder.") for name in names):
        return "greenmim" if any(name.startswith("decoder_") for name in names) else "simmim"
    moved = not any(name.startswith("layers.0.downsample.") for name in names)
    return "timm" if moved and any(".downsample." in name for name in names) else "microsoft"


def count_blocks(names: Iterable[str]) -> tuple[int, ...]:
    """Blocks of each stage.

    Raises:
        ValueError: there are none.
    """
    found = {(int(match[1]), int(match[2])) for name in names if (match := _BLOCK.search(name))}
    if not found:
        raise ValueError(_NO_SWIN)
    stages = max(stage for stage, _ in found) + 1
    if max(stages, *(block + 1 for _, block in found)) > len(found):
        raise ValueError("the blocks of the file (layers.0.blocks.0.…) are not numbered one after another")
    return tuple(max((block for of, block in found if of == stage), default=-1) + 1 for stage in range(stages))


def count_decoder_blocks(names: Iterable[str]) -> int:
    """Blocks of a published GreenMIM's decoder."""
    return len({name.split(".")[1] for name in names if name.startswith("decoder_blocks.")})


def published_names(source_format: str, depths: tuple[int, ...], decoder_blocks: int = 0) -> dict[str, tuple[str, ...]]:
    """From each parameter's published name to ours; where queries, keys and values are one tensor, to three.

    All that a file of this kind may hold; see `missing_names` for what it may lack.

    >>> published_names("timm", (2, 2))["layers.0.blocks.1.mlp.fc1.bias"]
    ('swin.encoder.layers.0.blocks.1.intermediate.dense.bias',)
    """
    style = _STYLES[source_format]
    modules, fused = _encoder_modules(depths, style)
    names: dict[str, tuple[str, ...]] = {f"{style.prefix}absolute_pos_embed": ("swin.embeddings.position_embeddings",)}
    for theirs, ours in fused.items():
        table = "relative_position_bias_table"
        names[f"{theirs.removesuffix('qkv')}{table}"] = (f"{ours}.{table}",)
    for stage in range(len(depths) - 1):
        theirs = f"{style.prefix}layers.{stage + style.merging_offset}.downsample.reduction.weight"
        names[theirs] = (f"swin.encoder.layers.{stage}.downsample.reduction.weight",)
    if style.head is not None:
        modules[style.head] = "classifier"
    if source_format == "greenmim":
        names["mask_token"] = ("decoder.mask_token",)
        _add_decoder(modules, fused, decoder_blocks)
    for kind in ("weight", "bias"):
        names.update({f"{theirs}.{kind}": (f"{ours}.{kind}",) for theirs, ours in modules.items()})
        for theirs, ours in fused.items():
            names[f"{theirs}.{kind}"] = tuple(f"{ours}.{part}.{kind}" for part in ("query", "key", "value"))
    return names


def _encoder_modules(depths: tuple[int, ...], style: _Style) -> tuple[dict[str, str], dict[str, str]]:
    """Modules of the encoder with weight and bias, and those that hold queries, keys and values in one."""
    modules = {"patch_embed.proj": "embeddings.patch_embeddings.projection", "patch_embed.norm": "embeddings.norm"}
    fused = {}
    for stage, depth in enumerate(depths):
        for block in range(depth):
            theirs, ours = f"layers.{stage}.blocks.{block}", f"encoder.layers.{stage}.blocks.{block}"
            modules.update({f"{theirs}.{old}": f"{ours}.{new}" for old, new in _BLOCK_MODULES.items()})
            fused[f"{theirs}.attn.qkv"] = f"{ours}.attention.self"
        if stage < len(depths) - 1:
            theirs = f"layers.{stage + style.merging_offset}.downsample.norm"
            modules[theirs] = f"encoder.layers.{stage}.downsample.norm"
    modules["norm"] = "layernorm"
    prefixed = ({f"{style.prefix}{old}": f"swin.{new}" for old, new in part.items()} for part in (modules, fused))
    return next(prefixed), next(prefixed)


def _add_decoder(modules: dict[str, str], fused: dict[str, str], decoder_blocks: int) -> None:
    for block in range(decoder_blocks):
        theirs, ours = f"decoder_blocks.{block}", f"decoder.layers.{block}"
        modules.update({f"{theirs}.{old}": f"{ours}.{new}" for old, new in _DECODER_MODULES.items()})
        fused[f"{theirs}.attn.qkv"] = ours
    modules.update({"decoder_embed": "decoder.embed", "decoder_norm": "decoder.layernorm"})
    modules["decoder_pred"] = "decoder.predictor"


def missing_names(names: Mapping[str, tuple[str, ...]], found: Iterable[str]) -> list[str]:
    """Of `published_names`, those that a file must hold and does not.

    A file may be without absolute positions, without biases of queries, keys and values, and without a classifier.
    """
    found = set(found)
    has_bias = any(name.endswith("attn.qkv.bias") and not name.startswith("decoder_") for name in found)
    has_head = any(name.startswith("head.") for name in found)

    def may_lack(name: str) -> bool:
        if name.endswith("attn.qkv.bias") and not name.startswith("decoder_"):
            return not has_bias
        return name.endswith("absolute_pos_embed") or (name.startswith("head.") and not has_head)

    return [name for name in names if name not in found and not may_lack(name)]


def to_our_names(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Published tensors under our names, of those that `names` lists."""
    ours: dict[str, Tensor] = {}
    for published, tensor in tensors.items():
        if published in names:
            _check_tensor(published, tensor, names[published])
            ours.update(zip(names[published], tensor.chunk(len(names[published])), strict=True))
    return ours


def _check_tensor(name: str, tensor: Tensor, ours: tuple[str, ...]) -> None:
    """Raise a `ValueError` unless a tensor is a dense one of floats with the dimensions its name implies."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _FLOATS:
        kind = f"{'meta' if tensor.is_meta else tensor.layout} {tensor.dtype}".replace("torch.", "")
        raise ValueError(f"{name} is {kind}; weights must be dense, of float16, bfloat16, float32 or float64")
    dimensions = _dimensions(ours[0])
    if dimensions not in (None, tensor.ndim):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; in a Swin it has {dimensions} dimensions")
    if tensor.ndim and tensor.shape[0] % len(ours):
        raise ValueError(f"{name} has {tensor.shape[0]} rows, which are not queries, keys and values")
    if ".downsample." in ours[0] and tensor.shape[-1] % 4:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; patch merging takes four siblings")


def _dimensions(name: str) -> int | None:
    """Of a parameter under our name; `None` where only its model knows."""
    if name.endswith("patch_embeddings.projection.weight"):
        return 4
    if name.endswith("position_embeddings"):
        return 3
    if name.endswith("relative_position_bias_table"):
        return 2
    if name.endswith(".bias"):
        return 1
    return (1 if "norm" in name else 2) if name.endswith(".weight") else None


def to_published_names(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """The inverse of `to_our_names`."""
    return {
        published: torch.cat([tensors[name] for name in ours])
        for published, ours in names.items()
        if ours[0] in tensors
    }


def our_names_of_folder(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """As `published_names`, for a folder of stock Swin or GreenSwin, whose encoder may lack its prefix."""
    own = ("swin.", "classifier.", "decoder.", "hidden_states_norms.")
    return {name: (name if name.startswith(own) else f"swin.{name}",) for name in names}


def split_unused(names: Iterable[str], source_format: str, is_backbone: bool) -> tuple[list[str], list[str]]:
    """Names that a conversion passes over: buffers, and parameters that have no counterpart here."""
    names = list(names)
    buffers = [name for name in names if _BUFFERS.search(name)]
    unused = []
    if source_format in ("swin", "simmim"):
        unused = [name for name in names if _SIMMIM_ONLY.search(name)]
    if source_format == "swin" and is_backbone:  # which never applies its final norm
        unused += [name for name in names if re.search(r"^(swin\.)?layernorm\.", name)]
    return buffers, unused


def undo_legacy_merge_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Patch merging trained on siblings in the order 00, 01, 10, 11 (row, column), for Swin's order 00, 10, 01, 11.

    Source: measured on the published GreenMIM code of May to June 2022.
    """

    def swapped(tensor: Tensor) -> Tensor:
        first, second, third, fourth = tensor.chunk(4, dim=-1)
        return torch.cat([first, third, second, fourth], dim=-1)

    return {name: swapped(tensor) if ".downsample." in name else tensor for name, tensor in tensors.items()}


__all__ = [
    "FORMATS",
    "count_blocks",
    "count_decoder_blocks",
    "missing_names",
    "our_names_of_folder",
    "published_names",
    "recognise_format",
    "split_unused",
    "to_our_names",
    "to_published_names",
    "undo_legacy_merge_order",
]
