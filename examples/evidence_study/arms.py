"""The arms of a study: how an encoder gets its weights before it sees a label."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One way to start.

    Attributes:
        title: in tables and pictures.
        method: how it is pretrained: "green" (GreenSwin, visible patches only), "dense" (transformers'
            `SwinForMaskedImageModeling`), or None.
        time_of_dense: pretrained for this share of the time that arm "dense" took with the same seed; None for the
            recipe's epochs.
    """

    title: str
    method: str | None
    time_of_dense: float | None = None


ARMS = {
    "scratch": Arm("scratch", None),
    "green": Arm("GreenSwin", "green"),
    "dense": Arm("dense SimMIM", "dense"),
    "green_third": Arm("GreenSwin, a third of the dense time", "green", 1 / 3),
    "green_equal": Arm("GreenSwin, the dense time", "green", 1.0),
}
