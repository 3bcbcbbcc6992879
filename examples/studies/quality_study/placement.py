"""The published decoder's placement of latents, for the study of what it costs; the package places them correctly.

The published encoder returns the visible latents in raster order. The published decoder takes them to be in the order
in which the mask sampler drew the visible units, so that the k-th latent lands on the unit that was drawn k-th: on a
visible unit always, and mostly on that of another latent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def place_as_published(latents: Tensor, draws: Tensor) -> Tensor:
    """Latents reordered, so that placing them in raster order puts them where the published decoder does.

    Args:
        latents: [B, V, C], of the visible units in raster order.
        draws: [B or 1, V], the sampler's random numbers for these units; it takes the smallest first.

    >>> latents, draws = torch.tensor([[[10.0], [20.0], [30.0]]]), torch.tensor([[0.9, 0.1, 0.5]])
    >>> place_as_published(latents, draws).flatten().tolist()  # units are drawn in the order 1, 2, 0
    [30.0, 10.0, 20.0]
    """
    rank = draws.argsort(dim=1).argsort(dim=1).to(latents.device)  # [B or 1, V], when each unit was drawn
    return latents.gather(1, rank[:, :, None].expand_as(latents))


def misplace_latents(model: Any, generator: torch.Generator, is_shared: bool) -> Any:
    """Have a `GreenSwinForMaskedImageModeling` place latents as published; returns the handle that undoes it.

    Which units are visible says nothing of the order in which they were drawn, so that order is drawn here.

    Args:
        generator: of the order.
        is_shared: the batch has one mask, hence one order.
    """

    def reorder(_: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        latents, *rest = arguments
        draws = torch.rand(1 if is_shared else latents.shape[0], latents.shape[1], generator=generator)
        return (place_as_published(latents, draws), *rest)

    return model.decoder.register_forward_pre_hook(reorder)
