"""Judge a folder with a model: a classifier's predictions, or how good an encoder's frozen features are.

    python examples/evaluate_model.py                          # outputs/pretrain on the embedded data
    python examples/evaluate_model.py --model outputs/finetune --output evaluation.json
    python examples/evaluate_model.py --model path/to/model --data my/images --split validation --judge both

A classifier gets top-1, top-5, loss and a table by class. Frozen features of any folder are judged by weighted k-NN and
a linear probe beside raw pixels and an untrained encoder. Images are prepared by the folder's preprocessor_config.json.
Every key of a recipe is a flag as well. Exit codes: 0 done, 2 wrong input, nothing written.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

import green_swin_hf
from green_swin_hf.evaluation import (
    MODEL,
    RANDOM_ENCODER,
    RAW_PIXELS,
    FeatureReport,
    class_accuracies,
    is_classifier,
    judge_encoder,
    load_classifier,
    load_encoder,
    load_processor,
    mean_loss,
    model_class_names,
    predict,
    read_config,
)
from green_swin_hf.evaluation_recipe import EvaluationRecipe
from green_swin_hf.feature_probes import FEATURE_KINDS, Accuracy, Judgement
from green_swin_hf.labelled_images import LabelledDataset, LabelledImages, label_budget, load_labelled_images
from green_swin_hf.recipe_files import add_recipe_flags, flag_overrides, load_recipe
from green_swin_hf.training import OneLineParser, check_output_folder, one_line_errors

DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "evaluation" / "fashion_mnist.yaml"
SHOWN_CLASSES = 40  # of more, those with the lowest accuracy are printed and drawn; the JSON file has all
METRIC = Path(__file__).resolve().parent / "metrics" / "top_k_accuracy"


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    with one_line_errors("evaluate_model.py"):
        arguments = parse_arguments(argv)
        recipe = read_recipe(arguments)
        if recipe.threads:
            torch.set_num_threads(recipe.threads)
        transformers_logging.disable_progress_bar()
        hub_logging.set_verbosity_error()  # of a Hub that does not answer, one line says enough
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        config = read_config(recipe.model)
        judged = what_to_judge(recipe, config)
        transform = load_processor(recipe.model)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        # Images and models; all that can be wrong with the input shows here
        by_classifier = "classifier" in judged
        names = model_class_names(config) if by_classifier else None
        taught_by: tuple[LabelledImages, ...] = ()
        if "features" in judged:
            taught_by = open_training_images(recipe, names)
            names = taught_by[0].class_names
        tested = open_split(recipe, recipe.split, recipe.images, names)
        if by_classifier:
            refuse_other_classes(recipe, tested, config)
        classifier = load_classifier(recipe.model, device) if by_classifier else None
        encoder = load_encoder(recipe.model, device) if "features" in judged else None

    options: dict[str, Any] = {"batch_size": recipe.batch_size, "workers": recipe.workers, "device": device}
    results: dict[str, Any] = {}
    print(f"# {recipe.model} on {len(tested):,} images of {recipe.data}, split {recipe.split}\n")
    with one_line_errors("evaluate_model.py"):  # no image is readable, or has a size that the model takes
        if classifier is not None:
            results["classifier"] = evaluate_classifier(classifier, LabelledDataset(tested, transform), options)
        if encoder is not None:
            sets = [LabelledDataset(images, transform) for images in (*taught_by, tested)]
            results["features"] = evaluate_features(encoder, sets, recipe, options)

    written = write_results(arguments.output, recipe, results) if arguments.output else []
    print(f"Done in {(time.monotonic() - started) / 60:.1f} minutes on {device}.", *written)
    if not written:
        print("Keep everything that was measured, and a picture of it: --output evaluation.json")
    return 0


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, help=f"YAML file (default: {DEFAULT_RECIPE.name}); flags go on top")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write all results there, and a PNG beside it")
    add_recipe_flags(parser.add_argument_group("keys of the recipe"), EvaluationRecipe)
    return parser.parse_args(argv)


def read_recipe(arguments: Namespace) -> EvaluationRecipe:
    recipe = load_recipe(arguments.recipe or DEFAULT_RECIPE, EvaluationRecipe)
    recipe = recipe.with_flags(flag_overrides(arguments, EvaluationRecipe))
    if not recipe.data:
        raise ValueError("no data given; name a folder of images or a data set with --data")
    if recipe.model == EvaluationRecipe().model and not Path(recipe.model).exists():
        raise ValueError(
            f"{recipe.model} does not exist; make it: python examples/pretrain.py, or give another --model"
        )
    if arguments.output:
        if arguments.output.suffix != ".json" or arguments.output.is_dir():
            raise ValueError(f"--output {arguments.output} must be the name of a file that ends in .json")
        check_output_folder(arguments.output.parent)
    return recipe


def what_to_judge(recipe: EvaluationRecipe, config: PretrainedConfig) -> tuple[str, ...]:
    """Of "classifier" and "features" what the recipe asks for, or what the folder is for."""
    if recipe.judge == "auto":
        return ("classifier",) if is_classifier(config) else ("features",)
    if recipe.judge != "features" and not is_classifier(config):
        raise ValueError(f"{recipe.model} is no classifier; give --judge features, or fine-tune it first")
    return ("classifier", "features") if recipe.judge == "both" else (recipe.judge,)


# Data


def open_split(
    recipe: EvaluationRecipe, split: str, count: int | None, class_names: Sequence[str] | None
) -> LabelledImages:
    """A split, or a class-balanced subset of it, with the given classes; with the data's own where none are given."""
    images = load_labelled_images(
        recipe.data,
        split=split,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        subset=recipe.subset,
        class_names=class_names,
    )
    return images if count is None else images.select(label_budget(images.labels, count, recipe.seed))


def refuse_other_classes(recipe: EvaluationRecipe, images: LabelledImages, config: PretrainedConfig) -> None:
    """Raise a `ValueError` where a model that does not name its classes has not as many as the data."""
    if config.num_labels != len(images.class_names):
        raise ValueError(
            f"data set {recipe.data!r} has {len(images.class_names)} classes, {recipe.model} tells {config.num_labels} "
            "apart; give the data that it was trained for, or --judge features"
        )


def open_training_images(
    recipe: EvaluationRecipe, class_names: Sequence[str] | None
) -> tuple[LabelledImages, LabelledImages]:
    """(images that teach the probes, images that choose the linear probe's regularisation), no image in both."""
    bank = open_split(recipe, recipe.train_split, recipe.train_images, class_names)
    if recipe.validation_split:
        return bank, open_split(recipe, recipe.validation_split, None, bank.class_names)
    chosen = set(label_budget(bank.labels, recipe.validation_share, recipe.seed))
    rest = [row for row in range(len(bank)) if row not in chosen]
    if len(bank.labels[rest].unique()) < len(bank.labels.unique()):
        raise ValueError(
            f"{len(bank)} images of split {recipe.train_split!r} are too few to set some of each class aside for "
            "validation; give a --validation-split or more --train-images"
        )
    return bank.select(rest), bank.select(sorted(chosen))


# Predictions


def evaluate_classifier(model: Any, images: LabelledDataset, options: dict[str, Any]) -> dict[str, Any]:
    """Top-1, top-5, loss and accuracy by class, printed as tables."""
    predicted = predict(model, images, progress="predictions", **options)
    scores, labels = predicted.features["logits"], predicted.labels
    shares = evaluate.load(str(METRIC)).compute(predictions=scores.numpy(), references=labels.numpy()) or {}
    accuracies = {name: Accuracy.from_share(share, len(labels)) for name, share in shares.items()}
    loss, loss_error = mean_loss(scores, labels)
    rows = [[name.replace("_", " "), accuracy] for name, accuracy in accuracies.items()]
    print_table(["measure", "value ± standard error"], [*rows, ["cross-entropy", f"{loss:.3f} ± {loss_error:.3f}"]])
    classes = [asdict(row) for row in class_accuracies(scores, labels, images.class_names)]
    shown = [class_cells(row) for row in worst_classes(classes)]
    print_table(["class", "images", "accuracy ± standard error", "most often taken for"], shown)
    if len(shown) < len(classes):
        print(f"These {len(shown)} of {len(classes)} classes have the lowest accuracy.\n")
    return {
        "num_images": len(labels),
        **{name: asdict(accuracy) for name, accuracy in accuracies.items()},
        "loss": {"value": loss, "standard_error": loss_error},
        "classes": classes,
    }


def worst_classes(classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The classes with the lowest accuracy, or all where they are few, in their order; none without images."""
    measured = [row for row in classes if row["accuracy"]]
    worst = sorted(measured, key=lambda row: row["accuracy"]["value"])[:SHOWN_CLASSES]
    return [row for row in measured if row in worst]


def class_cells(row: dict[str, Any]) -> tuple[Any, ...]:
    accuracy = Accuracy(**row["accuracy"])
    mistake = f"{row['mistaken_for']} ({row['mistakes']})" if row["mistakes"] else ""
    return row["name"], accuracy.num_images, accuracy, mistake


# Frozen features


def evaluate_features(
    encoder: Any, sets: Sequence[LabelledDataset], recipe: EvaluationRecipe, options: dict[str, Any]
) -> dict[str, Any]:
    """Accuracy of both probes on all features, printed as a table with what the model gains over its baselines."""
    bank, validation, tested = sets
    report = judge_encoder(
        encoder, bank, validation, tested, len(bank.class_names), kinds=recipe.features, seed=recipe.seed,
        neighbours=recipe.neighbours, temperature=recipe.temperature, progress=True, **options,
    )  # fmt: skip
    rows = [
        [source_name(source, recipe), FEATURE_KINDS.get(kind, ""), judged.dimension, judged.knn, judged.linear]
        for (source, kind), judged in report.judgements.items()
    ]
    chance = report.most_frequent
    print_table(["encoder", "frozen features", "dimension", "weighted k-NN", "linear probe"], rows)
    print(f"Accuracy ± binomial standard error; always the most frequent class: {chance}.")
    print(
        f"Taught by {report.bank_images:,} labelled images; k-NN: {recipe.neighbours} neighbours, temperature "
        f"{recipe.temperature}; linear probe: regularisation chosen on {report.validation_images:,} other images."
    )
    if report.shared_images:
        print(f"{report.shared_images} of the images judged on are, pixel for pixel, among those that taught.")
    print("\nWhat the model gains on the same images, in points:\n")
    gains = [(kind, baseline) for kind in recipe.features for baseline in ((RANDOM_ENCODER, kind), (RAW_PIXELS, ""))]
    print_table(
        ["frozen features", "over", "weighted k-NN", "linear probe"],
        [
            [FEATURE_KINDS[kind], baseline[0], *(points(report, kind, baseline, probe) for probe in ("knn", "linear"))]
            for kind, baseline in gains
        ],
    )
    return {
        "bank_images": report.bank_images,
        "validation_images": report.validation_images,
        "shared_images": report.shared_images,
        "most_frequent_class": asdict(chance),
        "rows": [{"source": key[0], "kind": key[1], **as_json(judged)} for key, judged in report.judgements.items()],
        "gains": [
            {"kind": kind, "over": baseline[0], **{p: report.difference(kind, baseline, p) for p in ("knn", "linear")}}
            for kind, baseline in gains
        ],
    }


def source_name(source: str, recipe: EvaluationRecipe) -> str:
    return {MODEL: recipe.model, RANDOM_ENCODER: f"{RANDOM_ENCODER} (seed {recipe.seed})"}.get(source, source)


def points(report: FeatureReport, kind: str, baseline: tuple[str, str], probe: str) -> str:
    gain, error = report.difference(kind, baseline, probe)
    return f"{100 * gain:+.1f} ± {100 * error:.1f}"


def as_json(judged: Judgement) -> dict[str, Any]:
    return {
        "dimension": judged.dimension,
        "knn": asdict(judged.knn),
        "linear": asdict(judged.linear),
        "inverse_strength": judged.inverse_strength,
        "validation": asdict(judged.validation),
    }


# Results


def print_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A Markdown table whose columns are aligned in a terminal, too."""
    lines = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    print()


def version_of(package: str) -> str | None:
    """Its version; None where it is not installed, as scikit-learn need not be for classifiers."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(path: Path, recipe: EvaluationRecipe, results: dict[str, Any]) -> list[str]:
    """The JSON file and a picture beside it; returns what was written, as a sentence."""
    packages = ("torch", "transformers", "datasets", "scikit-learn")
    report = {
        "recipe": recipe.to_dict(),
        **results,
        "versions": {
            "green-swin-hf": green_swin_hf.__version__,
            **{name: number for name in packages if (number := version_of(name))},
            "python": platform.python_version(),
        },
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(partial, path)
    draw(path.with_suffix(".png"), recipe, results)
    return [f"Wrote {path} and {path.with_suffix('.png')}."]


def draw(path: Path, recipe: EvaluationRecipe, results: dict[str, Any]) -> None:
    """Bars: features where they were judged, else classes."""
    from green_swin_hf.visualization import accuracy_figure, save_figure

    if "features" in results:
        rows = results["features"]["rows"]
        names = [f"{source_name(row['source'], recipe)}\n{FEATURE_KINDS.get(row['kind'], '')}".strip() for row in rows]
        series = {"weighted k-NN": [row["knn"] for row in rows], "linear probe": [row["linear"] for row in rows]}
        chance = results["features"]["most_frequent_class"]["value"]
        title = "Frozen features: accuracy of probes, ± standard error"
    else:
        rows = worst_classes(results["classifier"]["classes"])
        names = [row["name"] for row in rows]
        series, chance = {"accuracy": [row["accuracy"] for row in rows]}, None
        title = f"{recipe.model}: accuracy by class, ± standard error"
    bars = {name: [(bar["value"], bar["standard_error"]) for bar in values] for name, values in series.items()}
    save_figure(accuracy_figure(names, bars, chance=chance, title=title), path)


if __name__ == "__main__":
    sys.exit(main())
