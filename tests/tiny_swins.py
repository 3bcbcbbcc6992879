"""Tiny Swins of timm and transformers with the sizes of `tiny_config`, and conversions of them, for the tests."""

import argparse
import re
from pathlib import Path
from unittest import mock

import pytest
import timm
import torch
from test_examples import ROOT, load_script
from tiny import randomised
from transformers import SwinConfig, SwinForImageClassification

convert = load_script(ROOT / "examples" / "convert.py")
GOLDEN = Path(__file__).parent / "fixtures" / "golden"
PHOTO = ROOT / "examples" / "data" / "photos" / "chelsea.png"


def timm_swin(**changes) -> torch.nn.Module:
    """timm's own model of the sizes of `tiny_config`."""
    sizes = {"img_size": 32, "patch_size": 2, "embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", **{**sizes, "window_size": 4, "num_classes": 5, **changes}
    )
    return randomised(model)


def stock_config(**changes) -> SwinConfig:
    fields = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2, 2], "num_heads": [1, 2, 4]}
    fields |= {"window_size": 4, "encoder_stride": 8, "num_labels": 5}
    return SwinConfig(**{**fields, **changes})


def microsoft_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """timm's weights as Microsoft's files have them: merging at the end of a stage, plain head, buffers."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        name = re.sub(r"layers\.(\d)\.downsample", lambda found: f"layers.{int(found[1]) - 1}.downsample", name)
        tensors[name.replace("head.fc", "head")] = tensor
    for name, window in (("layers.0", 16), ("layers.1", 4)):
        tensors[f"{name}.blocks.1.attn_mask"] = torch.zeros(window, 16, 16)
        tensors[f"{name}.blocks.1.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    return tensors


def saved_stock(folder: Path, stock_class=SwinForImageClassification) -> Path:
    """A folder of stock Swin."""
    randomised(stock_class(stock_config())).save_pretrained(folder)
    return folder


def run(*words) -> int:
    """`convert.py` with these words, without waiting for the disk."""
    with mock.patch("os.fsync"):
        return convert.main([str(word) for word in words])


def refused(capsys, *words) -> str:
    """The one line that a refused command leaves."""
    with pytest.raises(SystemExit, match="2"):
        run(*words)
    error = capsys.readouterr().err
    assert error.startswith("convert.py: error: ")
    assert error.count("\n") == 1
    return error


@torch.no_grad()
def assert_equal_outputs(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def golden() -> dict[str, torch.Tensor]:
    """Tensors of a published GreenMIM."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "img128_win4.pth", weights_only=True)["model"]
