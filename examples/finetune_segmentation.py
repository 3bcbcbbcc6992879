"""Fine-tune a GreenSwin backbone in UperNet for semantic segmentation: a class for every pixel.

    python examples/finetune_segmentation.py                   # drawn shapes, minutes on a bare CPU
    python examples/finetune_segmentation.py --data my/data --class-names names.json --init-from outputs/pretrain
    python examples/finetune_segmentation.py --output-dir outputs/finetune_segmentation --resume auto

`my/data` holds train/images, train/masks, validation/images, … with the same file names in both; a mask has the class
number of every pixel, 255 for none. Every key of a recipe is a flag as well. Exit codes: 0 done, 1 failed while
training, 2 wrong input, nothing written.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    SegformerImageProcessor,
    TrainingArguments,
    UperNetForSemanticSegmentation,
    set_seed,
)

from green_swin_hf import GreenSwinBackbone
from green_swin_hf.checkpointing import listed_files, replace_files
from green_swin_hf.data import seeded_generator
from green_swin_hf.drawn_shapes import load_photographs
from green_swin_hf.energy import add_energy_flag, check_energy
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.optimization import build_optimizer
from green_swin_hf.pretrained_start import load_backbone
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
from green_swin_hf.segmentation import (
    PixelCounter,
    SegmentationTrainer,
    build_upernet,
    commonest_class_scores,
    enlarged_logits,
)
from green_swin_hf.segmentation_data import (
    CLASS_NAMES_FILE,
    DRAWN_CLASSES,
    ImagesWithMasks,
    SegmentationAugmentation,
    SegmentationDataset,
    WholeImages,
    load_images_with_masks,
    read_class_names,
    write_drawn_segmentation,
)
from green_swin_hf.segmentation_recipe import SegmentationRecipe
from green_swin_hf.trainer_runs import (
    TRAINER_FORMAT,
    TrainerProgress,
    check_facts,
    describe_stop,
    read_trainer_recipe,
    train,
)
from green_swin_hf.training import check_tracker, one_line_errors

DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "segmentation" / "drawn_shapes_tiny.yaml"
DEFAULT_OUTPUT = Path("outputs/finetune_segmentation")
DRAWN_FOLDER = "drawn_shapes"
CHECKED_MASKS = 500  # of the training split, before anything starts; the others are checked when they are read
NUM_PICTURES = 8


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("finetune_segmentation.py"):
        arguments = parse_arguments(argv)
        output, checkpoint = find_run(arguments.output_dir, arguments.resume, DEFAULT_OUTPUT, TRAINER_FORMAT)
        recipe = open_recipe(arguments, output, checkpoint)
        precision = set_up_process(recipe.precision, recipe.threads)
        class_names = find_class_names(recipe)
        trainer_options = training_arguments(recipe, precision, output, arguments.report_to)
        set_seed(recipe.seed)
        model = build_model(recipe, class_names)
        processor, drawn = build_processor(recipe), output / DRAWN_FOLDER
        given = open_data(recipe, recipe.data, processor, class_names) if recipe.data else None  # None: drawn shapes
        photographs = None if given else open_photographs(recipe, drawn)
        facts = describe_training_data(recipe, class_names, given[0]["train"].source if given else None)
        check_facts(checkpoint, recipe, facts)
        hub_id = open_hub(arguments, output)

    # From here on files are written.
    is_main = process_state().is_main_process
    with one_line_errors("finetune_segmentation.py"):
        if is_main:
            output.mkdir(parents=True, exist_ok=True)
            save_recipe(recipe, output / "recipe.yaml")  # first, so that a run that is stopped while it draws goes on
        if given is None:
            with trainer_options.main_process_first():
                draw_data(recipe, drawn, photographs)
        data, pixels = given or open_data(recipe, str(drawn), processor, class_names)
    counter, progress = PixelCounter(), TrainerProgress(describe_evaluation, arguments.stop_after)
    trainer = SegmentationTrainer(
        model,
        trainer_options,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        compute_metrics=counter,
        optimizers=(
            build_optimizer(model, recipe.learning_rate, weight_decay=recipe.weight_decay, betas=recipe.betas),
            None,
        ),
        facts=facts,
    )
    progress.attach(trainer)
    if is_main:
        print_heading(recipe, model, data, class_names, output, trainer_options, checkpoint)
    with one_line_errors("finetune_segmentation.py"):
        record = RunRecord(
            output, "segmentation", "finetune_segmentation.py", is_resumed=checkpoint is not None,
            device=trainer_options.device, precision=precision, track_energy=arguments.track_energy,
        )  # fmt: skip
        if not checkpoint:  # later the folder may be gone
            record.note(start_from=describe_start(recipe.init_from))

    # Train; at the end the weights of the best evaluation are put back
    is_saved = False
    try:
        train(trainer, checkpoint, progress)
        if trainer.state.global_step < recipe.max_steps:
            record.stop()
            return stopped_early(trainer, output, is_main, progress.stop_reason)

        # Leave the model, before an image that cannot be read may end its measurement; then the results
        names = save_model(output, trainer, processor) if is_main else []
        is_saved = True
        baselines = {name: commonest_class_scores(counts) for name, counts in pixels.items()}
        metrics = measure(trainer, counter, data, class_names, baselines)
        if is_main:
            names = sorted([*names, *save_results(output, trainer, data, metrics, class_names)])
            record.stop(**recorded_facts(recipe, trainer, data, metrics, class_names))
    except (ValueError, OSError) as error:  # a bad image or mask, a full disk
        progress.close()
        record.stop()
        return fail(describe_stop(error, output, trainer.args.world_size, is_saved=is_saved))
    if is_main:
        print_results(output, names, metrics, class_names, time.monotonic() - started, recipe)
    uploaded = (
        not hub_id
        or not is_main
        or publish_results("finetune_segmentation.py", output, hub_id, public=arguments.hub_public)
    )
    trainer.accelerator.end_training()
    return 0 if uploaded else 1


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = run_parser(__doc__, SegmentationRecipe, DEFAULT_RECIPE, DEFAULT_OUTPUT, stop_unit="updates")
    add_hub_flags(parser)
    add_energy_flag(parser)
    arguments = parser.parse_args(argv)
    check_tracker(arguments.report_to)
    check_energy(arguments.track_energy)
    return arguments


def open_recipe(arguments: Namespace, output: Path, checkpoint: Path | None) -> SegmentationRecipe:
    """The recipe of the run, which goes on with the settings that it had."""
    recipe = read_trainer_recipe(arguments, SegmentationRecipe, output, DEFAULT_RECIPE, checkpoint)
    if recipe.data is None:
        check_batch(recipe, recipe.drawn_images, f"drawn_images {recipe.drawn_images}")
    return recipe


def check_batch(recipe: SegmentationRecipe, num_images: int, limit: str) -> None:
    """Raise a `ValueError` where an update takes more images than there are, which the message calls `limit`."""
    needed = recipe.batch_size * recipe.gradient_accumulation_steps * int(os.environ.get("WORLD_SIZE", "1"))
    if needed > num_images:
        raise ValueError(
            f"batch_size {recipe.batch_size} ({needed} images for an update) must not exceed {limit}; give a smaller "
            "--batch-size or --gradient-accumulation-steps"
        )


def find_class_names(recipe: SegmentationRecipe) -> tuple[str, ...]:
    if recipe.data is None:
        return find_drawn_names(recipe)
    if recipe.class_names:
        return read_class_names(recipe.class_names)
    beside = Path(recipe.data).expanduser() / CLASS_NAMES_FILE
    if beside.is_file():
        return read_class_names(beside)
    raise ValueError(f"the classes of {recipe.data} have no names; give a JSON list of them: --class-names FILE")


def find_drawn_names(recipe: SegmentationRecipe) -> tuple[str, ...]:
    """Names of the classes of drawn shapes, as many as their masks have."""
    names = read_class_names(recipe.class_names) if recipe.class_names else DRAWN_CLASSES
    needed = len(DRAWN_CLASSES) - recipe.reduce_labels
    if len(names) < needed:
        raise ValueError(
            f"class names {recipe.class_names} are {len(names)}, and the drawn shapes have {needed} classes; leave out "
            "--class-names, or give --data"
        )
    return names


def training_arguments(recipe: SegmentationRecipe, precision: str, output: Path, report_to: str) -> TrainingArguments:
    is_cpu = process_state().device.type == "cpu"
    every = min(recipe.validate_every, recipe.max_steps)
    return TrainingArguments(
        output_dir=str(output / "checkpoints"),
        max_steps=recipe.max_steps,
        warmup_steps=recipe.warmup_steps,
        lr_scheduler_type="linear",
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=1,  # whole images differ in size
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_grad_norm=recipe.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        seed=recipe.seed,
        dataloader_num_workers=recipe.workers,
        dataloader_drop_last=True,
        dataloader_pin_memory=not is_cpu,
        remove_unused_columns=False,
        label_names=["labels"],
        batch_eval_metrics=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=recipe.keep_checkpoints + 1,
        load_best_model_at_end=True,
        metric_for_best_model="mean_iou",
        greater_is_better=True,
        logging_steps=recipe.log_every,
        report_to=report_to,
        disable_tqdm=True,
        use_cpu=is_cpu,
    )


# Data


def open_photographs(recipe: SegmentationRecipe, drawn: Path) -> list[Tensor] | None:
    """Photographs to draw on; None where a run that is gone on with has drawn."""
    if drawn.is_dir():
        return None
    if not recipe.photographs:
        raise ValueError("no data given; name a folder with train/images and train/masks: --data FOLDER")
    return load_photographs(recipe.photographs)


def draw_data(recipe: SegmentationRecipe, folder: Path, photographs: list[Tensor] | None) -> None:
    """Draw the three splits, if a resumed run has not done so: other shapes on other parts of the same photographs."""
    if photographs is None or folder.is_dir():  # by then the first process has drawn
        return
    held_out = max(10, recipe.drawn_images // 8)
    counts = {"train": recipe.drawn_images, "validation": held_out, "test": held_out}
    partial = folder.with_name(f"{folder.name}.partial")
    for number, (split, count) in enumerate(counts.items()):
        seed = 10 * recipe.seed + number
        write_drawn_segmentation(partial / split, photographs, count, seed, radii=recipe.drawn_radii)
    (partial / CLASS_NAMES_FILE).write_text(json.dumps(DRAWN_CLASSES))
    partial.rename(folder)


def open_data(
    recipe: SegmentationRecipe, source: str, processor: SegformerImageProcessor, class_names: tuple[str, ...]
) -> tuple[dict[str, SegmentationDataset], dict[str, Tensor]]:
    """The splits, looked into, and the pixels of each class in those that are measured on."""
    data = build_datasets(recipe, open_splits(recipe, source), processor, len(class_names))
    return data, check_data(data)


def describe_training_data(
    recipe: SegmentationRecipe, class_names: tuple[str, ...], images: ImagesWithMasks | None
) -> dict[str, Any]:
    """What must not change when the run is gone on with, wherever the images lie by then.

    Of shapes that are drawn (no `images`) the recipe says the rest: they stay in the output folder.
    """
    return {
        "class_names": list(class_names),
        "num_images": len(images) if images else recipe.drawn_images,
        "data_fingerprint": images.fingerprint() if images else None,
    }


def open_splits(recipe: SegmentationRecipe, source: str) -> dict[str, ImagesWithMasks]:
    """Images to train on, to choose the best weights on, and (maybe) to measure them on."""
    load = functools.partial(
        load_images_with_masks,
        source,
        image_column=recipe.image_column,
        mask_column=recipe.mask_column,
        subset=recipe.subset,
    )
    splits = {"train": load(split=recipe.split)}
    try:
        splits["validation"] = load(split=recipe.validation_split or "validation")
    except ValueError as error:
        if recipe.validation_split or "has no split" not in str(error):
            raise
        splits = hold_out_tenth(splits["train"], recipe.seed)
    if recipe.test_split:
        splits["test"] = load(split=recipe.test_split)
    for name, split in splits.items():
        if len(split) == 0:
            raise ValueError(f"the {name} split {split.name} is empty; name another one with --{name}-split")
    check_batch(recipe, len(splits["train"]), f"the {len(splits['train'])} training images")
    return splits


def hold_out_tenth(images: ImagesWithMasks, seed: int) -> dict[str, ImagesWithMasks]:
    """A split into images to train on and to choose the best weights on, the same for the same seed."""
    count = len(images) // 10
    if count == 0:
        raise ValueError(f"{images.name} has {len(images)} images, too few to hold a tenth out; add a validation split")
    order = torch.randperm(len(images), generator=seeded_generator(seed, len(images))).tolist()
    return {"train": images.select(sorted(order[count:])), "validation": images.select(sorted(order[:count]))}


def build_processor(recipe: SegmentationRecipe) -> SegformerImageProcessor:
    """What prepares whole images, here for evaluation and later for the finished model."""
    options: dict[str, Any] = {"size": recipe.size} if recipe.size else {"do_resize": False}
    return SegformerImageProcessor(
        image_mean=list(recipe.mean),
        image_std=list(recipe.std),
        do_reduce_labels=recipe.reduce_labels,
        **options,
    )


def build_datasets(
    recipe: SegmentationRecipe,
    splits: dict[str, ImagesWithMasks],
    processor: SegformerImageProcessor,
    num_classes: int,
) -> dict[str, SegmentationDataset]:
    augmentation = SegmentationAugmentation(
        recipe.crop_size,
        recipe.mean,
        recipe.std,
        scale_range=recipe.scale_range,
        short_side=recipe.short_side,
        long_side=recipe.long_side,
        max_class_share=recipe.max_class_share,
        flip=recipe.flip,
        photometric=recipe.photometric,
    )
    whole = WholeImages(processor)
    shared: dict[str, Any] = {"num_classes": num_classes, "reduce_labels": recipe.reduce_labels, "seed": recipe.seed}
    return {
        name: SegmentationDataset(source, augmentation if name == "train" else whole, **shared)
        for name, source in splits.items()
    }


def check_data(data: dict[str, SegmentationDataset]) -> dict[str, torch.Tensor]:
    """Read masks and an image of every split; returns the pixels of each class in those that are measured on."""
    for dataset in data.values():
        dataset.read(0)  # of the other images only the heads are read
    steps = {name: max(1, len(data[name]) // CHECKED_MASKS) if name == "train" else 1 for name in data}
    counts = {name: dataset.check(range(0, len(dataset), steps[name])) for name, dataset in data.items()}
    for name, pixels in counts.items():
        if pixels.sum() == 0:
            raise ValueError(f"no mask of {data[name].source.name} has a pixel with a class; mend the masks")
    return {name: pixels for name, pixels in counts.items() if name != "train"}


# Model


def build_model(recipe: SegmentationRecipe, class_names: tuple[str, ...]) -> UperNetForSemanticSegmentation:
    if recipe.init_from:
        backbone = load_backbone(recipe.init_from, drop_path_rate=recipe.drop_path_rate)
        if backbone.config.num_channels != 3:
            raise ValueError(
                f"--init-from {recipe.init_from} takes images of {backbone.config.num_channels} channels, these have "
                "3; pretrain with --num-channels 3"
            )
    else:
        backbone = GreenSwinBackbone(recipe.model_config())
    model = build_upernet(
        backbone,
        class_names,
        hidden_size=recipe.head_channels,
        pool_scales=recipe.pool_scales,
        auxiliary_channels=recipe.auxiliary_channels,
        auxiliary_loss_weight=recipe.auxiliary_loss_weight,
    )
    # Two images on each GPU are too few for norms over a batch: several GPUs share their statistics.
    if torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


# Training


def describe_evaluation(logs: dict[str, float]) -> str:
    return f"validation loss {logs['eval_loss']:.4f}, mean IoU {logs['eval_mean_iou']:.3f}"


def stopped_early(trainer: SegmentationTrainer, output: Path, is_main: bool, reason: str) -> int:
    if is_main:
        print(
            f"Stopped after update {trainer.state.global_step:,} of {trainer.args.max_steps:,} {reason}. Go on with: "
            f"{how_to_go_on(output, trainer.args.world_size)}"
        )
    trainer.accelerator.end_training()
    return 0


def fail(message: str) -> int:
    """Said by any process: an image that cannot be read is the matter of the one that reads it."""
    print(f"finetune_segmentation.py: {message}", file=sys.stderr)
    return 1


# Results


def measure(
    trainer: SegmentationTrainer,
    counter: PixelCounter,
    data: dict[str, SegmentationDataset],
    class_names: tuple[str, ...],
    baselines: dict[str, dict[str, Any]],
) -> dict[str, Any]:
    """Scores of the best weights on each split that is not trained on, beside those of the commonest class."""
    metrics: dict[str, Any] = {}
    for name in baselines:
        loss = trainer.evaluate(data[name], metric_key_prefix=name)[f"{name}_loss"]
        scores = {**counter.scores, "class_iou": dict(zip(class_names, counter.scores["class_iou"], strict=True))}
        baseline = {key: baselines[name][key] for key in ("mean_iou", "pixel_accuracy")}
        metrics[name] = {"images": len(data[name]), "loss": loss, **scores, "commonest_class": baseline}
    best = trainer.state.best_model_checkpoint
    return {"best_update": int(best.rsplit("-", 1)[1]) if best else trainer.state.global_step, **metrics}


def save_model(output: Path, trainer: SegmentationTrainer, processor: SegformerImageProcessor) -> list[str]:
    """Write model and processor; returns the names of their files."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)

    return replace_files(output, write)


def save_results(
    output: Path,
    trainer: SegmentationTrainer,
    data: dict[str, SegmentationDataset],
    metrics: dict[str, Any],
    class_names: tuple[str, ...],
) -> list[str]:
    """Write what belongs to the result beside the model: metrics, log and pictures; returns the names of the files."""
    from green_swin_hf.segmentation_pictures import prediction_figure, segmentation_curve
    from green_swin_hf.visualization import save_figure

    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    measured = "test" if "test" in data else "validation"
    triples = predict(model, data[measured], NUM_PICTURES)

    def write(folder: Path) -> None:
        (folder / "metrics.json").write_text(json.dumps(metrics, indent=1))
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in trainer.state.log_history))
        baseline = metrics["validation"]["commonest_class"]["mean_iou"]
        save_figure(segmentation_curve(trainer.state.log_history, baseline=baseline), folder / "curve.png")
        save_figure(prediction_figure(triples, class_names), folder / "predictions.png")

    return [*replace_files(output, write), "recipe.yaml", RECORD_FILE]


def recorded_facts(
    recipe: SegmentationRecipe,
    trainer: SegmentationTrainer,
    data: dict[str, SegmentationDataset],
    metrics: dict[str, Any],
    class_names: tuple[str, ...],
) -> dict[str, Any]:
    """What a model card says of this run."""
    images_per_update = recipe.batch_size * recipe.gradient_accumulation_steps * trainer.args.world_size
    updates, model = trainer.state.global_step, trainer.accelerator.unwrap_model(trainer.model)
    counts: dict[str, Any] = {f"{name}_images": len(dataset) for name, dataset in data.items()}
    counts["classes"] = len(class_names)
    drawn = {"name": "shapes drawn on photographs", "on_hub": False, **counts}
    found = []
    for split, scores in ((name, metrics[name]) for name in ("validation", "test") if name in metrics):
        simple = {**scores["commonest_class"], "name": "the commonest class everywhere"}
        for kind, title in (("mean_iou", "Mean IoU"), ("pixel_accuracy", "Pixel accuracy")):
            baseline = {"baseline": simple[kind], "baseline_name": simple["name"]}
            found.append(metric(title, kind, scores[kind], split, scores["images"], **baseline))
    return {
        "data": describe_data(recipe.data, **counts) if recipe.data else drawn,
        "model": {"parameters": sum(parameter.numel() for parameter in model.parameters())},
        "training": {
            "updates": updates,
            "epochs": updates * images_per_update / len(data["train"]),
            "images_per_update": images_per_update,
            "learning_rate": recipe.learning_rate,
            "best_update": metrics["best_update"],
        },
        "metrics": measured(found),
    }


@torch.no_grad()
def predict(
    model: nn.Module, dataset: SegmentationDataset, count: int
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Image, truth and prediction of the first images, as they are evaluated."""
    device, triples = next(model.parameters()).device, []
    for index in range(min(count, len(dataset))):
        image, truth = dataset.read(index)
        logits = model(pixel_values=dataset[index]["pixel_values"][None].to(device)).logits
        triples.append((image, truth, enlarged_logits(logits, (truth.shape[0], truth.shape[1]))[0].argmax(0).cpu()))
    return triples


def print_heading(
    recipe: SegmentationRecipe,
    model: UperNetForSemanticSegmentation,
    data: dict[str, SegmentationDataset],
    class_names: tuple[str, ...],
    output: Path,
    options: TrainingArguments,
    checkpoint: Path | None,
) -> None:
    backbone = model.backbone.config
    millions = [sum(value.numel() for value in part.parameters()) / 1e6 for part in (model, model.backbone)]
    counts = ", ".join(f"{len(dataset):,} {name}" for name, dataset in data.items())
    images = recipe.batch_size * recipe.gradient_accumulation_steps * options.world_size
    precision = "bf16" if options.bf16 else "fp16" if options.fp16 else "fp32"
    start = f"from {recipe.init_from}" if recipe.init_from else "from scratch"
    lines = {
        "data": f"{recipe.data or 'drawn shapes'}: {counts} images, {len(class_names)} classes",
        "images": f"crops of {recipe.crop_size} px; whole images "
        + (f"with {recipe.short_side} px on the shorter side" if recipe.short_side else "at their own size"),
        "model": f"UperNet, {millions[0]:.1f} M parameters, {millions[1]:.1f} M of them the backbone {start}: "
        f"blocks {'-'.join(map(str, backbone.depths))}, width {backbone.embed_dim}, window {backbone.window_size}",
        "device": f"{options.device}, {precision}, {options.world_size} process{'es' * (options.world_size > 1)}",
        "updates": f"{recipe.max_steps:,} of {images} images; learning rate {recipe.learning_rate:.1e}",
        "output": str(output),
    }
    print("Fine-tuning for semantic segmentation")
    for name, text in lines.items():
        print(f"  {name:<9} {text}")
    if checkpoint:
        print(f"  {'going on':<9} from {checkpoint}")
    sys.stdout.flush()


def print_results(
    output: Path,
    names: list[str],
    metrics: dict[str, Any],
    class_names: tuple[str, ...],
    seconds: float,
    recipe: SegmentationRecipe,
) -> None:
    print(f"Done in {seconds / 60:.1f} minutes. Best weights: those of update {metrics['best_update']:,}.")
    for split in ("validation", "test"):
        if split not in metrics:
            continue
        scores, baseline = metrics[split], metrics[split]["commonest_class"]
        print(
            f"  {split} ({scores['images']:,} whole images): mean IoU {scores['mean_iou']:.3f} (the commonest class "
            f"everywhere: {baseline['mean_iou']:.3f}), pixel accuracy {scores['pixel_accuracy']:.3f} "
            f"({baseline['pixel_accuracy']:.3f})"
        )
    if not math.isfinite(metrics["validation"]["loss"]):
        print("The loss is not finite: this model is of no use; lower --learning-rate")
    last = "test" if "test" in metrics else "validation"
    by_class = [f"{name} {iou:.3f}" for name, iou in metrics[last]["class_iou"].items() if iou is not None]
    print(f"  IoU of classes ({last}): {', '.join(by_class[:20])}{', …' if len(by_class) > 20 else ''}")
    print(f"Wrote to {output}: {listed_files(names)}")
    image = Path(recipe.photographs or ".") / "coffee.png" if recipe.data is None else "IMAGE"
    print("Next, for example, the classes that it finds in an image:")
    print(
        f"""  python -c "import green_swin_hf; from transformers import pipeline; """
        f"""print([s['label'] for s in pipeline('image-segmentation', model='{output}')('{image}')])" """.rstrip()
    )


if __name__ == "__main__":
    sys.exit(main())
