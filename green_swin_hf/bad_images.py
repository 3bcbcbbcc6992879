"""Images that cannot be decoded, over a run: each named once, all counted, and too many of them end it."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .training import RunState, TrainingLog

BAD_IMAGES_FILE = "bad_images.jsonl"  # in an output folder


class TooManyBadImagesError(RuntimeError):
    """More of the images of an epoch cannot be decoded than the recipe allows."""


class BadImageList:
    """The bad images of a run in a file of its output folder: one JSON object a line, `image` and `reason`.

    The processes of a run and its continuations share the file: an image that it lists is not named again.
    """

    def __init__(self, folder: Path):
        self.path = folder / BAD_IMAGES_FILE
        self._names: set[str] = set()

    def add(self, images: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """List those (name, reason) that are not listed yet; returns them."""
        unknown = {name: reason for name, reason in images if name not in self._names}
        if unknown:
            text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
            self._names |= _listed(text)  # by another process, or before the run was resumed
        new = {name: reason for name, reason in unknown.items() if name not in self._names}
        if new:
            lines = [json.dumps({"image": name, "reason": reason}) + "\n" for name, reason in new.items()]
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(lines) if not text or text.endswith("\n") else "\n" + "".join(lines))
        self._names |= new.keys()
        return list(new.items())


class BadImageCount:
    """What a training script does about bad images: names each when it comes, counts them, and knows when to stop.

    Args:
        folder: the output folder of the run.
        accelerator: of the run, whose processes' numbers are summed up.
        state: of the run; the counts of this process are in it.
        images: of an epoch, or of what counts as one of a stream.
        max_share: of them that may be bad, 0 … 1.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, state: RunState, images: int, max_share: float):
        self.listed = BadImageList(folder)
        self.accelerator = accelerator
        self.state = state
        self.images = images
        self.max_share = max_share

    def add(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Count those of an update's batches (`num_bad`, `skipped`), and name those that were not named before."""
        batches = list(batches)
        num_bad = sum(batch["num_bad"] for batch in batches)
        self.state.skipped_images += num_bad
        self.state.bad_in_epoch += num_bad
        for name, reason in self.listed.add(image for batch in batches for image in batch["skipped"]):
            tqdm.write(f"Bad image {name}: {reason}; another one takes its place", file=sys.stderr)

    def totals(self) -> list[int]:
        """[of the run, of the epoch that is not over], of all processes, which must all ask."""
        counts = torch.tensor([self.state.skipped_images, self.state.bad_in_epoch], device=self.accelerator.device)
        return self.accelerator.reduce(counts, "sum").tolist()

    def check(
        self, when: str, log: TrainingLog | None, entry: Mapping[str, Any], *, ends_epoch: bool
    ) -> TooManyBadImagesError | None:
        """The error to stop with where too many images of the epoch are bad; all processes must ask.

        Args:
            when: the epoch, in words.
            log: of the main process. The end of an epoch with bad images is noted there, `entry` before their number.
            ends_epoch: they are counted anew from here on.
        """
        _, bad = self.totals()
        if ends_epoch:
            self.state.bad_in_epoch = 0
            if bad and log:
                tqdm.write(f"Bad images in {when}: {bad:,} of {self.images:,}", file=sys.stderr)
                log.write({**entry, "bad_images": bad, "of_images": self.images})
        try:
            check_bad_share(bad, self.images, self.max_share, when, self.listed.path.parent)
        except TooManyBadImagesError as error:
            return error
        return None


def _listed(text: str) -> set[str]:
    names = set()
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the last line of a run that was killed
            names.add(json.loads(line)["image"])
    return names


def check_bad_share(bad: int, images: int, max_share: float, when: str, folder: Path) -> None:
    """Raise when more than the share `max_share` of `images` are bad.

    Args:
        bad: images that could not be decoded so far.
        images: of the whole epoch, those still to come included: a bad one among the first few stops nothing.
        max_share: 0 … 1.
        when: the epoch, in words.
        folder: of the run, where its bad images are listed.

    Raises:
        TooManyBadImagesError: with the figures and the remedy.
    """
    allowed = math.floor(max_share * images + 1e-6)  # 0.29 * 100 is below 29
    if bad > allowed:
        raise TooManyBadImagesError(
            f"{bad:,} bad images in {when}, and max_bad_share {max_share:g} allows {allowed:,} of its {images:,}; they "
            f"are listed in {folder / BAD_IMAGES_FILE}: mend them, or give a larger --max-bad-share"
        )


__all__ = ["BAD_IMAGES_FILE", "BadImageCount", "BadImageList", "TooManyBadImagesError", "check_bad_share"]
