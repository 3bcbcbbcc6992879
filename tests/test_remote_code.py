"""What leaves the package: its import, and its files as remote code beside saved weights."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from tiny import images, tiny_config

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)
from green_swin_hf.image_processing_green_swin import GreenSwinImageProcessor

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


def run_without(code: str, blocked: set[str], cwd: Path, offline: bool = True) -> str:
    """Output of `code` in another interpreter, in which these packages cannot be imported."""
    # a package laid over the environment (an older transformers) must be found there as well
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    source = PRELUDE.format(blocked=blocked, path=path) + code
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HOME": str(cwd / "cache"),
        "OMP_NUM_THREADS": "1",
    }
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


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder saved by each class, with a processor for grey images, and the outputs of the models."""
    folder, expected = tmp_path_factory.mktemp("saved"), {}
    torch.manual_seed(0)
    processor = GreenSwinImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.3], image_std=[0.4], do_convert_rgb=None
    )
    for auto_class, model_class in MODELS.items():
        model = model_class(tiny_config(num_channels=1)).eval()
        model.save_pretrained(folder / auto_class)
        processor.save_pretrained(folder / auto_class)
        expected[auto_class] = model(images(2, 1)).to_tuple()
    picture = Image.radial_gradient("L").convert("RGB")
    picture.save(folder / "picture.png")
    pixels = processor(picture, return_tensors="pt").pixel_values
    torch.save({"images": images(2, 1), "pixels": pixels, **expected}, folder / "expected.pt")
    return folder


def test_saved_folders_load_where_the_package_is_not_installed(saved):
    code = f"""
import torch, transformers

def flat(values):
    return [t for value in values for t in (value if isinstance(value, tuple) else (value,))]

for auto_class in (transformers.AutoConfig, transformers.AutoModel, transformers.AutoImageProcessor):
    try:  # nothing runs unasked
        auto_class.from_pretrained("AutoModel", trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error)
    else:
        raise AssertionError(auto_class)
assert not any(name.startswith("transformers_modules.") for name in sys.modules)

expected = torch.load("expected.pt")
trusted = {{"trust_remote_code": True}}
for folder in {list(MODELS)!r}:
    for name in {list(MODELS)!r}:  # whichever class was saved
        model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True, **trusted)
        assert type(model).__module__.startswith("transformers_modules"), type(model)
        differing = {{key for keys in report.values() for key in keys}}
        assert all(key.startswith(("decoder.", "classifier.")) for key in differing), report  # heads only
        if name == folder:
            assert not differing, report
            outputs = flat(model(expected["images"]).to_tuple())
            errors = [(a - b).abs().max().item() for a, b in zip(outputs, flat(expected[name]), strict=True)]
            assert max(errors) <= 1e-6, errors
    config = transformers.AutoConfig.from_pretrained(folder, **trusted)
    assert (type(config).__name__, config.mask_unit_size) == ("GreenSwinConfig", 8)
    processor = transformers.AutoImageProcessor.from_pretrained(folder, **trusted)
    pixels = processor(transformers.image_utils.load_image("picture.png"), return_tensors="pt").pixel_values
    assert torch.equal(pixels, expected["pixels"])
    print(folder, type(model).__name__, type(processor).__name__)

features = transformers.pipeline("image-feature-extraction", model="AutoModel", **trusted)("picture.png")
classify = transformers.pipeline("image-classification", model="AutoModelForImageClassification", **trusted)
answers = classify("picture.png")
print(len(features[0]), len(features[0][0]), sorted(answer["label"] for answer in answers))

model.save_pretrained("again")  # a copy of a copy
again = transformers.AutoModel.from_pretrained("again", **trusted)
print(torch.equal(again(expected["images"])[0], model.swin(expected["images"])[0]))
"""
    lines = run_without(code, {"green_swin_hf"}, saved).splitlines()
    assert lines == [
        *(f"{name} GreenSwinForImageClassification GreenSwinImageProcessor" for name in MODELS),
        "16 32 ['LABEL_0', 'LABEL_1', 'LABEL_2', 'LABEL_3', 'LABEL_4']",
        "True",
    ]


@pytest.mark.parametrize("trusted", [None, True])
def test_with_the_package_no_code_of_a_folder_is_used(saved, tmp_path, trusted):
    folder = shutil.copytree(saved / "AutoModelForImageClassification", tmp_path / "folder")
    for path in folder.glob("*.py"):
        path.write_text("raise RuntimeError('code of the folder was run')\n")
    for auto_class, model_class in MODELS.items():
        assert type(getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=trusted)) is model_class
    assert type(transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trusted)) is GreenSwinConfig
    processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=trusted)
    assert type(processor) is GreenSwinImageProcessor
    classify = transformers.pipeline("image-classification", model=str(folder), trust_remote_code=trusted)
    assert type(classify.model) is GreenSwinForImageClassification
    assert len(classify(str(saved / "picture.png"))) == 5


def test_the_code_of_a_folder_is_whole_and_names_no_module_of_the_package(saved):
    """Remote code is a flat folder: every relative import has its file there."""
    for folder in (saved / name for name in MODELS):
        present = {path.stem for path in folder.glob("*.py")}
        assert {"configuration_green_swin", "modeling_green_swin", "image_processing_green_swin"} <= present
        for path in folder.glob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert set(re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)) <= present, path
            assert not re.search(r"^\s*(?:from|import) green_swin_hf", text, flags=re.MULTILINE), path
