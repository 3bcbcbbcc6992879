"""PEFT's LoRA on the classifier: what it trains, what it saves, and that it comes back."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import images, randomised, tiny_config
from transformers import AutoModelForImageClassification, Trainer, TrainingArguments

from green_swin_hf import GreenSwinForImageClassification, GreenSwinForMaskedImageModeling

LABELS = torch.tensor([0, 3, 4, 1])


@pytest.fixture
def pretrained(tmp_path):
    """A pretraining folder: the classifier made from it has a new head."""
    folder = tmp_path / "pretrain"
    randomised(GreenSwinForMaskedImageModeling(tiny_config())).save_pretrained(folder)
    return folder


def load_base(folder):
    return GreenSwinForImageClassification.from_pretrained(folder, num_labels=5)


def adapt(base):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    return get_peft_model(base, config)


def trainable(model):
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def train_one_step(model):
    optimizer = torch.optim.SGD(trainable(model).values(), lr=1.0)
    model.train()(pixel_values=images(4), labels=LABELS).loss.backward()
    optimizer.step()
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(pixel_values=images(3, seed=7)).logits


def is_adapter(name):
    return "lora_" in name or "modules_to_save" in name


def test_queries_values_and_head_train_and_nothing_else(pretrained):
    model = adapt(load_base(pretrained))
    attention = "base_model.model.swin.encoder.layers.{}.blocks.{}.attention.self.{}.lora_{}.default.weight"
    expected = {
        attention.format(stage, block, projection, matrix)
        for stage, depth in enumerate(tiny_config().depths)
        for block in range(depth)
        for projection in ("query", "value")
        for matrix in "AB"
    }
    head = "base_model.model.classifier.modules_to_save.default"
    assert trainable(model).keys() == expected | {f"{head}.weight", f"{head}.bias"}


def test_a_step_changes_what_trains_alone(pretrained):
    model = adapt(load_base(pretrained))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_one_step(model)
    changed = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    # The first step leaves the A matrices: their gradient passes B, which starts at zero.
    assert changed == {name for name in trainable(model) if "lora_A" not in name}
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    train_one_step(model)
    assert {name for name, value in model.named_parameters() if not torch.equal(value, before[name])} == {
        *trainable(model)
    }


def test_the_saved_adapter_is_small_and_gives_the_same_on_the_base(pretrained, tmp_path):
    untrained = logits(adapt(load_base(pretrained)))
    model = train_one_step(adapt(load_base(pretrained)))
    expected = logits(model)
    assert not torch.allclose(expected, untrained, atol=1e-2)
    model.save_pretrained(tmp_path / "adapter")
    adapter, whole = tmp_path / "adapter" / "adapter_model.safetensors", pretrained / "model.safetensors"
    assert adapter.stat().st_size < whole.stat().st_size / 8
    restored = PeftModel.from_pretrained(load_base(pretrained), tmp_path / "adapter").eval()
    assert torch.equal(logits(restored), expected)


def test_merged_it_is_a_plain_classifier_that_saves_and_loads(pretrained, tmp_path):
    model = train_one_step(adapt(load_base(pretrained)))
    expected, names = logits(model), load_base(pretrained).state_dict().keys()
    merged = model.merge_and_unload()
    assert isinstance(merged, GreenSwinForImageClassification)
    assert merged.state_dict().keys() == names
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    restored = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(restored), logits(merged))


# transformers 5.23 renames gradient checkpointing, peft asks by the old name
@pytest.mark.filterwarnings("ignore:.*removed in v6:FutureWarning")
def test_trainer_trains_it_and_saves_the_adapter_alone(pretrained, tmp_path):
    model = adapt(load_base(pretrained))
    frozen = {name: value.clone() for name, value in model.state_dict().items() if not is_adapter(name)}
    dataset = [{"pixel_values": image, "labels": int(label)} for image, label in zip(images(4), LABELS, strict=True)]
    steps = {"per_device_train_batch_size": 2, "max_steps": 2, "logging_steps": 1, "learning_rate": 0.1}
    run = tmp_path / "run"
    arguments = TrainingArguments(str(run), eval_strategy="epoch", report_to="none", use_cpu=True, **steps)
    trainer = Trainer(model, arguments, train_dataset=dataset, eval_dataset=dataset)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
    for name, value in frozen.items():
        assert torch.equal(model.state_dict()[name], value), name
    trainer.save_model()
    assert (run / "adapter_model.safetensors").is_file()
    assert not (run / "model.safetensors").exists()
    restored = PeftModel.from_pretrained(load_base(pretrained), run).eval()
    torch.testing.assert_close(logits(restored), logits(model.eval()), rtol=0, atol=0)
