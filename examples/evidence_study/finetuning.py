"""Fine-tuning until the validation curve is flat, by one rule for every arm, or for a fixed number of updates."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm.auto import tqdm

from green_swin_hf import GreenSwinForImageClassification
from green_swin_hf.checkpointing import random_state, restore_random_state
from green_swin_hf.data import seeded_generator
from green_swin_hf.optimization import build_optimizer, cosine_schedule

from .pretraining import MAX_GRAD_NORM, Stopwatch
from .recipe import EvidenceRecipe, StudyRecipe
from .tasks import Split, Task, shuffled
from .unfinished import State, Unfinished, identity_of

_HEAD, _ORDER, _IMAGES, _DROP_PATH = 11, 12, 13, 14
WARMUP_STEPS = 50
LOWER = 0.1
LOOKS_IN_A_PASS = 4
EVALUATION_BATCH = 250
_KEPT_OF_COURSE = ("step", "curve", "best_step", "best_weights")


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


@dataclass
class Course:
    """How far a fine-tuning has come.

    Attributes:
        rule: that ends it.
        step: updates done.
        curve: validation accuracies so far.
        best_step: of the best of them.
        best_weights: of the model after `best_step`.
    """

    rule: FlatCurve
    step: int = 0
    curve: list[float] = field(default_factory=list)
    best_step: int = 0
    best_weights: dict[str, Tensor] = field(default_factory=dict)

    def look(self, model: nn.Module, value: float) -> str:
        """Take a validation accuracy; returns what `rule` says, which `model` has followed."""
        self.curve.append(value)
        decision = self.rule.look(value)
        if decision == "better":
            self.best_step = self.step
            self.best_weights = {name: weights.clone() for name, weights in model.state_dict().items()}
        elif decision == "lower":
            model.load_state_dict(self.best_weights)  # the small steps start at the best point of the large ones
        return decision

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        own = {name: getattr(self, name) for name in _KEPT_OF_COURSE}
        return {**own, "rule": asdict(self.rule), "model": model.state_dict(), "optimizer": optimizer.state_dict()}

    def restore(self, state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for name in _KEPT_OF_COURSE:
            setattr(self, name, state[name])
        self.rule = FlatCurve(**state["rule"])
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])


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
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Train `model` until its validation curve is flat; it is left with the weights that were best on validation.

    Args:
        unfinished: where the state is kept, and gone on from.

    Returns:
        `validation` and `test` accuracy of those weights, `best_step` they are of, `steps` in all, `is_flat` (False:
        ended by the recipe's `max_steps`), the validation `curve`, and the time.
    """
    model.to(device)
    optimizer = build_optimizer(
        model, learning_rate, weight_decay=recipe.weight_decay, layer_decay=layer_decay, betas=(0.9, 0.999)
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    batch_size = min(recipe.finetune_batch_size, len(labelled))
    every = updates_between_looks(recipe, len(labelled) // batch_size)
    course, generator, before = Course(FlatCurve(recipe.patience)), seeded_generator(seed, _IMAGES), None
    settings = {"learning_rate": learning_rate, "compile": recipe.compile}
    identity = identity_of(model, labelled.images, device, **settings) if unfinished else {}
    trained = compiled(model) if recipe.compile else model
    with torch.random.fork_rng():
        torch.manual_seed(seeded_generator(seed, _DROP_PATH).initial_seed())
        if unfinished and (state := unfinished.load(identity)):
            course.restore(state, model, optimizer)
            generator.set_state(state["generator"])
            restore_random_state(state["random"])  # of stochastic depth
            before = state["time"]
        batches = _batches(task, labelled, batch_size, seed, generator, device, course.step)
        stopwatch = Stopwatch(before)

        def state_now() -> State:
            own = {"time": stopwatch.read(), "generator": generator.get_state(), "random": random_state()}
            return own | course.state(model, optimizer)

        bar = tqdm(total=recipe.max_steps, initial=course.step, desc=title, mininterval=1, leave=False)
        decision = "go on"
        while course.step < recipe.max_steps and decision != "stop":
            course.step += 1
            factor = min(1.0, course.step / WARMUP_STEPS) * (LOWER if course.rule.has_fallen else 1.0)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            _update(trained, optimizer, *next(batches))
            bar.update()
            if course.step % every == 0 or course.step == recipe.max_steps:
                decision = course.look(model, accuracy(model, task, task.validation, device))
                bar.set_postfix(validation=f"{course.curve[-1]:.3f}", refresh=False)
            if unfinished and decision != "stop":
                unfinished.keep(identity, state_now)
    bar.close()
    model.load_state_dict(course.best_weights)
    return {
        "validation": course.rule.best,
        "test": accuracy(model, task, task.test, device),
        "best_step": course.best_step,
        "steps": course.step,
        "is_flat": decision == "stop",
        "curve": [round(value, 4) for value in course.curve],
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
    batch_size, generator = min(recipe.finetune_batch_size, len(labelled)), seeded_generator(seed, _IMAGES)
    batches = _batches(task, labelled, batch_size, seed, generator, device)
    stopwatch = Stopwatch()
    with torch.random.fork_rng():
        torch.manual_seed(seeded_generator(seed, _DROP_PATH).initial_seed())
        for _ in tqdm(range(updates), desc=title, mininterval=1, leave=False):
            _update(model, optimizer, *next(batches))
            schedule.step()
    return {"test": accuracy(model, task, task.test, device), "steps": updates, **stopwatch.read()}


def compiled(model: nn.Module) -> nn.Module:
    """`model` compiled with `torch.compile`, which shares its weights; all that was compiled before is forgotten."""
    torch.compiler.reset()  # each model adds to the versions of one code, after a few of which PyTorch gives up
    return cast(nn.Module, torch.compile(model))


def check_compiles(device: torch.device) -> None:
    """Raise a `ValueError` where `torch.compile` does not work for a small layer and its gradients.

    So it is on a machine without a C++ compiler, and would show after hours of pretraining otherwise.
    """
    try:
        compiled(nn.Linear(2, 2).to(device))(torch.zeros(2, 2, device=device)).sum().backward()
    except Exception as error:  # whatever PyTorch, its compiler and the system's lead to
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"compile: torch.compile does not work here ({reason}); install what it needs, a C++ compiler for "
            "example, or leave it out"
        ) from error


def updates_between_looks(recipe: EvidenceRecipe, updates_of_a_pass: int) -> int:
    """`evaluate_every`, or as many as make `LOOKS_IN_A_PASS` where there are more labels.

    So a curve has some passes over the labels to rise again before it counts as flat, however many they are.
    """
    return max(recipe.evaluate_every, updates_of_a_pass // LOOKS_IN_A_PASS)


def _batches(
    task: Task,
    labelled: Split,
    batch_size: int,
    seed: int,
    generator: torch.Generator,
    device: torch.device,
    done: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of pixels and labels without end, all of one size; the rest of a pass is left out.

    Args:
        generator: of the variations of images.
        done: batches that are not given, as they were in an earlier start.
    """
    epoch, first = divmod(done, len(labelled) // batch_size)
    while True:
        order = shuffled(len(labelled), seed + _ORDER, epoch)
        for start in range(first * batch_size, len(labelled) - batch_size + 1, batch_size):
            part = labelled.rows(order[start : start + batch_size])
            yield task.varied(part.images, generator).to(device), part.labels.to(device)
        epoch, first = epoch + 1, 0


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
