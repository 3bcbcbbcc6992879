"""From images to masked batches: transforms, samples, their order, and the collator that draws masks.

Every random number of a sample (crop, flip, mask) comes from a generator seeded by (seed, epoch, index), so
that a sample does not depend on the number of workers, on the batch it is in, or on what was read before it.
torch's global generator is never touched.

`load_images` opens a source, `PretrainingImages` reads samples from it, `EpochSampler` orders an epoch, and
`MaskedImageCollator` makes a batch with its plan in the loader's worker. Streams have
`StreamingPretrainingImages`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from typing import Any, Literal

import datasets
import torch
import torch.utils.data
from datasets.distributed import split_dataset_by_node
from torch import Tensor
from torch.nn.functional import interpolate, pad

from .configuration_green_swin import as_pair
from .image_decoding import BrokenDataError, ColorMode, CorruptImageError, decode_image
from .image_sources import ImageSource, load_images
from .sparse_plan import SparseGeometry, build_sparse_plan, sample_masks

MAX_CORRUPT_RUN = 100

_MASK_64 = (1 << 64) - 1


def mix_seed(*parts: int) -> int:
    """A 63-bit number mixed from all parts (splitmix64): neighbouring parts give unrelated seeds."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) & _MASK_64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK_64
        state ^= state >> 31
    return state >> 1


def seeded_generator(*parts: int) -> torch.Generator:
    """A CPU generator of its own, seeded by `mix_seed(*parts)`."""
    return torch.Generator().manual_seed(mix_seed(*parts))


_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_CROP_TRIES = 10


@dataclass(frozen=True)
class _ImageTransform:
    """What both transforms share: zero padding before, normalisation after.

    Attributes:
        image_size: pixels of the result, one number or (rows, columns).
        num_channels: 1 or 3.
        pad: pixels of zeros added on each side first, as for 28 px images on a 32 px grid.
        mean, std: of each channel, for pixels in [0, 1]; ImageNet's for colour and 0.5 for grey by default.
    """

    image_size: tuple[int, int]
    num_channels: int = 3
    pad: int = 0
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.num_channels not in (1, 3):
            raise ValueError(f"num_channels {self.num_channels} must be 1 (grey) or 3 (colour)")
        is_grey = self.num_channels == 1
        mean, std = ((0.5,), (0.5,)) if is_grey else (_IMAGENET_MEAN, _IMAGENET_STD)
        object.__setattr__(self, "image_size", as_pair(self.image_size))
        object.__setattr__(self, "mean", tuple(mean if self.mean is None else self.mean))
        object.__setattr__(self, "std", tuple(std if self.std is None else self.std))
        self._require(min(self.image_size) > 0, "image_size", "positive, one integer or two (rows, columns)")
        self._require(self.pad >= 0, "pad", "0 or more pixels")
        for field in ("mean", "std"):
            is_complete = len(getattr(self, field)) == self.num_channels
            self._require(is_complete, field, f"as many numbers as num_channels {self.num_channels}")
        self._require(min(self.std or ()) > 0, "std", "greater than 0")

    def _require(self, holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{field} {getattr(self, field)!r} must be {rule}")

    @property
    def color_mode(self) -> ColorMode:
        """How to decode images for this transform."""
        return "L" if self.num_channels == 1 else "RGB"

    def _padded(self, image: Tensor) -> Tensor:
        return pad(image, [self.pad] * 4) if self.pad else image

    def _resized(self, image: Tensor, box: tuple[int, int, int, int]) -> Tensor:
        """The `box` (top, left, height, width) of the image at `image_size`, still uint8: no overshoot."""
        top, left, height, width = box
        crop = image[None, :, top : top + height, left : left + width]
        return interpolate(crop, self.image_size, mode="bicubic", antialias=True)[0]

    def _normalized(self, image: Tensor) -> Tensor:
        scale, shift = _scale_and_shift(self.mean, self.std)
        return torch.addcmul(shift, image.float(), scale)


@lru_cache
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """([C, 1, 1], [C, 1, 1]): normalisation of pixels in 0 … 255 as one multiplication and one addition."""
    means, stds = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (mean, std))
    return (1 / (255 * stds)).float(), (-means / stds).float()


@dataclass(frozen=True)
class PretrainingTransform(_ImageTransform):
    """Random resized crop (bicubic, antialiased, on uint8 pixels), horizontal flip, normalisation.

    Attributes:
        crop_scale: range of the crop's share of the image's area.
        crop_ratio: range of the crop's width / height.
        flip: probability of a horizontal flip.
    """

    crop_scale: tuple[float, float] = (0.2, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.crop_scale
        self._require(0 < low <= high <= 1, "crop_scale", "two numbers in (0, 1], the smaller first")
        low, high = self.crop_ratio
        self._require(0 < low <= high, "crop_ratio", "two positive numbers, the smaller first")
        self._require(0 <= self.flip <= 1, "flip", "a probability in [0, 1]")

    def __call__(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """[C, H, W] uint8 of any size → [C, rows, columns] float32; all randomness from `generator`."""
        return self._normalized(self._random_view(image, generator))

    def _random_view(self, image: Tensor, generator: torch.Generator) -> Tensor:
        """The crop, perhaps mirrored, still uint8."""
        image = self._padded(image)
        height, width = image.shape[-2:]
        box = sample_crop_box((height, width), self.crop_scale, self.crop_ratio, generator)
        image = self._resized(image, box)
        return image.flip(-1) if torch.rand((), generator=generator).item() < self.flip else image


@dataclass(frozen=True)
class EvaluationTransform(_ImageTransform):
    """The same for every look at an image: resize, normalise.

    Attributes:
        crop_fraction: `None` resizes the whole image to exactly `image_size`; a share such as 0.875 keeps
            proportions and takes the centre, with that share of the side that limits it.
    """

    crop_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        is_share = self.crop_fraction is None or 0 < self.crop_fraction <= 1
        self._require(is_share, "crop_fraction", "None or in (0, 1]")

    def __call__(self, image: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[C, H, W] uint8 of any size → [C, rows, columns] float32; `generator` is not used."""
        image = self._padded(image)
        box = self._kept_box(image.shape[-2], image.shape[-1])
        return self._normalized(self._resized(image, box))

    def _kept_box(self, height: int, width: int) -> tuple[int, int, int, int]:
        """(top, left, height, width) to resize; cropping first bounds the work for very long images."""
        if self.crop_fraction is None:
            return 0, 0, height, width
        rows, columns = self.image_size
        scale = min(height / rows, width / columns) * self.crop_fraction
        kept_height, kept_width = max(1, round(rows * scale)), max(1, round(columns * scale))
        return (height - kept_height) // 2, (width - kept_width) // 2, kept_height, kept_width


def sample_crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], generator: torch.Generator
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of an image of `size` (rows, columns).

    Area uniform in `scale` times the image's, width / height log-uniform in `ratio`, place uniform. When ten
    draws do not fit, the largest centred crop with the image's own ratio clamped to `ratio`. Source: as
    torchvision's `RandomResizedCrop`; always the same number of draws.
    """
    rows, columns = size
    num_draws = 2 + 2 * _CROP_TRIES
    top_draw, left_draw, *draws = torch.rand(num_draws, generator=generator, dtype=torch.float64).tolist()
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for area_draw, ratio_draw in zip(draws[::2], draws[1::2], strict=True):
        area = rows * columns * (scale[0] + (scale[1] - scale[0]) * area_draw)
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * ratio_draw)
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= rows and 0 < width <= columns:
            return int(top_draw * (rows - height + 1)), int(left_draw * (columns - width + 1)), height, width
    height = min(rows, max(1, round(columns / ratio[0])))
    width = min(columns, max(1, round(rows * ratio[1])))
    return (rows - height) // 2, (columns - width) // 2, height, width


class PretrainingImages(torch.utils.data.Dataset[dict[str, Any]]):
    """Transformed images of a map-style source, read by keys that hold the epoch.

    With `key = epoch * len(self) + index` a sample is a function of (seed, epoch, index) alone, and workers
    need not be told of a new epoch. A plain index is a key of epoch 0. An image that cannot be decoded is
    replaced by the next one that can.

    Args:
        source: what `load_images` returns without streaming.
        transform: `PretrainingTransform`, or `EvaluationTransform` for images that do not change.
        seed: of all randomness.
        cache_bytes: memory for decoded images, in each worker: decoding a small image costs more than the rest.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: PretrainingTransform | EvaluationTransform,
        *,
        seed: int,
        cache_bytes: int = 0,
    ):
        if isinstance(source.dataset, datasets.IterableDataset):
            raise ValueError(f"data set {source.name!r} is a stream; read it with StreamingPretrainingImages")
        self.name = source.name
        self.records = source.dataset.select_columns([source.image_column])
        self._rows = source.rows
        self.image_column = source.image_column
        self.transform = transform
        self.seed = seed
        self._free_bytes = cache_bytes
        self._decoded: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, key: int) -> dict[str, Any]:
        """The sample of one key.

        Returns:
            pixel_values: [C, rows, columns] float32.
            mask_seed: int, seed of this sample's mask.
            skipped: (name, reason) of the images that could not be decoded in its place, its own first.
            num_bad: 1 when its own could not be decoded, else 0: over an epoch every bad image counts once.

        Raises:
            IndexError: a negative key.
            BrokenDataError: no readable image among this one and those that follow.
        """
        if key < 0:
            raise IndexError(f"key {key} must be 0 or more")
        epoch, index = divmod(key, len(self))
        image, skipped = self._read(index)
        sample_seed = mix_seed(self.seed, epoch, index)
        return _make_sample(image, skipped, bool(skipped), self.transform, sample_seed)

    def describe(self, key: int) -> str:
        """Which image a key means, in words, without reading its file."""
        epoch, index = divmod(key, len(self))
        path = (self.records[index][self.image_column] or {}).get("path")
        place = f"row {self._source_row(index)} of {self.name}"
        return f"{place}, {path}, in epoch {epoch + 1}" if path else f"{place} in epoch {epoch + 1}"

    def _source_row(self, index: int) -> int:
        """The row in what was opened: some of it may be held out."""
        return index if self._rows is None else int(self._rows[index])

    def _read(self, index: int) -> tuple[Tensor, tuple[tuple[str, str], ...]]:
        errors: list[CorruptImageError] = []
        for step in range(min(MAX_CORRUPT_RUN, len(self))):
            try:
                return self._decode((index + step) % len(self)), tuple((e.name, e.reason) for e in errors)
            except CorruptImageError as error:
                errors.append(error)
        raise _broken_data_error(self.name, errors)

    def _decode(self, row: int) -> Tensor:
        image = self._decoded.get(row)
        if image is None:
            record = self.records[row][self.image_column]
            image = decode_image(record, self.transform.color_mode, f"row {self._source_row(row)}")
            if image.nbytes <= self._free_bytes:
                self._free_bytes -= image.nbytes
                self._decoded[row] = image
        return image


def _make_sample(
    image: Tensor, skipped: Sequence[tuple[str, str]], num_bad: int, transform: Any, sample_seed: int
) -> dict[str, Any]:
    return {
        "pixel_values": transform(image, seeded_generator(sample_seed, 0)),
        "mask_seed": mix_seed(sample_seed, 1),
        "skipped": tuple(skipped),
        "num_bad": int(num_bad),
    }


def _broken_data_error(name: str, errors: Sequence[CorruptImageError]) -> BrokenDataError:
    return BrokenDataError(
        f"data set {name!r} looks broken: {len(errors)} images in a row cannot be decoded, "
        f"the first is {errors[0]}; check the files, or name another column with --image-column"
    )


class EpochSampler(torch.utils.data.Sampler[int]):
    """Keys of one epoch of `PretrainingImages`, in an order that depends on (seed, epoch) alone.

    accelerate: the loader that `prepare` returns counts its own epochs from 0 and sets them here, so start a
    resumed run with `loader.set_epoch(epoch)` on that loader (then `accelerator.skip_first_batches`), not
    with `epoch=`.

    Args:
        dataset: the data set, for its length.
        seed: of the order; may be that of the data set.
        epoch: the first epoch.
        shuffle: False keeps the order of the data set.
    """

    def __init__(self, dataset: PretrainingImages, *, seed: int, epoch: int = 0, shuffle: bool = True):
        self.num_images = len(dataset)
        self.seed = seed
        self.epoch = epoch
        self.shuffle = shuffle

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration yield the keys of `epoch`."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.num_images
        if not self.shuffle:
            yield from range(first, first + self.num_images)
            return
        order = torch.randperm(self.num_images, generator=seeded_generator(self.seed, self.epoch))
        for part in (order + first).split(65536):  # a list of millions of Python integers takes memory
            yield from part.tolist()


class StreamingPretrainingImages(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Transformed images of a stream, shuffled in a buffer: samples as those of `PretrainingImages`.

    Processes and loader workers share the stream without overlap. It goes on for ever by default, so that no
    process runs dry before another; the training loop counts steps. Do not give its loader to accelerate's
    `prepare`, which would split the stream again.

    Two runs with the same seed, processes and workers see the same samples. Resuming is not exact: with
    `epoch` a resumed run starts that epoch over, and samples of it that were seen before may be seen again,
    others not.

    Args:
        source: what `load_images` returns with streaming.
        transform: see `PretrainingImages`.
        seed: of order and samples, the same on all processes.
        rank, world_size: of this process.
        shuffle_buffer: images held back to draw from; 0 keeps the order of the stream.
        epoch: the first epoch.
        num_epochs: how many; `None` for no end.
    """

    def __init__(
        self,
        source: ImageSource,
        transform: PretrainingTransform | EvaluationTransform,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        shuffle_buffer: int = 1000,
        epoch: int = 0,
        num_epochs: int | None = None,
    ):
        if not isinstance(source.dataset, datasets.IterableDataset):
            raise ValueError(f"data set {source.name!r} is not a stream; read it with PretrainingImages")
        records = source.dataset.select_columns([source.image_column])
        if shuffle_buffer:
            records = records.shuffle(seed=mix_seed(seed), buffer_size=shuffle_buffer)
        self.records: datasets.IterableDataset = split_dataset_by_node(records, rank, world_size)
        self.name, self.image_column = source.name, source.image_column
        self.transform = transform
        self.seed, self.rank = seed, rank
        self.epoch, self.num_epochs = epoch, num_epochs

    @property
    def num_shards(self) -> int:
        """Parts of the stream on this process: more loader workers than that would have nothing to do."""
        return self.records.num_shards

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = torch.utils.data.get_worker_info()
        source_id = (self.rank, worker.id if worker else 0)
        epochs = count(self.epoch) if self.num_epochs is None else range(self.epoch, self.epoch + self.num_epochs)
        for epoch in epochs:
            self.records.set_epoch(epoch)
            position = -1
            for position, (image, skipped) in enumerate(self._images()):
                sample_seed = mix_seed(self.seed, epoch, *source_id, position)
                yield _make_sample(image, skipped, len(skipped), self.transform, sample_seed)
            if position < 0:  # a worker without a shard would spin for ever
                return

    def _images(self) -> Iterator[tuple[Tensor, list[tuple[str, str]]]]:
        """Decoded images of one epoch, each with names and reasons of those skipped before it."""
        errors: list[CorruptImageError] = []
        for position, record in enumerate(self.records):
            try:
                image = decode_image(
                    record[self.image_column], self.transform.color_mode, f"image {position} of the stream"
                )
            except CorruptImageError as error:
                errors.append(error)
                if len(errors) == MAX_CORRUPT_RUN:
                    raise _broken_data_error(self.name, errors) from error
                continue
            yield image, [(error.name, error.reason) for error in errors]
            errors = []


def mask_unit_multiple(mask_unit_size: int, model_unit_size: int) -> int:
    """How many of the model's mask units make a side of a mask unit of `mask_unit_size` pixels.

    >>> mask_unit_multiple(64, 32)
    2

    Raises:
        ValueError: it is no multiple of the model's unit.
    """
    if mask_unit_size < model_unit_size or mask_unit_size % model_unit_size:
        raise ValueError(
            f"mask_unit_size {mask_unit_size} must be a multiple of {model_unit_size}, the model's mask unit"
        )
    return mask_unit_size // model_unit_size


class MaskedImageCollator:
    """Makes a batch of samples, their masks, and the plan for them; runs in the loader's workers.

    Args:
        geometry: sizes of the model and the images.
        mask_ratio: share of masked units, in (0, 1).
        mask_sharing: "image" draws a mask for each image from its own seed, "batch" one from the first
            image's seed (processes hold different images, so their masks differ).
        unit_multiple: side of the squares that are masked, in mask units of the model (see
            `mask_unit_multiple`).

    Raises:
        ValueError: unknown sharing, ratio outside (0, 1), or a grid that larger units do not tile.
    """

    def __init__(
        self,
        geometry: SparseGeometry,
        mask_ratio: float,
        mask_sharing: Literal["image", "batch"] = "image",
        unit_multiple: int = 1,
    ):
        rows, columns = geometry.unit_grid_size
        if mask_sharing not in ("image", "batch"):
            raise ValueError(f'mask_sharing {mask_sharing!r} must be "image" or "batch"')
        if unit_multiple < 1 or rows % unit_multiple or columns % unit_multiple:
            raise ValueError(
                f"unit_multiple {unit_multiple} must divide the {rows}x{columns} mask units of an image: "
                "image_size must be a multiple of mask_unit_size"
            )
        self.geometry = geometry
        self.mask_ratio = mask_ratio
        self.mask_sharing = mask_sharing
        self.unit_multiple = unit_multiple
        self._sample_mask(0)  # raises for a bad ratio now and not in a worker

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A batch of B samples.

        Returns:
            pixel_values: [B, C, H, W] float32; the first entry, where accelerate looks for the batch size.
            sparse_plan: `SparsePlan` on the CPU.
            skipped: (name, reason) of images that could not be decoded.
            num_bad: images whose turn it was and that could not be decoded.
        """
        masked_by = samples if self.mask_sharing == "image" else samples[:1]
        bool_masked_pos = torch.cat([self._sample_mask(sample["mask_seed"]) for sample in masked_by])  # [B or 1, units]
        return {
            "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
            "sparse_plan": build_sparse_plan(bool_masked_pos, self.geometry),
            "skipped": [image for sample in samples for image in sample["skipped"]],
            "num_bad": sum(sample["num_bad"] for sample in samples),
        }

    def _sample_mask(self, seed: int) -> Tensor:
        """[1, units] bool, True = masked."""
        rows, columns = (side // self.unit_multiple for side in self.geometry.unit_grid_size)
        masks = sample_masks(1, (rows, columns), self.mask_ratio, torch.Generator().manual_seed(seed))
        if self.unit_multiple == 1:
            return masks
        grid = masks.view(rows, columns)
        return grid.repeat_interleave(self.unit_multiple, 0).repeat_interleave(self.unit_multiple, 1).flatten()[None]


__all__ = [
    "CorruptImageError",
    "EpochSampler",
    "EvaluationTransform",
    "ImageSource",
    "MaskedImageCollator",
    "PretrainingImages",
    "PretrainingTransform",
    "StreamingPretrainingImages",
    "decode_image",
    "load_images",
    "mask_unit_multiple",
    "mix_seed",
    "sample_crop_box",
    "seeded_generator",
]
