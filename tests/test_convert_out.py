"""GreenSwin weights for stock transformers and timm: what loads there, with the same outputs, and what cannot go."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from test_remote_code import run_without
from tiny import images, randomised, tiny_config
from tiny_swins import GOLDEN, PHOTO, assert_equal_outputs, microsoft_tensors, refused, run, stock_config, timm_swin
from transformers import AutoImageProcessor, SwinBackbone, SwinForImageClassification, SwinModel, ViTImageProcessor

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)

OURS = {
    "encoder": GreenSwinModel,
    "classifier": GreenSwinForImageClassification,
    "pretraining": GreenSwinForMaskedImageModeling,
    "backbone": GreenSwinBackbone,
}
STOCK = {
    "encoder": SwinModel,
    "classifier": SwinForImageClassification,
    "pretraining": SwinModel,
    "backbone": SwinBackbone,
}


def saved(kind: str, folder: Path, **changes) -> torch.nn.Module:
    fields = {"out_features": ["stage1", "stage3"]} if kind == "backbone" else {}
    model = randomised(OURS[kind](tiny_config(**fields, **changes)))
    model.save_pretrained(folder)
    return model


def main_output(model, pixels) -> torch.Tensor:
    with torch.no_grad():
        found = (model.swin if isinstance(model, GreenSwinForMaskedImageModeling) else model)(pixels)
    if found.get("feature_maps") is not None:
        return torch.cat([maps.flatten(1) for maps in found.feature_maps], dim=1)
    return found.logits if found.get("logits") is not None else found.last_hidden_state


# With the package imported, as they are


@pytest.mark.parametrize("stock_class", [SwinModel, SwinForImageClassification, SwinBackbone])
@pytest.mark.parametrize("kind", ["pretraining", "classifier"])
def test_a_folder_of_ours_loads_into_stock_classes_as_it_is(kind, stock_class, tmp_path):
    ours = saved(kind, tmp_path)
    stock, report = stock_class.from_pretrained(tmp_path, output_loading_info=True)
    new = {"classifier.weight", "classifier.bias"} if kind == "pretraining" else set()
    norms = {"hidden_states_norms.stage3.weight", "hidden_states_norms.stage3.bias"}
    assert set(report["missing_keys"]) <= {SwinForImageClassification: new, SwinBackbone: norms}.get(stock_class, set())
    assert not report["mismatched_keys"]
    with torch.no_grad():
        states = stock.eval().swin if stock_class is not SwinModel else stock.eval()
        assert_equal_outputs(ours.swin(images(2)).last_hidden_state, states(images(2)).last_hidden_state)


@pytest.mark.parametrize(
    ("kind", "stock_class"), [("classifier", SwinForImageClassification), ("backbone", SwinBackbone)]
)
def test_heads_of_ours_load_into_stock_classes_as_they_are(kind, stock_class, tmp_path):
    ours = saved(kind, tmp_path)
    assert_equal_outputs(main_output(ours, images(2)), main_output(stock_class.from_pretrained(tmp_path), images(2)))


# Exported folders of stock Swin

LOADING = """
import sys, torch, transformers
from PIL import Image
pixels, photo = torch.load("pixels.pt"), Image.open("photo.png").convert("RGB")
for word in sys.argv[1:]:
    folder, name = word.split("=")
    loaded, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.get(key) for key in ("missing_keys", "mismatched_keys")), report
    found = loaded.eval()(pixels)
    maps = found.get("feature_maps")
    output = torch.cat([m.flatten(1) for m in maps], dim=1) if maps is not None else found.get("logits")
    torch.save((found.last_hidden_state if output is None else output).detach(), folder + "/output.pt")
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    prepared = processor(photo, return_tensors="pt")["pixel_values"]
    assert prepared.shape == (1, 3, 32, 32)
    torch.save(prepared, folder + "/prepared.pt")
    print(transformers.__version__, type(transformers.AutoConfig.from_pretrained(folder)).__name__)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A folder with our models of each kind and their exports, the models, and words that tell `LOADING` of them."""
    tmp_path = tmp_path_factory.mktemp("exported")
    torch.save(images(2), tmp_path / "pixels.pt")
    shutil.copy(PHOTO, tmp_path / "photo.png")
    models = {kind: saved(kind, tmp_path / f"our_{kind}") for kind in OURS}
    cropped = {"size": {"shortest_edge": 40}, "do_center_crop": True, "crop_size": {"height": 32, "width": 32}}
    for kind in OURS:
        options = cropped if kind in ("classifier", "backbone") else {"size": {"height": 32, "width": 32}}
        ViTImageProcessor(**options, image_mean=[0.5] * 3, image_std=[0.25] * 3, resample=3).save_pretrained(
            tmp_path / f"our_{kind}"
        )
        assert run(tmp_path / f"our_{kind}", tmp_path / kind, "--to", "swin") == 0
    return tmp_path, models, [f"{kind}={STOCK[kind].__name__}" for kind in OURS]


def assert_loaded(models, folder: Path, tolerance: float = 1e-6) -> None:
    for kind, ours in models.items():
        assert_equal_outputs(torch.load(folder / kind / "output.pt"), main_output(ours, images(2)))
        entries = json.loads((folder / kind / "config.json").read_text())
        assert (entries["model_type"], entries["architectures"]) == ("swin", [STOCK[kind].__name__])
        with Image.open(PHOTO) as photo:
            own = AutoImageProcessor.from_pretrained(folder / f"our_{kind}")
            wanted = own(photo.convert("RGB"), return_tensors="pt")["pixel_values"]
        prepared = torch.load(folder / kind / "prepared.pt")
        # 4.x resizes with Pillow, whose rounding differs by a grey level or two
        torch.testing.assert_close(prepared, wanted, atol=tolerance, rtol=0)


def test_exported_folders_load_where_the_package_is_not_installed(exported):
    folder, models, words = exported
    printed = run_without(f"import sys\nsys.argv = ['-c', *{words!r}]\n{LOADING}", {"green_swin_hf"}, folder)
    assert printed.count("SwinConfig") == len(OURS)
    assert_loaded(models, folder)


OLD_PYTHON = os.environ.get("GREEN_SWIN_TRANSFORMERS_4_PYTHON")


@pytest.mark.skipif(
    not OLD_PYTHON, reason="GREEN_SWIN_TRANSFORMERS_4_PYTHON names no interpreter that has transformers 4.x"
)
def test_exported_folders_load_in_transformers_4(exported):
    folder, models, words = exported
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [str(OLD_PYTHON), "-c", LOADING, *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("4.")
    assert_loaded(models, folder, tolerance=2.1 / 255 / 0.25)


def test_what_has_no_counterpart_is_named(tmp_path, capsys):
    saved("pretraining", tmp_path / "ours", layer_norm_eps=1e-4)
    for target in ("swin", "timm"):
        assert run(tmp_path / "ours", tmp_path / target, "--to", target) == 0
        printed = capsys.readouterr().out
        assert "tensors of the decoder, which has no counterpart there" in printed
        assert printed.count("Compared on astronaut.png, as written") == 1
        assert "Changed: patch embedding: times 0.316, for a norm behind it with epsilon 1e-05, not 0.0001" in printed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stock_swin_computes_the_same_without_the_recipes_epsilon(dtype, tmp_path):
    """Of new weights, whose small patch embeddings make the most of it; the norm there has 1e-5 whatever is asked."""
    model = GreenSwinModel(tiny_config(layer_norm_eps=1e-6, embed_dim=32)).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    model = model.float().eval()
    assert run(tmp_path / "ours", tmp_path / "stock", "--to", "swin") == 0
    assert run(tmp_path / "stock", tmp_path / "back") == 0
    wanted = main_output(model, images(2))
    unchanged = SwinModel.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert (main_output(unchanged, images(2)) - wanted).abs().max() > 1e-3  # what the export must mend
    options = {"dtype": torch.float32}
    stock = SwinModel.from_pretrained(tmp_path / "stock", **options)
    for loaded in (stock, GreenSwinModel.from_pretrained(tmp_path / "back", **options)):
        torch.testing.assert_close(main_output(loaded.eval(), images(2)), wanted, rtol=0, atol=3e-4)


def test_an_epsilon_that_changes_the_outputs_is_refused(tmp_path, capsys):
    GreenSwinModel(tiny_config(layer_norm_eps=1e-3)).save_pretrained(tmp_path / "ours")
    for target in ("swin", "timm"):
        refused(capsys, "norms there have epsilon 1e-05", tmp_path / "ours", tmp_path / target, "--to", target)
        assert not (tmp_path / target).exists()


# timm


def timm_model(folder: Path) -> torch.nn.Module:
    """timm's own model of an exported folder; its loader misreads Swins without a head before 1.0.31."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=False)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict(tensors, strict=True)
    if model.num_classes:
        loaded = timm.create_model(f"local-dir:{folder}", pretrained=True).state_dict()
        assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("classifier", {}),
        ("classifier", {"window_size": 8, "image_size": 64, "num_channels": 2, "qkv_bias": False, "mlp_ratio": 2.0}),
        ("classifier", {"image_size": (64, 96), "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}),
        ("encoder", {"window_size": 8}),
        ("pretraining", {}),
    ],
    ids=["classifier", "other sizes", "not square", "clamped window", "pretraining"],
)
def test_an_exported_state_dict_equals_in_timms_own_forward(kind, changes, tmp_path):
    changes = {**changes, "num_labels": len(changes["id2label"])} if "id2label" in changes else changes
    ours = saved(kind, tmp_path / "ours", **changes)
    assert run(tmp_path / "ours", tmp_path / "timm", "--to", "timm") == 0
    theirs = timm_model(tmp_path / "timm")
    size = changes.get("image_size", 32)
    rows, columns = size if isinstance(size, tuple) else (size, size)
    pixels = images(2, channels=changes.get("num_channels", 3), rows=rows, columns=columns)
    with torch.no_grad():
        wanted = theirs(pixels) if kind == "classifier" else theirs.forward_features(pixels).flatten(1, 2)
    assert_equal_outputs(main_output(ours, pixels), wanted)
    if "id2label" in changes:
        assert json.loads((tmp_path / "timm" / "config.json").read_text())["label_names"] == ["a", "b"]
    settings = timm.data.resolve_model_data_config(theirs)
    assert tuple(settings["input_size"]) == (changes.get("num_channels", 3), rows, columns)


# There and back


def test_timm_in_and_out_gives_the_identical_tensors(tmp_path):
    theirs = timm_swin().state_dict()
    torch.save(theirs, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "ours", "--image-size", 32) == 0
    assert run(tmp_path / "ours", tmp_path / "timm", "--to", "timm") == 0
    back = load_file(tmp_path / "timm" / "model.safetensors")
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("stock_class", [SwinModel, SwinForImageClassification, SwinBackbone])
def test_stock_swin_in_and_out_gives_the_identical_tensors(stock_class, tmp_path):
    randomised(stock_class(stock_config(out_features=["stage2"]))).save_pretrained(tmp_path / "stock")
    assert run(tmp_path / "stock", tmp_path / "ours") == 0
    assert run(tmp_path / "ours", tmp_path / "back", "--to", "swin") == 0
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "back"))
    unused = {"swin.layernorm.weight", "swin.layernorm.bias"} if stock_class is SwinBackbone else set()
    index = {name for name in after if name.endswith("relative_position_index")}  # what transformers 4.x wants
    assert after.keys() - index == before.keys() - unused
    assert all(torch.equal(before[name], after[name]) for name in after.keys() - index)


def test_microsoft_to_stock_swin_in_one_command(tmp_path):
    theirs = timm_swin()
    torch.save({"model": microsoft_tensors(theirs)}, tmp_path / "swin.pth")
    assert run(tmp_path / "swin.pth", tmp_path / "swin", "--to", "swin", "--photo", PHOTO) == 0
    stock = SwinForImageClassification.from_pretrained(tmp_path / "swin").eval()
    with torch.no_grad():
        assert_equal_outputs(stock(images(2)).logits, theirs(images(2)))


def test_heads_are_dropped_on_the_way_out(tmp_path):
    ours = saved("classifier", tmp_path / "ours")
    assert run(tmp_path / "ours", tmp_path / "swin", "--to", "swin", "--drop-head") == 0
    stock, report = SwinModel.from_pretrained(tmp_path / "swin", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        states = stock.eval()(images(2)).last_hidden_state
        assert_equal_outputs(ours.swin(images(2)).last_hidden_state, states)


# What cannot go

FORBIDDEN = {
    "clamped window": ("classifier", {"window_size": 8}, "swin", "stock Swin cannot have stage 3", "--window-size 4"),
    "absolute positions": ("encoder", {"use_absolute_embeddings": True}, "timm", "no absolute position", "timm"),
    "activation": ("encoder", {"hidden_act": "relu"}, "timm", "activation gelu, this model relu", "timm"),
    "grid clamped on one side": ("encoder", {"image_size": (32, 64)}, "timm", "the 4x8 grid of stage 3", "square"),
    "backbone": ("backbone", {}, "timm", "a backbone has none", "export the encoder"),
}


@pytest.mark.parametrize("case", FORBIDDEN)
def test_an_export_that_geometry_forbids_says_so_and_writes_nothing(case, tmp_path, capsys):
    kind, changes, target, problem, remedy = FORBIDDEN[case]
    saved(kind, tmp_path / "ours", **changes)
    error = refused(capsys, tmp_path / "ours", tmp_path / "out", "--to", target)
    assert problem in error
    assert remedy in error
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_the_remedy_for_a_clamped_window_works(tmp_path):
    saved("classifier", tmp_path / "ours", window_size=8)
    assert run(tmp_path / "ours", tmp_path / "smaller", "--to", "swin", "--window-size", 4) == 0
    assert run(tmp_path / "ours", tmp_path / "larger", "--to", "swin", "--image-size", 64) == 0


def test_the_published_greenmim_goes_to_timm_and_stock_swin(tmp_path):
    for target in ("swin", "timm"):
        assert run(GOLDEN / "img128_win4.pth", tmp_path / target, "--to", target, "--drop-head") == 0
    theirs = timm_model(tmp_path / "timm")
    stock = SwinModel.from_pretrained(tmp_path / "swin").eval()
    pixels = images(1, rows=128, columns=128)
    with torch.no_grad():
        states = stock(pixels).last_hidden_state
        torch.testing.assert_close(states, theirs.forward_features(pixels).flatten(1, 2), atol=1e-4, rtol=1e-4)
