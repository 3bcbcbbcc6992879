"""What leaves the package: its import, and its files as remote code beside saved weights."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import images, tiny_config

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)

MODELS = {  # not AutoBackbone, which asks the Hub first
    "AutoModel": GreenSwinModel,
    "AutoModelForMaskedImageModeling": GreenSwinForMaskedImageModeling,
    "AutoModelForImageClassification": GreenSwinForImageClassification,
}

# `-I` leaves out the working directory, PYTHONPATH and user packages; the filter also an editable install.
PRELUDE = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {blocked!r} else self.finder.find_spec(name, path, target)

sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path[:0] = {path!r}
"""


def run_without(code: str, blocked: set[str], cwd: Path) -> str:
    """Output of `code` in another interpreter, in which these packages cannot be imported."""
    # a package laid over the environment (an older transformers) must be found there as well
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    source = PRELUDE.format(blocked=blocked, path=path) + code
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", source], capture_output=True, text=True, cwd=cwd, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_importing_needs_torch_and_transformers_only(tmp_path):
    others = {"PIL", "torchvision", "datasets", "accelerate", "evaluate", "matplotlib", "scipy", "pandas"}
    code = f"""
sys.path.insert(0, {str(Path(__file__).resolve().parents[1])!r})
import torch, green_swin_hf
from transformers import AutoModelForMaskedImageModeling
config = green_swin_hf.GreenSwinConfig(image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 2],
    window_size=4, decoder_hidden_size=16, decoder_num_attention_heads=2, decoder_intermediate_size=16)
model = AutoModelForMaskedImageModeling.from_config(config)
print(model.train()(torch.rand(2, 3, 32, 32)).loss.isfinite().item())
"""
    assert run_without(code, others, tmp_path).strip() == "True"


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """A folder with weights and code for each class, and the outputs of the models."""
    expected = {}
    for auto_class, model_class in MODELS.items():
        config = tiny_config()
        monkeypatch.setattr(GreenSwinConfig, "_auto_class", "AutoConfig")
        monkeypatch.setattr(model_class, "_auto_class", auto_class)
        config.auto_map = {name: f"modeling_green_swin.{other.__name__}" for name, other in MODELS.items()}
        model = model_class(config).eval()
        model.save_pretrained(tmp_path / auto_class)
        expected[auto_class] = model(images(2)).to_tuple()
    torch.save({"images": images(2), **expected}, tmp_path / "expected.pt")
    return tmp_path


def test_saved_folders_load_where_the_package_is_not_installed(saved):
    code = f"""
import torch, transformers

def flat(values):
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]

expected = torch.load("expected.pt")
for name in {list(MODELS)!r}:
    load = getattr(transformers, name).from_pretrained
    model, report = load(name, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    outputs = flat(model(expected["images"]).to_tuple())
    errors = [(a - b).abs().max().item() for a, b in zip(outputs, flat(expected[name]), strict=True)]
    print(name, type(model).__module__.startswith("transformers_modules"), max(errors) <= 1e-6)
encoder = transformers.AutoModel.from_pretrained("AutoModelForImageClassification", trust_remote_code=True)
print(type(encoder).__name__)
"""
    lines = run_without(code, {"green_swin_hf"}, saved).splitlines()
    assert lines == [f"{name} True True" for name in MODELS] + ["GreenSwinModel"]
