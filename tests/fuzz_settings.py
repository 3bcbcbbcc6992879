"""Fuzz targets of configurations and recipe files."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import yaml
from fuzz_case import ACCEPTED, Choices, Target, attempt, refused

from green_swin_hf import GreenSwinConfig, SparseGeometry
from green_swin_hf.detection_recipe import DetectionRecipe
from green_swin_hf.evaluation_recipe import EvaluationRecipe
from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.recipe_files import load_recipe, save_recipe
from green_swin_hf.segmentation_recipe import SegmentationRecipe

STRANGE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 4, 7, 49, 64, 224, 10**9, 10**30, -(10**30), 2**63, 10**400),
    *(0.5, 1.0, 0.0, -0.0, 1.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf),
    *("", "window", "7", "nan", "1e-4", "no\nline", "\ud800", "x" * 5000, "٣", "true"),
    *([], [0], [1], [2, 2], [7, 7], [1, 2, 3], [-1, 4], [64, 96], [2] * 40, [[2]], ["a"], [1.5, 2], [True, 2]),
    *([10**30], [math.nan], {}, {"a": 1}, [None]),
)

# Configurations

BASE = {
    "image_size": 32, "patch_size": 2, "num_channels": 3, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4],
    "window_size": 4, "mlp_ratio": 4.0, "qkv_bias": True, "hidden_dropout_prob": 0.0, "drop_path_rate": 0.1,
    "attention_probs_dropout_prob": 0.0, "hidden_act": "gelu", "use_absolute_embeddings": False, "mask_ratio": 0.75,
    "initializer_range": 0.02, "layer_norm_eps": 1e-5, "norm_pix_loss": True, "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32,
    "group_size": "window",
}  # fmt: skip
# Values that are good by themselves and may contradict the others
FITTING: dict[str, tuple[Any, ...]] = {
    "image_size": (8, 16, 24, 36, 64, [32, 64], [16, 20]),
    "patch_size": (1, 2, 3, 4, [2, 2], [2, 4]),
    "embed_dim": (1, 3, 4, 6, 8, 12),
    "depths": ([1], [2, 2], [1, 1, 1, 1], [2, 6, 2]),
    "num_heads": ([1], [1, 2], [1, 2, 3], [3, 6, 12], [1, 1, 1, 1]),
    "window_size": (1, 2, 3, 5, 7, 100),
    "decoder_hidden_size": (4, 6, 8, 12, 20),
    "decoder_num_attention_heads": (1, 3, 4, 5),
    "group_size": ("window", "optimal", "other", 1, 15, 16, 17, 100, 10**6),
    "mask_ratio": (0, 1, 0.01, 0.99, 1e-9),
}


def config_inputs(draw: Choices) -> dict[str, Any]:
    changes = {}
    for _ in range(draw.integer(1, 3)):
        field = draw.of(sorted(BASE))
        own = FITTING.get(field, ())
        values = own if own and not draw.one_in(3) else STRANGE
        changes[field] = draw.of(values)
    return changes


def is_count(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**31


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= 3e38


def is_good_config(fields: dict[str, Any]) -> bool:
    """Whether the documentation allows it, said once more and in another way."""
    counts = ("num_channels", "embed_dim", "window_size", "decoder_num_hidden_layers", "decoder_num_attention_heads")
    sizes = {
        name: [fields[name]] * 2 if type(fields[name]) is int else fields[name] for name in ("image_size", "patch_size")
    }
    lists = [*sizes.values(), fields["depths"], fields["num_heads"]]
    if not all(is_count(fields[name]) for name in (*counts, "decoder_hidden_size", "decoder_intermediate_size")):
        return False
    if not all(type(values) is list and values and all(map(is_count, values)) for values in lists):
        return False
    if any(len(pair) != 2 for pair in sizes.values()) or len(set(sizes["patch_size"])) != 1:
        return False
    stages = len(fields["depths"])
    if stages > 16:
        return False
    unit = sizes["patch_size"][0] * 2 ** (stages - 1)
    heads = fields["num_heads"]
    if len(heads) != stages or any(fields["embed_dim"] * 2**i % number for i, number in enumerate(heads)):
        return False
    if any(side % unit for side in sizes["image_size"]):
        return False
    if any(type(fields[name]) is not bool for name in ("qkv_bias", "use_absolute_embeddings", "norm_pix_loss")):
        return False
    shares = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
    rates = ("mask_ratio", "mlp_ratio", "layer_norm_eps", "initializer_range")
    if not all(is_number(fields[name]) for name in (*shares, *rates)):
        return False
    if not (all(0 <= fields[name] < 1 for name in shares) and 0 < fields["mask_ratio"] < 1):
        return False
    if fields["layer_norm_eps"] <= 0 or fields["initializer_range"] < 0 or fields["mlp_ratio"] <= 0:
        return False
    if not 1 <= fields["mlp_ratio"] * fields["embed_dim"] < 2**31 or fields["hidden_act"] != "gelu":
        return False
    width = fields["decoder_hidden_size"]
    if width % 4 or width % fields["decoder_num_attention_heads"]:
        return False
    if fields["norm_pix_loss"] and unit**2 * fields["num_channels"] == 1:
        return False
    group, window = fields["group_size"], fields["window_size"]
    grids = [min(side // sizes["patch_size"][0] // 2**i for side in sizes["image_size"]) for i in range(stages)]
    largest = max(min(side, window) for side in grids)
    return group in ("window", "optimal") if isinstance(group, str) else is_count(group) and group >= largest**2


def check_config(changes: dict[str, Any]) -> str:
    fields = {**BASE, **changes}
    is_good = is_good_config(fields)
    config, error = attempt(lambda: GreenSwinConfig(**fields))
    if error:
        assert not is_good, f"a good configuration is refused: {error}"
        return refused(error, changes)
    assert is_good, "a wrong configuration is accepted"
    again = GreenSwinConfig.from_dict(json.loads(config.to_json_string(use_diff=False)))
    for name, value in fields.items():
        assert getattr(config, name) == value
        assert getattr(again, name) == value
    geometry = SparseGeometry.from_config(config)
    assert [stage.channels for stage in geometry.stages] == [config.embed_dim * 2**i for i in range(len(config.depths))]
    assert geometry.num_units * config.mask_unit_size**2 == math.prod(
        [config.image_size] * 2 if isinstance(config.image_size, int) else config.image_size
    )
    return ACCEPTED


# Recipe files

KINDS = {
    "pretraining": PretrainingRecipe,
    "finetuning": FinetuningRecipe,
    "detection": DetectionRecipe,
    "segmentation": SegmentationRecipe,
    "evaluation": EvaluationRecipe,
}
FOLDERS = Path(__file__).resolve().parents[1] / "examples" / "recipes"
# Pieces of YAML for places where a value stands
PIECES = (
    *("~", "null", "yes", "on", "0x1F", "0o17", "017", "1_000", "1:30", "1e3", "1.e+3", ".5", ".inf", "-.INF", ".NaN"),
    *("2020-01-01", "2020-99-99", "2001-12-14t21:59:43.10-05:00", "'a''b'", '"\\ud800"', '"\\0"', '"\\x41"'),
    *("!!int abc", "!!float x", "!!bool maybe", "!!timestamp 1", "!!binary x", "!!binary aGk=", "!!set {a, b}"),
    *("!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.getcwd []", "!!python/name:os.system", "!x 1"),
    *("!!str 1", "!!map {a: 1}", "!!seq [1]", "!!null x", "&a 1", "*a", "*nothing", "&a [*a]", "[[1]]", "{a: {b: 1}}"),
    *("[1, 2", "{a", "|\n  text", ">-\n  text", "- 1", "? a", "@x", "`x`", "%TAG", "\t1", "1 # note", "a: b: c"),
    *("'" + "y" * 3000 + "'", "9" * 4400, "1e999999", "[" * 2000, "[" * 60 + "]" * 60, "../../x", "/etc/passwd", "~"),
    *("/" + "d/" * 3000, "{<<: {a: 1}}", "{? [1] : 2}", "{? {a: 1} : 2}", "\\", "\x85", "é", "😀"),
)
LINES = (
    "<<: {seed: 1}", "<<: [1]", "? [a]\n: 1", "? {a: 1}\n: 1", "1: 2", "null: 1", "true: 1", "2020-01-01: 1", "---",
    "...", "%YAML 1.1", "a: &x [1, 2]", "b: *x", "- 1", "seed: 1", "seed: 2", "sead: 1", "!!python/name:os.system : 1",
    "\x00", "\ufeff", "   ", "# note", "bomb: &a0 [x, x]\nbomb1: &a1 [*a0, *a0]", "[", "}", "'", '"',
)  # fmt: skip


def recipe_inputs(draw: Choices) -> dict[str, Any]:
    """`lines` of a file; some of them are aliases that grow without end."""
    kind = draw.of(sorted(KINDS))
    names = [item.name for item in dataclasses.fields(KINDS[kind])]
    lines = []
    for _ in range(draw.integer(0, 3)):
        pieces = draw.of([strange_texts()] * 5 + [PIECES] * 4 + [(draw.text(12),)])
        value = draw.of(pieces)
        lines.append(f"{draw.of(names)}: {value}")
    if draw.one_in(4):
        lines.insert(draw.integer(0, len(lines)), draw.of(LINES))
    if draw.one_in(41):
        style = draw.of(["lists", "merges"])
        lines.extend(bomb(style, draw.of(names)))
    file = draw.of(file_names(kind)) if draw.one_in(20) else ""
    cut = draw.integer(0, 3000) if draw.one_in(10) else None
    return {"kind": kind, "lines": lines, "file": file, "cut": cut}


@functools.cache
def file_names(kind: str) -> tuple[str, ...]:
    return tuple(sorted(path.name for path in (FOLDERS / kind).glob("*.yaml")))


@functools.cache
def file_text(kind: str, name: str) -> str:
    return (FOLDERS / kind / name).read_text(encoding="utf-8") if name else ""


@functools.cache
def strange_texts() -> tuple[str, ...]:
    return tuple(map(yaml_of, STRANGE))


def yaml_of(value: Any) -> str:
    if isinstance(value, str) and "\ud800" in value:
        return '"\\ud800"'
    try:
        return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    except ValueError:  # too many digits for Python to write at once
        return "1" + "0" * 5000


def bomb(style: str, name: str) -> list[str]:
    """Thirty doublings: a billion entries in a few hundred bytes."""
    if style == "lists":
        return ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 30)), f"{name}: *a29"]
    first = "a0: &a0 {x: 1}"
    return [first, *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 30)), "<<: *a29"]


@functools.cache
def work_folder() -> Path:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a busy disk makes a case many times slower
    folder = tempfile.TemporaryDirectory(prefix="green-swin-fuzz-", dir=memory)
    work_folder.keep = folder  # type: ignore[attr-defined]
    return Path(folder.name)


def check_recipe(case: dict[str, Any]) -> str:
    text = "\n".join([file_text(case["kind"], case["file"]), *case["lines"]])
    content = text.encode("utf-8", "surrogatepass")
    path, kind = work_folder() / "recipe.yaml", KINDS[case["kind"]]
    path.write_bytes(content[: case["cut"]])
    recipe, error = attempt(load_recipe, path, kind)
    if error:
        return refused(error, [str(path)])
    again = work_folder() / "again.yaml"
    save_recipe(recipe, again)
    assert load_recipe(again, kind) == recipe
    for name, value in recipe.to_dict().items():
        assert type(value) in (bool, int, float, str, list), (name, value)
        assert not isinstance(value, float) or math.isfinite(value), (name, value)
    assert recipe.differences(recipe) == {}
    _, error = attempt(getattr(recipe, "model_config", lambda: None))
    return refused(error, [item.name for item in dataclasses.fields(kind)]) if error else ACCEPTED


TARGETS = (
    Target("configs", config_inputs, check_config),
    Target("recipes", recipe_inputs, check_recipe),
)
