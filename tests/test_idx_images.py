"""idx files as MNIST and its relatives are published in, written here byte by byte."""

import gzip
import struct
from pathlib import Path

import datasets
import pytest
import torch
from test_examples import TINY, run_pretrain

from green_swin_hf.data import decode_image
from green_swin_hf.image_sources import load_images

ROWS, COLUMNS = 3, 5


def images_file(count: int, first: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> bytes:
    """Images whose pixels count up from `first`, modulo 256."""
    pixels = bytes((first + place) % 256 for place in range(count * rows * columns))
    return struct.pack(">BBBBIII", 0, 0, 8, 3, count, rows, columns) + pixels


def labels_file(*labels: int) -> bytes:
    return struct.pack(">BBBBI", 0, 0, 8, 1, len(labels)) + bytes(labels)


def write(folder: Path, **files: bytes) -> Path:
    """Files by short names: `train_images` is `train-images-idx3-ubyte`, `train_images_gz` the same packed."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        split, kind, *packed = name.split("_")
        path = folder / f"{split}-{kind}-idx{3 if kind == 'images' else 1}-ubyte{'.gz' if packed else ''}"
        path.write_bytes(gzip.compress(content) if packed else content)
    return folder


@pytest.mark.parametrize("end", ["", "_gz"], ids=["plain", "packed"])
@pytest.mark.parametrize("streaming", [False, True])
def test_images_and_labels_of_both_splits(tmp_path, end, streaming):
    files = {
        f"train_images{end}": images_file(4),
        f"train_labels{end}": labels_file(2, 0, 1, 2),
        f"t10k_images{end}": images_file(2, first=250),
        f"t10k_labels{end}": labels_file(1, 3),
    }
    write(tmp_path, **files)
    for split, first, labels in (("train", 0, [2, 0, 1, 2]), ("test", 250, [1, 3])):
        source = load_images(tmp_path, split=split, streaming=streaming)
        assert source.image_column == "image"
        assert source.num_images == (None if streaming else len(labels))
        records = list(source.dataset)
        assert [record["label"] for record in records] == labels
        assert source.dataset.features["label"] == datasets.ClassLabel(names=["0", "1", "2", "3"])
        pixels = torch.stack([decode_image(record["image"], "L") for record in records])
        expected = torch.arange(first, first + len(labels) * ROWS * COLUMNS) % 256
        assert torch.equal(pixels, expected.view(-1, 1, ROWS, COLUMNS).byte())


def test_images_without_labels_serve_pretraining(tmp_path):
    write(tmp_path, train_images_gz=images_file(2))
    source = load_images(tmp_path)
    assert (source.num_images, source.dataset.column_names) == (2, ["image"])
    with pytest.raises(ValueError, match=r"no split 'test'; choose one of: train$"):
        load_images(tmp_path, split="test")


def test_an_unpacked_file_goes_before_its_packed_copy(tmp_path):
    write(tmp_path, train_images=images_file(3), train_images_gz=b"half a downl", train_labels_gz=labels_file(0, 1, 0))
    (tmp_path / "preview.png").write_bytes(b"no image of the data set")
    source = load_images(tmp_path)
    assert (source.num_images, source.dataset["label"][:]) == (3, [0, 1, 0])


TRAIN_IMAGES, TRAIN_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
WRONG_FILES = {
    "truncated": (
        {"train_images": images_file(4)[:-7]},
        rf"{TRAIN_IMAGES}' holds 53 bytes where its header says 4 images x 3 rows x 5 columns; get the file again$",
    ),
    "too long": ({"train_images": images_file(4) + b"\0"}, "holds 61 bytes where its header says 4 images"),
    "half a header": ({"train_images": images_file(4)[:9]}, "holds 0 bytes where its header says 4 images x 0 rows"),
    "nothing in it": ({"train_images": b""}, rf"{TRAIN_IMAGES}' is no idx file of images: it begins with 0x, not"),
    "no images": ({"train_images": images_file(0)}, "holds 0 bytes where its header says 0 images"),
    "labels for images": (
        {"train_images": labels_file(1, 2)},
        r"is no idx file of images: it begins with 0x00000801, not 0x00000803; check that images and labels are not "
        "exchanged",
    ),
    "images for labels": (
        {"train_images": images_file(2), "train_labels": images_file(2)},
        rf"{TRAIN_LABELS}' is no idx file of labels: it begins with 0x00000803, not 0x00000801",
    ),
    "16-bit pixels": (
        {"train_images": struct.pack(">BBBBIII", 0, 0, 11, 3, 1, 1, 1) + b"\0\0"},
        "begins with 0x00000b03, not 0x00000803",
    ),
    "fewer labels": (
        {"train_images_gz": images_file(4), "train_labels_gz": labels_file(1, 2, 3)},
        rf"{TRAIN_LABELS}.gz' holds 3 labels for the 4 images of '{TRAIN_IMAGES}.gz'; take both from the same release$",
    ),
}


@pytest.mark.parametrize(("files", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_wrong_files_are_named_with_the_remedy_in_one_line(tmp_path, files, message):
    with pytest.raises(ValueError, match=message) as error:
        load_images(write(tmp_path, **files))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", ["cut", "other", "flipped"])
def test_a_damaged_packed_file_is_named(tmp_path, damage):
    write(tmp_path, train_images_gz=images_file(40))
    path = tmp_path / f"{TRAIN_IMAGES}.gz"
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
    path.write_bytes({"cut": content[:-12], "other": b"<html>not found</html>", "flipped": flipped}[damage])
    with pytest.raises(ValueError, match=rf"{TRAIN_IMAGES}\.gz' cannot be read: .*; get the file again$"):
        load_images(tmp_path)


def test_pretraining_reads_them_and_says_what_is_wrong(tmp_path, capsys):
    data = write(tmp_path / "data", train_images_gz=images_file(24, rows=28, columns=28))
    assert run_pretrain("--data", data, "--output-dir", tmp_path / "run", "--max-steps", "1", *TINY) == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    write(data, train_images_gz=images_file(24)[:-1])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        run_pretrain("--data", data, "--output-dir", tmp_path / "other", *TINY)
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"{TRAIN_IMAGES}.gz' holds 359 bytes" in message
    assert not (tmp_path / "other").exists()
