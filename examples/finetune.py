"""Fine-tune an image classifier from a pretrained GreenSwin, from a stock Swin, or from random weights.

    python examples/finetune.py                                # outputs/pretrain on the embedded data, minutes on a CPU
    python examples/finetune.py --model none                   # the same from random weights
    accelerate launch examples/finetune.py --recipe examples/recipes/finetuning/swin_base_window7.yaml \\
        --model my/pretrained --data my/images --validation-split validation
    python examples/finetune.py --output-dir outputs/finetune --resume auto

Every key of a recipe is a flag as well. Exit codes: 0 done, 1 failed while training, 2 wrong input, nothing written.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from green_swin_hf.augmentation import FinetuningImages, MixingCollator
from green_swin_hf.checkpointing import listed_files, replace_files
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.energy import add_energy_flag, check_energy
from green_swin_hf.finetuning import (
    ClassificationTrainer,
    build_classifier,
    build_processor,
    build_transforms,
    check_readable,
    complete_recipe,
    split_off,
)
from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.image_decoding import BrokenDataError
from green_swin_hf.labelled_images import LabelledDataset, LabelledImages, label_budget, load_labelled_images
from green_swin_hf.optimization import build_optimizer, cosine_schedule, scaled_learning_rate
from green_swin_hf.pretrained_start import load_for_finetuning
from green_swin_hf.publish import publish_results
from green_swin_hf.recipe_files import save_recipe
from green_swin_hf.run_record import RECORD_FILE, RunRecord, describe_data, describe_start, measured, metric
from green_swin_hf.run_setup import (
    find_run,
    how_to_go_on,
    process_state,
    run_parser,
    set_up_process,
)
from green_swin_hf.trainer_runs import (
    TRAINER_FORMAT,
    TrainerProgress,
    check_facts,
    describe_stop,
    read_trainer_recipe,
    train,
)
from green_swin_hf.training import (
    check_tracker,
    count_updates,
    one_line_errors,
)

EXAMPLES = Path(__file__).resolve().parent
DEFAULT_RECIPE = EXAMPLES / "recipes" / "finetuning" / "fashion_mnist_tiny.yaml"
DEFAULT_MODEL = "outputs/pretrain"  # what examples/pretrain.py leaves
DEFAULT_OUTPUT = Path("outputs/finetune")
METRIC = EXAMPLES / "metrics" / "top_k_accuracy"
NUM_PICTURES = 12


@dataclass(frozen=True)
class Splits:
    """What is trained and measured on."""

    train: LabelledImages
    validation: LabelledImages | None
    validated_on: str
    test: LabelledImages | None


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("finetune.py"):
        arguments = parse_arguments(argv)
        output, checkpoint = find_run(arguments.output_dir, arguments.resume, DEFAULT_OUTPUT, TRAINER_FORMAT)
        recipe = open_recipe(arguments, output, checkpoint)
        precision, state = set_up_process(recipe.precision, recipe.threads), process_state()
        transformers_logging.set_verbosity_error()

        # Data, then the model, which says what the recipe leaves open: size, channels and statistics of images
        splits = open_data(recipe)
        names = splits.train.class_names
        facts = describe_training_data(splits.train)
        check_facts(checkpoint, recipe, facts)
        set_seed(recipe.seed)
        model: Any = load_for_finetuning(str(checkpoint), names) if checkpoint else build_classifier(recipe, names)
        recipe = complete_recipe(recipe, model.config)
        training, unchanged = build_transforms(recipe)
        cache = recipe.cache_megabytes * 2**20
        training_images = FinetuningImages(splits.train, training, seed=recipe.seed, cache_bytes=cache)
        validation, test = (
            LabelledDataset(part, unchanged, cache_bytes=cache) if part else None
            for part in (splits.validation, splits.test)
        )
        check_readable({"training": training_images, "validation": validation, "test": test})
        collator = MixingCollator(
            len(names), mixup=recipe.mixup, cutmix=recipe.cutmix, label_smoothing=recipe.label_smoothing
        )

        # Optimizer and schedule
        updates_per_epoch = updates_of_an_epoch(recipe, len(training_images), state.num_processes)
        total_updates = recipe.max_steps or max(1, math.ceil(recipe.epochs * updates_per_epoch))
        settings = training_arguments(
            recipe, precision, arguments, output, updates_per_epoch, total_updates, bool(validation)
        )
        images_per_update = recipe.batch_size * recipe.gradient_accumulation_steps * state.num_processes
        peak = scaled_learning_rate(recipe.learning_rate, images_per_update * 256 / recipe.base_batch_size)
        optimizer = build_optimizer(
            model.to(settings.device),
            peak,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=recipe.betas,
        )
        warmup = count_warmup(recipe, updates_per_epoch, total_updates)
        scheduler = cosine_schedule(optimizer, warmup, total_updates, recipe.min_lr_ratio)
        hub_id = open_hub(arguments, output)
        metric = load_metric(state)

    # Train. From here on files are written.
    stop_after = arguments.stop_after and arguments.stop_after * updates_per_epoch
    trainer = ClassificationTrainer(
        model,
        settings,
        data_collator=collator,
        train_dataset=training_images,
        eval_dataset=validation,
        compute_metrics=metric,
        optimizers=(optimizer, scheduler),
        facts=facts,
    )
    progress = TrainerProgress(describe_evaluation, stop_after)
    progress.attach(trainer)
    with one_line_errors("finetune.py"):
        if state.is_main_process:
            save_recipe(recipe, output / "recipe.yaml")
        record = RunRecord(
            output, "classification", "finetune.py", is_resumed=checkpoint is not None, device=settings.device,
            precision=precision, track_energy=arguments.track_energy,
        )  # fmt: skip
        if not checkpoint:  # later the folder may be gone
            record.note(start_from=describe_start(None if recipe.from_scratch else recipe.model))
    print_heading(state, recipe, model, splits, settings, total_updates, peak, warmup, output, checkpoint)
    is_saved = False
    try:
        train(trainer, checkpoint, progress)
        if trainer.state.global_step < total_updates:
            record.stop()
            return stopped_early(state, trainer, output, progress.stop_reason)

        # Leave the model that was kept, before images that cannot be read may end its measurement; then the results
        written = save_model(state, trainer, recipe, output)
        is_saved = True
        measured = {"validation": measure(trainer, validation), "test": measure(trainer, test)}
        results = collect_results(recipe, splits, trainer, measured, updates_per_epoch, time.monotonic() - started)
        written = sorted([*written, *save_results(state, trainer, recipe, output, results, test or validation)])
        record.stop(**recorded_facts(recipe, splits, model, results, images_per_update, updates_per_epoch, peak))
    except (BrokenDataError, OSError) as error:  # OSError: the disk is full or gone
        progress.close()
        record.stop()
        return fail(describe_stop(error, output, state.num_processes, is_saved=is_saved))
    print_results(state, results, splits, output, written)
    uploaded = (
        not hub_id
        or not state.is_main_process
        or publish_results("finetune.py", output, hub_id, public=arguments.hub_public)
    )
    return 0 if uploaded else 1


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = run_parser(__doc__, FinetuningRecipe, DEFAULT_RECIPE, DEFAULT_OUTPUT, stop_unit="epochs")
    add_hub_flags(parser)
    add_energy_flag(parser)
    arguments = parser.parse_args(argv)
    check_tracker(arguments.report_to)
    check_energy(arguments.track_energy)
    return arguments


def open_recipe(arguments: Namespace, output: Path, checkpoint: Path | None) -> FinetuningRecipe:
    """The recipe of the run, which goes on with the settings that it had."""
    recipe = read_trainer_recipe(arguments, FinetuningRecipe, output, DEFAULT_RECIPE, checkpoint)
    if not recipe.data:
        raise ValueError("no data given; name a folder with a sub-folder for each class, or a data set, with --data")
    if not checkpoint and recipe.model == DEFAULT_MODEL:  # it would be an absolute path if it were there
        raise ValueError(
            f"the pretrained model {DEFAULT_MODEL} is not here; run examples/pretrain.py first, name another with "
            "--model, or train from random weights: --model none"
        )
    return recipe


def training_arguments(
    recipe: FinetuningRecipe,
    precision: str,
    arguments: Namespace,
    output: Path,
    updates_per_epoch: int,
    total_updates: int,
    has_validation: bool,
) -> TrainingArguments:
    """`Trainer`'s settings. Checkpoints fall on ends of epochs, from where a run goes on exactly."""
    is_cpu = process_state().device.type == "cpu"
    every = recipe.validate_every * updates_per_epoch
    return TrainingArguments(
        str(output / "checkpoints"),
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_grad_norm=recipe.max_grad_norm,
        max_steps=total_updates,
        eval_strategy="steps" if has_validation else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=recipe.keep_checkpoints + 1,
        load_best_model_at_end=has_validation,
        metric_for_best_model="top_1_accuracy" if has_validation else None,
        greater_is_better=True if has_validation else None,
        logging_steps=recipe.log_every,
        seed=recipe.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        dataloader_num_workers=recipe.workers,
        dataloader_persistent_workers=recipe.workers > 0,
        dataloader_drop_last=True,
        dataloader_pin_memory=not is_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        report_to=[] if arguments.report_to == "none" else [arguments.report_to],
        disable_tqdm=True,
        use_cpu=is_cpu,
    )


def updates_of_an_epoch(recipe: FinetuningRecipe, num_images: int, num_processes: int) -> int:
    """As `Trainer` counts: whole batches only, and an update of what is left of an accumulation.

    Raises:
        ValueError: the images do not fill one update.
    """
    accumulation = recipe.gradient_accumulation_steps
    count_updates(num_images, recipe.batch_size, accumulation, num_processes)
    return math.ceil(num_images // (recipe.batch_size * num_processes) / accumulation)


def count_warmup(recipe: FinetuningRecipe, updates_per_epoch: int, total_updates: int) -> int:
    """Updates of warm-up; its share of the run where --max-steps ends before it."""
    warmup = round(recipe.warmup_epochs * updates_per_epoch)
    return warmup if warmup < total_updates else round(total_updates * recipe.warmup_epochs / recipe.epochs)


# Data and metric


def open_data(recipe: FinetuningRecipe) -> Splits:
    """The splits, with the classes of the one to train on; of that only as many images as the recipe allows."""
    open_split = functools.partial(
        load_labelled_images,
        recipe.data,
        image_column=recipe.image_column,
        label_column=recipe.label_column,
        subset=recipe.subset,
    )
    train = open_split(split=recipe.split)
    names = train.class_names
    if len(names) < 2:
        raise ValueError(f"data set {recipe.data!r} has the class {names[0]!r} only; a classifier needs two or more")
    validation: LabelledImages | None
    if recipe.validation_split:
        validation, validated_on = open_split(split=recipe.validation_split, class_names=names), recipe.validation_split
    else:
        train, validation = split_off(train, recipe.validation_share, recipe.seed)
        validated_on = f"held out of {recipe.split}"
    test = open_split(split=recipe.test_split, class_names=names) if recipe.test_split else None
    if recipe.label_limit is not None:
        train = train.select(label_budget(train.labels, recipe.label_limit, recipe.seed))
    return Splits(train, validation, validated_on, test)


def describe_training_data(images: LabelledImages) -> dict[str, Any]:
    """What must not change when the run is gone on with, wherever the images lie by then."""
    return {
        "class_names": list(images.class_names),
        "num_images": len(images),
        "data_fingerprint": images.fingerprint(),
    }


def load_metric(state: PartialState) -> Callable[[Any], dict[str, float]]:
    """What `Trainer` measures beside the loss: top-1 accuracy, and top-5 with more than five classes."""
    with state.main_process_first():  # it is copied to the cache of modules
        metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def compute(prediction: Any) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    return compute


# Training


def describe_evaluation(logs: dict[str, float]) -> str:
    top_5 = f", top-5 {logs['eval_top_5_accuracy']:.1%}" if "eval_top_5_accuracy" in logs else ""
    return f"validation loss {logs['eval_loss']:.4f}, top-1 {logs['eval_top_1_accuracy']:.1%}{top_5}"


def measure(trainer: ClassificationTrainer, dataset: LabelledDataset | None) -> dict[str, Any] | None:
    """Loss and accuracies on a split, and its first rows of logits."""
    if dataset is None:
        return None
    output = trainer.predict(dataset)  # type: ignore[arg-type]
    found = {name.removeprefix("test_"): value for name, value in (output.metrics or {}).items()}
    values: dict[str, Any] = {
        name: found[name] for name in ("loss", "top_1_accuracy", "top_5_accuracy") if name in found
    }
    return {"images": len(dataset), **values, "logits": output.predictions}


# Results


def collect_results(
    recipe: FinetuningRecipe,
    splits: Splits,
    trainer: ClassificationTrainer,
    measured: dict[str, Any],
    updates_per_epoch: int,
    seconds: float,
) -> dict[str, Any]:
    """What the run found, for the screen and metrics.json."""
    labels = splits.train.labels
    best = trainer.state.best_global_step if splits.validation else None
    return {
        "model": recipe.model,
        "classes": len(splits.train.class_names),
        "train_images": len(labels),
        "most_common_class": splits.train.class_names[int(labels.bincount().argmax())],
        "updates": trainer.state.global_step,
        "best_epoch": best / updates_per_epoch if best else None,
        "seed": recipe.seed,
        "seconds": round(seconds, 1),
        **measured,
    }


def recorded_facts(
    recipe: FinetuningRecipe,
    splits: Splits,
    model: Any,
    results: dict[str, Any],
    images_per_update: int,
    updates_per_epoch: int,
    peak: float,
) -> dict[str, Any]:
    """What a model card says of this run."""
    data = describe_data(
        recipe.data,
        train_images=results["train_images"],
        validation_images=len(splits.validation) if splits.validation else None,
        test_images=len(splits.test) if splits.test else None,
        classes=results["classes"],
    )
    metrics = []
    for split in ("validation", "test"):
        if found := results[split]:
            count, top_1 = found["images"], found["top_1_accuracy"]
            error = math.sqrt(top_1 * (1 - top_1) / count)
            metrics.append(metric("Top-1 accuracy", "accuracy", top_1, split, count, standard_error=error))
            metrics.append(metric("Top-5 accuracy", "accuracy", found.get("top_5_accuracy"), split, count))
            metrics.append(metric("Loss", "loss", found["loss"], split, count))
    return {
        "data": data,
        "model": {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        "training": {
            "updates": results["updates"],
            "epochs": results["updates"] / updates_per_epoch,
            "images_per_update": images_per_update,
            "learning_rate": peak,
            "best_epoch": results["best_epoch"],
        },
        "metrics": measured(metrics),
    }


def save_model(
    state: PartialState, trainer: ClassificationTrainer, recipe: FinetuningRecipe, output: Path
) -> list[str]:
    """Write model and processor; returns the names of their files."""

    def write(folder: Path) -> None:
        trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
        build_processor(recipe).save_pretrained(folder)

    names = replace_files(output, write) if state.is_main_process else []
    state.wait_for_everyone()
    return names


def save_results(
    state: PartialState,
    trainer: ClassificationTrainer,
    recipe: FinetuningRecipe,
    output: Path,
    results: dict[str, Any],
    pictured: LabelledDataset | None,
) -> list[str]:
    """Write what belongs to the result beside the model: metrics, log and pictures; returns the names of the files."""
    names: list[str] = []
    if state.is_main_process:
        names = replace_files(output, functools.partial(write_metrics, trainer, results))
        draw_curves(trainer, results, output)
        names += ["training_curve.png", "recipe.yaml", RECORD_FILE]
        if pictured:
            draw_predictions(recipe, pictured, results, output)
            names.append("predictions.png")
    state.wait_for_everyone()
    return names


def write_metrics(trainer: ClassificationTrainer, results: dict[str, Any], folder: Path) -> None:
    splits = {name: _without_logits(results[name]) for name in ("validation", "test")}
    (folder / "metrics.json").write_text(json.dumps({**results, **splits}, indent=1) + "\n")
    lines = [json.dumps(entry) for entry in trainer.state.log_history]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def _without_logits(measured: dict[str, Any] | None) -> dict[str, Any] | None:
    return measured and {name: value for name, value in measured.items() if name != "logits"}


def draw_curves(trainer: ClassificationTrainer, results: dict[str, Any], output: Path) -> None:
    from green_swin_hf.classification_figures import finetuning_figure
    from green_swin_hf.visualization import save_figure

    figure = finetuning_figure(trainer.state.log_history, best_epoch=results["best_epoch"])
    save_figure(figure, output / "training_curve.png")


def draw_predictions(recipe: FinetuningRecipe, dataset: LabelledDataset, results: dict[str, Any], output: Path) -> None:
    """Random images of the test split (without one: of the validation images)."""
    from green_swin_hf.classification_figures import prediction_figure
    from green_swin_hf.visualization import save_figure, to_display

    of = "test" if results["test"] else "validation"
    rows = np.random.default_rng(recipe.seed).permutation(len(dataset))[:NUM_PICTURES]
    samples = [dataset[int(row)] for row in rows]
    pixels = torch.stack([sample["pixel_values"] for sample in samples])
    scores = torch.tensor(results[of]["logits"][rows]).float().softmax(-1)
    best = scores.max(-1)
    names = dataset.class_names
    figure = prediction_figure(
        to_display(pixels, recipe.mean or (), recipe.std or ()),
        [names[index] for index in best.indices],
        [names[sample["labels"]] for sample in samples],
        best.values.tolist(),
        title=f"Random {of} images: prediction with its probability",
    )
    save_figure(figure, output / "predictions.png")


# Messages


def print_heading(
    state: PartialState,
    recipe: FinetuningRecipe,
    model: Any,
    splits: Splits,
    settings: TrainingArguments,
    total_updates: int,
    peak: float,
    warmup: int,
    output: Path,
    checkpoint: Path | None,
) -> None:
    config = model.config
    rows, columns = as_pair(config.image_size)
    images_per_update = recipe.batch_size * recipe.gradient_accumulation_steps * state.num_processes
    parameters = sum(parameter.numel() for parameter in model.parameters())
    start = "random weights" if recipe.from_scratch else recipe.model
    precision = "bf16" if settings.bf16 else "fp16" if settings.fp16 else "fp32"
    processes, threads = state.num_processes, torch.get_num_threads()
    lines = {
        "data": f"{len(splits.train):,} images of {recipe.data} in {config.num_labels} classes, {rows}x{columns} px, "
        f"{'grey' if config.num_channels == 1 else 'colour'}",
        "validation": f"{len(splits.validation):,} images ({splits.validated_on})" if splits.validation else "none",
        "test": f"{len(splits.test):,} images ({recipe.test_split})" if splits.test else "none",
        "model": f"{parameters / 1e6:.1f} M parameters, from {start}",
        "device": f"{settings.device}, {precision}, {processes} process{'es' * (processes > 1)}, "
        f"{threads} thread{'s' * (threads > 1)}",
        "updates": f"{total_updates:,} of {images_per_update} images; learning rate {peak:.2e} after {warmup}, "
        f"times {recipe.layer_decay} for each block towards the input",
        "output": str(output),
    }
    if checkpoint:
        lines["going on"] = f"from {checkpoint}"
    state.print("Fine-tuning an image classifier")
    for name, text in lines.items():
        state.print(f"  {name:<12} {text}")
    sys.stdout.flush()


def print_results(
    state: PartialState, results: dict[str, Any], splits: Splits, output: Path, written: list[str]
) -> None:
    say = state.print
    say(f"Done in {results['seconds'] / 60:.1f} minutes.")
    if results["best_epoch"]:
        say(f"Kept the model of epoch {results['best_epoch']:.3g}, the best on the validation images.")
    for name, part in (("validation", splits.validation), ("test", splits.test)):
        measured = results[name]
        if measured is None or part is None:
            continue
        accuracy, count = measured["top_1_accuracy"], measured["images"]
        error = math.sqrt(accuracy * (1 - accuracy) / count)
        common = part.class_names.index(results["most_common_class"])
        constant = float((part.labels == common).float().mean())
        top_5 = f", top-5 {measured['top_5_accuracy']:.1%}" if "top_5_accuracy" in measured else ""
        say(
            f"{name.capitalize()}: top-1 {accuracy:.1%} (standard error {error:.1%}){top_5}, loss "
            f"{measured['loss']:.4f} on {count:,} images. Always answering the most common class scores {constant:.1%}."
        )
    say(f"Wrote to {output}: {listed_files(written)}")
    say("Next, for example, classify a picture:")
    say(
        f"""  python -c "import green_swin_hf; from transformers import pipeline; """
        f"""print(pipeline('image-classification', model='{output}')('examples/data/photos/rocket.jpg'))" """.rstrip()
    )


def stopped_early(state: PartialState, trainer: ClassificationTrainer, output: Path, reason: str) -> int:
    state.print(
        f"Stopped after update {trainer.state.global_step:,} of {trainer.state.max_steps:,} {reason}. Go on with: "
        f"{how_to_go_on(output, state.num_processes)}"
    )
    return 0


def fail(message: str) -> int:
    """Said by any process: an image that cannot be read is the matter of the one that reads it."""
    print(f"finetune.py: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
