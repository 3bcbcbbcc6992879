"""A model whose parameters are divided among processes (FSDP): it and its optimizer's state, whole in one place.

What is saved is then the same as without FSDP: it loads on one device, and a run goes on from it with or without FSDP.
Every process of the run calls these functions, as the parts travel between them.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether the parameters of a prepared model are divided among processes."""
    return accelerator.distributed_type == DistributedType.FSDP


def whole_model(accelerator: Accelerator, model: nn.Module) -> Any:
    """The model to compute with and to save on the main process; None on the others.

    Of a sharded model it is a copy, in the same mode and on the same device.
    """
    if not is_sharded(accelerator):
        return accelerator.unwrap_model(model) if accelerator.is_main_process else None
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    own = accelerator.unwrap_model(model)
    kind: Any = next(kind for kind in type(own).__mro__ if not issubclass(kind, FSDPModule))
    with torch.random.fork_rng():  # its first values are drawn, and overwritten
        copy = kind(own.config)
    copy.load_state_dict(weights)
    return copy.to(accelerator.device).train(own.training)


def optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """`state_dict` of a prepared optimizer with whole tensors; complete on the main process only."""
    if not is_sharded(accelerator):
        return optimizer.state_dict()
    whole = get_optimizer_state_dict(model, optimizer.optimizer, options=_WHOLE)
    if not accelerator.is_main_process:
        return {}
    named: dict[str, Any] = dict(whole["state"])  # type: ignore[arg-type]  # torch's own type allows lists too
    groups = optimizer.state_dict()["param_groups"]
    names = _names(model, optimizer)
    state = {number: named[name] for number, name in enumerate(names) if name in named}
    return {"state": state, "param_groups": groups}


def load_optimizer_state(accelerator: Accelerator, model: nn.Module, optimizer: Any, state: dict[int, Any]) -> None:
    """Put the moments of `optimizer_state` back into a prepared optimizer, new as it was built.

    Args:
        accelerator, model, optimizer: of the run that goes on.
        state: of each parameter, by its number among those of all groups.
    """
    if not is_sharded(accelerator):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return
    names = _names(model, optimizer)
    groups = [
        {**group, "params": [names[number] for number in group["params"]]}
        for group in optimizer.state_dict()["param_groups"]
    ]
    named = {name: state[number] for number, name in enumerate(names) if number in state}
    set_optimizer_state_dict(model, optimizer.optimizer, {"state": named, "param_groups": groups}, options=_WHOLE)


def _names(model: nn.Module, optimizer: Any) -> list[str]:
    """Name of each parameter in the order of the groups, in which optimizers count them."""
    known = {id(parameter): name for name, parameter in model.named_parameters()}
    return [known[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


__all__ = ["is_sharded", "load_optimizer_state", "optimizer_state", "whole_model"]
