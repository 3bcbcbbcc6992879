"""Sources, decoding, transforms, data sets, order, collator: on real images where that is possible, without network."""

import contextlib
import dataclasses
import io
import math
import pickle
import shutil
import struct
import time
import types
import warnings
import zlib
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

from green_swin_hf import GreenSwinConfig
from green_swin_hf.data import (
    CorruptImageError,
    EpochSampler,
    EvaluationTransform,
    MaskedImageCollator,
    PretrainingImages,
    PretrainingTransform,
    StreamingPretrainingImages,
    decode_image,
    load_images,
    mask_unit_multiple,
    mix_seed,
    sample_crop_box,
    seeded_generator,
)
from green_swin_hf.sparse_plan import SparseGeometry, SparsePlan, build_sparse_plan

DATA = Path(__file__).parents[1] / "examples" / "data"
FASHION = DATA / "fashion_mnist_10k"
PHOTOS = DATA / "photos"
PLAIN_GREY = {"mean": (0.0,), "std": (1.0,)}


@pytest.fixture(scope="module", autouse=True)
def _quiet_private_cache(tmp_path_factory):
    """Arrow copies go to a folder that vanishes, and the Hub is asked nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
        patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)  # 5 s at the end of a Parquet stream
        datasets.disable_progress_bars()
        yield
        datasets.enable_progress_bars()


@pytest.fixture(scope="module")
def fashion(_quiet_private_cache):
    source = load_images(FASHION, split="test")
    return dataclasses.replace(source, dataset=source.dataset.select(range(300)), num_images=300)


@pytest.fixture(scope="module")
def geometry():
    config = GreenSwinConfig(
        image_size=32, patch_size=2, num_channels=1, embed_dim=8, depths=(1, 1, 1), num_heads=(1, 1, 1), window_size=4
    )
    return SparseGeometry.from_config(config)


def grey_png(value=0, size=(4, 4), **options):
    """Encoded grey image of one value, of `size` (rows, columns)."""
    return encode(Image.new("L", size[::-1], value), "PNG", **options)


def encode(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def write_grey_folder(folder, values):
    folder.mkdir(parents=True, exist_ok=True)
    for value in values:
        (folder / f"{value:03d}.png").write_bytes(grey_png(value))
    return folder


def grey_values(samples):
    """The grey value of each sample of constant images, transformed by `plain_transform`."""
    return [round(sample["pixel_values"].mean().item() * 255) for sample in samples]


def plain_transform(size=(4, 4)):
    return EvaluationTransform(size, 1, **PLAIN_GREY)


def fashion_images(fashion, seed=0, **options):
    transform = PretrainingTransform((32, 32), 1, pad=2, crop_scale=(0.5, 1.0))
    return PretrainingImages(fashion, transform, seed=seed, **options)


def same_batches(first, second):
    return len(first) == len(second) and all(
        torch.equal(a["pixel_values"], b["pixel_values"])
        and torch.equal(a["sparse_plan"].bool_masked_pos, b["sparse_plan"].bool_masked_pos)
        for a, b in zip(first, second, strict=True)
    )


class TestSources:
    def test_embedded_data_set_with_its_card(self):
        for split, count in (("train", 8000), ("validation", 1000), ("test", 1000)):
            source = load_images(str(FASHION), split=split)
            assert (source.image_column, source.num_images, source.name) == ("image", count, str(FASHION))
        assert decode_image(source.dataset[0]["image"], "L").shape == (1, 28, 28)
        assert "label" in source.dataset.column_names

    def test_flat_folder_of_photographs(self):
        source = load_images(PHOTOS)
        names = [Path(record["path"]).name for record in source.dataset["image"]]
        assert names == ["astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg"]
        assert source.num_images == 4

    def test_nested_folder_keeps_a_fixed_order_and_leaves_hidden_files_out(self, tmp_path):
        write_grey_folder(tmp_path / "b" / "deep", [3, 4])
        write_grey_folder(tmp_path / "a", [1, 2])
        write_grey_folder(tmp_path / ".trash", [9])
        (tmp_path / "a" / "._001.png").write_bytes(b"resource fork")
        (tmp_path / "a" / "notes.txt").write_text("no image")
        source = load_images(tmp_path)
        assert [Path(record["path"]).stem for record in source.dataset["image"]] == ["001", "002", "003", "004"]

    def test_a_file_called_train_does_not_hide_the_others(self, tmp_path):
        for name in ("train_station.png", "test_tube.png", "valid_ticket.png"):
            (tmp_path / name).write_bytes(grey_png())
        assert load_images(tmp_path).num_images == 3

    def test_split_folders(self, tmp_path):
        write_grey_folder(tmp_path / "train" / "cat", [1, 2, 3])
        write_grey_folder(tmp_path / "val", [4, 5])
        assert load_images(tmp_path).num_images == 3
        assert load_images(tmp_path, split="validation").num_images == 2
        with pytest.raises(ValueError, match="no split 'test'; choose one of: train, validation"):
            load_images(tmp_path, split="test")

    def test_linked_folders_are_read_once_even_in_a_loop(self, tmp_path):
        write_grey_folder(tmp_path / "elsewhere", [1, 2])
        root = tmp_path / "set"
        root.mkdir()
        (root / "linked").symlink_to(tmp_path / "elsewhere")
        (root / "loop").symlink_to(root)
        assert load_images(root).num_images == 2

    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_parquet_file_and_glob(self, tmp_path, streaming):
        for number in range(2):
            rows = {"image": [grey_png(number)] * 3, "caption": ["a", "b", "c"]}
            datasets.Dataset.from_dict(rows).to_parquet(tmp_path / f"part-{number}.parquet")
        one = load_images(tmp_path / "part-0.parquet", streaming=streaming)
        both = load_images(f"{tmp_path}/part-*.parquet", streaming=streaming)
        assert len(list(one.dataset)) == 3
        assert len(list(both.dataset)) == 6
        assert both.num_images == (None if streaming else 6)
        assert decode_image(next(iter(both.dataset))["image"], "L").shape == (1, 4, 4)

    def test_folder_saved_by_datasets(self, tmp_path):
        features = datasets.Features({"picture": datasets.Image(), "label": datasets.Value("int64")})
        rows = datasets.Dataset.from_dict({"picture": [str(PHOTOS / "rocket.jpg")], "label": [1]}, features)
        rows.save_to_disk(tmp_path / "one")
        datasets.DatasetDict({"train": rows, "extra": rows}).save_to_disk(tmp_path / "several")
        assert load_images(tmp_path / "one").image_column == "picture"
        assert load_images(tmp_path / "several", split="extra").num_images == 1
        with pytest.raises(ValueError, match="no split 'test'; choose one of: train, extra"):
            load_images(tmp_path / "several", split="test")

    def test_home_folder_is_expanded(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        write_grey_folder(tmp_path / "pictures", [1])
        assert load_images("~/pictures").num_images == 1

    def test_opening_does_not_decode(self, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"")
        assert load_images(tmp_path).num_images == 1


class TestColumns:
    def parquet(self, folder, **columns):
        path = folder / "data.parquet"
        datasets.Dataset.from_dict(columns).to_parquet(path)
        return path

    def test_image_feature_wins_over_names(self, tmp_path):
        features = datasets.Features({"image": datasets.Value("string"), "scan": datasets.Image()})
        rows = {"image": ["a caption"], "scan": [{"bytes": grey_png(), "path": None}]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "data.parquet")
        assert load_images(tmp_path / "data.parquet").image_column == "scan"

    @pytest.mark.parametrize("name", ["image", "img", "pixel_values", "jpg", "PNG"])
    def test_encoded_bytes_under_a_known_name(self, tmp_path, name):
        source = load_images(self.parquet(tmp_path, **{"id": [1], name: [grey_png(7)]}))
        assert source.image_column == name
        assert decode_image(source.dataset[0][name], "L")[0, 0, 0] == 7

    def test_paths_in_a_column(self, tmp_path):
        source = load_images(self.parquet(tmp_path, image=[str(PHOTOS / "rocket.jpg")]))
        assert decode_image(source.dataset[0]["image"], "RGB").shape == (3, 427, 640)

    def test_column_by_flag(self, tmp_path):
        path = self.parquet(tmp_path, before=[grey_png(1)], after=[grey_png(2)])
        source = load_images(path, image_column="after")
        assert decode_image(source.dataset[0]["after"], "L")[0, 0, 0] == 2

    def test_errors_name_the_columns_and_the_flag(self, tmp_path):
        none = self.parquet(tmp_path, before=[grey_png(1)], count=[2])
        with pytest.raises(ValueError, match="set --image-column to one of: before, count"):
            load_images(none)
        with pytest.raises(ValueError, match="no column 'picture'; set --image-column to one of: before, count"):
            load_images(none, image_column="picture")
        with pytest.raises(ValueError, match="no images in 'count'; set --image-column"):
            load_images(none, image_column="count")
        several = self.parquet(tmp_path, img=[grey_png(1)], jpg=[grey_png(1)], count=[2])
        with pytest.raises(ValueError, match=r"several image columns; set --image-column to one of: img, jpg$"):
            load_images(several)


class TestSourceErrors:
    @pytest.mark.parametrize("path", ["./no/such", "../nothing", "/nowhere/at/all", "~/nothing", "a/b/c", "x.parquet"])
    def test_missing_path_is_not_asked_of_the_hub(self, path, monkeypatch):
        monkeypatch.setattr("green_swin_hf.image_sources.HfApi", None)  # any use of it raises another error
        with pytest.raises(ValueError, match=r"does not exist; check the path"):
            load_images(path)

    def test_folder_without_images(self, tmp_path):
        (tmp_path / "readme.txt").write_text("nothing here")
        with pytest.raises(ValueError, match="holds no images and no data files"):
            load_images(tmp_path)

    def test_file_that_is_not_parquet(self):
        with pytest.raises(ValueError, match=r"is a file and not Parquet; give a folder"):
            load_images(PHOTOS / "rocket.jpg")

    def test_glob_without_match_or_of_other_files(self):
        with pytest.raises(ValueError, match="matches no file"):
            load_images(f"{PHOTOS}/*.parquet")
        with pytest.raises(ValueError, match="which is not Parquet"):
            load_images(f"{PHOTOS}/*.jpg")

    @pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
    def test_unknown_split(self, streaming):
        with pytest.raises(ValueError, match="no split 'dev'; choose one of: train, validation, test"):
            load_images(FASHION, split="dev", streaming=streaming)

    def test_damaged_parquet(self, tmp_path):
        (tmp_path / "data.parquet").write_bytes(b"PAR1 but nothing else")
        with pytest.raises(ValueError, match="cannot be loaded: ") as caught:
            load_images(tmp_path / "data.parquet")
        assert "\n" not in str(caught.value)

    def test_unknown_subset_names_the_flag(self):
        with pytest.raises(ValueError, match="--subset"):
            load_images(FASHION, subset="colour")

    def test_hub_that_does_not_answer(self):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=r"Hub does not answer for 'someone/pictures'.*HF_HUB_OFFLINE") as caught:
            load_images("someone/pictures")
        assert time.perf_counter() - start < 5
        assert "\n" not in str(caught.value)

    def test_offline_and_not_in_the_cache(self, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        with pytest.raises(ValueError, match=r"'someone/pictures' cannot be loaded: .*; unset HF_HUB_OFFLINE"):
            load_images("someone/pictures")

    def test_name_the_hub_cannot_know(self):
        with pytest.raises(ValueError, match="'no such name!' is neither a folder here nor known to the Hub"):
            load_images("no such name!")

    def test_a_fingerprint_tells_other_images_wherever_they_lie_and_reads_nothing_else(self, tmp_path):
        buffers = [io.BytesIO() for _ in range(40)]
        for value, buffer in enumerate(buffers):
            Image.new("L", (4, 4), value).save(buffer, "PNG")
        rows = [{"bytes": buffer.getvalue(), "path": None} for buffer in buffers]
        broken = [{"bytes": b"no image", "path": None}] * len(rows)
        features = datasets.Features({"image": datasets.Image(), "second": datasets.Image()})
        prints = []
        for number, order in enumerate((rows, rows, rows[::-1], rows[:-1])):
            table = datasets.Dataset.from_dict({"image": order, "second": broken[: len(order)]}, features=features)
            (tmp_path / str(number)).mkdir()
            table.to_parquet(str(tmp_path / str(number) / "images.parquet"))
            source = load_images(str(tmp_path / str(number) / "images.parquet"), image_column="image")
            prints.append(source.fingerprint())
        assert prints[0] == prints[1]
        assert len(set(prints)) == 3
        streamed = load_images(str(tmp_path / "0" / "images.parquet"), image_column="image", streaming=True)
        assert streamed.fingerprint() is None

    def test_empty_data_set(self, tmp_path):
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        pyarrow.parquet.write_table(pyarrow.table({"image": pyarrow.array([], image)}), tmp_path / "empty.parquet")
        with pytest.raises(ValueError, match=r"empty\.parquet.* cannot be loaded: .*; check name, files"):
            load_images(tmp_path / "empty.parquet")


def sixteen_bit_png():
    return encode(Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)), "PNG")


def float_tiff(values):
    return encode(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")


def transparent(mode, color):
    return encode(Image.new(mode, (3, 2), color), "PNG")


def palette_png(**options):
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return encode(image, "PNG", **options)


def animated(kind):
    frames = [Image.new("RGB", (3, 2), color) for color in ("red", "lime", "blue")]
    return encode(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)


def damaged_exif_jpeg():
    content = bytearray(encode(Image.new("RGB", (3, 2), "red"), "JPEG", exif=Image.Exif()))
    return bytes(content[:2] + b"\xff\xe1\x00\x0eExif\x00\x00II*\x00\xff\xff" + content[2:])


class TestDecoding:
    @pytest.mark.parametrize(
        ("content", "rgb", "grey"),
        [
            pytest.param(grey_png(77), (77, 77, 77), 77, id="grey"),
            pytest.param(encode(Image.new("1", (3, 2), 1), "PNG"), (255,) * 3, 255, id="bilevel"),
            pytest.param(transparent("RGB", (255, 0, 0)), (255, 0, 0), 76, id="rgb"),
            pytest.param(transparent("RGBA", (0, 0, 0, 0)), (255,) * 3, 255, id="transparent-is-white"),
            pytest.param(transparent("RGBA", (10, 20, 30, 255)), (10, 20, 30), 18, id="opaque-alpha"),
            pytest.param(transparent("LA", (0, 0)), (255,) * 3, 255, id="grey-alpha"),
            pytest.param(palette_png(), (200, 100, 50), 124, id="palette"),
            pytest.param(palette_png(transparency=1), (255,) * 3, 255, id="palette-transparent"),
            pytest.param(encode(Image.new("CMYK", (3, 2), (0, 255, 255, 0)), "TIFF"), (255, 0, 0), 76, id="cmyk"),
            pytest.param(animated("GIF"), (255, 0, 0), 76, id="animated-gif"),
            pytest.param(animated("PNG"), (255, 0, 0), 76, id="animated-png"),
            pytest.param(grey_png(9, size=(1, 1)), (9, 9, 9), 9, id="one-pixel"),
        ],
    )
    def test_kinds_of_files(self, content, rgb, grey):
        colour, single = (decode_image({"bytes": content, "path": None}, mode) for mode in ("RGB", "L"))
        assert colour.dtype == single.dtype == torch.uint8
        assert colour.is_contiguous()
        assert colour[:, 0, 0].tolist() == list(rgb)
        assert single.shape == (1, *colour.shape[1:])
        assert single[0, 0, 0] == pytest.approx(grey, abs=1)

    @pytest.mark.parametrize(
        ("content", "expected"),
        [
            pytest.param(sixteen_bit_png(), [0, 100, 255], id="16-bit"),
            pytest.param(float_tiff([0.0, 0.5, 1.0]), [0, 128, 255], id="float-to-1"),
            pytest.param(float_tiff([0.0, 100.0, 300.0]), [0, 100, 255], id="float-to-255"),
        ],
    )
    def test_deep_pixels_are_scaled(self, content, expected):
        assert decode_image({"bytes": content}, "L").flatten().tolist() == expected
        assert decode_image({"bytes": content}, "RGB")[2].flatten().tolist() == expected

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_orientation(self, orientation):
        pixels = np.zeros((2, 3, 3), np.uint8)
        pixels[0, 0] = 255  # the first stored row and column
        exif = Image.Exif()
        exif[0x0112] = orientation
        seen = decode_image({"bytes": encode(Image.fromarray(pixels), "PNG", exif=exif)}, "L")[0]
        rows, columns = (2, 3) if orientation <= 4 else (3, 2)
        corner = {1: (0, 0), 2: (0, -1), 3: (-1, -1), 4: (-1, 0), 5: (0, 0), 6: (0, -1), 7: (-1, -1), 8: (-1, 0)}
        assert seen.shape == (rows, columns)
        assert seen[corner[orientation]] == 255

    def test_damaged_exif_is_no_reason_to_drop_a_picture(self):
        assert decode_image({"bytes": damaged_exif_jpeg()}, "RGB").shape == (3, 2, 3)

    def test_real_photograph_equals_pil(self):
        path = PHOTOS / "rocket.jpg"
        expected = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(decode_image({"path": str(path), "bytes": None}, "RGB"), expected)

    def test_extension_does_not_matter(self, tmp_path):
        shutil.copy(PHOTOS / "rocket.jpg", tmp_path / "rocket.png")
        assert decode_image({"path": str(tmp_path / "rocket.png")}, "RGB").shape == (3, 427, 640)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            pytest.param(b"", "is empty", id="zero-byte"),
            pytest.param((PHOTOS / "rocket.jpg").read_bytes()[:50_000], "truncated", id="truncated-jpeg"),
            pytest.param((PHOTOS / "chelsea.png").read_bytes()[:50_000], "truncated", id="truncated-png"),
            pytest.param(b"<html>not found</html>", "cannot identify", id="html"),
            pytest.param(float_tiff([0.0, math.nan]), "NaN", id="nan"),
            pytest.param(float_tiff([0.0, math.inf]), "infinite", id="infinite"),
        ],
    )
    def test_damaged_files_are_named(self, tmp_path, content, reason):
        path = tmp_path / "broken.png"
        path.write_bytes(content)
        with pytest.raises(CorruptImageError, match=reason) as by_path:
            decode_image({"path": str(path), "bytes": None}, "RGB")
        assert by_path.value.name == str(path)
        with pytest.raises(CorruptImageError, match=r"^row 17: "):
            decode_image({"path": None, "bytes": content}, "RGB", "row 17")

    @pytest.mark.parametrize("record", [None, {}, {"path": None, "bytes": None}], ids=["null", "empty", "nulls"])
    def test_no_image_at_all(self, record):
        with pytest.raises(CorruptImageError, match="row 3: holds no image"):
            decode_image(record, "L", "row 3")

    def test_missing_file(self, tmp_path):
        with pytest.raises(CorruptImageError, match="No such file"):
            decode_image({"path": str(tmp_path / "gone.png")}, "L")

    @pytest.mark.parametrize("side", [10_000, 30_000])
    def test_decompression_bomb(self, side):
        header = bytearray(grey_png())
        header[16:24] = struct.pack(">II", side, side)  # IHDR: width and height
        crc = struct.pack(">I", zlib.crc32(bytes(header[12:29])))
        header[29:33] = crc
        with pytest.raises(CorruptImageError, match="bomb"):
            decode_image({"bytes": bytes(header)}, "L")

    def test_error_survives_a_worker(self):
        error = pickle.loads(pickle.dumps(CorruptImageError("a.png", "is empty")))
        assert (error.name, error.reason, str(error)) == ("a.png", "is empty", "a.png: is empty")

    @settings(max_examples=150, deadline=None)
    @given(st.binary(max_size=40), st.integers(0, 5000), st.sampled_from(["PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"]))
    def test_noise_in_a_file_never_gets_out_as_another_error(self, noise, position, kind):
        content = encode(Image.radial_gradient("L").resize((64, 48)), kind)
        position %= len(content)
        damaged = content[:position] + noise + content[position + len(noise) :]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with contextlib.suppress(CorruptImageError):
                assert decode_image({"bytes": damaged}, "RGB").dtype == torch.uint8


class TestTransforms:
    @settings(max_examples=300, deadline=None)
    @given(
        size=st.tuples(st.integers(1, 400), st.integers(1, 400)),
        scale=st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted),
        ratio=st.tuples(st.floats(0.3, 3), st.floats(0.3, 3)).map(sorted),
        seed=st.integers(0, 1000),
    )
    def test_crop_box_is_inside_and_as_asked(self, size, scale, ratio, seed):
        top, left, height, width = sample_crop_box(size, scale, ratio, seeded_generator(seed))
        rows, columns = size
        assert top >= 0
        assert left >= 0
        assert 1 <= height <= rows - top
        assert 1 <= width <= columns - left
        is_fallback = height == rows or width == columns
        slack = (height + 1) * (width + 1) - height * width  # sides are rounded to whole pixels
        low, high = scale[0] * rows * columns, scale[1] * rows * columns
        assert is_fallback or low - slack <= height * width <= high + slack
        assert is_fallback or ratio[0] <= (width + 0.5) / (height - 0.5)
        assert is_fallback or (width - 0.5) / (height + 0.5) <= ratio[1]

    def test_crop_statistics(self):
        boxes = [sample_crop_box((300, 400), (0.2, 1.0), (3 / 4, 4 / 3), seeded_generator(7, n)) for n in range(4000)]
        shares = torch.tensor([height * width / 120_000 for _, _, height, width in boxes])
        ratios = torch.tensor([math.log(width / height) for _, _, height, width in boxes])
        assert shares.min() > 0.19
        image = torch.empty(1, 300, 400)
        oracle = [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(4000)]
        oracle_shares = torch.tensor([height * width / 120_000 for _, _, height, width in oracle])
        tenths = torch.arange(1, 10) / 10
        assert (shares.quantile(tenths) - oracle_shares.quantile(tenths)).abs().max() < 0.03
        assert ratios.abs().max() <= math.log(4 / 3) + 0.02
        tops = torch.tensor([top / (300 - height) for top, _, height, _ in boxes if height < 290])
        assert tops.mean() == pytest.approx(0.5, abs=0.02)
        assert (tops < 0.25).float().mean() == pytest.approx(0.25, abs=0.03)

    @pytest.mark.parametrize(
        ("size", "expected"),
        [((100, 100), (0, 0, 100, 100)), ((100, 400), (0, 133, 100, 133)), ((1, 9), (0, 4, 1, 1))],
        ids=["whole", "wide", "line"],
    )
    def test_whole_image_when_asked_for(self, size, expected):
        assert sample_crop_box(size, (1, 1), (3 / 4, 4 / 3), seeded_generator(0)) == expected

    @pytest.mark.parametrize(("mode", "channels"), [("RGB", 3), ("L", 1)], ids=["colour", "grey"])
    @pytest.mark.parametrize("size", [(224, 224), (96, 160)], ids=["square", "wide"])
    def test_same_pixels_as_torchvision_for_the_same_box(self, mode, channels, size):
        image = decode_image({"path": str(PHOTOS / "chelsea.png")}, mode)
        transform = PretrainingTransform(size, channels)
        generator = seeded_generator(3)
        box = sample_crop_box(tuple(image.shape[1:]), transform.crop_scale, transform.crop_ratio, generator)
        flips = torch.rand((), generator=generator).item() < 0.5
        expected = F.resized_crop(image, *box, list(size), InterpolationMode.BICUBIC, antialias=True)
        expected = F.horizontal_flip(expected) if flips else expected
        expected = F.normalize(F.to_dtype(expected, torch.float32, scale=True), transform.mean, transform.std)
        found = transform(image, seeded_generator(3))
        assert found.shape == (channels, *size)
        # torchvision may interpolate in float and round once, torch's uint8 kernel rounds each direction
        levels = (found - expected).abs() * torch.tensor(transform.std)[:, None, None] * 255
        assert levels.max() < 1.5
        assert levels.mean() < 0.1

    def test_bicubic_overshoot_is_clamped(self):
        edge = torch.zeros(1, 16, 16, dtype=torch.uint8)
        edge[..., 8:] = 255
        pixels = EvaluationTransform((61, 61), 1, **PLAIN_GREY)(edge)
        assert pixels.min() == 0
        assert pixels.max() == 1

    def test_padding_puts_zeros_around(self):
        pixels = EvaluationTransform((32, 32), 1, pad=2, **PLAIN_GREY)(torch.full((1, 28, 28), 255, dtype=torch.uint8))
        assert pixels[:, 2:-2, 2:-2].min() == 1
        assert pixels.sum() == 28 * 28

    @pytest.mark.parametrize(("flip", "expected"), [(0.0, 0), (1.0, 64), (0.5, 32)], ids=["never", "always", "half"])
    def test_flip_probability(self, flip, expected):
        ramp = torch.arange(8, dtype=torch.uint8).expand(1, 8, 8)
        transform = PretrainingTransform((8, 8), 1, crop_scale=(1, 1), crop_ratio=(1, 1), flip=flip)
        flipped = [transform(ramp, seeded_generator(n))[0, 0] for n in range(64)]
        count = sum((row[0] > row[-1]).item() for row in flipped)
        assert count == expected if flip in (0, 1) else 16 < count < 48

    def test_evaluation_keeps_proportions_with_a_crop_fraction(self):
        image = decode_image({"path": str(PHOTOS / "rocket.jpg")}, "RGB")  # 427 x 640
        found = EvaluationTransform((224, 224), 3, mean=(0,) * 3, std=(1,) * 3, crop_fraction=0.875)(image)
        resized = F.resize(image, [256], InterpolationMode.BICUBIC, antialias=True)
        expected = F.center_crop(resized, [224, 224]).float() / 255
        assert (found - expected).abs().mean() < 0.02  # the centre is cut before, not after: less than a pixel apart
        assert EvaluationTransform((4, 4), 1, crop_fraction=0.5)(torch.zeros(1, 1, 30_000, dtype=torch.uint8)).any()

    def test_global_random_state_is_left_alone(self, fashion):
        state = torch.get_rng_state()
        list(EpochSampler(fashion_images(fashion), seed=1))
        fashion_images(fashion)[5]
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_channels": 4}, "num_channels 4 must be 1"),
            ({"image_size": (0, 32)}, r"image_size \(0, 32\) must be"),
            ({"pad": -1}, "pad -1 must be"),
            ({"mean": (0.5,)}, "mean .* must be as many numbers as num_channels 3"),
            ({"std": (0.0, 1.0, 1.0)}, "std .* must be greater than 0"),
            ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
            ({"crop_scale": (0.8, 0.2)}, "crop_scale"),
            ({"crop_ratio": (2.0, 1.0)}, "crop_ratio"),
            ({"flip": 1.5}, "flip 1.5 must be"),
        ],
        ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
    )
    def test_wrong_settings(self, options, message):
        with pytest.raises(ValueError, match=message):
            PretrainingTransform(**{"image_size": (32, 32), "num_channels": 3, **options})


class TestSamples:
    def test_sample_depends_on_seed_epoch_and_index_alone(self, fashion):
        images, again = fashion_images(fashion), fashion_images(fashion)
        again[3], again[299]  # what was read before does not matter
        for key in (0, 17, 17 + 5 * len(images)):
            first, second = images[key], again[key]
            assert torch.equal(first["pixel_values"], second["pixel_values"])
            assert first["mask_seed"] == second["mask_seed"]

    def test_epoch_index_and_seed_change_the_sample(self, fashion):
        images = fashion_images(fashion)
        samples = [images[17], images[17 + len(images)], images[18], fashion_images(fashion, seed=1)[17]]
        assert len({sample["mask_seed"] for sample in samples}) == 4
        assert not torch.equal(samples[0]["pixel_values"], samples[1]["pixel_values"])
        assert not torch.equal(samples[0]["pixel_values"], samples[3]["pixel_values"])

    def test_cache_changes_nothing(self, fashion):
        plain, cached = fashion_images(fashion), fashion_images(fashion, cache_bytes=2 * 28 * 28)
        for key in (1, 2, 3, 1, 2 + len(plain), 3):
            assert torch.equal(plain[key]["pixel_values"], cached[key]["pixel_values"])

    def test_negative_key(self, fashion):
        with pytest.raises(IndexError, match="key -1"):
            fashion_images(fashion)[-1]

    def test_seeds_of_neighbours_are_unrelated(self):
        seeds = {mix_seed(*parts) for parts in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (0, 1, 0)]}
        assert len(seeds) == 8
        bits = torch.tensor([[mix_seed(0, 0, n) >> bit & 1 for bit in range(63)] for n in range(2000)]).float()
        assert (bits.mean(dim=0) - 0.5).abs().max() < 0.06

    def test_corrupt_images_are_replaced_by_the_next_and_named(self, tmp_path):
        write_grey_folder(tmp_path, [10, 20, 30, 40])
        for value in (20, 30):
            (tmp_path / f"{value:03d}.png").write_bytes(b"")
        images = PretrainingImages(load_images(tmp_path), plain_transform(), seed=0)
        assert grey_values(images[index] for index in range(4)) == [10, 40, 40, 40]
        assert [len(images[index]["skipped"]) for index in range(4)] == [0, 2, 1, 0]
        reason = "is empty"
        assert images[1]["skipped"] == ((str(tmp_path / "020.png"), reason), (str(tmp_path / "030.png"), reason))
        assert [images[index]["num_bad"] for index in range(4)] == [0, 1, 1, 0]
        assert images[1]["mask_seed"] != images[2]["mask_seed"]

    def test_last_image_is_replaced_by_the_first(self, tmp_path):
        write_grey_folder(tmp_path, [10, 20])
        (tmp_path / "020.png").write_bytes(b"noise")
        images = PretrainingImages(load_images(tmp_path), plain_transform(), seed=0)
        assert grey_values([images[1]]) == [10]

    def test_a_set_of_broken_images_is_an_error(self, tmp_path):
        for number in range(120):
            (tmp_path / f"{number:03d}.png").write_bytes(b"")
        images = PretrainingImages(load_images(tmp_path), plain_transform(), seed=0)
        with pytest.raises(ValueError, match=r"looks broken: 100 images in a row.*005\.png: is empty"):
            images[5]

    def test_streams_and_maps_are_not_confused(self, fashion):
        stream = load_images(PHOTOS, streaming=True)
        with pytest.raises(ValueError, match="is a stream; read it with StreamingPretrainingImages"):
            PretrainingImages(stream, plain_transform(), seed=0)
        with pytest.raises(ValueError, match="is not a stream; read it with PretrainingImages"):
            StreamingPretrainingImages(fashion, plain_transform(), seed=0)


class TestOrder:
    def test_keys_of_an_epoch(self, fashion):
        images = fashion_images(fashion)
        sampler = EpochSampler(images, seed=3)
        first = list(sampler)
        sampler.set_epoch(2)
        third = list(sampler)
        assert len(sampler) == len(first) == 300
        assert sorted(first) == list(range(300))
        assert sorted(third) == list(range(600, 900))
        assert [key - 600 for key in third] != first
        assert list(EpochSampler(images, seed=3, epoch=2)) == third
        assert list(EpochSampler(images, seed=4)) != first
        assert list(EpochSampler(images, seed=3, epoch=1, shuffle=False)) == list(range(300, 600))

    def test_accelerate_splits_an_epoch_between_processes(self, fashion):
        images = fashion_images(fashion)
        halves = []
        for index in range(2):
            loader = DataLoader(
                images, batch_size=32, sampler=EpochSampler(images, seed=3), collate_fn=lambda samples: samples
            )
            prepared = prepare_data_loader(loader, num_processes=2, process_index=index, put_on_device=False)
            prepared.set_epoch(1)
            halves.append([key for batch in prepared.batch_sampler for key in batch])
        assert len(halves[0]) == len(halves[1]) == 5 * 32  # even_batches: the last ones are filled up
        assert set(halves[0]) | set(halves[1]) == set(range(300, 600))
        drawn_twice = len(halves[0]) + len(halves[1]) - 300
        assert len(set(halves[0]) & set(halves[1])) <= drawn_twice

    @pytest.mark.parametrize("processes", [1, 2])
    def test_skipping_batches_gives_the_tail(self, fashion, geometry, processes):
        images = fashion_images(fashion)
        loaders = []
        for _ in range(2):
            sampler = EpochSampler(images, seed=3)
            collator = MaskedImageCollator(geometry, 0.75)
            loader = DataLoader(images, batch_size=30, sampler=sampler, collate_fn=collator, drop_last=True)
            loaders.append(prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False))
            loaders[-1].set_epoch(4)
        whole = list(loaders[0])
        tail = list(skip_first_batches(loaders[1], 2))
        assert len(whole) == 10 // processes
        assert same_batches(whole[2:], tail)


class TestCollator:
    def samples(self, fashion, keys=range(6)):
        images = fashion_images(fashion)
        return [images[key] for key in keys]

    def test_mask_of_each_image_is_its_own(self, fashion, geometry):
        collator = MaskedImageCollator(geometry, 0.75)
        batch = collator(self.samples(fashion))
        masks = batch["sparse_plan"].bool_masked_pos
        assert next(iter(batch)) == "pixel_values"
        assert batch["pixel_values"].shape == (6, 1, 32, 32)
        assert batch["skipped"] == []
        assert isinstance(batch["sparse_plan"], SparsePlan)
        assert masks.shape == (6, 16)
        assert masks.sum(dim=1).tolist() == [12] * 6
        assert len({tuple(row) for row in masks.tolist()}) > 1
        alone = collator(self.samples(fashion, [4]))["sparse_plan"].bool_masked_pos
        assert torch.equal(alone[0], masks[4])

    def test_shared_mask(self, fashion, geometry):
        collator = MaskedImageCollator(geometry, 0.75, "batch")
        plans = [collator(self.samples(fashion, keys))["sparse_plan"] for keys in ([0, 1, 2], [0, 5], [1, 2])]
        assert all(plan.is_shared for plan in plans)
        assert plans[0].bool_masked_pos.shape == (1, 16)
        assert torch.equal(plans[0].bool_masked_pos, plans[1].bool_masked_pos)  # that of the first image
        shared = [collator(self.samples(fashion, [key]))["sparse_plan"].bool_masked_pos for key in range(20)]
        assert len({tuple(mask[0].tolist()) for mask in shared}) > 10

    def test_larger_mask_units(self, fashion, geometry):
        collator = MaskedImageCollator(geometry, 0.75, unit_multiple=mask_unit_multiple(16, 8))
        masks = collator(self.samples(fashion, range(40)))["sparse_plan"].bool_masked_pos
        squares = masks.view(-1, 2, 2, 2, 2).transpose(2, 3).flatten(3)  # [B, 2, 2, units of a square]
        assert torch.equal(squares.all(dim=-1), squares.any(dim=-1))
        assert masks.sum(dim=1).tolist() == [12] * 40
        assert set(squares[..., 0].flatten(1).float().argmin(dim=1).tolist()) == {0, 1, 2, 3}

    def test_wrong_settings(self, geometry):
        for size in (12, 4, 0):
            with pytest.raises(ValueError, match=f"mask_unit_size {size} must be a multiple of 8"):
                mask_unit_multiple(size, 8)
        with pytest.raises(ValueError, match="unit_multiple 3 must divide the 4x4 mask units"):
            MaskedImageCollator(geometry, 0.75, unit_multiple=3)
        with pytest.raises(ValueError, match="mask_sharing 'process' must be"):
            MaskedImageCollator(geometry, 0.75, "process")
        for ratio in (0, 1, 1.5):
            with pytest.raises(ValueError, match="mask_ratio"):
                MaskedImageCollator(geometry, ratio)

    def test_names_of_skipped_images_are_collected(self, tmp_path, geometry):
        write_grey_folder(tmp_path, [1, 2, 3])
        (tmp_path / "002.png").write_bytes(b"")
        images = PretrainingImages(load_images(tmp_path), plain_transform((32, 32)), seed=0)
        batch = MaskedImageCollator(geometry, 0.75)([images[index] for index in range(3)])
        assert batch["skipped"] == [(str(tmp_path / "002.png"), "is empty")]
        assert batch["num_bad"] == 1


class TestLoading:
    def loader(self, fashion, geometry, **options):
        images = fashion_images(fashion)
        sampler = EpochSampler(images, seed=5)
        options = {"batch_size": 50, **options}
        return DataLoader(images, sampler=sampler, collate_fn=MaskedImageCollator(geometry, 0.75), **options)

    def test_workers_and_batch_size_change_nothing(self, fashion, geometry):
        alone = self.loader(fashion, geometry)
        workers = self.loader(fashion, geometry, num_workers=2, persistent_workers=True)
        for epoch in (0, 1):  # persistent workers are not told of the second epoch: the keys tell them
            for loader in (alone, workers):
                loader.sampler.set_epoch(epoch)
            assert same_batches(list(alone), list(workers))
        alone.sampler.set_epoch(0)
        halves = self.loader(fashion, geometry, batch_size=100)
        pixels, masks = (
            [torch.cat([get(batch) for batch in loader]) for loader in (alone, halves)]
            for get in (lambda batch: batch["pixel_values"], lambda batch: batch["sparse_plan"].bool_masked_pos)
        )
        assert torch.equal(*pixels)
        assert torch.equal(*masks)

    def test_accelerate_moves_the_plan(self, fashion, geometry):
        loader = self.loader(fashion, geometry)
        meta = prepare_data_loader(loader, device=torch.device("meta"), put_on_device=True, non_blocking=True)
        moved = next(iter(meta))
        assert moved["pixel_values"].device.type == moved["sparse_plan"].visible_unit_index.device.type == "meta"
        assert moved["skipped"] == []

    def test_plan_comes_out_of_a_worker_whole(self, fashion, geometry):
        plan = next(iter(self.loader(fashion, geometry, num_workers=1)))["sparse_plan"]
        expected = build_sparse_plan(plan.bool_masked_pos, geometry)
        for stage, expected_stage in zip(plan.stages, expected.stages, strict=True):
            assert torch.equal(stage.position, expected_stage.position)
            found, wanted = stage.shifted.relative_position_index, expected_stage.shifted.relative_position_index
            assert torch.equal(found, wanted)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a GPU")
    def test_page_locked_batches(self, fashion, geometry):
        batch = next(iter(self.loader(fashion, geometry, num_workers=2, pin_memory=True)))
        assert batch["pixel_values"].is_pinned()
        assert batch["sparse_plan"].visible_unit_index.is_pinned()
        assert batch["sparse_plan"].stages[0].regular.relative_position_index.is_pinned()

    def test_pinning_asks_the_plan(self, fashion, geometry, monkeypatch):
        batch = next(iter(self.loader(fashion, geometry)))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, *_: tensor + 0)
        pinned = torch.utils.data._utils.pin_memory.pin_memory(batch)
        assert pinned["sparse_plan"] is not batch["sparse_plan"]
        assert torch.equal(pinned["sparse_plan"].bool_masked_pos, batch["sparse_plan"].bool_masked_pos)


def stream_of(folder, rank=0, world_size=1, **options):
    source = load_images(folder, streaming=True)
    return StreamingPretrainingImages(
        source, plain_transform(), **{"seed": 1, "rank": rank, "world_size": world_size, **options}
    )


def read_stream(stream, num_workers=0):
    return list(DataLoader(stream, batch_size=None, num_workers=num_workers, collate_fn=lambda sample: sample))


class TestStreaming:
    @pytest.fixture
    def folder(self, tmp_path):
        return write_grey_folder(tmp_path / "greys", range(40))

    @pytest.fixture
    def one_file(self, tmp_path):
        rows = {"image": [grey_png(value) for value in range(40)]}
        datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "greys.parquet")
        return tmp_path / "greys.parquet"

    def test_two_nodes_of_two_workers_share_without_overlap(self, folder):
        seen = [
            value
            for rank in range(2)
            for value in grey_values(read_stream(stream_of(folder, rank, 2, num_epochs=1), num_workers=2))
        ]
        assert sorted(seen) == list(range(40))

    def test_three_nodes_share_one_file(self, one_file):
        seen = [
            value for rank in range(3) for value in grey_values(read_stream(stream_of(one_file, rank, 3, num_epochs=1)))
        ]
        assert sorted(seen) == list(range(40))

    @pytest.mark.filterwarnings("ignore::UserWarning")
    def test_worker_without_a_shard_ends(self, one_file):
        stream = stream_of(one_file, num_epochs=2)
        assert stream.num_shards == 1
        assert sorted(grey_values(read_stream(stream, num_workers=2))) == sorted(2 * list(range(40)))

    def test_it_is_shuffled_goes_on_and_repeats_exactly(self, folder):
        first, second = (iter(stream_of(folder)), iter(stream_of(folder)))
        samples = [next(first) for _ in range(100)]
        again = [next(second) for _ in range(100)]
        values = grey_values(samples)
        assert sorted(values[:40]) == sorted(values[40:80]) == list(range(40))
        assert values[:40] != list(range(40))
        assert values[:40] != values[40:80]
        assert [sample["mask_seed"] for sample in samples] == [sample["mask_seed"] for sample in again]
        assert values == grey_values(again)
        assert len({sample["mask_seed"] for sample in samples}) == 100

    def test_later_start_and_order_without_shuffling(self, folder):
        whole = grey_values(read_stream(stream_of(folder, num_epochs=2)))
        assert grey_values(read_stream(stream_of(folder, epoch=1, num_epochs=1))) == whole[40:]
        plain = grey_values(read_stream(stream_of(folder, shuffle_buffer=0, num_epochs=1)))
        assert plain == list(range(40))

    def test_nodes_and_workers_draw_different_masks(self, folder):
        seeds = [
            sample["mask_seed"]
            for rank in range(2)
            for sample in read_stream(stream_of(folder, rank, 2, num_epochs=1), num_workers=2)
        ]
        assert len(set(seeds)) == 40

    def test_corrupt_images_are_named_with_the_next(self, folder):
        (folder / "005.png").write_bytes(b"")
        samples = read_stream(stream_of(folder, shuffle_buffer=0, num_epochs=1))
        assert len(samples) == 39
        found = [sample["skipped"] for sample in samples if sample["skipped"]]
        assert found == [((str(folder / "005.png"), "is empty"),)]
        assert sum(sample["num_bad"] for sample in samples) == 1

    def test_a_broken_stream_is_an_error(self, tmp_path):
        for number in range(101):
            (tmp_path / f"{number:03d}.png").write_bytes(b"")
        with pytest.raises(ValueError, match="looks broken: 100 images in a row"):
            next(iter(stream_of(tmp_path)))


def test_pickles_for_workers_that_are_spawned(fashion, geometry):
    images = fashion_images(fashion)
    collator = MaskedImageCollator(geometry, 0.75)
    there_and_back = [pickle.loads(pickle.dumps(part)) for part in (images, collator)]
    expected, found = collator([images[3]]), there_and_back[1]([there_and_back[0][3]])
    assert same_batches([expected], [found])


def test_gated_and_private_names(monkeypatch):
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    for error_class, message in ((GatedRepoError, "is gated; accept"), (RepositoryNotFoundError, "check the spelling")):
        error = error_class.__new__(error_class)
        api = types.SimpleNamespace(dataset_info=lambda *_, error=error, **__: (_ for _ in ()).throw(error))
        monkeypatch.setattr("green_swin_hf.image_sources.HfApi", lambda api=api: api)
        with pytest.raises(ValueError, match=message):
            load_images("someone/pictures")


def test_a_folder_with_pictures_beside_its_tables(tmp_path):
    """A clone from the Hub may hold a preview; its card says what the data are, without one the user has to."""
    shutil.copytree(FASHION, tmp_path / "clone")
    Image.new("L", (3, 2)).save(tmp_path / "clone" / "preview.png")
    assert load_images(tmp_path / "clone", split="validation").num_images == 1000
    (tmp_path / "clone" / "README.md").unlink()
    with pytest.raises(
        ValueError, match=r"holds images \(preview.png, …\) and Parquet or Arrow files; give the one or"
    ):
        load_images(tmp_path / "clone")


@pytest.mark.parametrize(("values", "expected"), [((0, 100, 200), (0, 100, 200)), ((0, 25700, 65535), (0, 100, 255))])
def test_grey_of_32_bits_is_that_of_8_or_16_bits(values, expected):
    content = encode(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")
    assert decode_image({"bytes": content, "path": None}, "L").flatten().tolist() == list(expected)


def test_transforms_take_a_size_as_one_number():
    assert PretrainingTransform(16, num_channels=1) == PretrainingTransform((16, 16), num_channels=1)
