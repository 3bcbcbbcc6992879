"""ONNX files of the models: valid, with a batch of any size, and equal to PyTorch in onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from tiny import backbone_config, images, randomised, tiny_config

from green_swin_hf import GreenSwinBackbone, GreenSwinForImageClassification, GreenSwinForMaskedImageModeling

BATCH_SIZES = (1, 2, 5)
TWO_STAGES = {"depths": (2, 1), "num_heads": (1, 2)}  # one shifted block; exporting takes seconds for each block

# What torch's exporter and onnxscript warn of in their own code
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def classifier():
    return randomised(GreenSwinForImageClassification(tiny_config(**TWO_STAGES)))


def backbone():
    stages = {"out_features": ["stage1", "stage2"], "image_size": 32, **TWO_STAGES}
    return randomised(GreenSwinBackbone(backbone_config(**stages)))


def export(model, example, output_names, path):
    """A session on the file that `torch.onnx.export` writes, valid to ONNX's own checker."""
    dynamic = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=20,
        input_names=["pixel_values"],
        output_names=output_names,
        dynamic_shapes=dynamic,
        verbose=False,
    )
    program.save(path)
    onnx.checker.check_model(path, full_check=True)
    written = onnx.load(path)
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [20]
    assert not written.functions
    assert {node.domain for node in written.graph.node} == {""}  # standard operators alone: any runtime runs them
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def assert_equal_outputs(session, expected_of, size):
    for batch_size in BATCH_SIZES:
        pixels = images(batch_size, rows=size[0], columns=size[1], seed=batch_size)
        outputs = session.run(None, {"pixel_values": pixels.numpy()})
        with torch.no_grad():
            expected = expected_of(pixels)
        assert len(outputs) == len(expected)
        for actual, value in zip(outputs, expected, strict=True):
            np.testing.assert_allclose(actual, value.numpy(), rtol=1e-4, atol=1e-4)


# 26x42 px are 13x21 and 7x11 tokens: windows of 4 divide neither, nor does merging.
@pytest.mark.parametrize(
    ("size", "attention"), [((32, 32), "sdpa"), ((26, 42), "eager")], ids=["whole windows", "padded windows"]
)
def test_classifier(tmp_path, size, attention):
    model = classifier()
    model.set_attn_implementation(attention)
    session = export(model, images(2, rows=size[0], columns=size[1]), ["logits"], tmp_path / "classifier.onnx")
    assert [output.name for output in session.get_outputs()] == ["logits"]
    assert_equal_outputs(session, lambda pixels: [model(pixel_values=pixels).logits], size)


@pytest.mark.parametrize("size", [(32, 48), (26, 42)], ids=["whole windows", "padded windows"])
def test_backbone(tmp_path, size):
    model = backbone()
    example = images(2, rows=size[0], columns=size[1])
    session = export(model, example, model.out_features, tmp_path / "backbone.onnx")
    assert [output.name for output in session.get_outputs()] == ["stage1", "stage2"]
    assert_equal_outputs(session, lambda pixels: model(pixels).feature_maps, size)


def test_whole_images_through_the_pretraining_model(tmp_path):
    model = randomised(GreenSwinForMaskedImageModeling(tiny_config(**TWO_STAGES)))
    session = export(model, images(2), ["reconstruction", "logits"], tmp_path / "pretraining.onnx")

    def expected_of(pixels):
        outputs = model(pixel_values=pixels)
        return [outputs.reconstruction, outputs.logits]

    assert_equal_outputs(session, expected_of, (32, 32))
