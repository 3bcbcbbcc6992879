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
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env, set_seed
from tqdm.auto import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.utils import logging as transformers_logging

from green_swin_hf.augmentation import FinetuningImages, MixingCollator
from green_swin_hf.checkpointing import listed, replace_files
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.energy import add_energy_flag, check_energy
from green_swin_hf.finetuning import (
    ClassificationTrainer,
    build_classifier,
    build_processor,
    build_transforms,
    complete_recipe,
    count_processes,
    is_whole,
    load_classifier,
    newest_trainer_checkpoint,
    split_off,
)
from green_swin_hf.finetuning_recipe import FinetuningRecipe
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.labelled_images import LabelledDataset, LabelledImages, label_budget, load_labelled_images
from green_swin_hf.optimization import build_optimizer, cosine_schedule, native_bf16, scaled_learning_rate
from green_swin_hf.publish import publish_results
from green_swin_hf.recipe_files import add_recipe_flags, flag_overrides, load_recipe, save_recipe
from green_swin_hf.run_record import RECORD_FILE, RunRecord, describe_data, describe_start, measured, metric
from green_swin_hf.training import (
    OneLineParser,
    check_output_folder,
    check_tracker,
    count_updates,
    one_line_errors,
    unused_folder,
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
        output, checkpoint = find_run(arguments)
        recipe = read_recipe(arguments, output, checkpoint)
        state = start_process(recipe, arguments)

        # Data, then the model, which says what the recipe leaves open: size, channels and statistics of images
        splits = open_data(recipe)
        names = splits.train.class_names
        set_seed(recipe.seed)
        model: Any = resumed_model(checkpoint, names) if checkpoint else build_classifier(recipe, names)
        recipe = complete_recipe(recipe, model.config)
        training, unchanged = build_transforms(recipe)
        cache = recipe.cache_megabytes * 2**20
        train = FinetuningImages(splits.train, training, seed=recipe.seed, cache_bytes=cache)
        validation, test = (
            LabelledDataset(part, unchanged, cache_bytes=cache) if part else None
            for part in (splits.validation, splits.test)
        )
        collator = MixingCollator(
            len(names), mixup=recipe.mixup, cutmix=recipe.cutmix, label_smoothing=recipe.label_smoothing
        )

        # Optimizer and schedule
        updates_per_epoch = updates_of_an_epoch(recipe, len(train), state.num_processes)
        total_updates = recipe.max_steps or max(1, math.ceil(recipe.epochs * updates_per_epoch))
        settings = training_arguments(recipe, arguments, output, updates_per_epoch, total_updates, bool(validation))
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
    report = RunReport(arguments.stop_after and arguments.stop_after * updates_per_epoch, state.is_main_process)
    trainer = ClassificationTrainer(
        model,
        settings,
        data_collator=collator,
        train_dataset=train,
        eval_dataset=validation,
        compute_metrics=metric,
        optimizers=(optimizer, scheduler),
        callbacks=[report],
    )
    trainer.remove_callback(PrinterCallback)
    if state.is_main_process:
        save_recipe(recipe, output / "recipe.yaml")
    with one_line_errors("finetune.py"):
        record = RunRecord(
            output, "classification", "finetune.py", is_resumed=checkpoint is not None, device=settings.device,
            precision=precision_of(settings), track_energy=arguments.track_energy,
        )  # fmt: skip
        record.note(start_from=describe_start(None if recipe.from_scratch else recipe.model))
    print_heading(state, recipe, model, splits, settings, total_updates, peak, warmup, output, checkpoint)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if trainer.state.global_step < total_updates:
            record.stop()
            return stopped_early(state, trainer, output)

        # Measure the model that was kept, and leave the results
        measured = {"validation": measure(trainer, validation), "test": measure(trainer, test)}
        results = collect_results(recipe, splits, trainer, measured, updates_per_epoch, time.monotonic() - started)
        written = save_results(state, trainer, recipe, output, results, test or validation)
        record.stop(**recorded_facts(recipe, splits, model, results, images_per_update, updates_per_epoch, peak))
    except OSError as error:  # the disk is full or gone
        record.stop()
        return fail(state, f"stopped: {error}; whole checkpoints are in {output / 'checkpoints'}")
    print_results(state, results, splits, output, written)
    uploaded = not hub_id or not state.is_main_process or publish_results("finetune.py", output, hub_id)
    return 0 if uploaded else 1


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", type=Path, help=f"YAML file (default: {DEFAULT_RECIPE.name}); flags go on top")
    parser.add_argument("--output-dir", type=Path, help=f"new folder for all results (default: {DEFAULT_OUTPUT}, …-2)")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on from the newest checkpoint, or from this one")
    parser.add_argument("--stop-after", type=int, metavar="EPOCHS", help="stop after so many epochs, to go on later")
    trackers = ("none", "tensorboard", "trackio", "wandb")
    parser.add_argument("--report-to", default="none", choices=trackers, help="also log there (default: none)")
    add_hub_flags(parser)
    add_energy_flag(parser)
    add_recipe_flags(parser.add_argument_group("keys of the recipe"), FinetuningRecipe)
    arguments = parser.parse_args(argv)
    if arguments.stop_after is not None and arguments.stop_after < 1:
        raise ValueError(f"--stop-after {arguments.stop_after} must be at least 1")
    check_energy(arguments.track_energy)
    return arguments


def find_run(arguments: Namespace) -> tuple[Path, Path | None]:
    """The output folder, and the checkpoint to go on from (None: a new run). Makes nothing."""
    run, checkpoint = find_checkpoint(arguments) if arguments.resume else (None, None)
    output = arguments.output_dir or run or unused_folder(DEFAULT_OUTPUT)
    if output.is_dir() and any(output.iterdir()) and (run is None or output.resolve() != run.resolve()):
        raise ValueError(
            f"output folder {output} is not empty; go on with its run: --resume auto, or give another --output-dir"
        )
    check_output_folder(output)
    return output, checkpoint


def find_checkpoint(arguments: Namespace) -> tuple[Path, Path]:
    """The folder of the run to go on with and its checkpoint."""
    is_auto = arguments.resume == "auto"
    path = (arguments.output_dir or newest_default_output()) if is_auto else Path(arguments.resume)
    if not path.is_dir():
        raise ValueError(f"--resume: {path} is no folder; give a checkpoint or a run's output folder")
    if path.name.startswith("checkpoint-"):
        if not is_whole(path):
            raise ValueError(f"checkpoint {path} was not written to its end; give the output folder, or another one")
        return path.resolve().parents[1], path
    checkpoint = newest_trainer_checkpoint(path / "checkpoints")
    if checkpoint is None:
        raise ValueError(f"--resume: {path} holds no whole checkpoint; start a new run with another --output-dir")
    return path, checkpoint


def newest_default_output() -> Path:
    """The default output folder with the highest number."""
    number = int(unused_folder(DEFAULT_OUTPUT).name.removeprefix(DEFAULT_OUTPUT.name).removeprefix("-") or 1) - 1
    return DEFAULT_OUTPUT if number < 2 else DEFAULT_OUTPUT.with_name(f"{DEFAULT_OUTPUT.name}-{number}")


def read_recipe(arguments: Namespace, output: Path, checkpoint: Path | None) -> FinetuningRecipe:
    """The recipe file (of a resumed run: its own) with the flags on top."""
    flags = flag_overrides(arguments, FinetuningRecipe)
    if checkpoint:
        before = load_recipe(checkpoint.resolve().parents[1] / "recipe.yaml", FinetuningRecipe)
        given = load_recipe(arguments.recipe, FinetuningRecipe) if arguments.recipe else before
        recipe = given.replace(**flags)
        refuse_changes(before, recipe)
    else:
        recipe = load_recipe(arguments.recipe or DEFAULT_RECIPE, FinetuningRecipe).with_flags(flags)
    if not recipe.data:
        raise ValueError("no data given; name a folder with a sub-folder for each class, or a data set, with --data")
    if not checkpoint and recipe.model == DEFAULT_MODEL and not Path(DEFAULT_MODEL).exists():
        raise ValueError(
            f"the pretrained model {DEFAULT_MODEL} is not here; run examples/pretrain.py first, name another with "
            "--model, or train from random weights: --model none"
        )
    # absolute, so that the run goes on from another working directory, too
    local = [name for name in ("data", "model") if os.path.exists(getattr(recipe, name))]
    local = [name for name in local if name == "data" or not recipe.from_scratch]
    return recipe.replace(**{name: os.path.abspath(getattr(recipe, name)) for name in local})


def refuse_changes(before: FinetuningRecipe, recipe: FinetuningRecipe) -> None:
    """Raise a `ValueError` when a run would go on with settings that make it another run."""
    changes = before.differences(recipe)
    if changes:
        shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        raise ValueError(f"--resume cannot change the run: {shown}; leave these as they were, or start a new run")


def resumed_model(checkpoint: Path, class_names: tuple[str, ...]) -> Any:
    """The model of a checkpoint; `Trainer` restores the rest."""
    model = load_classifier(str(checkpoint), class_names)
    before, now = count_processes(checkpoint), PartialState().num_processes
    if before != now:
        raise ValueError(f"--resume: {checkpoint} is of a run with {before} processes, not {now}; start as many")
    return model


def start_process(recipe: FinetuningRecipe, arguments: Namespace) -> PartialState:
    """Device and rank of this process; sets its threads, and how much is said."""
    check_tracker(arguments.report_to)
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if recipe.threads and recipe.threads > 8 * cores:
        raise ValueError(f"threads {recipe.threads} must be at most 8 for each of the {cores} cores")
    if recipe.threads or state.device.type == "cpu":
        torch.set_num_threads(recipe.threads or max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    if recipe.precision == "fp16" and state.device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; give --precision bf16 or fp32")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if not state.is_main_process or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return state


def training_arguments(
    recipe: FinetuningRecipe,
    arguments: Namespace,
    output: Path,
    updates_per_epoch: int,
    total_updates: int,
    has_validation: bool,
) -> TrainingArguments:
    """`Trainer`'s settings. Checkpoints fall on ends of epochs, from where a run goes on exactly."""
    state = PartialState()
    automatic = "bf16" if native_bf16(state.device) else "fp32"
    precision = automatic if recipe.precision == "auto" else recipe.precision
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
        dataloader_pin_memory=state.device.type == "cuda",
        remove_unused_columns=False,
        label_names=["labels"],
        ddp_find_unused_parameters=False,
        report_to=[] if arguments.report_to == "none" else [arguments.report_to],
        disable_tqdm=True,
        use_cpu=state.device.type == "cpu",
    )


def precision_of(settings: TrainingArguments) -> str:
    return "bf16" if settings.bf16 else "fp16" if settings.fp16 else "fp32"


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


def load_metric(state: PartialState) -> Callable[[Any], dict[str, float]]:
    """What `Trainer` measures beside the loss: top-1 accuracy, and top-5 with more than five classes."""
    with state.main_process_first():  # it is copied to the cache of modules
        metric = evaluate.load(str(METRIC), keep_in_memory=True)

    def compute(prediction: Any) -> dict[str, float]:
        return metric.compute(predictions=prediction.predictions, references=prediction.label_ids)

    return compute


# Training


class RunReport(TrainerCallback):
    """A progress bar with the loss, a line for each measurement, and a stop after so many updates.

    Args:
        stop_after: updates of this start of the run; None for all.
        shown: whether this process says anything.
    """

    def __init__(self, stop_after: int | None, shown: bool):
        self.stop_after = stop_after
        self.shown = shown
        self.first_update = 0
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.first_update = state.global_step
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, disable=not self.shown, unit="update",
            mininterval=0.5 if sys.stderr.isatty() else 20, dynamic_ncols=True, smoothing=0.05,
        )  # fmt: skip

    def on_step_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.bar.update()
        if self.stop_after is not None and state.global_step - self.first_update >= self.stop_after:
            control.should_training_stop = True
            control.should_save = True

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **others: Any) -> None:
        logs = logs or {}
        if "loss" in logs:
            shown = {"loss": f"{float(logs['loss']):.4f}", "lr": f"{float(logs['learning_rate']):.2e}"}
            self.bar.set_postfix(shown, refresh=False)
        if "eval_loss" in logs:
            top_5 = f", top-5 {logs['eval_top_5_accuracy']:.1%}" if "eval_top_5_accuracy" in logs else ""
            text = f"validation loss {logs['eval_loss']:.4f}, top-1 {logs['eval_top_1_accuracy']:.1%}{top_5}"
            self.bar.write(f"  epoch {state.epoch:.3g}: {text}") if self.shown else None

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.bar.close()


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


def save_results(
    state: PartialState,
    trainer: ClassificationTrainer,
    recipe: FinetuningRecipe,
    output: Path,
    results: dict[str, Any],
    pictured: LabelledDataset | None,
) -> list[str]:
    """Write model, processor, metrics and pictures; returns the names of all files that belong to the result."""
    names: list[str] = []
    if state.is_main_process:
        names = replace_files(output, functools.partial(save_model, trainer, recipe, results))
        draw_curves(trainer, results, output)
        names += ["training_curve.png", "recipe.yaml", RECORD_FILE]
        if pictured:
            draw_predictions(recipe, pictured, results, output)
            names.append("predictions.png")
    state.wait_for_everyone()
    return sorted(names)


def save_model(trainer: ClassificationTrainer, recipe: FinetuningRecipe, results: dict[str, Any], folder: Path) -> None:
    trainer.accelerator.unwrap_model(trainer.model).save_pretrained(folder)
    build_processor(recipe).save_pretrained(folder)
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
    processes, threads = state.num_processes, torch.get_num_threads()
    lines = {
        "data": f"{len(splits.train):,} images of {recipe.data} in {config.num_labels} classes, {rows}x{columns} px, "
        f"{'grey' if config.num_channels == 1 else 'colour'}",
        "validation": f"{len(splits.validation):,} images ({splits.validated_on})" if splits.validation else "none",
        "test": f"{len(splits.test):,} images ({recipe.test_split})" if splits.test else "none",
        "model": f"{parameters / 1e6:.1f} M parameters, from {start}",
        "device": f"{settings.device}, {precision_of(settings)}, {processes} process{'es' * (processes > 1)}, "
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
    say(f"Wrote to {output}: {listed(written)}")
    say("Next, for example, classify a picture:")
    say(
        f"""  python -c "import green_swin_hf; from transformers import pipeline; """
        f"""print(pipeline('image-classification', model='{output}')('examples/data/photos/rocket.jpg'))" """.rstrip()
    )


def stopped_early(state: PartialState, trainer: ClassificationTrainer, output: Path) -> int:
    launcher = "python" if state.num_processes == 1 else "accelerate launch (as before)"
    state.print(
        f"Stopped after update {trainer.state.global_step:,} of {trainer.state.max_steps:,} as asked. Go on with: "
        f"{launcher} {sys.argv[0]} --output-dir {output} --resume auto"
    )
    return 0


def fail(state: PartialState, message: str) -> int:
    if state.is_main_process:
        print(f"finetune.py: {message}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
