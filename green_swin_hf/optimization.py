"""What is decided once for an optimizer: which parameters decay, how fast each layer learns, and the schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Vectors (biases, norms) never decay; these are tables and tokens of more than one axis that must not either.
_NO_DECAY = ("relative_position_bias_table", "position_embeddings", "mask_token")
_BLOCK = re.compile(r"encoder\.layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.")


def is_decayed(name: str, parameter: Tensor) -> bool:
    """True where weight decay applies: weight matrices and kernels, not biases, norms, position tables or tokens."""
    return parameter.ndim > 1 and not any(part in name.split(".") for part in _NO_DECAY)


def layer_depth(name: str, depths: Sequence[int]) -> int:
    """How deep a parameter sits, for layer-wise learning rates.

    0 is the patch embedding, `1 … sum(depths)` the blocks in order (a patch merging counts with the block before it)
    and `sum(depths) + 1` everything behind the encoder's blocks: final norm, decoder, classifier.

    >>> [layer_depth(f"swin.{name}", (2, 2)) for name in ("embeddings.norm.bias", "encoder.layers.1.blocks.0.output")]
    [0, 3]
    """
    if "embeddings" in name.split(".") and "decoder" not in name.split("."):
        return 0
    match = _BLOCK.search(name + ".")
    if match is None:
        return sum(depths) + 1
    stage, block = int(match[1]), match[2]
    return sum(depths[:stage]) + (int(block) + 1 if block is not None else depths[stage])


def parameter_groups(model: nn.Module, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
    """Groups of trainable parameters for an optimizer.

    Args:
        model: a GreenSwin model; its `config.depths` counts the blocks when `layer_decay` is not 1.
        weight_decay: decay of weight matrices; biases, norms, relative position tables, absolute position embeddings
            and the mask token get none.
        layer_decay: factor of the learning rate from each block to the one before it, in (0, 1]; 1 treats all alike.

    Returns:
        One dict for each combination of depth and decay with `params`, `weight_decay`, `lr_scale` (the factor of the
        learning rate) and `names` (of the parameters, in order).

    Raises:
        ValueError: `layer_decay` is not in (0, 1] or `weight_decay` is negative.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay {layer_decay} must be greater than 0 and at most 1")
    if weight_decay < 0:
        raise ValueError(f"weight_decay {weight_decay} must be at least 0")
    depths: Sequence[int] = model.config.depths if layer_decay != 1.0 else ()  # type: ignore[union-attr, assignment]
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        depth, decayed = layer_depth(name, depths) if depths else 0, is_decayed(name, parameter)
        scale = layer_decay ** (sum(depths) + 1 - depth) if depths else 1.0
        empty = {
            "params": [],
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_scale": scale,
            "names": [],
        }
        group = groups.setdefault((depth, decayed), empty)
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    *,
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    betas: tuple[float, float] = (0.9, 0.95),
) -> Optimizer:
    """AdamW over `parameter_groups`, in its fused form where the parameters' device has one.

    The learning rate of each group is `learning_rate` times the group's `lr_scale`. Parameter names are not kept in
    the optimizer, so that its state holds tensors and numbers only.
    """
    groups = parameter_groups(model, weight_decay, layer_decay)
    for group in groups:
        group["lr"] = learning_rate * group.pop("lr_scale")
        del group["names"]
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.device.type in ("cpu", "cuda", "xpu", "mps") and p.is_floating_point() for p in parameters)
    return AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def scaled_learning_rate(base_learning_rate: float, total_batch_size: int) -> float:
    """Linear scaling rule: the base learning rate holds for 256 images in an update.

    >>> scaled_learning_rate(1.5e-4, 2048)
    0.0012
    """
    return base_learning_rate * total_batch_size / 256


def cosine_factor(step: int, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0) -> float:
    """Learning rate of update `step` (from 0) as a share of its peak: linear warm-up from 0, then half a cosine.

    The first update already moves (`1 / warmup_steps`), the peak is at update `warmup_steps - 1`, and update
    `total_steps` would have `min_lr_ratio`.

    >>> [round(cosine_factor(step, 2, 6), 2) for step in range(7)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15, 0.0]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return min_lr_ratio + (1 - min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


def cosine_schedule(optimizer: Optimizer, warmup_steps: int, total_steps: int, min_lr_ratio: float = 0.0) -> LambdaLR:
    """`cosine_factor` as a scheduler that is stepped once per update, also after an update that was skipped.

    Raises:
        ValueError: `warmup_steps` is negative or exceeds `total_steps`, or `min_lr_ratio` is not in [0, 1].
    """
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps {warmup_steps} must be between 0 and total_steps {total_steps}")
    if not 0 <= min_lr_ratio <= 1:
        raise ValueError(f"min_lr_ratio {min_lr_ratio} must be between 0 and 1")
    # The schedule counts updates, not calls of `optimizer.step`: a first update that is skipped is no mistake.
    optimizer._opt_called = True  # type: ignore[attr-defined]
    return LambdaLR(optimizer, lambda step: cosine_factor(step, warmup_steps, total_steps, min_lr_ratio))


def set_schedule(scheduler: LambdaLR, optimizer: Optimizer, step: int) -> None:
    """Put a new scheduler and the learning rates of its optimizer to where they are after `step` updates."""
    scheduler.last_epoch = step
    for group, peak, factor in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        group["lr"] = peak * factor(step)


def step_factor(step: int, warmup_steps: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """Learning rate of update `step` (from 0) as a share of its peak: linear warm-up, then times `gamma` at milestones.

    >>> [round(step_factor(step, 2, (4, 6)), 2) for step in range(8)]
    [0.5, 1.0, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    """
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    return warmup * gamma ** sum(step >= milestone for milestone in milestones)


def step_schedule(optimizer: Optimizer, warmup_steps: int, milestones: Sequence[int], gamma: float = 0.1) -> LambdaLR:
    """`step_factor` as a scheduler that is stepped once per update, also after an update that was skipped."""
    optimizer._opt_called = True  # type: ignore[attr-defined]  # as in `cosine_schedule`
    return LambdaLR(optimizer, lambda step: step_factor(step, warmup_steps, milestones, gamma))


def native_bf16(device: torch.device) -> bool:
    """True where the device multiplies bfloat16 in hardware; elsewhere bfloat16 is emulated and slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        probes = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16"))
        return any(probe() for probe in probes if probe is not None)
    return device.type == "xpu"


__all__ = [
    "build_optimizer",
    "cosine_factor",
    "cosine_schedule",
    "is_decayed",
    "layer_depth",
    "native_bf16",
    "parameter_groups",
    "scaled_learning_rate",
    "set_schedule",
    "step_factor",
    "step_schedule",
]
