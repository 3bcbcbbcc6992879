"""Opening a data set of images from a name or a path, whatever its layout."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

from .idx_images import find_idx_images, load_idx_images

HUB_TIMEOUT_SECONDS = 10
LOCAL_STREAM_SHARDS = 64

IMAGE_EXTENSIONS = tuple(
    f".{kind}"
    for kind in "avif bmp gif jfif jp2 jpe jpeg jpg pbm pgm png pnm ppm tif tiff webp".split()  # noqa: SIM905
)
DATA_EXTENSIONS = (".arrow", ".csv", ".json", ".jsonl", ".parquet", ".tar", ".zip")
IMAGE_COLUMN_NAMES = ("image", "img", "jpeg", "jpg", "photo", "picture", "pixel_values", "png", "webp")
ENCODED_DTYPES = ("binary", "large_binary", "string", "large_string")
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "eval"), "test"),
}
_FINGERPRINT_IMAGES, _FINGERPRINT_BYTES = 16, 4096


@dataclass(frozen=True)
class ImageSource:
    """An opened data set and where its images are.

    Attributes:
        dataset: a `datasets.Dataset`, or a `datasets.IterableDataset` when streaming. `image_column` gives
            undecoded records `{"bytes", "path"}`; the other columns are as the data set has them.
        image_column: name of the column with the images.
        name: what was asked for, for messages and model cards.
        num_images: images in the split; `None` when streaming.
        rows: of a part of a split, the row in the split of each of its images; `None` for all of them.
    """

    dataset: datasets.Dataset | datasets.IterableDataset
    image_column: str
    name: str
    num_images: int | None
    rows: np.ndarray | None = field(default=None, compare=False)

    def select(self, rows: Sequence[int]) -> ImageSource:
        """These images alone, in this order; not of a stream."""
        dataset = self.dataset.select(rows)
        chosen = np.asarray(rows, dtype=np.int64)
        kept = chosen if self.rows is None else self.rows[chosen]
        return replace(self, dataset=dataset, num_images=len(dataset), rows=kept)

    def fingerprint(self) -> str | None:
        """Twelve hexadecimal digits that other images hardly share, wherever the files lie; `None` for a stream.

        They follow from the number of images and from the first bytes of a sample of them.
        """
        return None if self.num_images is None else sample_fingerprint(self.dataset, [self.image_column])


def sample_fingerprint(dataset: Any, columns: Sequence[str], beside: bytes = b"") -> str:
    """Twelve hexadecimal digits from the number of rows, the first bytes of a sample of their files, and `beside`.

    Args:
        dataset: map-style.
        columns: give undecoded records `{"bytes", "path"}`; no other column is read.
        beside: what else tells the data from others, such as all labels.
    """
    num_rows = len(dataset)
    digest = hashlib.sha256(str(num_rows).encode())
    files = dataset.select_columns(list(columns))
    count = min(_FINGERPRINT_IMAGES, num_rows)
    for place in range(count):
        row = files[place * num_rows // count]
        for column in columns:
            digest.update(_first_bytes(row[column] or {}))
    digest.update(beside)
    return digest.hexdigest()[:12]


def _first_bytes(record: Mapping[str, Any]) -> bytes:
    """Of an image; none of a file that cannot be read, which is no reason to end here."""
    if record.get("bytes"):
        return record["bytes"][:_FINGERPRINT_BYTES]
    path = record.get("path") or ""
    if not os.path.isfile(path):
        return b""
    try:
        with open(path, "rb") as file:
            return file.read(_FINGERPRINT_BYTES)
    except OSError:
        return b""


def load_images(
    source: str | os.PathLike[str],
    *,
    split: str = "train",
    streaming: bool = False,
    image_column: str | None = None,
    subset: str | None = None,
) -> ImageSource:
    """Open one split of a data set of images without decoding any.

    Args:
        source: a folder of images (flat or nested; split folders such as `train/` are recognised), a folder
            with data files and a data set card, a folder with the idx files of MNIST and its relatives, a Parquet
            file or a glob of them, a `save_to_disk` folder, or the name of a data set on the Hub. What looks like a
            path is never asked of the Hub.
        split: name of the split.
        streaming: read while training instead of downloading and converting first.
        image_column: column with the images; found by its type, then by its name, when not given.
        subset: configuration of a data set that has several.

    Raises:
        ValueError: missing path, unknown name, split or column, several columns to choose from, a Hub that
            does not answer: one line that names the value and the remedy.
    """
    name = os.fspath(source)
    splits = _open_splits(name, streaming, subset)
    if split not in splits:
        raise ValueError(f"data set {name!r} has no split {split!r}; choose one of: {', '.join(splits)}")
    dataset = splits[split]
    if dataset.features is None:
        raise ValueError(f"data set {name!r} does not tell its columns as a stream; do not stream it")
    column = _find_image_column(dataset.features, image_column, name)
    dataset = dataset.cast_column(column, datasets.Image(decode=False))
    num_images = None if isinstance(dataset, datasets.IterableDataset) else len(dataset)
    return ImageSource(dataset, column, name, num_images)


def _open_splits(name: str, streaming: bool, subset: str | None) -> Mapping[str, Any]:
    """Data sets by split name, from wherever `name` leads."""
    path = Path(name).expanduser()
    if glob.has_magic(name) and not path.exists():
        return _load("parquet", name, streaming, data_files=_parquet_files(name))
    if path.is_file():
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"{name!r} is a file and not Parquet; give a folder of images, or a .parquet file")
        return _load("parquet", name, streaming, data_files=[str(path)])
    if path.is_dir():
        return _open_folder(path, name, streaming, subset)
    if looks_local(name):
        raise ValueError(f"folder {name!r} does not exist; check the path, or give the name of a Hub data set")
    _check_hub(name)
    return _load(name, name, streaming, subset)


def looks_local(name: str) -> bool:
    """Whether a name is meant as a path rather than as a repository on the Hub."""
    starts_local = name in (".", "..") or name.startswith(("./", "../", "~")) or os.path.isabs(name)
    return starts_local or name.count("/") > 1 or "\\" in name or name.lower().endswith(".parquet")


def _parquet_files(pattern: str) -> list[str]:
    files = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if not files:
        raise ValueError(f"{pattern!r} matches no file; check the path")
    other = [file for file in files if not file.lower().endswith(".parquet")]
    if other:
        raise ValueError(f"{pattern!r} matches {other[0]!r}, which is not Parquet; end it in .parquet")
    return files


def _open_folder(path: Path, name: str, streaming: bool, subset: str | None) -> Mapping[str, Any]:
    is_single, is_dict = (path / "state.json").is_file(), (path / "dataset_dict.json").is_file()
    if is_single or is_dict:
        saved: Any = _one_line_errors(name, partial(datasets.load_from_disk, str(path)))
        return _as_streams(saved if is_dict else {str(saved.split or "train"): saved}, streaming)
    images, holds_data, holds_tables = _scan_folder(path, name)
    idx_images = find_idx_images(path)
    if idx_images:
        return _as_streams(load_idx_images(idx_images), streaming)
    if images and holds_tables and not _has_card(path):
        raise ValueError(
            f"folder {name!r} holds images ({Path(images[0]).name}, …) and Parquet or Arrow files; give the one or the "
            f"other: --data '{name}/**/*.parquet', or a folder of images only"
        )
    if images and not holds_tables:
        return _as_streams(_image_folder_splits(path, images), streaming)
    if not holds_data:
        raise ValueError(f"folder {name!r} holds no images and no data files; check the path")
    return _load(str(path), name, streaming, subset)


def _has_card(folder: Path) -> bool:
    """Whether the folder is laid out as on the Hub, with a card that says which files are the data."""
    card = folder / "README.md"
    return card.is_file() and "data_files:" in card.read_text(encoding="utf-8", errors="replace")


def _scan_folder(folder: Path, name: str) -> tuple[list[str], bool, bool]:
    """(absolute paths of the images below `folder` in a fixed order, are there data files, are there tables of images).

    Hidden files and folders are left out; links to folders are followed, each folder once.
    """

    def fail(error: OSError) -> None:
        raise ValueError(f"folder {name!r} cannot be read: {error.filename}: {error.strerror}") from error

    images: list[str] = []
    seen: set[str] = set()
    holds_data = holds_tables = False
    for parent, folders, files in os.walk(folder.absolute(), followlinks=True, onerror=fail):
        real = os.path.realpath(parent)
        folders[:] = [] if real in seen else sorted(child for child in folders if not child.startswith("."))
        if real in seen:
            continue
        seen.add(real)
        for file in sorted(file for file in files if not file.startswith(".")):
            extension = os.path.splitext(file)[1].lower()
            holds_data |= extension in DATA_EXTENSIONS
            holds_tables |= extension in (".arrow", ".parquet")
            if extension in IMAGE_EXTENSIONS:
                images.append(os.path.join(parent, file))
    return images, holds_data, holds_tables


def _image_folder_splits(folder: Path, images: list[str]) -> dict[str, datasets.Dataset]:
    """Images by split: by the split folders at the top if one is for training, else all as "train".

    The guesses of `datasets` are not used: for them a flat folder with one `train_station.jpg` has a single
    image.
    """
    root = folder.absolute()
    by_split: dict[str, list[str]] = {}
    for image in images:
        top = Path(image).relative_to(root).parts[0].lower()
        by_split.setdefault(SPLIT_FOLDERS.get(top, ""), []).append(image)
    if "train" not in by_split:
        by_split = {"train": images}
    by_split.pop("", None)
    features = datasets.Features({"image": datasets.Image(decode=False)})
    return {split: datasets.Dataset.from_dict({"image": files}, features) for split, files in by_split.items()}


def _as_streams(splits: Mapping[str, Any], streaming: bool) -> Mapping[str, Any]:
    if not streaming:
        return splits
    return {
        split: dataset.to_iterable_dataset(num_shards=max(1, min(LOCAL_STREAM_SHARDS, len(dataset))))
        for split, dataset in splits.items()
    }


def _load(path: str, name: str, streaming: bool, subset: str | None = None, **options: Any) -> Mapping[str, Any]:
    """`datasets.load_dataset` for all splits; its failures as one line."""
    return _one_line_errors(name, partial(datasets.load_dataset, path, subset, streaming=streaming, **options))


def _one_line_errors(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except Exception as error:  # anything: readers of files and of the network raise what they like
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        remedies = {"Config": "choose one with --subset", "Offline": "unset HF_HUB_OFFLINE to download it"}
        fitting = (remedy for word, remedy in remedies.items() if word in reason)
        remedy = next(fitting, "check name, files and disk space")
        raise ValueError(f"data set {name!r} cannot be loaded: {reason}; {remedy}") from error


def _check_hub(name: str) -> None:
    """Ask the Hub once, with a short timeout: `load_dataset` retries for half a minute, and prints each time.

    Raises:
        ValueError: the Hub does not know the data set, or does not answer.
    """
    if constants.HF_HUB_OFFLINE:  # then `load_dataset` looks in the cache only
        return
    try:
        HfApi().dataset_info(name, timeout=HUB_TIMEOUT_SECONDS)
    except GatedRepoError:
        problem = f"Hub data set {name!r} is gated; accept its terms on its page and log in: hf auth login"
    except (RepositoryNotFoundError, HFValidationError):
        problem = (
            f"data set {name!r} is neither a folder here nor known to the Hub; check the spelling, "
            "or log in if it is private: hf auth login"
        )
    except Exception as error:  # types of the HTTP library, which differ between versions of huggingface_hub
        problem = (
            f"the Hub does not answer for {name!r} ({type(error).__name__}), and no folder has that name; "
            "check the connection, set HF_HUB_OFFLINE=1 to use a cached copy, or give a local folder"
        )
    else:
        return
    raise ValueError(problem)


def _find_image_column(features: Mapping[str, Any], wanted: str | None, name: str) -> str:
    if wanted is not None:
        candidates = [wanted] if wanted in features and _can_hold_images(features[wanted]) else []
        problem = f"has no column {wanted!r}" if wanted not in features else f"holds no images in {wanted!r}"
    else:
        candidates = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
        if not candidates:
            named = [column for column in features if column.lower() in IMAGE_COLUMN_NAMES]
            candidates = [column for column in named if _can_hold_images(features[column])]
        problem = "has several image columns" if candidates else "has no column known to hold images"
    if len(candidates) == 1:
        return candidates[0]
    choices = ", ".join(candidates or features)
    raise ValueError(f"data set {name!r} {problem}; set --image-column to one of: {choices}")


def _can_hold_images(feature: Any) -> bool:
    """Whether a column is of images, of encoded bytes or paths, or of records of those."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in ENCODED_DTYPES
