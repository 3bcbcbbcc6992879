"""Files of every kind and format that a data set may hold by mistake: what becomes of each, and of the run."""

import json
import os
import pickle
import re
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bad_image_files import BLUE, FORMATS, RED, all_cases, bomb, encode, halves, rare_bombs, turned, webp_bombs
from PIL import Image
from test_examples import (
    PRETRAIN,
    TINY,
    _fresh_accelerator,  # noqa: F401
    assert_same,
    read_log,
    run_command,
    run_pretrain,
    training_losses,
    weights,
)

from green_swin_hf import data as data_module
from green_swin_hf.bad_images import BadImageList, TooManyBadImagesError, check_bad_share
from green_swin_hf.checkpointing import list_checkpoints, read_trainer_state
from green_swin_hf.data import EvaluationTransform, PretrainingTransform
from green_swin_hf.image_decoding import MAX_PIXELS, CorruptImageError, decode_image
from green_swin_hf.image_processing_green_swin import GreenSwinImageProcessor, GreenSwinImageProcessorPil

CASES = all_cases()
TOLERANCE = 12  # levels of 255: what lossy formats change


def mean_of(pixels):
    return pixels.float().mean(dim=(1, 2)).tolist()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_becomes_of_a_file(case, tmp_path):
    path = tmp_path / "picture.jpeg"  # whatever it is
    path.write_bytes(case.content)
    if case.reason:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        with pytest.raises(CorruptImageError, match=f"(?s)picture.jpeg: .*(?:{case.reason})") as caught:
            decode_image({"path": str(path)}, "RGB")
        assert "\n" not in str(caught.value)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB
        return
    pixels = decode_image({"path": str(path)}, "RGB")
    rows, columns = case.size
    assert pixels.shape == (3, rows, columns)
    first, second = pixels.chunk(2, 1 if rows > columns else 2) if rows * columns > 1 else (pixels, pixels)
    assert mean_of(first) == pytest.approx(case.left, abs=TOLERANCE)
    assert mean_of(second) == pytest.approx(case.right, abs=TOLERANCE)
    grey = decode_image({"path": str(path)}, "L")
    assert grey.float().mean().item() == pytest.approx(np.mean([luma(case.left), luma(case.right)]), abs=TOLERANCE)
    for transform in (PretrainingTransform(32), EvaluationTransform(32), EvaluationTransform(32, crop_fraction=0.875)):
        sample = transform(pixels, torch.Generator().manual_seed(0))
        assert sample.shape == (3, 32, 32)
        assert sample.isfinite().all()


def luma(colour):
    return 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]


def test_the_limit_of_pixels_does_not_depend_on_that_of_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # as other libraries leave it
    bomb = next(case for case in CASES if case.kind == "real-bomb")
    with pytest.raises(
        CorruptImageError, match=rf"row 3: Image size \(900000000 pixels\) exceeds limit of {2 * MAX_PIXELS}"
    ):
        decode_image({"bytes": bomb.content}, "L", "row 3")
    assert Image.MAX_IMAGE_PIXELS is None


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's account of memory")
def test_no_bomb_takes_memory_where_freed_memory_is_kept(tmp_path):
    """Pillow takes the canvas of a WebP when it opens one, and then the C library fills it with zeros, page by page.

    The bombs have fewer pixels than those that Pillow 13 refuses by itself.
    """
    bombs = webp_bombs(11_500) | {name: bomb(name, 11_500) for name in FORMATS} | rare_bombs(11_500)
    for kind, content in bombs.items():
        (tmp_path / kind).write_bytes(content)
    script = f"""
import re
from pathlib import Path
from PIL import Image
from green_swin_hf.host_memory import keep_freed_memory
from green_swin_hf.image_decoding import CorruptImageError, decode_image

def peak():  # ru_maxrss would begin with that of the parent
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

keep_freed_memory()
Image.MAX_IMAGE_PIXELS = None  # as other libraries leave it
before = peak()
for path in 2 * sorted(Path({str(tmp_path)!r}).iterdir()):  # what is taken first may be clean pages, untouched
    try:
        decode_image({{"path": str(path)}}, "RGB")
    except CorruptImageError as error:
        print(error.reason)
print(peak() - before)
"""
    *reasons, grown = run_command(sys.executable, "-c", script).stdout.split("\n")[:-1]
    assert len(reasons) == 2 * len(bombs) >= 22
    assert [reason for reason in reasons if not re.search(r"132,?250,?000 pixels.*bomb", reason)] == []
    assert int(grown) < 100_000  # kB; a canvas would take half a million or a million


@pytest.mark.parametrize("kind", ["pipe", "folder", "link-to-nowhere", "device", "huge"])
def test_what_is_no_file_is_not_read(kind, tmp_path):
    path = tmp_path / "x.png"
    if kind == "pipe":
        os.mkfifo(path)  # to open it would wait for ever
    elif kind == "folder":
        path.mkdir()
    elif kind == "huge":
        path.touch()
        os.truncate(path, 1 << 40)  # takes no place on the disk
    else:
        path.symlink_to("/dev/zero" if kind == "device" else tmp_path / "gone.png")
    reasons = {"link-to-nowhere": "No such file", "huge": "1,099,511,627,776 bytes, more than the"}
    with pytest.raises(CorruptImageError, match=reasons.get(kind, "is no regular file")):
        decode_image({"path": str(path)}, "RGB")


def test_an_image_inside_a_table_is_named_by_its_row_and_path():
    with pytest.raises(CorruptImageError, match=r"^row 17 \(cat\.png\): is empty"):
        decode_image({"bytes": b"", "path": "cat.png"}, "RGB", "row 17")


@pytest.mark.parametrize(
    ("size", "orientation", "seen"),
    [
        ((32, 48), 6, "stored"),  # annotated on the pixels as they are stored
        ((48, 32), 6, "upright"),
        ((32, 48), 3, "upright"),  # both fit: as viewers show it
        ((99, 99), 6, "upright"),  # neither does: the caller refuses it
    ],
)
def test_an_annotated_size_decides_whether_an_image_is_turned(size, orientation, seen):
    content = encode(halves(RED, BLUE), "PNG", exif=turned(orientation))
    pixels = decode_image({"bytes": content}, "RGB", size=size)
    upright = decode_image({"bytes": content}, "RGB")
    stored = decode_image({"bytes": encode(halves(RED, BLUE), "PNG")}, "RGB")
    assert torch.equal(pixels, stored if seen == "stored" else upright)


@pytest.mark.parametrize("kind", [GreenSwinImageProcessor, GreenSwinImageProcessorPil])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_image_processor_refuses_pixels_that_are_not_finite(kind, value):
    processor = kind(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5], do_convert_rgb=None)
    image = np.full((1, 8, 8), 0.5, np.float32)
    assert processor(image, do_rescale=False, return_tensors="pt").pixel_values.isfinite().all()
    image[0, 3, 3] = value
    for given in (image, torch.from_numpy(image), [image]):
        with pytest.raises(ValueError, match="NaN or infinite; mend it"):
            processor(given, do_rescale=False, return_tensors="pt")


def test_each_bad_image_is_listed_once_also_by_a_resumed_run(tmp_path):
    images = BadImageList(tmp_path)
    assert images.add([("a.png", "is empty"), ("b\n.png", "is cut"), ("a.png", "is empty")]) == [
        ("a.png", "is empty"),
        ("b\n.png", "is cut"),
    ]
    assert images.add([("a.png", "is empty")]) == []
    images.path.write_text(images.path.read_text() + '{"image": "torn')
    other = BadImageList(tmp_path)
    assert other.add([("b\n.png", "is cut"), ("c.png", "is empty")]) == [("c.png", "is empty")]
    assert BadImageList(tmp_path).add([("c.png", "is empty")]) == []


def test_the_share_is_of_the_whole_epoch(tmp_path):
    check_bad_share(29, 100, 0.29, "epoch 1", tmp_path)
    check_bad_share(100, 100, 1.0, "epoch 1", tmp_path)
    with pytest.raises(
        TooManyBadImagesError, match=r"1 bad images in epoch 2, and max_bad_share 0 allows 0 of its 100"
    ):
        check_bad_share(1, 100, 0.0, "epoch 2", tmp_path)


@pytest.fixture(scope="module")
def mixed_folder(tmp_path_factory):
    """80 images: 70 good ones, then 10 of which each is broken in its way."""
    folder = tmp_path_factory.mktemp("mixed")
    noise = np.random.default_rng(0)
    for number in range(70):
        Image.fromarray(noise.integers(0, 255, (40, 40), np.uint8)).save(folder / f"{number:02d}.png")
    broken = [case for case in CASES if case.reason]
    for number in range(10):
        (folder / f"9{number}.png").write_bytes(broken[number * len(broken) // 10].content)
    return folder


def mixed_flags(folder, *more):
    return ["--data", folder, *TINY, "--batch-size", 10, "--max-steps", 16, "--validation-images", 0, *more]


@pytest.fixture(scope="module")
def whole(mixed_folder, tmp_path_factory):
    """Two epochs of it without interruption."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert run_pretrain("--output-dir", output, *mixed_flags(mixed_folder, "--max-bad-share", 0.2)) == 0
    return output


def test_bad_images_are_counted_each_epoch_and_a_resumed_run_counts_as_one_that_was_not_interrupted(
    mixed_folder, whole, tmp_path, capsys
):
    parts, flags = tmp_path / "parts", mixed_flags(mixed_folder, "--max-bad-share", 0.2)
    epochs = [entry for entry in read_log(whole) if "bad_images" in entry]
    assert [(entry["step"], entry["bad_images"], entry["of_images"]) for entry in epochs] == [(8, 10, 80), (16, 10, 80)]
    listed = [json.loads(line) for line in (whole / "bad_images.jsonl").read_text().splitlines()]
    assert sorted(entry["image"] for entry in listed) == [str(mixed_folder / f"9{number}.png") for number in range(10)]

    assert run_pretrain("--output-dir", parts, *flags, "--stop-after", 3, "--workers", 1) == 0
    assert run_pretrain("--output-dir", parts, "--resume", "auto") == 0
    shown = capsys.readouterr().err
    assert shown.count("another one takes its place") == 10
    assert "Bad images in epoch 2: 10 of 80" in shown
    assert_same(weights(whole), weights(parts))
    timeless = [[{**entry, "images_per_second": 0} for entry in read_log(folder)] for folder in (whole, parts)]
    assert timeless[0] == timeless[1]


def test_too_many_bad_images_stop_the_run_with_a_checkpoint(mixed_folder, whole, tmp_path, capsys):
    output = tmp_path / "run"
    flags = mixed_flags(mixed_folder, "--save-every", 0)
    assert run_pretrain("--output-dir", output, *flags, "--max-bad-share", 0.05) == 1
    shown = capsys.readouterr().err
    assert "5 bad images in epoch 1, and max_bad_share 0.05 allows 4 of its 80" in shown
    update = read_trainer_state(list_checkpoints(output / "checkpoints")[-1])["state"]["update"]
    assert f"the checkpoint after update {update} was written whole, go on with: python" in shown
    assert f"{output / 'bad_images.jsonl'}" in shown
    assert run_pretrain("--output-dir", output, "--resume", "auto") == 1  # it is still so
    assert run_pretrain("--output-dir", output, "--resume", "auto", "--max-bad-share", 0.2) == 0
    assert_same(weights(whole), weights(output))
    assert training_losses(whole) == training_losses(output)


def test_wrong_limits_are_refused(mixed_folder, tmp_path, capsys):
    for flag, value in (("--max-bad-share", 1.5), ("--max-bad-share", -0.1), ("--worker-timeout", -1)):
        with pytest.raises(SystemExit, match="2"):
            run_pretrain("--output-dir", tmp_path / "run", *mixed_flags(mixed_folder), flag, value)
        assert flag[2:].replace("-", "_") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_of_broken_images_only_ends_in_one_line(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.png").touch()
    flags = ["--data", folder, *TINY, "--workers", 1, "--max-steps", 2, "--validation-images", 0]
    done = run_command(sys.executable, PRETRAIN, *flags, "--output-dir", tmp_path / "run")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pretrain.py: stopped: data set ")
    assert "looks broken: 30 images in a row" in last
    assert "it has no checkpoint yet" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("end", ["hangs", "is killed"])
def test_a_worker_that_ends_ends_the_run_which_goes_on_exactly(mixed_folder, whole, tmp_path, monkeypatch, capsys, end):
    flags = mixed_flags(mixed_folder, "--max-bad-share", 1, "--workers", 1, "--save-every", 1)
    output = tmp_path / "run"
    decode, main_process = data_module.decode_image, os.getpid()

    def trouble(record, *arguments):
        if record["path"].endswith("09.png") and os.getpid() != main_process and len(list_checkpoints(checkpoints)) > 1:
            os.kill(os.getpid(), signal.SIGSTOP if end == "hangs" else signal.SIGKILL)
        return decode(record, *arguments)

    checkpoints = output / "checkpoints"
    monkeypatch.setattr(data_module, "decode_image", trouble)
    capsys.readouterr()
    assert run_pretrain("--output-dir", output, *flags, "--worker-timeout", 2) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("pretrain.py: stopped: a loader worker " + ("hung" if end == "hangs" else "died"))
    assert f"was on row 9 of {mixed_folder}, {mixed_folder / '09.png'}, in epoch" in last
    assert "go on with: python" in last
    monkeypatch.undo()
    assert run_pretrain("--output-dir", output, "--resume", "auto") == 0
    assert_same(weights(whole), weights(output))
    assert training_losses(whole) == training_losses(output)


@pytest.mark.parametrize("brightest", [200, 40_000])
def test_dark_pictures_of_16_bits_have_the_scale_of_bright_ones(brightest):
    """Pillow opens such a PGM as 32-bit, where the range depends on the brightest pixel."""
    header = b"P5 2 1 65535\n"
    pixels = np.array([0, brightest], dtype=">u2").tobytes()
    decoded = decode_image({"bytes": header + pixels, "path": None}, "L")
    assert decoded.flatten().tolist() == [0, round(brightest / 257)]


def test_the_address_of_a_bad_image_is_named_without_what_opens_it():
    found = []
    for signature in ("abc", "xyz"):
        address = f"http://me:hf_secretsecret@127.0.0.1:9/x.png?Signature={signature}"
        with pytest.raises(CorruptImageError) as caught:
            decode_image({"path": address, "bytes": None}, "RGB")
        found.append(caught.value.name)
    assert len(set(found)) == 2  # two images
    again = pickle.loads(pickle.dumps(caught.value))  # as from a loader's worker
    for text in (str(caught.value), repr(caught.value), str(again)):
        assert "127.0.0.1:9/x.png" in text
        assert "secret" not in text
        assert "xyz" not in text
    assert CorruptImageError("/data/what?a=1/img 7.png", "it is broken").name == "/data/what?a=1/img 7.png"
