"""Configuration: fields survive files, derived sizes follow the fields, contradictions raise."""

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_config
from transformers import AutoConfig, SwinConfig, SwinModel

from green_swin_hf import (
    VARIANTS,
    GreenSwinConfig,
    GreenSwinForImageClassification,
    GreenSwinModel,
    SparseGeometry,
)

# A value that differs from the default, for every field, such that together they make a valid configuration.
OTHER_VALUES = {
    "image_size": [64, 96],
    "patch_size": 2,
    "num_channels": 5,
    "embed_dim": 16,
    "depths": [1, 2, 3],
    "num_heads": [2, 4, 8],
    "window_size": 4,
    "mlp_ratio": 2.0,
    "qkv_bias": False,
    "hidden_dropout_prob": 0.25,
    "attention_probs_dropout_prob": 0.5,
    "drop_path_rate": 0.3,
    "hidden_act": "relu",
    "use_absolute_embeddings": True,
    "initializer_range": 0.01,
    "layer_norm_eps": 1e-6,
    "mask_ratio": 0.6,
    "norm_pix_loss": False,
    "decoder_hidden_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 3,
    "decoder_intermediate_size": 48,
    "group_size": 20,
}


def own_fields() -> set[str]:
    return {name for name in GreenSwinConfig.__annotations__ if not name.startswith("_") and name != "attribute_map"}


def test_the_table_of_other_values_names_every_field():
    assert set(OTHER_VALUES) == own_fields() - {"model_type"}
    default = GreenSwinConfig()
    assert [name for name, value in OTHER_VALUES.items() if getattr(default, name) == value] == []


def test_every_field_survives_save_and_load(tmp_path):
    config = GreenSwinConfig(**OTHER_VALUES, out_features=["stage1", "stage3"], id2label={0: "cat", 1: "dog", 2: "eel"})
    config.save_pretrained(tmp_path)
    for loaded in (GreenSwinConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is GreenSwinConfig
        assert {name: getattr(loaded, name) for name in OTHER_VALUES} == OTHER_VALUES
        assert loaded.out_features == ["stage1", "stage3"]
        assert loaded.out_indices == [1, 3]
        assert loaded.id2label == {0: "cat", 1: "dog", 2: "eel"}
        assert loaded.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("changes", [{}, OTHER_VALUES], ids=["defaults", "others"])
def test_dictionaries_deep_copies_and_json_keep_the_config(changes):
    config = GreenSwinConfig(**changes)
    for twin in (
        GreenSwinConfig.from_dict(config.to_dict()),
        GreenSwinConfig.from_dict(json.loads(config.to_json_string())),
        copy.deepcopy(config),
    ):
        assert twin.to_dict() == config.to_dict()


def test_file_names_the_type_and_the_sizes_stock_swin_reads(tmp_path):
    tiny_config(depths=(1, 1), num_heads=(1, 2)).save_pretrained(tmp_path)
    entries = json.loads((tmp_path / "config.json").read_text())
    assert entries["model_type"] == "green_swin"
    assert entries["encoder_stride"] == 4
    assert SwinConfig.from_dict(entries).encoder_stride == 4


def test_what_transformers_reads_of_every_vision_config_is_there():
    config = tiny_config()
    assert (config.hidden_size, config.num_hidden_layers, config.num_layers) == (32, 3, 3)
    assert (config.image_size, config.patch_size, config.num_channels) == (32, 2, 3)
    assert config.num_attention_heads == (1, 2, 4)
    assert config.num_labels == 5


# What the backbone mixin adds


@pytest.mark.parametrize(
    ("given_fields", "features", "indices"),
    [
        ({}, ["stage3"], [3]),
        ({"out_features": ["stage1", "stage2"]}, ["stage1", "stage2"], [1, 2]),
        ({"out_indices": [0, 3]}, ["stem", "stage3"], [0, 3]),
        ({"out_indices": (1, -1)}, ["stage1", "stage3"], [1, -1]),
    ],
    ids=["default", "features", "indices", "negative_index"],
)
def test_output_features_and_indices_stay_aligned(given_fields, features, indices):
    config = tiny_config(**given_fields)
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert list(config.out_features) == features
    assert list(config.out_indices) == indices


def test_output_features_can_be_set_later():
    config = tiny_config()
    config.set_output_features_output_indices(out_features=["stage1", "stage2"], out_indices=None)
    assert (list(config.out_features), list(config.out_indices)) == (["stage1", "stage2"], [1, 2])


@pytest.mark.parametrize("fields", [{"out_features": ["stage4"]}, {"out_indices": [7]}], ids=["feature", "index"])
def test_an_unknown_output_stage_raises(fields):
    with pytest.raises(ValueError, match="stage"):
        tiny_config(**fields)


# Derived sizes


def test_derived_sizes_of_swin_tiny():
    config = GreenSwinConfig()
    assert config.stage_channels == (96, 192, 384, 768)
    assert (config.hidden_size, config.mask_unit_size, config.encoder_stride) == (768, 32, 32)
    assert (config.grid_size, config.mask_grid_size) == ((56, 56), (7, 7))


@pytest.mark.parametrize(
    ("window_size", "image_size", "windows"),
    [
        (7, 224, (7, 7, 7, 7)),
        (14, 224, (14, 14, 14, 7)),
        (12, 384, (12, 12, 12, 12)),
        (7, 96, (7, 7, 6, 3)),
        (7, (64, 224), (7, 7, 4, 2)),
    ],
    ids=str,
)
def test_window_of_each_stage_is_clamped_to_its_grid(window_size, image_size, windows):
    assert GreenSwinConfig(window_size=window_size, image_size=image_size).stage_window_sizes == windows


def test_derived_sizes_follow_update_as_transformers_scripts_use_it():
    config = GreenSwinConfig(window_size=14)
    config.update({"image_size": 192, "patch_size": 2, "encoder_stride": 16})
    assert (config.mask_unit_size, config.encoder_stride) == (16, 16)
    assert (config.grid_size, config.mask_grid_size) == ((96, 96), (12, 12))
    assert config.stage_window_sizes == (14, 14, 14, 12)
    config.update({"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 10})
    assert (config.hidden_size, config.num_layers, config.mask_unit_size) == (20, 2, 4)
    assert config.stage_names == ["stem", "stage1", "stage2"]


def test_encoder_stride_is_accepted_and_follows_the_mask_unit():
    assert tiny_config(encoder_stride=8).encoder_stride == 8
    config = tiny_config(encoder_stride=16)
    assert config.encoder_stride == config.mask_unit_size == 8


@pytest.mark.parametrize("size", [(32, 48), [32, 48]], ids=["tuple", "list"])
def test_pairs_of_sizes_mean_rows_and_columns(size):
    config = tiny_config(image_size=size, patch_size=type(size)((2, 2)))
    assert (config.grid_size, config.mask_grid_size, config.patch_length) == ((16, 24), (4, 6), 2)


# Named variants, against table 7 of the Swin paper (arXiv 2103.14030)


@pytest.mark.parametrize(
    ("variant", "embed_dim", "depths", "heads", "millions"),
    [
        ("tiny", 96, (2, 2, 6, 2), (3, 6, 12, 24), 28.3),
        ("small", 96, (2, 2, 18, 2), (3, 6, 12, 24), 49.6),
        ("base", 128, (2, 2, 18, 2), (4, 8, 16, 32), 87.8),
        ("large", 192, (2, 2, 18, 2), (6, 12, 24, 48), 196.5),
    ],
)
def test_variants_have_the_numbers_of_the_swin_paper(variant, embed_dim, depths, heads, millions):
    config = GreenSwinConfig.from_variant(variant, num_labels=1000)
    assert (config.embed_dim, tuple(config.depths), tuple(config.num_heads)) == (embed_dim, depths, heads)
    assert (config.window_size, config.image_size, config.patch_size) == (7, 224, 4)
    stock = SwinConfig(embed_dim=embed_dim, depths=list(depths), num_heads=list(heads))
    with torch.device("meta"):
        assert count(GreenSwinModel(config)) == count(SwinModel(stock))
        assert round(count(GreenSwinForImageClassification(config)) / 1e6, 1) == millions


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_variants_take_a_window_and_overrides():
    assert sorted(VARIANTS) == ["base", "large", "small", "tiny"]
    config = GreenSwinConfig.from_variant("base", window_size=14, mask_ratio=0.6, depths=(1, 1, 1, 1))
    assert (config.window_size, config.mask_ratio, config.depths, config.embed_dim) == (14, 0.6, (1, 1, 1, 1), 128)
    with pytest.raises(ValueError, match=r"variant 'huge' is unknown; choose one of tiny, small, base, large"):
        GreenSwinConfig.from_variant("huge")


# Contradictions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 36}, r"image_size 36 must be a multiple of mask_unit_size 8"),
        ({"image_size": (32, 20)}, r"image_size \(32, 20\) must be a multiple of mask_unit_size 8"),
        ({"image_size": 0}, r"image_size 0 must be a positive integer"),
        ({"image_size": -32}, r"image_size -32 must be a positive integer"),
        ({"image_size": [32]}, r"image_size \[32\] must be"),
        ({"image_size": (32, 32, 3)}, r"image_size \(32, 32, 3\) must be"),
        ({"patch_size": (2, 4)}, r"patch_size \(2, 4\) must be square"),
        ({"num_channels": 0}, r"num_channels 0 must be a positive integer"),
        ({"embed_dim": 0}, r"embed_dim 0 must be a positive integer"),
        ({"window_size": 0}, r"window_size 0 must be a positive integer"),
        ({"depths": ()}, r"depths \(\) must be a list of positive integers"),
        ({"depths": (2, 0, 2)}, r"depths \(2, 0, 2\) must be a list of positive integers"),
        ({"num_heads": (1, 2)}, r"num_heads \[1, 2\] must be as long as depths \[2, 2, 2\]"),
        ({"num_heads": (3, 2, 4)}, r"num_heads\[0\] 3 must be a divisor of the 8 channels of stage 1"),
        ({"mask_ratio": 0.0}, r"mask_ratio 0.0 must be greater than 0 and less than 1"),
        ({"mask_ratio": 1.0}, r"mask_ratio 1.0 must be greater than 0 and less than 1"),
        ({"mask_ratio": float("nan")}, r"mask_ratio nan must be greater than 0 and less than 1"),
        ({"hidden_dropout_prob": 1.5}, r"hidden_dropout_prob 1.5 must be at least 0 and less than 1"),
        ({"attention_probs_dropout_prob": -0.1}, r"attention_probs_dropout_prob -0.1 must be at least 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate 1.0 must be at least 0 and less than 1"),
        ({"mlp_ratio": 0.0}, r"mlp_ratio 0.0 must be greater than 0"),
        ({"layer_norm_eps": 0.0}, r"layer_norm_eps 0.0 must be greater than 0"),
        ({"decoder_hidden_size": 18}, r"decoder_hidden_size 18 must be a multiple of 4"),
        (
            {"decoder_num_attention_heads": 3},
            r"decoder_hidden_size 16 must be a multiple of decoder_num_attention_heads 3",
        ),
        ({"decoder_num_hidden_layers": 0}, r"decoder_num_hidden_layers 0 must be a positive integer"),
        ({"decoder_intermediate_size": 0}, r"decoder_intermediate_size 0 must be a positive integer"),
        ({"group_size": 15}, r"group_size 15 must be .* at least 16"),
        ({"group_size": "best"}, r"group_size 'best' must be \"window\", \"optimal\" or an integer"),
        ({"hidden_act": "gelly"}, r"hidden_act 'gelly' must be an activation of transformers: gelu"),
        ({"mlp_ratio": 0.01}, r"mlp_ratio 0.01 must be"),
        ({"layer_norm_eps": "1e-6"}, r"layer_norm_eps '1e-6' must be a number"),
        # found by tests/fuzz.py
        ({"hidden_act": ["gelu"]}, r"hidden_act \['gelu'\] must be an activation"),
        ({"initializer_range": float("inf")}, r"initializer_range inf must be finite"),
        ({"initializer_range": -1}, r"initializer_range -1 must be at least 0"),
        ({"mlp_ratio": 1e308}, r"mlp_ratio 1e\+308 must be finite, in float32 as well"),
        ({"depths": [1] * 17, "num_heads": [1] * 17}, r"depths \[1, .*\] must be a list .*\(at most 16\)"),
        ({"mask_ratio": None}, r"mask_ratio None must be a number"),
        ({"norm_pix_loss": "no"}, r"norm_pix_loss 'no' must be True or False"),
        (
            {"image_size": 4, "patch_size": 1, "depths": [1], "num_heads": [1], "num_channels": 1},
            r"norm_pix_loss True must be",
        ),
    ],
    ids=str,
)
def test_contradictions_raise_with_field_value_and_rule(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


# Folders of stock Swin


@pytest.mark.parametrize(
    ("field", "value"),
    [("embed_dim", 10**5000), ("layer_norm_eps", 10**400), ("hidden_act", "x" * 5000), ("depths", [[1] * 5000] * 3)],
    ids=["thousands of digits", "beyond all floats", "long text", "long list"],
)
def test_a_value_of_any_size_is_shown_short(field, value):
    """Found by tests/fuzz.py."""
    with pytest.raises(ValueError, match=f"^{field} .* must be ") as refusal:
        tiny_config(**{field: value})
    assert len(str(refusal.value)) < 1000


def test_config_of_a_stock_swin_folder_becomes_green_swin(tmp_path):
    stock = SwinConfig(image_size=64, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4, encoder_stride=8)
    stock.save_pretrained(tmp_path / "stock")
    config = GreenSwinConfig.from_pretrained(tmp_path / "stock")
    assert config.model_type == "green_swin"
    shared = (
        "image_size",
        "embed_dim",
        "window_size",
        "mlp_ratio",
        "layer_norm_eps",
        "drop_path_rate",
        "encoder_stride",
    )
    assert {name: getattr(config, name) for name in shared} == {name: getattr(stock, name) for name in shared}
    assert list(config.depths) == [1, 1]
    config.save_pretrained(tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["model_type"] == "green_swin"
    assert type(AutoConfig.from_pretrained(tmp_path / "ours")) is GreenSwinConfig


def test_defaults_are_those_of_stock_swin():
    config, stock = GreenSwinConfig(), SwinConfig()
    names = own_fields() & set(stock.to_dict())
    assert len(names) == 16
    for name in names:
        ours, theirs = getattr(config, name), getattr(stock, name)
        assert (list(ours) if isinstance(ours, tuple) else ours) == (
            list(theirs) if isinstance(theirs, tuple) else theirs
        )


# Any valid combination


@st.composite
def valid_fields(draw):
    stages = draw(st.integers(1, 4))
    patch_size = draw(st.sampled_from([1, 2, 4, 5]))
    unit = patch_size * 2 ** (stages - 1)
    rows, columns = draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    heads = [2 ** draw(st.integers(0, stage + 1)) for stage in range(stages)]
    return {
        "image_size": (rows * unit, columns * unit),
        "patch_size": patch_size,
        "embed_dim": 2 * draw(st.integers(1, 5)),
        "depths": draw(st.lists(st.integers(1, 3), min_size=stages, max_size=stages)),
        "num_heads": heads,
        "window_size": draw(st.integers(1, 12)),
        "mask_ratio": draw(st.floats(0.01, 0.99)),
    }


@given(valid_fields())
@settings(max_examples=60, deadline=None)
def test_valid_configs_describe_one_geometry(fields):
    config = GreenSwinConfig(**fields)
    stages = len(fields["depths"])
    rows, columns = (side // fields["patch_size"] for side in fields["image_size"])
    assert config.grid_size == (rows, columns)
    assert config.mask_grid_size == (rows // 2 ** (stages - 1), columns // 2 ** (stages - 1))
    assert config.hidden_size == config.stage_channels[-1] == fields["embed_dim"] * 2 ** (stages - 1)
    geometry = SparseGeometry.from_config(config)
    assert geometry.num_units == config.mask_grid_size[0] * config.mask_grid_size[1]
    for stage, window in enumerate(config.stage_window_sizes):
        smaller_side = min(rows, columns) // 2**stage
        assert window == min(fields["window_size"], smaller_side)
        assert geometry.stages[stage].grid_size == (rows // 2**stage, columns // 2**stage)
        assert geometry.stages[stage].shift_size == (window // 2 if smaller_side > fields["window_size"] else 0)
    assert (
        GreenSwinConfig.from_dict(json.loads(json.dumps(config.to_dict()))).to_json_string() == config.to_json_string()
    )
    with torch.device("meta"):
        assert count(GreenSwinModel(config)) > 0


def test_a_changed_image_size_is_saved_and_loaded_but_not_masked(tmp_path):
    config = tiny_config()
    config.update({"image_size": 50})
    config.save_pretrained(tmp_path)
    loaded = GreenSwinConfig.from_pretrained(tmp_path)
    assert loaded.image_size == 50
    assert loaded.to_dict() == config.to_dict()
    assert "any_image_size" not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match="image_size 50x50 must be a multiple of mask_unit_size 8"):
        SparseGeometry.from_config(loaded)
    with pytest.raises(ValueError, match="image_size 50 must be a multiple of mask_unit_size 8"):
        GreenSwinConfig(**{**config.to_dict(), "image_size": 50})
