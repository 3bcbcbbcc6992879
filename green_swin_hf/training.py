"""What training scripts share: the order of batches over a run, its log, held-out measures, and errors in one line."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from tqdm.auto import tqdm

from .data import (
    EpochSampler,
    EvaluationTransform,
    ImageSource,
    MaskedImageCollator,
    PretrainingImages,
    StreamingPretrainingImages,
    seeded_generator,
)
from .modeling_green_swin import patchify, unit_statistics
from .numerics import COLLAPSED_LOSS_SCALE, explain_collapse, explain_skips
from .redaction import redacted


class UpdateBatches(Sampler[list[int]]):
    """Keys of one process's batches, over a whole run: a batch sampler without ends of epochs.

    An update takes `batch_size * num_processes * accumulation` images, in consecutive parts: pass by pass, in each
    pass process by process. So the images of an update do not depend on how they are divided, and a run goes on where
    it stopped by starting at another update. The last images of an epoch that fill no update are left out.

    >>> class Order(list):
    ...     def set_epoch(self, epoch): self[:] = range(epoch * 7, epoch * 7 + 7)
    >>> list(UpdateBatches(Order(range(7)), 1, accumulation=3, first_update=1, total_updates=4))
    [[3], [4], [5], [7], [8], [9], [10], [11], [12]]

    Args:
        sampler: yields the keys of an epoch.
        batch_size: images of one process in one forward pass.
        accumulation: forward passes for each update.
        num_processes, process_index: of this process.
        first_update: updates that were done before.
        total_updates: updates of the whole run.

    Raises:
        ValueError: an epoch does not fill one update.
    """

    def __init__(
        self,
        sampler: EpochSampler,
        batch_size: int,
        *,
        accumulation: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        first_update: int = 0,
        total_updates: int,
    ):
        self.sampler = sampler
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.num_processes = num_processes
        self.process_index = process_index
        self.first_update = first_update
        self.total_updates = total_updates
        self.updates_per_epoch = count_updates(len(sampler), batch_size, accumulation, num_processes)

    def __len__(self) -> int:
        return (self.total_updates - self.first_update) * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        update = self.first_update
        while update < self.total_updates:
            epoch, first = divmod(update, self.updates_per_epoch)
            self.sampler.set_epoch(epoch)
            last = min(self.updates_per_epoch, first + self.total_updates - update)
            yield from self._epoch_batches(first, last)
            update += last - first

    def _epoch_batches(self, first: int, last: int) -> Iterator[list[int]]:
        """Batches of the updates `first … last - 1` of the sampler's epoch."""
        pass_size = self.batch_size * self.num_processes
        own = range(self.process_index * self.batch_size, (self.process_index + 1) * self.batch_size)
        begin, end = (update * pass_size * self.accumulation for update in (first, last))
        batch: list[int] = []
        for position, key in enumerate(self.sampler):
            if position >= end:
                return
            if position >= begin and position % pass_size in own:
                batch.append(key)
                if len(batch) == self.batch_size:
                    yield batch
                    batch = []


def count_updates(num_images: int, batch_size: int, accumulation: int = 1, num_processes: int = 1) -> int:
    """Updates of one epoch.

    Raises:
        ValueError: an epoch does not fill one update.
    """
    images = batch_size * accumulation * num_processes
    if images > num_images:
        factors = f"{num_processes} processes x {accumulation} gradient_accumulation_steps"
        raise ValueError(
            f"batch_size {batch_size} (x {factors} = {images} images for an update) must not exceed the {num_images} "
            f"training images; give --batch-size {max(1, num_images // (accumulation * num_processes))} or less"
        )
    return num_images // images


class DivergenceError(RuntimeError):
    """Too many updates in a row had gradients that were not finite, or the loss scale of fp16 has collapsed."""


@dataclass
class RunState:
    """Where a run stands; saved with a checkpoint.

    Attributes:
        update: updates done, skipped ones included.
        skipped_updates: those whose gradients were not finite.
        skipped_in_a_row: of these, the last ones without another between.
        skipped_images: images that could not be decoded.
        bad_in_epoch: of these, those of the epoch that is not over.
        log_position: bytes of the log.
    """

    update: int = 0
    skipped_updates: int = 0
    skipped_in_a_row: int = 0
    skipped_images: int = 0
    bad_in_epoch: int = 0
    log_position: int = 0

    def record_update(
        self, finite: bool, limit: int, *, loss: Tensor | None = None, scale: float | None = None
    ) -> None:
        """Count an update; `finite` says whether its gradients were.

        Args:
            limit: updates in a row that may be skipped, less one.
            loss: of this update, for the message.
            scale: see `numerics.loss_scale`.

        Raises:
            DivergenceError: `limit` updates in a row were skipped, or the loss scale of fp16 has collapsed.
        """
        self.update += 1
        self.skipped_updates += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if scale is not None and scale < COLLAPSED_LOSS_SCALE:
            raise DivergenceError(explain_collapse(self.skipped_updates, self.update, scale))
        if self.skipped_in_a_row >= limit:
            raise DivergenceError(explain_skips(limit, self.update, loss, scale))


class TrainingLog:
    """One JSON object a line. A resumed run cuts what was logged after its checkpoint and goes on.

    The file is open only while a line is written: one that is held open on a disk that went away takes lines that
    nobody will read.

    Args:
        path: the file.
        position: bytes that stand; the rest is cut.
    """

    def __init__(self, path: Path, position: int = 0):
        self.path = path
        with path.open("ab") as file:
            file.truncate(min(position, path.stat().st_size))
        self._last = next(reversed(self.entries()), None)

    def write(self, entry: dict[str, Any]) -> None:
        """Add a line; numbers that are not finite become null."""
        entry = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in entry.items()}
        with self.path.open("ab") as file:
            file.write(json.dumps(entry).encode() + b"\n")
        self._last = entry

    def position(self) -> int:
        """Bytes on the disk so far."""
        with self.path.open("ab") as file:
            os.fsync(file.fileno())
            return file.seek(0, os.SEEK_END)

    def last_entry(self) -> dict[str, Any] | None:
        """The newest line."""
        return self._last

    def entries(self) -> list[dict[str, Any]]:
        """All lines, oldest first."""
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def hold_out(source: ImageSource, count: int, seed: int) -> tuple[ImageSource, ImageSource | None]:
    """Split a map-style source into images to train on and images to measure on, the same for the same seed.

    Args:
        source: all images.
        count: images to measure on; no more than a tenth of all are taken.

    Returns:
        Both parts; None for the second when there are none to spare.
    """
    total = len(source.dataset)
    count = min(count, total // 10)
    if count == 0:
        return source, None
    order = torch.randperm(total, generator=seeded_generator(seed, total)).tolist()
    return source.select(sorted(order[count:])), source.select(sorted(order[:count]))


def fixed_batches(
    source: ImageSource,
    transform: EvaluationTransform,
    collator: MaskedImageCollator,
    *,
    count: int,
    batch_size: int,
    seed: int,
) -> list[dict[str, Any]]:
    """Batches of `count` images with masks, all drawn once: the first images of a stream, random ones otherwise."""
    images: Dataset[dict[str, Any]]
    if source.num_images is None:
        images = StreamingPretrainingImages(source, transform, seed=seed, shuffle_buffer=0, num_epochs=1)
        samples = list(islice(images, count))
    else:
        images = PretrainingImages(source, transform, seed=seed)
        keys = torch.randperm(len(images), generator=seeded_generator(seed)).tolist()[:count]
        samples = [images[key] for key in keys]
    return [collator(samples[start : start + batch_size]) for start in range(0, len(samples), batch_size)]


@torch.no_grad()
def held_out_loss(model: nn.Module, batches: Iterable[dict[str, Any]], device: torch.device) -> float:
    """Mean loss over images whose masks are part of the batches, so that it compares between moments of a run."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in batches:
        inputs = send_to_device(model_inputs(batch), device)
        total += model(**inputs).loss.item() * len(batch["pixel_values"])
        count += len(batch["pixel_values"])
    model.train(was_training)
    return total / count


def mean_prediction_loss(batches: Iterable[dict[str, Any]], unit: int, norm_pix_loss: bool) -> float:
    """The loss, on the masks of the batches, of a model that predicts the mean of every masked unit's pixels.

    With normalised targets it is just below 1 (less by the share of flat units, whose target is 0).
    """
    total, count = 0.0, 0
    for batch in batches:
        targets = patchify(batch["pixel_values"], unit)
        mean, std = unit_statistics(targets)
        error = (targets - mean) / std if norm_pix_loss else targets - mean
        masked = batch["sparse_plan"].bool_masked_pos.expand(len(targets), -1)
        total += error[masked].square().sum(dtype=torch.float64).item()
        count += error[masked].numel()
    return total / count


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What of a batch goes to the model."""
    return {"pixel_values": batch["pixel_values"], "sparse_plan": batch["sparse_plan"]}


def is_finite(norm: Tensor) -> bool:
    """Whether gradients with this norm are all finite. Waits for the device."""
    return bool(torch.isfinite(norm).item())


def update_weights(
    accelerator: Accelerator, model: nn.Module, optimizer: Any, max_grad_norm: float
) -> tuple[Tensor, bool]:
    """Take an optimizer step with clipped gradients, or none where they are not finite, and clear them.

    Args:
        max_grad_norm: 0 does not clip.

    Returns:
        The norm of the gradients before they were clipped, and whether they are finite. All processes hold the same
        averaged gradients, so they decide alike.
    """
    grad_norm: Any = accelerator.clip_grad_norm_(model.parameters(), max_grad_norm or math.inf)
    finite = is_finite(grad_norm)
    if finite or accelerator.scaler is not None:  # the scaler skips by itself, and learns from it
        optimizer.step()
    optimizer.zero_grad()
    return grad_norm, finite


def report_skip(accelerator: Accelerator, update: int, finite: bool) -> None:
    """Say that an update was skipped where its gradients were not finite."""
    if not finite and accelerator.is_main_process:
        tqdm.write(f"Skipped update {update}: its gradients are not finite", file=sys.stderr)


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are `ValueError`s, to be shown by `one_line_errors`."""

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


@contextlib.contextmanager
def one_line_errors(program: str) -> Iterator[None]:
    """Turn wrong input into one line on stderr, from the first process of each machine, and exit code 2.

    Wrong input is a `ValueError`, or an `OSError` for files that cannot be read or made. Credentials in it are hidden.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"{program}: error: {' '.join(redacted(str(error)).split())}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None


def last_line(error: Exception) -> str:
    """What an error says, without credentials; of a loader's worker, without the worker's traceback."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(re.sub(rf"^[\w.]*\b{type(error).__name__}: ", "", lines[-1]))


def check_tracker(name: str) -> None:
    """Raise a `ValueError` when the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise ValueError(f"--report-to {name} needs the package {name}; install it: pip install {name}")


def check_output_folder(folder: Path, flag: str = "--output-dir") -> None:
    """Raise a `ValueError` that names the flag unless the folder can be made or written to. Makes nothing."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"output folder {folder} cannot be made: {existing} is a file; give another {flag}")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"output folder {folder} cannot be written: no permission in {existing}; change {flag}")


def unused_folder(folder: Path) -> Path:
    """`folder`, or with `-2`, `-3`, … behind its name the first that does not exist or is empty."""
    number, candidate = 1, folder
    while candidate.exists() and not (candidate.is_dir() and not any(candidate.iterdir())):
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate


__all__ = [
    "DivergenceError",
    "OneLineParser",
    "RunState",
    "TrainingLog",
    "UpdateBatches",
    "check_output_folder",
    "check_tracker",
    "count_updates",
    "fixed_batches",
    "held_out_loss",
    "hold_out",
    "is_finite",
    "last_line",
    "mean_prediction_loss",
    "model_inputs",
    "one_line_errors",
    "report_skip",
    "unused_folder",
    "update_weights",
]
