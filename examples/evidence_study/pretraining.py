"""Pretraining by masked image modeling on images in memory, visible-only or dense, with its time."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import SwinConfig, SwinForMaskedImageModeling

from green_swin_hf import GreenSwinConfig, GreenSwinForMaskedImageModeling, sample_masks
from green_swin_hf.checkpointing import replace_files
from green_swin_hf.data import seeded_generator
from green_swin_hf.optimization import build_optimizer, cosine_schedule

from .recipe import EvidenceRecipe, StudyRecipe
from .tasks import Task, shuffled
from .unfinished import State, Unfinished, identity_of

# Streams of random numbers that must not be the same for one seed.
_WEIGHTS, _ORDER, _IMAGES = 1, 2, 3
LOSSES_KEPT = 20
MAX_GRAD_NORM = 5.0


class Stopwatch:
    """Seconds since it was made: by the wall clock, and those that this process was computing.

    On the CPU the second does not count the time that other processes took, or for which this one was stopped.

    Args:
        before: what another one read, to go on from.
    """

    def __init__(self, before: dict[str, float] | None = None) -> None:
        self.wall, self.busy = time.perf_counter(), time.process_time()
        if before:
            self.wall, self.busy = self.wall - before["seconds"], self.busy - before["cpu_seconds"]

    def read(self) -> dict[str, float]:
        wall, busy = time.perf_counter() - self.wall, time.process_time() - self.busy
        return {"seconds": round(wall, 2), "cpu_seconds": round(busy, 2)}


def swin_config(config: GreenSwinConfig) -> SwinConfig:
    """The same encoder for transformers' own Swin classes."""
    names = ("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size")
    more = ("mlp_ratio", "drop_path_rate", "layer_norm_eps", "initializer_range", "encoder_stride")
    return SwinConfig(**{name: getattr(config, name) for name in (*names, *more)})


def build_masked_model(method: str, config: GreenSwinConfig, seed: int) -> Any:
    """GreenSwin ("green") or transformers' SimMIM ("dense") with random weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeded_generator(seed, _WEIGHTS).initial_seed())
        if method == "green":
            return GreenSwinForMaskedImageModeling(config)
        return SwinForMaskedImageModeling(swin_config(config))


def masks_for(method: str, config: GreenSwinConfig, count: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Masks for `count` images: on mask units for GreenSwin, on patches for SimMIM, of the same squares."""
    rows, columns = config.mask_grid_size
    units = sample_masks(count, (rows, columns), ratio, generator)
    if method == "green":
        return units
    side = config.mask_unit_size // config.patch_length
    grid = units.view(count, rows, columns).repeat_interleave(side, 1).repeat_interleave(side, 2)
    return grid.flatten(1).long()


DrawMasks = Callable[[int, torch.Generator], Tensor]


def pretrain(
    method: str,
    recipe: EvidenceRecipe,
    task: Task,
    seed: int,
    folder: Path,
    device: torch.device,
    epochs: float,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Pretrain on the training images and save the model to `folder`; returns what a cell keeps of it.

    It goes on from the state in `unfinished`, if there is one, and keeps its own there.
    """
    is_green, config = method == "green", recipe.model_config()
    model = build_masked_model(method, config, seed)
    ratio = recipe.mask_ratio if is_green else recipe.dense_mask_ratio

    def draw_masks(count: int, generator: torch.Generator) -> Tensor:
        masks = masks_for(method, config, count, ratio, generator)
        return masks if is_green else masks.to(device)

    peak = recipe.learning_rate if is_green else recipe.dense_learning_rate
    title = f"pretraining, {method}, seed {seed}"
    result = train_masked(model, draw_masks, recipe, task, seed, device, epochs, peak, title, unfinished)
    save_model(model, folder)
    return result


def train_masked(
    model: Any,
    draw_masks: DrawMasks,
    recipe: StudyRecipe,
    task: Task,
    seed: int,
    device: torch.device,
    epochs: float,
    learning_rate: float,
    title: str,
    unfinished: Unfinished | None = None,
) -> dict[str, Any]:
    """Train a model by masked image modeling on the training images; returns what a cell keeps of it.

    Args:
        draw_masks: masks for so many images, as the model takes them.
        learning_rate: the peak.
        title: of the progress bar.
        unfinished: where the state is kept, and gone on from.
    """
    model.to(device).train()
    images = task.unlabelled
    batch_size = min(recipe.batch_size, len(images))
    per_epoch = len(images) // batch_size
    steps = max(1, round(epochs * per_epoch))
    optimizer = build_optimizer(model, learning_rate, weight_decay=recipe.weight_decay)
    schedule = cosine_schedule(optimizer, math.ceil(recipe.warmup * steps), steps)
    generator = seeded_generator(seed, _IMAGES)
    losses, done, before = torch.empty(steps, device=device), 0, None
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    identity = identity_of(model, images, device, steps=steps) if unfinished else {}
    if unfinished and (state := unfinished.load(identity)):
        for name, part in stateful.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
        done, before = state["step"], state["time"]
        losses[:done] = state["losses"].to(device)
    stopwatch = Stopwatch(before)

    def state_after(step: int) -> State:
        own = {"step": step, "time": stopwatch.read(), "generator": generator.get_state(), "losses": losses[:step]}
        return own | {name: part.state_dict() for name, part in stateful.items()}

    for step in tqdm(range(done, steps), desc=title, initial=done, total=steps, mininterval=1, leave=False):
        epoch, place = divmod(step, per_epoch)
        if place == 0 or step == done:
            order = shuffled(len(images), seed + _ORDER, epoch)
        rows = order[place * batch_size : (place + 1) * batch_size]
        pixels = task.varied(images[rows], generator).to(device)
        loss = model(pixel_values=pixels, bool_masked_pos=draw_masks(len(rows), generator)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses[step] = loss.detach()
        if unfinished:
            unfinished.keep(identity, functools.partial(state_after, step + 1))
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {"steps": steps, "epochs": epochs, **stopwatch.read(), "losses": _thinned(losses)}


def save_model(model: Any, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    replace_files(folder, model.save_pretrained)


def _thinned(losses: Tensor) -> list[float]:
    """Mean losses of equal parts of the training, in order."""
    parts = losses.cpu().tensor_split(min(LOSSES_KEPT, len(losses)))
    return [round(part.mean().item(), 4) for part in parts]
