"""examples/evaluate_model.py as a user runs it: what it measures, against other ways to the same figures."""

import json
import re
import sys
from pathlib import Path

import datasets
import matplotlib.image
import pytest
import torch
from test_examples import ROOT, load_script, run_command
from tiny import tiny_config
from torch.utils.data import DataLoader
from transformers import SwinConfig, SwinForImageClassification, ViTConfig, ViTImageProcessor, ViTModel

from green_swin_hf import GreenSwinForImageClassification, GreenSwinForMaskedImageModeling, GreenSwinModel
from green_swin_hf.evaluation import ProcessorTransform, class_accuracies, load_encoder
from green_swin_hf.evaluation_recipe import EvaluationRecipe

SCRIPT = ROOT / "examples" / "evaluate_model.py"
EMBEDDED = ROOT / "examples/data/fashion_mnist_10k/data"
SIZES = {"train": 120, "validation": 40, "test": 60}

evaluate_model = load_script(SCRIPT)


@pytest.fixture(scope="module")
def records():
    return {split: datasets.Dataset.from_parquet(str(next(EMBEDDED.glob(f"{split}-*")))) for split in SIZES}


@pytest.fixture(scope="module")
def data(records, tmp_path_factory):
    """A saved data set of small splits of the embedded one."""
    splits = {split: records[split].select(range(count)) for split, count in SIZES.items()}
    folder = tmp_path_factory.mktemp("data") / "saved"
    datasets.DatasetDict(splits).save_to_disk(str(folder))
    return folder


def save(model, folder, channels=1):
    model.save_pretrained(folder)
    processor = ViTImageProcessor(
        size={"height": 32, "width": 32}, image_mean=[0.286] * channels, image_std=[0.353] * channels,
        do_convert_rgb=channels == 3 or None,
    )  # fmt: skip
    processor.save_pretrained(folder)
    return folder


def small_config(**changes):
    return tiny_config(**{"num_channels": 1, "depths": (1, 1, 1), **changes})


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return save(GreenSwinForMaskedImageModeling(small_config()), tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="module")
def class_names(records):
    return records["test"].features["label"].names


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, class_names):
    torch.manual_seed(0)
    label2id = {name: index for index, name in enumerate(class_names)}
    config = small_config(num_labels=10, id2label=dict(enumerate(class_names)), label2id=label2id)
    model = GreenSwinForImageClassification(config)
    with torch.no_grad():
        model.classifier.weight.mul_(50)  # predictions that differ
    return save(model, tmp_path_factory.mktemp("classifier"))


def run(*flags):
    return evaluate_model.main([str(flag) for flag in flags])


def results_of(path):
    return json.loads(path.read_text())


def logits_of(model, folder, records):
    """Scores and labels by transformers' own way: PIL images through the folder's processor."""
    processor = ViTImageProcessor.from_pretrained(folder)
    grey = model.config.num_channels == 1
    pictures = [record["image"].convert("L" if grey else "RGB") for record in records]
    pixel_values = processor(pictures, return_tensors="pt").pixel_values
    with torch.no_grad():
        return model.eval()(pixel_values).logits, torch.tensor([record["label"] for record in records])


def test_frozen_features_beside_their_baselines_in_one_table(data, pretrained, tmp_path):
    """As a user gives it, in a process of its own."""
    flags = ["--model", pretrained, "--data", data, "--validation-split", "validation", "--features", "pooled", "map"]
    done = run_command(sys.executable, SCRIPT, *flags, "--output", tmp_path / "new" / "result.json")
    assert done.returncode == 0, done.stderr
    sources = re.findall(r"^\| (raw pixels|random encoder|/\S+)[^|]*\|([^|]*)\|", done.stdout, flags=re.MULTILINE)
    expected = ["", "last stage, mean of all tokens", "last stage, all tokens"]
    assert [kind.strip() for _, kind in sources] == [expected[0], *expected[1:], *expected[1:]]
    assert [source for source, _ in sources] == ["raw pixels"] + 2 * ["random encoder"] + 2 * [str(pretrained)]
    found = results_of(tmp_path / "new" / "result.json")
    features = found["features"]
    assert (features["bank_images"], features["validation_images"], features["shared_images"]) == (120, 40, 0)
    assert [row["dimension"] for row in features["rows"]] == [1024, 32, 512, 32, 512]
    assert features["most_frequent_class"]["value"] < 0.3
    raw = features["rows"][0]
    assert raw["knn"]["value"] > 0.5
    assert raw["linear"]["value"] > 0.5
    assert f"{raw['knn']['value']:.3f} ± {raw['knn']['standard_error']:.3f}" in done.stdout
    gain = next(g for g in features["gains"] if (g["kind"], g["over"]) == ("map", "raw pixels"))
    assert gain["knn"][0] == pytest.approx(features["rows"][4]["knn"]["value"] - raw["knn"]["value"])
    assert found["recipe"]["neighbours"] == 20
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["result.json", "result.png"]
    assert matplotlib.image.imread(tmp_path / "new" / "result.png").shape[1] > 500


def test_an_untrained_encoder_gains_nothing_over_a_random_one_of_its_seed(data, tmp_path):
    torch.manual_seed(7)
    folder = save(GreenSwinModel(small_config()), tmp_path / "untrained")
    flags = ["--model", folder, "--data", data, "--features", "pooled", "--output", tmp_path / "result.json"]
    assert run(*flags, "--seed", 7) == 0
    gains = results_of(tmp_path / "result.json")["features"]["gains"]
    over_random = next(gain for gain in gains if gain["over"] == "random encoder")
    assert (over_random["knn"], over_random["linear"]) == ([0, 0], [0, 0])
    assert run(*flags, "--seed", 8) == 0
    (error,) = {gain["knn"][1] for gain in results_of(tmp_path / "result.json")["features"]["gains"][:1]}
    assert error > 0


def test_the_same_command_gives_the_same_figures(data, pretrained, tmp_path, capsys):
    flags = ["--model", pretrained, "--data", data, "--train-images", 50, "--images", 30]
    for name in ("one", "two"):
        assert run(*flags, "--output", tmp_path / f"{name}.json") == 0
    one, two = (results_of(tmp_path / f"{name}.json")["features"] for name in ("one", "two"))
    assert one == two
    assert (one["bank_images"], one["validation_images"]) == (40, 10)  # a tenth, but one of every class at least
    assert one["rows"][0]["knn"]["num_images"] == 30


def test_images_judged_on_that_are_in_the_bank_as_well_are_counted(records, pretrained, tmp_path, capsys):
    train = records["train"].select(range(60))
    splits = {
        "train": train,
        "test": datasets.concatenate_datasets([records["test"].select(range(37)), train.select([1, 5, 9])]),
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))
    assert run("--model", pretrained, "--data", tmp_path / "data", "--output", tmp_path / "r.json") == 0
    # Some of the three may be among the validation images.
    shared = results_of(tmp_path / "r.json")["features"]["shared_images"]
    assert 1 <= shared <= 3
    assert f"{shared} of the images judged on are" in capsys.readouterr().out


def test_a_classifier_is_measured_as_transformers_computes_it(data, records, classifier, class_names, tmp_path, capsys):
    assert run("--model", classifier, "--data", data, "--output", tmp_path / "r.json", "--batch-size", 7) == 0
    found = results_of(tmp_path / "r.json")["classifier"]
    model = GreenSwinForImageClassification.from_pretrained(classifier)
    logits, labels = logits_of(model, classifier, records["test"].select(range(60)))
    top = logits.topk(5, dim=1).indices
    assert found["top_1_accuracy"]["value"] == pytest.approx((top[:, 0] == labels).double().mean().item())
    assert found["top_5_accuracy"]["value"] == pytest.approx((top == labels[:, None]).any(1).double().mean().item())
    losses = -logits.log_softmax(dim=1)[torch.arange(60), labels]
    assert found["loss"]["value"] == pytest.approx(losses.mean().item(), rel=1e-3)
    assert [row["name"] for row in found["classes"]] == class_names
    assert sum(row["accuracy"]["num_images"] for row in found["classes"]) == 60
    said = capsys.readouterr().out
    assert "| top 1 accuracy |" in said
    assert f"| {class_names[3]} " in said
    assert (tmp_path / "r.png").is_file()


def test_classes_are_matched_by_name(data, classifier, class_names, tmp_path, capsys):
    """The same classifier with its outputs in another order says the same of every class."""
    model = GreenSwinForImageClassification.from_pretrained(classifier)
    order = torch.tensor([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight[order])
        model.classifier.bias.copy_(model.classifier.bias[order])
    model.config.id2label = {place: class_names[index] for place, index in enumerate(order.tolist())}
    model.config.label2id = {name: place for place, name in model.config.id2label.items()}
    other = save(model, tmp_path / "other")
    for folder, name in ((classifier, "one"), (other, "two")):
        assert run("--model", folder, "--data", data, "--output", tmp_path / f"{name}.json") == 0
    one, two = (results_of(tmp_path / f"{name}.json")["classifier"] for name in ("one", "two"))
    assert one["top_1_accuracy"] == two["top_1_accuracy"]
    by_name = [{row["name"]: row for row in found["classes"]} for found in (one, two)]
    assert by_name[0] == by_name[1]


def test_a_stock_swin_with_a_processor_for_colour(data, records, tmp_path):
    torch.manual_seed(0)
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 2, 4], window_size=4, num_labels=10
    )
    stock = SwinForImageClassification(config)
    with torch.no_grad():
        stock.classifier.weight.mul_(50)
    folder = save(stock, tmp_path / "stock", channels=3)
    flags = ["--model", folder, "--data", data, "--judge", "both", "--features", "stages"]
    assert run(*flags, "--output", tmp_path / "r.json") == 0
    found = results_of(tmp_path / "r.json")
    logits, labels = logits_of(stock, folder, records["test"].select(range(60)))
    expected = (logits.argmax(1) == labels).double().mean().item()
    assert found["classifier"]["top_1_accuracy"]["value"] == pytest.approx(expected)
    assert [row["kind"] for row in found["features"]["rows"]] == ["", "stages", "stages"]


def test_the_encoder_of_every_folder_is_the_same(pretrained, tmp_path):
    model = load_encoder(str(pretrained))
    pixel_values = torch.randn(2, 1, 32, 32)
    expected = GreenSwinForMaskedImageModeling.from_pretrained(pretrained).eval().swin(pixel_values).last_hidden_state
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected)
    assert not model.training
    model.save_pretrained(tmp_path / "encoder")
    again = load_encoder(str(tmp_path / "encoder"))
    torch.testing.assert_close(again(pixel_values).last_hidden_state, expected)


def test_the_processor_prepares_tensors_as_it_prepares_pictures(records, pretrained):
    processor = ViTImageProcessor.from_pretrained(pretrained)
    picture = records["test"][0]["image"].convert("L")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, *picture.size[::-1])
    transform = ProcessorTransform(processor)
    assert transform.color_mode == "L"
    expected = processor(picture, return_tensors="pt").pixel_values[0]
    torch.testing.assert_close(transform(pixels), expected)
    batch = next(iter(DataLoader([transform(pixels)], 1)))
    assert batch.shape == (1, 1, 32, 32)


def test_accuracy_by_class_names_the_most_frequent_mistake():
    labels = torch.tensor([0, 0, 0, 0, 1, 1])
    scores = torch.nn.functional.one_hot(torch.tensor([0, 2, 2, 1, 1, 1]), 3).float()
    first, second, third = class_accuracies(scores, labels, ["a", "b", "c"])
    assert (first.accuracy.value, first.accuracy.num_images) == (0.25, 4)
    assert (first.mistaken_for, first.mistakes) == ("c", 2)
    assert (second.accuracy.value, second.mistaken_for, second.mistakes) == (1.0, None, 0)
    assert third.accuracy is None


WRONG_INPUT = {
    "model": ("--model ./nowhere", "./nowhere does not exist"),
    "no model": ("--model {folder}", "{folder} cannot be read"),
    "another model": ("--model {folder}/vit", "is a vit; give the folder of a GreenSwin or a Swin"),
    "no processor": ("--model {folder}/bare", "has no preprocessor_config.json"),
    "no classifier": ("--judge classifier", "is no classifier; give --judge features"),
    "lost weights": ("--model {folder}/lost", "lacks"),
    "data": ("--data ./nowhere", "'./nowhere' does not exist"),
    "split": ("--split holdout", "no split 'holdout'"),
    "test is train": ("--split train", "train_split 'train' must not be the split that is judged on"),
    "test is validation": ("--validation-split test", "validation_split 'test' must not be the split that is judged"),
    "labels": ("--label-column colour", "has no column 'colour'"),
    "too few": ("--train-images 10", "give a --validation-split or more --train-images"),
    "other classes": ("--model {classifier} --data {folder}/two", "not among the 10 known ones"),
    "features": ("--features mean", "features 'mean' must be one of pooled, map, stages"),
    "neighbours": ("--neighbours 0", "neighbours 0 must be at least 1"),
    "temperature": ("--temperature 0", "temperature 0.0 must be greater than 0"),
    "share": ("--validation-share 1", "validation_share 1.0 must be greater than 0 and less than 1"),
    "output": ("--output result.txt", "result.txt must be the name of a file that ends in .json"),
    "output below a file": ("--output {folder}/file/r.json", "is a file"),
    "flag": ("--neighbors 5", "unrecognized arguments: --neighbors"),
    "recipe": ("--recipe nowhere.yaml", "recipe nowhere.yaml is not a file"),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory, data):
    """A folder with what is no use to evaluate."""
    folder = tmp_path_factory.mktemp("wrong")
    (folder / "file").write_text("text")
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=32)
    ViTModel(vit).save_pretrained(folder / "vit")
    GreenSwinModel(small_config()).save_pretrained(folder / "bare")
    save(GreenSwinModel(small_config()), folder / "lost")
    GreenSwinModel(small_config(depths=(1, 1, 2))).config.save_pretrained(folder / "lost")
    two = datasets.load_from_disk(str(data))
    features = two["test"].features.copy()
    features["label"] = datasets.ClassLabel(names=["cat", "dog"])
    two = two.map(lambda record: {"label": record["label"] % 2}, features=features)
    two.save_to_disk(str(folder / "two"))
    return folder


@pytest.mark.parametrize(("flags", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2(
    data, pretrained, classifier, wrong, tmp_path, monkeypatch, capfd, flags, message
):
    monkeypatch.chdir(tmp_path)
    words = flags.format(folder=wrong, classifier=classifier).split()
    first = [] if "--model" in words else ["--model", pretrained]
    first += [] if "--data" in words else ["--data", data]
    with pytest.raises(SystemExit) as stopped:
        run(*first, *words)
    lines = capfd.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("evaluate_model.py: error: ")
    assert message.format(folder=wrong) in lines[0]
    assert not list(tmp_path.iterdir())


def test_without_a_model_it_says_how_to_make_one(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "outputs/pretrain does not exist; make it: python examples/pretrain.py" in capfd.readouterr().err


def test_flags_for_other_data_drop_what_was_said_about_the_former():
    recipe = EvaluationRecipe().replace(data="some", validation_split="dev", label_column="kind", neighbours=5)
    other = recipe.with_flags({"data": "other", "split": "holdout"})
    assert (other.validation_split, other.label_column, other.split, other.neighbours) == (None, None, "holdout", 5)


def test_the_script_does_not_hide_the_package_of_the_metric():
    import evaluate

    assert Path(evaluate.__file__).parent.name == "evaluate"
    assert evaluate.load is evaluate_model.evaluate.load
