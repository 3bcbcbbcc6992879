"""Fuzz targets of checkpoints of others: their files, and the conversion of what is in them."""

from __future__ import annotations

import copy
import functools
import json
import math
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fuzz_case import ACCEPTED, Choices, Target, attempt, refused
from fuzz_settings import STRANGE, work_folder
from safetensors.torch import save_file
from transformers import SwinConfig, SwinForImageClassification

from green_swin_hf.weight_conversion import ConversionOptions, convert_to_green_swin
from green_swin_hf.weight_conversion_files import open_checkpoint, refusal_in_one_line
from green_swin_hf.weight_conversion_geometry import folder_config
from green_swin_hf.weight_conversion_names import recognise_format

PHOTO = Path(__file__).resolve().parents[1] / "examples" / "data" / "photos" / "astronaut.png"
SHARDED = "model.safetensors.index.json"


@functools.cache
def source() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """`config.json` and weights of a tiny stock Swin."""
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=16, patch_size=2, embed_dim=4, depths=[1, 1], num_heads=[1, 2], window_size=2, num_labels=3
    )
    folder = work_folder() / "source"
    SwinForImageClassification(config).save_pretrained(folder)
    return json.loads((folder / "config.json").read_text()), dict(open_checkpoint(folder).tensors)


@functools.cache
def whole_file(kind: str) -> bytes:
    path = work_folder() / f"whole.{kind}"
    tensors = dict(list(source()[1].items())[:3])
    save_file(tensors, path) if kind == "safetensors" else torch.save(tensors, path)
    return path.read_bytes()


# Files: bytes changed, headers and indices rewritten

HEADER_FIELDS = ("dtype", "shape", "data_offsets", "__metadata__", "name")
HEADER_VALUES: tuple[Any, ...] = (
    *(
        "F32",
        "F64",
        "F999",
        "BOOL",
        "I8",
        "F8_E4M3",
        "",
        None,
        [],
        [0],
        [1],
        [-1],
        [2**62],
        [2**62, 2**62, 2],
        [1] * 70,
    ),
    *(
        [0, 4],
        [0, 0],
        [4, 0],
        [-4, 0],
        [0, 2**63],
        [2**62, 2**62 + 4],
        {},
        {"a": 1},
        {"a": "b"},
        math.nan,
        1.5,
        "x" * 300,
    ),
)
SHARDS: tuple[Any, ...] = (
    *(
        "model-00001-of-00001.safetensors",
        "model.safetensors",
        "../x.safetensors",
        "/etc/passwd",
        "",
        ".",
        "..",
        "a\\b",
    ),
    *("a\0b", "\ud800.safetensors", "no\nline", None, 3, [], {}, "x" * 300, "config.json", "missing.safetensors"),
)


def file_inputs(draw: Choices) -> dict[str, Any]:
    kind = draw.of(["safetensors", "safetensors", "pth", "header", "header", "index", "json", "config", "config"])
    if kind in ("safetensors", "pth"):
        edits = [[draw.integer(0, 6000), draw.integer(0, 255)] for _ in range(draw.integer(0, 4))]
        return {"kind": kind, "edits": edits, "cut": draw.integer(0, 6000) if draw.one_in(2) else None}
    if kind == "header":
        edits = [
            [draw.integer(0, 2), draw.of(HEADER_FIELDS), draw.integer(0, len(HEADER_VALUES) - 1)]
            for _ in range(draw.integer(1, 2))
        ]
        length = draw.of([0, 1, 2**31, 2**62, 2**64 - 1]) if draw.one_in(10) else None
        return {"kind": kind, "edits": edits, "length": length}
    if kind == "index":
        shards = [draw.integer(0, len(SHARDS) - 1) for _ in range(draw.integer(0, 3))]
        return {"kind": kind, "shards": shards, "whole": draw.of([[], {}, "", 0]) if draw.one_in(6) else None}
    if kind == "json":
        pieces = (
            "{",
            "}",
            "[",
            "]",
            '"a"',
            ":",
            ",",
            "1",
            "NaN",
            "1e999",
            "null",
            "\ufeff",
            "[" * 9000,
            "9" * 5000,
            "\x00",
        )
        return {"kind": kind, "text": "".join(draw.of(pieces) for _ in range(draw.integer(0, 6)))}
    known = sorted(source()[0])
    edits = [[draw.of(known), draw.integer(0, len(STRANGE) - 1)] for _ in range(draw.integer(1, 2))]
    return {"kind": kind, "edits": edits}


def check_file(case: dict[str, Any]) -> str:
    folder = work_folder() / "files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, _ = source()
    path = folder
    if case["kind"] in ("safetensors", "pth"):
        content = bytearray(whole_file(case["kind"]))
        for place, value in case["edits"]:
            content[place % len(content)] = value
        path = folder / f"model.{case['kind']}"
        path.write_bytes(content[: case["cut"]])
    elif case["kind"] == "header":
        path = folder / "model.safetensors"
        path.write_bytes(with_header(whole_file("safetensors"), case))
    elif case["kind"] == "index":
        names = {f"tensor.{number}": SHARDS[shard] for number, shard in enumerate(case["shards"])}
        content = json.dumps({"weight_map": names if case["whole"] is None else case["whole"]})
        (folder / SHARDED).write_text(content)
        (folder / "model-00001-of-00001.safetensors").write_bytes(whole_file("safetensors"))
    elif case["kind"] == "json":
        (folder / "config.json").write_text(case["text"])
        (folder / "model.safetensors").write_bytes(whole_file("safetensors"))
    else:
        config = {**config, **{name: STRANGE[value] for name, value in case["edits"]}}
        (folder / "config.json").write_text(json_of(config))
        (folder / "model.safetensors").write_bytes((work_folder() / "source" / "model.safetensors").read_bytes())
    try:
        with refusal_in_one_line(path):
            checkpoint = open_checkpoint(path)
            if case["kind"] != "config":
                return ACCEPTED
            recognise_format(checkpoint.tensors, checkpoint.config)
            found = folder_config(checkpoint)
    except ValueError as error:
        return refused(error, [str(folder), "config.json", "the file"])
    for name in ("embed_dim", "window_size", "patch_size", "mlp_ratio"):
        assert getattr(found, name) == config[name] or config[name] is None
    return ACCEPTED


def json_of(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "{"


def with_header(content: bytes, case: dict[str, Any]) -> bytes:
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    for tensor, field, value in case["edits"]:
        name = names[tensor % len(names)]
        if field == "__metadata__":
            header[field] = HEADER_VALUES[value]
        elif field == "name":
            header[json.dumps(HEADER_VALUES[value])] = copy.deepcopy(header.get(name))
        elif isinstance(header.get(name), dict):
            header[name][field] = HEADER_VALUES[value]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text) if case["length"] is None else case["length"]) + text + content[8 + size :]


# Conversions: whole folders whose weights were damaged

CHANGES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "longer": lambda t: torch.cat([t, t]),
    "integers": lambda t: t.int(),
    "half": lambda t: t.half(),
    "complex": lambda t: t.to(torch.complex64),
    "nan": lambda t: torch.full_like(t, math.nan),
    "huge": lambda t: torch.full_like(t, 3e38),
    "zero": torch.zeros_like,
    "turned": lambda t: t.flip(0),
    "empty": lambda t: t[:0],
    "scalar": lambda t: t.flatten()[0].clone(),
    "double": lambda t: t.double(),
    "one dimension more": lambda t: t[None],
}
DAMAGES = ("drop", "rename", "extra", *CHANGES)
NEW_NAMES = (
    "swin.encoder.layers.0.blocks.0.attention.self.key.bias", "swin.encoder.layers.9.blocks.0.x", "",
    "classifier.weight", "swin.encoder.layers.99999999999.blocks.0.layernorm_before.weight", "mask_token",
    "decoder.0.weight", "logit_scale", "module.swin.layernorm.weight", "swin.swin.layernorm.weight", "no\nline",
    "x" * 500, "hidden_states_norms.stage1.weight",
)  # fmt: skip


OPTIONS: tuple[dict[str, Any], ...] = (
    *({"image_size": 24}, {"image_size": 17}, {"window_size": 3}, {"num_channels": 1}, {"keep_head": True}),
    *({"keep_head": False}, {"source_format": "timm"}, {"source_format": "microsoft"}, {"decoder_heads": 3}),
    *({"legacy_merge_order": True}, {"layer_norm_eps": 1e-3}, {"image_size": 10**6}, {"window_size": 10**6}),
)


def conversion_inputs(draw: Choices) -> dict[str, Any]:
    damages = [
        [draw.of(DAMAGES), draw.integer(0, len(source()[1]) - 1), draw.integer(0, len(NEW_NAMES) - 1)]
        for _ in range(0 if draw.one_in(10) else draw.integer(1, 2))
    ]
    return {"damages": damages, "options": draw.of(OPTIONS) if draw.one_in(2) else {}}


def damaged(case: dict[str, Any]) -> dict[str, torch.Tensor]:
    tensors = dict(source()[1])
    names = list(tensors)
    for kind, place, new in case["damages"]:
        name = names[place]
        if name not in tensors:
            continue
        tensor = tensors[name]
        if kind == "drop":
            del tensors[name]
        elif kind == "rename":
            tensors[NEW_NAMES[new]] = tensors.pop(name)
        elif kind == "extra":
            tensors[NEW_NAMES[new]] = tensor.clone()
        else:
            tensors[name] = CHANGES[kind](tensor).contiguous()
    return tensors


def check_conversion(case: dict[str, Any]) -> str:
    folder = work_folder() / "conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    config, _ = source()
    tensors = damaged(case)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    conversion, error = attempt(convert_to_green_swin, folder, PHOTO, ConversionOptions(**case["options"]))
    if error:
        assert case["damages"] or case["options"], f"whole weights are refused: {error}"
        return refused(
            error, [str(folder), "image_size", "--", *tensors, "the weights", "stage", "refused", "the file"]
        )
    assert not any(tensor.isnan().any() for tensor in conversion.model.parameters())
    if case["options"] in ({}, {"keep_head": True}):
        for name, tensor in conversion.model.state_dict().items():
            torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=0, check_dtype=False)
    return ACCEPTED


TARGETS = (
    Target("files", file_inputs, check_file),
    Target("conversions", conversion_inputs, check_conversion),
)
