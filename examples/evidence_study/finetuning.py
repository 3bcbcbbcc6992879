"""Fine-tuning until the validation curve is flat, by one rule for every arm, or for a fixed number of updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from green_swin_hf import GreenSwinForImageClassification
from green_swin_hf.data import seeded_generator
from green_swin_hf.optimization import build_optimizer, cosine_schedule

from .pretraining import MAX_GRAD_NORM, Stopwatch
from .recipe import EvidenceRecipe, StudyRecipe
from .tasks import Split, Task, shuffled

_HEAD, _ORDER, _IMAGES, _DROP_PATH = 11, 12, 13, 14
WARMUP_STEPS = 50
LOWER = 0.1
LOOKS_IN_A_PASS = 4
EVALUATION_BATCH = 250


@dataclass
class FlatCurve:
    """Watches a validation curve: the learning rate falls once when it is flat, and the next time training ends.

    Flat is: no value above the best one in `patience` looks, counted anew after the fall.

    >>> rule = FlatCurve(patience=2)
    >>> [rule.look(value) for value in (0.5, 0.6, 0.6, 0.5, 0.7, 0.7, 0.6)]
    ['better', 'better', 'go on', 'lower', 'better', 'go on', 'stop']
    """

    patience: int
    best: float = -1.0
    waited: int = 0
    has_fallen: bool = False

    def look(self, value: float) -> str:
        """What to do after this value: "better" (keep these weights), "go on", "lower" or "stop"."""
        if value > self.best:
            self.best, self.waited = value, 0
            return "better"
        self.waited += 1
        if self.waited < self.patience:
            return "go on"
        if self.has_fallen:
            return "stop"
        self.has_fallen, self.waited = True, 0
        return "lower"


def build_classifier(
    recipe: StudyRecipe, num_classes: int, seed: int, pretrained: Path | None
) -> GreenSwinForImageClassification:
    """A classifier on the encoder of a pretrained folder (GreenSwin's or stock Swin's), or on random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, _HEAD).initial_seed())
        if pretrained is None:
            config = recipe.model_config()
            config.update({"num_labels": num_classes, "drop_path_rate": recipe.drop_path_rate})
            return GreenSwinForImageClassification(config)
        return GreenSwinForImageClassification.from_pretrained(
            pretrained, num_labels=num_classes, drop_path_rate=recipe.drop_path_rate
        )


def finetune(
    model: nn.Module,
    recipe: EvidenceRecipe,
    task: Task,
    labelled: Split,
    *,
    learning_rate: float,
    layer_decay: float,
    seed: int,
    device: torch.device,
    title: str = "",
) -> dict[str, Any]:
    """Train `model` until its validation curve is flat; it is left with the weights that were best on validation.

    Returns:
        `validation` and `test` accuracy of those weights, `best_step` they are of, `steps` in all, `is_flat` (False:
        ended by the recipe's `max_steps`), the validation `curve`, and the time.
    """
    model.to(device)
    optimizer = build_optimizer(
        model, learning_rate, weight_decay=recipe.weight_decay, layer_decay=layer_decay, betas=(0.9, 0.999)
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    rule, curve, stopwatch = FlatCurve(recipe.patience), [], Stopwatch()
    best_step, kept = 0, {}
    batch_size = min(recipe.finetune_batch_size, len(labelled))
    every = updates_between_looks(recipe, len(labelled) // batch_size)
    batches = _batches(task, labelled, batch_size, seed, device)
    bar = tqdm(total=recipe.max_steps, desc=title, mininterval=1, leave=False)
    with torch.random.fork_rng():
        torch.manual_seed(seeded_generator(seed, _DROP_PATH).initial_seed())
        for step in range(1, recipe.max_steps + 1):
            factor = min(1.0, step / WARMUP_STEPS) * (LOWER if rule.has_fallen else 1.0)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            _update(model, optimizer, *next(batches))
            bar.update()
            if step % every and step < recipe.max_steps:
                continue
            curve.append(accuracy(model, task, task.validation, device))
            bar.set_postfix(validation=f"{curve[-1]:.3f}", refresh=False)
            decision = rule.look(curve[-1])
            if decision == "better":
                best_step, kept = step, {name: value.clone() for name, value in model.state_dict().items()}
            elif decision == "lower":
                model.load_state_dict(kept)  # the small steps start at the best point of the large ones
            elif decision == "stop":
                break
    bar.close()
    model.load_state_dict(kept)
    return {
        "validation": rule.best,
        "test": accuracy(model, task, task.test, device),
        "best_step": best_step,
        "steps": step,
        "is_flat": decision == "stop",
        "curve": [round(value, 4) for value in curve],
        **stopwatch.read(),
    }


def finetune_for(
    updates: int,
    model: nn.Module,
    recipe: StudyRecipe,
    task: Task,
    labelled: Split,
    *,
    learning_rate: float,
    seed: int,
    device: torch.device,
    title: str = "",
) -> dict[str, Any]:
    """Train `model` for a fixed number of updates, the learning rate falling to zero; nothing is chosen on the way.

    Returns:
        `test` accuracy at the end, `steps`, and the time.
    """
    model.to(device)
    optimizer = build_optimizer(model, learning_rate, weight_decay=recipe.weight_decay, betas=(0.9, 0.999))
    schedule = cosine_schedule(optimizer, min(WARMUP_STEPS, updates), updates)
    batches = _batches(task, labelled, min(recipe.finetune_batch_size, len(labelled)), seed, device)
    stopwatch = Stopwatch()
    with torch.random.fork_rng():
        torch.manual_seed(seeded_generator(seed, _DROP_PATH).initial_seed())
        for _ in tqdm(range(updates), desc=title, mininterval=1, leave=False):
            _update(model, optimizer, *next(batches))
            schedule.step()
    return {"test": accuracy(model, task, task.test, device), "steps": updates, **stopwatch.read()}


def updates_between_looks(recipe: EvidenceRecipe, updates_of_a_pass: int) -> int:
    """`evaluate_every`, or as many as make `LOOKS_IN_A_PASS` where there are more labels.

    So a curve has some passes over the labels to rise again before it counts as flat, however many they are.
    """
    return max(recipe.evaluate_every, updates_of_a_pass // LOOKS_IN_A_PASS)


def _batches(
    task: Task, labelled: Split, batch_size: int, seed: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pixels and labels without end, all of one size; the rest of a pass is left out."""
    generator, epoch = seeded_generator(seed, _IMAGES), 0
    while True:
        order = shuffled(len(labelled), seed + _ORDER, epoch)
        for start in range(0, len(labelled) - batch_size + 1, batch_size):
            part = labelled.rows(order[start : start + batch_size])
            yield task.varied(part.images, generator).to(device), part.labels.to(device)
        epoch += 1


def _update(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor, labels: Tensor) -> None:
    model.train()
    loss = cross_entropy(model(pixel_values=pixels).logits, labels)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def accuracy(model: nn.Module, task: Task, split: Split, device: torch.device) -> float:
    """Share of a split's images whose class gets the largest logit."""
    model.eval()
    right = 0
    for images, labels in zip(split.images.split(EVALUATION_BATCH), split.labels.split(EVALUATION_BATCH), strict=True):
        logits = model(pixel_values=task.pixels(images).to(device)).logits
        right += int((logits.argmax(-1).cpu() == labels).sum())
    return right / len(split)
