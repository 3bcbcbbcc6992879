"""Who uses the models: detection and segmentation heads on the backbone, Trainer, pipelines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny import backbone_config, images, masks, tiny_config
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    MaskFormerConfig,
    MaskFormerForInstanceSegmentation,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    VisionEncoderDecoderModel,
    ViTImageProcessor,
    pipeline,
)

from green_swin_hf import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
)

# transformers 5.23 renames gradient checkpointing, 5.17 does not know the new name yet
pytestmark = pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")

DETR_SIZES = {
    "use_timm_backbone": False,
    "use_pretrained_backbone": False,
    "backbone": None,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
    "num_labels": 3,
}


def detection_labels(count: int) -> list[dict]:
    label = {"class_labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.3, 0.2, 0.2]])}
    return [label] * count


def instance_labels(count: int, rows: int, columns: int) -> dict:
    mask = torch.zeros(2, rows, columns)
    mask[0, : rows // 2] = mask[1, rows // 2 :] = 1
    return {"mask_labels": [mask] * count, "class_labels": [torch.tensor([0, 2])] * count}


def make_upernet():
    config = UperNetConfig(
        backbone_config=backbone_config(),
        hidden_size=8,
        pool_scales=[1, 2],
        auxiliary_channels=8,
        auxiliary_in_channels=32,
        num_labels=3,
    )
    return UperNetForSemanticSegmentation(config), lambda n, h, w: {"labels": torch.randint(0, 3, (n, h, w))}


def make_maskformer():
    decoder = DetrConfig(backbone_config=backbone_config(), **DETR_SIZES)
    config = MaskFormerConfig(
        backbone_config=backbone_config(),
        decoder_config=decoder,
        fpn_feature_size=32,
        mask_feature_size=32,
        num_labels=3,
    )
    return MaskFormerForInstanceSegmentation(config), instance_labels


def make_mask2former():
    config = Mask2FormerConfig(
        backbone_config=backbone_config(),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=4,
        train_num_points=32,
        num_labels=3,
    )
    return Mask2FormerForUniversalSegmentation(config), instance_labels


def make_detr():
    config = DetrConfig(backbone_config=backbone_config(out_features=["stage4"]), **DETR_SIZES)
    return DetrForObjectDetection(config), lambda n, h, w: {"labels": detection_labels(n)}


def make_deformable_detr():
    backbone = backbone_config(out_features=["stage2", "stage3", "stage4"])
    config = DeformableDetrConfig(backbone_config=backbone, num_feature_levels=4, **{**DETR_SIZES, "decoder_layers": 2})
    return DeformableDetrForObjectDetection(config), lambda n, h, w: {"labels": detection_labels(n)}


def make_vision_encoder_decoder():
    bert = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        is_decoder=True,
        add_cross_attention=True,
    )
    model = VisionEncoderDecoderModel(encoder=GreenSwinModel(backbone_config()), decoder=BertLMHeadModel(bert))
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    model.generation_config.decoder_start_token_id, model.generation_config.pad_token_id = 1, 0
    return model, lambda n, h, w: {"labels": torch.randint(2, 20, (n, 5))}


CONSUMERS = {
    "upernet": make_upernet,
    "maskformer": make_maskformer,
    "mask2former": make_mask2former,
    "detr": make_detr,
    "deformable_detr": make_deformable_detr,
    "vision_encoder_decoder": make_vision_encoder_decoder,
}


def first_logits(outputs) -> torch.Tensor:
    key = next(key for key in ("logits", "class_queries_logits") if outputs.get(key) is not None)
    return outputs[key]


def our_module(model: nn.Module) -> GreenSwinBackbone | GreenSwinModel:
    """The GreenSwin inside."""
    return next(module for module in model.modules() if isinstance(module, (GreenSwinBackbone, GreenSwinModel)))


def our_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(our_module(model).named_parameters())


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_consumers_train_and_survive_their_files(consumer, tmp_path):
    model, labels = CONSUMERS[consumer]()
    model.train()
    for rows, columns in ((64, 64), (64, 96)):
        loss = model(pixel_values=images(2, rows=rows, columns=columns), **labels(2, rows, columns)).loss
        assert loss.isfinite()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in our_parameters(model).items()}
    assert [name for name, gradient in gradients.items() if gradient is None or not gradient.isfinite().all()] == []
    # A bias of all keys changes no softmax; everything else moves the loss.
    assert [name for name, value in gradients.items() if not value.any() and not name.endswith("key.bias")] == []

    model.eval().save_pretrained(tmp_path)
    loaded, info = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    given = {"pixel_values": images(1, rows=96, columns=64)}
    if consumer == "vision_encoder_decoder":
        given["decoder_input_ids"] = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        ours, theirs = first_logits(loaded.eval()(**given)), first_logits(model(**given))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    saved_names = {name: parameter.shape for name, parameter in our_parameters(loaded).items()}
    assert saved_names == {name: parameter.shape for name, parameter in our_parameters(model).items()}


OUTPUT_NAMES = ("logits", "pred_boxes", "class_queries_logits", "masks_queries_logits")
LOAD_IN_A_NEW_PROCESS = f"""if True:
    import sys, torch, transformers, green_swin_hf
    from pathlib import Path
    for folder in Path(sys.argv[1]).iterdir():
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model, info = kind.from_pretrained(folder, output_loading_info=True)
        with torch.no_grad():
            outputs = model.eval()(**torch.load(folder / "given.pt"))
        tensors = {{name: outputs[name] for name in {OUTPUT_NAMES} if outputs.get(name) is not None}}
        problems = [name for entries in info.values() for name in entries]
        torch.save((tensors, problems), folder / "fresh.pt")
"""


def pretrained_composite(consumer: str, pretrained: Path, folder: Path) -> nn.Module:
    """The composite with the weights of a pretrained folder in its GreenSwin."""
    model, _ = CONSUMERS[consumer]()
    if consumer != "vision_encoder_decoder":
        inside = our_module(model)
        loaded = GreenSwinBackbone.from_pretrained(pretrained, out_features=inside.config.out_features)
        inside.load_state_dict(loaded.state_dict())
        return model
    model.decoder.save_pretrained(folder / "bert")
    joined = VisionEncoderDecoderModel.from_encoder_decoder_pretrained(str(pretrained), str(folder / "bert"))
    joined.config.decoder_start_token_id, joined.config.pad_token_id = 1, 0
    return joined


@pytest.fixture(scope="module")
def composites(tmp_path_factory):
    """Of every consumer: its outputs here, and what a new process makes of its folder; and the pretrained weights."""
    root = tmp_path_factory.mktemp("composites")
    torch.manual_seed(0)
    pretrained = GreenSwinForMaskedImageModeling(backbone_config(out_features=None))
    pretrained.save_pretrained(root / "pretrained")
    here = {}
    for consumer in CONSUMERS:
        model = pretrained_composite(consumer, root / "pretrained", root).eval()
        folder = root / "saved" / consumer
        model.save_pretrained(folder)
        given = {"pixel_values": images(2, rows=96, columns=64)}
        if consumer == "vision_encoder_decoder":
            given["decoder_input_ids"] = torch.tensor([[1, 2, 3], [4, 5, 6]])
        torch.save(given, folder / "given.pt")
        with torch.no_grad():
            here[consumer] = model(**given)
    paths = os.pathsep.join([str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", LOAD_IN_A_NEW_PROCESS, str(root / "saved")]
    variables = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    fresh = {consumer: torch.load(root / "saved" / consumer / "fresh.pt") for consumer in CONSUMERS}
    return here, fresh, pretrained.swin.state_dict(), root / "saved"


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_a_composite_with_pretrained_weights_is_the_same_in_a_new_process(consumer, composites):
    here, fresh, pretrained, folder = composites
    tensors, problems = fresh[consumer]
    assert problems == []
    assert tensors
    for name, value in tensors.items():
        torch.testing.assert_close(value, here[consumer][name], atol=1e-6, rtol=1e-5, msg=name)
    kind = type(CONSUMERS[consumer]()[0])
    inside = our_module(kind.from_pretrained(folder / consumer))
    weights = inside.state_dict() if isinstance(inside, GreenSwinModel) else inside.swin.state_dict()
    assert len(weights) > 50
    for name, value in weights.items():
        torch.testing.assert_close(value, pretrained[name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("size", [(50, 70), (65, 33)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_upernet_takes_sizes_that_nothing_divides(size):
    model, labels = make_upernet()
    outputs = model.eval()(images(1, rows=size[0], columns=size[1]), **labels(1, *size))
    assert outputs.loss.isfinite()
    assert outputs.logits.shape == (1, 3, *size)


def test_vision_encoder_decoder_generates():
    model, _ = make_vision_encoder_decoder()
    tokens = model.eval().generate(images(2, rows=64, columns=64), max_new_tokens=4, do_sample=False)
    assert tokens.shape[0] == 2


class PyramidOnGreenSwin(nn.Module):
    """A backbone as torchvision's detectors take it: images to a dictionary of maps of equal width."""

    out_channels = 16

    def __init__(self, backbone: GreenSwinBackbone):
        super().__init__()
        self.body = backbone
        self.pyramid = FeaturePyramidNetwork(list(backbone.channels), self.out_channels, LastLevelMaxPool())

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(pixel_values).feature_maps
        return self.pyramid({str(level): feature_map for level, feature_map in enumerate(maps)})


def test_mask_rcnn_with_a_pyramid_trains_and_detects():
    backbone = PyramidOnGreenSwin(GreenSwinBackbone(backbone_config()))
    anchors = AnchorGenerator(sizes=((8,), (16,), (32,), (64,), (128,)), aspect_ratios=((1.0,),) * 5)
    detector = MaskRCNN(
        backbone, num_classes=3, rpn_anchor_generator=anchors, min_size=64, max_size=128, box_detections_per_img=5
    )
    pictures = [torch.rand(3, 60, 90), torch.rand(3, 80, 50)]
    targets = []
    for picture in pictures:
        mask = torch.zeros(1, *picture.shape[1:], dtype=torch.uint8)
        mask[:, 10:40, 10:40] = 1
        targets.append({"boxes": torch.tensor([[10.0, 10.0, 40.0, 40.0]]), "labels": torch.tensor([1]), "masks": mask})
    losses = detector(pictures, targets)
    assert {"loss_mask", "loss_box_reg", "loss_classifier"} <= set(losses)
    sum(losses.values()).backward()
    assert [name for name, value in backbone.body.named_parameters() if value.grad is None] == []
    detections = detector.eval()(pictures)
    assert all(set(found) == {"boxes", "labels", "scores", "masks"} for found in detections)


# Trainer


class Samples(torch.utils.data.Dataset):
    """Six fixed samples of a dictionary of tensors with the samples first."""

    def __init__(self, **columns: torch.Tensor):
        self.columns = columns

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


def patch_masks(count: int) -> torch.Tensor:
    """As `run_mim.py` makes them: int64, one row for each image, one entry for each patch."""
    units = masks("per_image", count).view(count, 4, 4).long()
    return units.repeat_interleave(4, dim=1).repeat_interleave(4, dim=2).flatten(1)


def pretraining_case():
    columns = {"pixel_values": images(6), "bool_masked_pos": patch_masks(6)}
    return GreenSwinForMaskedImageModeling(tiny_config(drop_path_rate=0.1)), Samples(**columns), ["bool_masked_pos"]


def classification_case():
    columns = {"pixel_values": images(6), "labels": torch.arange(6) % 5}
    return GreenSwinForImageClassification(tiny_config(drop_path_rate=0.1)), Samples(**columns), None


def trainer_for(case, folder, steps: int, **changes) -> Trainer:
    torch.manual_seed(0)
    model, samples, label_names = case()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        max_steps=steps,
        save_steps=2,
        save_strategy="steps",
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,  # the last batch is smaller
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        remove_unused_columns=False,
        label_names=label_names,
        report_to="none",
        disable_tqdm=True,
        **changes,
    )
    return Trainer(model, arguments, train_dataset=samples, eval_dataset=samples)


each_case = pytest.mark.parametrize(
    "case", [pretraining_case, classification_case], ids=["pretraining", "classification"]
)


@each_case
def test_trainer_evaluates_and_trains(case, tmp_path):
    trainer = trainer_for(case, tmp_path, steps=2)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    assert trainer.evaluate()["eval_loss"] > 0
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
    assert trainer.evaluate()["eval_loss"] > 0
    predictions = trainer.predict(trainer.eval_dataset).predictions
    first = predictions[0] if isinstance(predictions, tuple) else predictions
    assert len(first) == 6


@each_case
def test_trainer_resumes_exactly(case, tmp_path):
    whole = trainer_for(case, tmp_path / "whole", steps=4)
    whole.train()
    resumed = trainer_for(case, tmp_path / "resumed", steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert resumed.state.global_step == 4
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name)


@each_case
def test_trainer_trains_in_bf16_with_gradient_checkpointing(case, tmp_path):
    trainer = trainer_for(
        case, tmp_path, steps=1, bf16=True, gradient_checkpointing=True, gradient_accumulation_steps=2
    )
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


# Pipelines


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(torch.randint(0, 256, (40, 52, 3), dtype=torch.uint8).numpy())


def with_processor(model, folder) -> str:
    model.save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}, do_convert_rgb=True).save_pretrained(folder)
    return str(folder)


def test_image_classification_pipeline(tmp_path, picture):
    names = dict(enumerate(["ant", "bee", "cow", "dog", "eel"]))
    model = GreenSwinForImageClassification(tiny_config(id2label=names, label2id={v: k for k, v in names.items()}))
    classify = pipeline("image-classification", model=with_processor(model, tmp_path), device="cpu")
    assert type(classify.model) is GreenSwinForImageClassification
    scores = classify([picture, picture.convert("L")], top_k=5)
    assert [{score["label"] for score in image} for image in scores] == [set(names.values())] * 2
    assert sum(score["score"] for score in scores[0]) == pytest.approx(1, abs=1e-4)


def test_image_feature_extraction_pipeline(tmp_path, picture):
    folder = with_processor(GreenSwinForMaskedImageModeling(tiny_config()), tmp_path)
    extract = pipeline("image-feature-extraction", model=folder, device="cpu")
    assert type(extract.model) is GreenSwinModel
    assert torch.tensor(extract(picture)).shape == (1, 16, 32)
    pooled = pipeline("image-feature-extraction", model=folder, device="cpu", pool=True)
    assert torch.tensor(pooled(picture)).shape == (1, 32)
