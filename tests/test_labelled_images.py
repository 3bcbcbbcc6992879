"""Labelled data sets: where classes come from, subsets of labels, samples, and what is wrong with a data set."""

import doctest
from pathlib import Path

import datasets
import pytest
import torch
from PIL import Image

from green_swin_hf import labelled_images
from green_swin_hf.data import EvaluationTransform
from green_swin_hf.labelled_images import LabelledDataset, label_budget, load_labelled_images

EMBEDDED = Path(__file__).resolve().parents[1] / "examples" / "data" / "fashion_mnist_10k"


def save_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8), value).save(path)


def write_parquet(path, labels, feature, column="label"):
    """Images whose pixels are 10 times their row."""
    pictures = [Image.new("L", (8, 8), 10 * row) for row in range(len(labels))]
    features = datasets.Features({"image": datasets.Image(), column: feature})
    datasets.Dataset.from_dict({"image": pictures, column: labels}, features).to_parquet(str(path))
    return path


@pytest.fixture
def folders(tmp_path):
    """Two classes in two splits; the value of each image tells its class and number."""
    for split, classes in (("train", {"cat": 3, "ant": 2}), ("val", {"ant": 1, "cat": 1})):
        for number, (name, count) in enumerate(classes.items()):
            for index in range(count):
                save_image(tmp_path / split / name / "deeper" / f"{index}.png", 100 * number + index)
    return tmp_path


def test_sub_folders_are_the_classes_sorted_by_name(folders):
    images = load_labelled_images(folders)
    assert images.class_names == ("ant", "cat")
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.labels.dtype == torch.int64
    paths = [record["path"] for record in images.source.dataset["image"]]
    assert [Path(path).parts[-3] for path in paths] == ["ant", "ant", "cat", "cat", "cat"]
    assert load_labelled_images(folders, split="validation").labels.tolist() == [0, 1]
    assert load_labelled_images(folders / "val").class_names == ("ant", "cat")


def test_a_column_of_class_labels_of_integers_or_of_text(tmp_path):
    named = datasets.ClassLabel(names=["z", "a"])
    integer, text = datasets.Value("int32"), datasets.Value("string")
    cases = {
        "named": ([1, 0, 1], named, ("z", "a"), [1, 0, 1]),
        "integer": ([2, 0, 1], integer, ("0", "1", "2"), [2, 0, 1]),
        "text": (["dog", "ant", "dog"], text, ("ant", "dog"), [1, 0, 1]),
    }
    for name, (values, feature, names, labels) in cases.items():
        images = load_labelled_images(write_parquet(tmp_path / f"{name}.parquet", values, feature))
        assert (images.class_names, images.labels.tolist()) == (names, labels)
        assert images.source.dataset[1][images.label_column] == labels[1]
        assert images.select([2, 1]).labels.tolist() == [labels[2], labels[1]]


def test_the_embedded_data_has_ten_classes_in_three_splits():
    train = load_labelled_images(EMBEDDED)
    assert len(train) == 8000
    assert train.class_names[9] == "Ankle boot"
    assert train.labels.bincount().tolist() == [800] * 10
    test = load_labelled_images(EMBEDDED, split="test", class_names=train.class_names[::-1])
    assert torch.equal(9 - test.labels, load_labelled_images(EMBEDDED, split="test").labels)


def test_samples_are_transformed_images_with_their_class(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", ["b", "a", "b"], datasets.Value("string"))
    transform = EvaluationTransform((8, 8), 1, mean=(0.0,), std=(1.0,))
    dataset = LabelledDataset(load_labelled_images(path), transform)
    samples = [dataset[key] for key in range(6)]  # keys of a second epoch follow
    assert [sample["labels"] for sample in samples] == [1, 0, 1] * 2
    assert [round(255 * sample["pixel_values"].mean().item()) for sample in samples] == [0, 10, 20] * 2
    assert samples[0]["pixel_values"].shape == (1, 8, 8)


def test_randomness_is_of_seed_epoch_and_index(tmp_path):
    class Noise:
        color_mode = "L"

        def __call__(self, image, generator):
            return torch.rand(1, 2, 2, generator=generator)

    images = load_labelled_images(write_parquet(tmp_path / "a.parquet", [0, 1], datasets.Value("int64")))
    one, other = LabelledDataset(images, Noise(), seed=3), LabelledDataset(images, Noise(), seed=4)
    assert torch.equal(one[3]["pixel_values"], LabelledDataset(images, Noise(), seed=3)[3]["pixel_values"])
    different = [one[0], one[1], one[2], other[0]]
    assert len({sample["pixel_values"].sum().item() for sample in different}) == 4


def test_an_unreadable_image_gives_way_to_the_next_with_that_ones_class(folders, caplog):
    (folders / "train" / "ant" / "deeper" / "1.png").write_bytes(b"torn")
    transform = EvaluationTransform((8, 8), 1, mean=(0.0,), std=(1.0,))
    dataset = LabelledDataset(load_labelled_images(folders), transform)
    assert [dataset[key]["labels"] for key in (0, 1, 2, 1)] == [0, 1, 1, 1]
    assert torch.equal(dataset[1]["pixel_values"], dataset[2]["pixel_values"])
    assert caplog.text.count("1.png") == 1


def test_a_label_budget_is_balanced_and_nested_and_fixed_by_its_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 3 + [3] * 17)[torch.randperm(100)]
    before: set[int] = set()
    for count in (1, 4, 9, 20, 60, 100, 1000):
        rows = label_budget(labels, count, seed=5)
        assert rows == label_budget(labels, count, seed=5) == sorted(set(rows))
        assert before <= set(rows)
        before = set(rows)
        counts = labels[rows].bincount(minlength=4)
        assert counts.sum() == min(100, max(4, count))
        room = counts < torch.tensor([50, 30, 3, 17])
        assert counts.min() >= 1
        assert not room.any() or counts.max() - counts[room].min() <= 1  # none has more while another has some left
    assert label_budget(labels, 0.2, seed=5) == label_budget(labels, 20, seed=5)
    assert label_budget(labels, 1.0, seed=5) == list(range(100))
    assert label_budget(labels, 20, seed=6) != label_budget(labels, 20, seed=5)


@pytest.mark.parametrize("budget", [0.0, 1.5, 0, -3, float("nan")])
def test_a_label_budget_out_of_range_is_refused(budget):
    with pytest.raises(ValueError, match=r"must be"):
        label_budget(torch.arange(5), budget, seed=0)


TEXT, INTEGER = datasets.Value("string"), datasets.Value("int64")
WRONG = {
    "no labels": ([0.5, 1.5], datasets.Value("float32"), {}, "no column known to hold classes"),
    "no such column": ([0, 1], INTEGER, {"label_column": "klass"}, "no column 'klass'; set --label-column to one of: "),
    "no classes there": ([[0], [1]], datasets.List(INTEGER), {"label_column": "label"}, "no classes in 'label'"),
    "unknown class": ([0, -1, -1], datasets.ClassLabel(names=["a"]), {}, "(-1) in 2 of 3 rows, the first is row 1"),
    "null": ([0, None], INTEGER, {}, "(None) in 1 of 2 rows"),
    "empty text": (["a", ""], TEXT, {}, "('') in 1 of 2 rows"),
    "negative": ([0, -5], INTEGER, {}, "class -5; classes are integers from 0 on"),
    "class without images": ([0, 2], INTEGER, {}, "no image of class '1' (1 of 3 classes"),
    "other classes": (["a", "c"], TEXT, {"class_names": ("a", "b")}, "the class 'c', which is not among the 2 known"),
    "more classes": ([0, 2], INTEGER, {"class_names": ("a", "b")}, "class 2, but there are 2 classes"),
}


@pytest.mark.parametrize(("labels", "feature", "options", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_labels_are_named_with_the_remedy(tmp_path, labels, feature, options, message):
    path = write_parquet(tmp_path / "a.parquet", labels, feature)
    with pytest.raises(ValueError, match=r".") as caught:
        load_labelled_images(path, **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_split_without_images_is_named(tmp_path, monkeypatch):
    images = load_labelled_images(write_parquet(tmp_path / "a.parquet", [0, 1], INTEGER))
    monkeypatch.setattr(labelled_images, "load_images", lambda *_, **__: images.select([]).source)
    with pytest.raises(ValueError, match=r"split 'test': column label has no rows; give another --split"):
        load_labelled_images("a", split="test")


def test_the_example_in_the_docstring_holds():
    assert doctest.testmod(labelled_images).failed == 0


def test_folders_that_are_no_classes_are_named(folders):
    save_image(folders / "train" / "lost.png", 0)
    with pytest.raises(ValueError, match=r"lost\.png has no class; put the images of each class into a sub-folder"):
        load_labelled_images(folders)
    with pytest.raises(ValueError, match=r"folder of images, which has no column 'label'"):
        load_labelled_images(folders, label_column="label")
    save_image(folders / "val" / "bee" / "0.png", 0)
    with pytest.raises(ValueError, match=r"class 'bee', which is not among the 2 known ones \(ant, cat\)"):
        load_labelled_images(folders, split="validation", class_names=("ant", "cat"))


def test_several_columns_of_classes_are_to_be_chosen_from(tmp_path):
    feature = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"image": datasets.Image(), "coarse": feature, "fine": feature})
    pictures = [Image.new("L", (8, 8))] * 2
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"image": pictures, "coarse": [0, 1], "fine": [1, 0]}, features).to_parquet(str(path))
    with pytest.raises(ValueError, match=r"several columns of classes; set --label-column to one of: coarse, fine"):
        load_labelled_images(path)
    assert load_labelled_images(path, label_column="fine").labels.tolist() == [1, 0]


def test_a_saved_data_set_of_images_alone_has_no_classes(tmp_path):
    image = {"bytes": b"P5 1 1 255 \x00", "path": None}
    features = datasets.Features({"image": datasets.Image(decode=False)})
    datasets.Dataset.from_dict({"image": [image]}, features).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no column"):
        load_labelled_images(tmp_path / "saved")
