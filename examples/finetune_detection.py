"""Fine-tune Mask R-CNN with a feature pyramid on a GreenSwin backbone, for boxes and masks of data in COCO's format.

    accelerate launch examples/finetune_detection.py              # shapes drawn on photographs, minutes on a bare CPU
    accelerate launch examples/finetune_detection.py --recipe examples/recipes/detection/coco_swin_base_window7.yaml \
        --init-from outputs/pretrain --train-annotations … --train-images … --validation-annotations …
    accelerate launch examples/finetune_detection.py --output-dir outputs/finetune_detection --resume auto

Every key of a recipe is a flag as well. Exit codes: 0 done, 1 failed while training, 2 wrong input, nothing written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from torch import Tensor
from torch.utils.data import Subset
from tqdm.auto import tqdm
from transformers import ViTImageProcessor

from green_swin_hf.bad_images import BadImageCount, TooManyBadImagesError
from green_swin_hf.checkpointing import (
    list_checkpoints,
    listed_files,
    prepare_checkpoints,
    random_state,
    read_trainer_state,
    read_training_state,
    replace_files,
    restore_random_state,
    save_checkpoint,
)
from green_swin_hf.coco_data import CocoImages, collate_detection, load_coco
from green_swin_hf.data import EpochSampler
from green_swin_hf.detection import GreenSwinMaskRCNN, load_detector, new_backbone, total_loss
from green_swin_hf.detection_metrics import Detections, coco_results, detect, mean_average_precision
from green_swin_hf.detection_recipe import DetectionRecipe
from green_swin_hf.drawn_shapes import SHAPE_NAMES, load_photographs, write_coco_shapes
from green_swin_hf.energy import add_energy_flag, check_energy
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.loader_watch import LoaderError, LoaderWatch
from green_swin_hf.numerics import loss_scale
from green_swin_hf.optimization import build_optimizer, step_schedule
from green_swin_hf.pretrained_start import load_backbone
from green_swin_hf.publish import publish_results
from green_swin_hf.recipe_files import save_recipe
from green_swin_hf.run_record import RECORD_FILE, RunRecord, describe_data, describe_start, measured, metric
from green_swin_hf.run_setup import (
    build_accelerator,
    check_changes,
    find_run,
    how_to_go_on,
    progress_bar,
    read_recipe,
    run_parser,
    set_up_process,
)
from green_swin_hf.stop_signals import StopSignals
from green_swin_hf.training import (
    DivergenceError,
    RunState,
    TrainingLog,
    UpdateBatches,
    check_tracker,
    count_updates,
    last_line,
    one_line_errors,
    report_skip,
    update_weights,
)

DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "detection" / "drawn_shapes_tiny.yaml"
DEFAULT_OUTPUT = Path("outputs/finetune_detection")


@dataclass
class Run:
    """What the steps of a run share."""

    recipe: DetectionRecipe
    output: Path
    accelerator: Accelerator
    model: Any
    optimizer: Any
    scheduler: Any
    state: RunState
    updates_per_epoch: int
    facts: dict[str, Any]  # of data and processes, which stay what they are when the run is gone on with
    validation: CocoImages
    log: TrainingLog | None = None  # of the main process only
    found: list[Detections] = field(default_factory=list)  # on the validation images, when last measured
    bad_images: BadImageCount = field(init=False)

    def __post_init__(self) -> None:
        images, share = self.updates_per_epoch * self.images_per_update, self.recipe.max_bad_share
        self.bad_images = BadImageCount(self.output, self.accelerator, self.state, images, share)

    @property
    def images_per_update(self) -> int:
        return self.recipe.batch_size * self.recipe.gradient_accumulation_steps * self.accelerator.num_processes

    @property
    def total_updates(self) -> int:
        return self.recipe.epochs * self.updates_per_epoch

    @property
    def epoch(self) -> float:
        return self.state.update / self.updates_per_epoch


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("finetune_detection.py"):
        arguments = parse_arguments(argv)
        output, checkpoint = find_run(arguments.output_dir, arguments.resume, DEFAULT_OUTPUT)
        resumed = read_trainer_state(checkpoint) if checkpoint else None
        before = DetectionRecipe().replace(**resumed["recipe"]) if resumed else None
        recipe = read_recipe(arguments, DetectionRecipe, output, DEFAULT_RECIPE, before)
        precision = set_up_process(recipe.precision, recipe.threads, resumed["threads"] if resumed else None)
        accelerator = build_accelerator(precision, arguments.report_to, output)
        data = open_data(recipe)  # None: shapes are to be drawn
        train, validation = data or (None, None)
        class_names = train.data.class_names if train else SHAPE_NAMES
        num_images = len(train) if train else recipe.drawn_images
        passes = recipe.gradient_accumulation_steps
        updates_per_epoch = count_updates(num_images, recipe.batch_size, passes, accelerator.num_processes)
        facts = {
            "class_names": list(class_names),
            "num_images": num_images,
            "num_processes": accelerator.num_processes,
            "data_fingerprint": train.data.fingerprint() if train else None,
        }
        if resumed:
            resumed.setdefault("data_fingerprint", facts["data_fingerprint"])  # of a run begun before it was kept
        check_changes(before, recipe, {name: (resumed[name], now) for name, now in facts.items()} if resumed else {})

        # Model, optimizer, schedule
        set_seed(recipe.seed)
        model = load_detector(checkpoint) if checkpoint else build_model(recipe, arguments.init_from, class_names)
        recipe = recipe.with_backbone(model.config) if arguments.init_from else recipe
        optimizer = build_optimizer(
            model,
            recipe.learning_rate,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            betas=recipe.betas,
        )
        milestones = [epoch * updates_per_epoch for epoch in recipe.milestones]
        scheduler = step_schedule(optimizer, recipe.warmup_updates, milestones)
        hub_id = open_hub(arguments, output)

    # Prepare. From here on files are written.
    with one_line_errors("finetune_detection.py"):
        state = RunState(**resumed["state"]) if resumed else RunState()
        log = open_output(recipe, output, accelerator, state, arguments.report_to)
        record = RunRecord(
            output, "detection", "finetune_detection.py", is_resumed=checkpoint is not None, device=accelerator.device,
            precision=accelerator.mixed_precision, track_energy=arguments.track_energy,
        )  # fmt: skip
        if not checkpoint:
            record.note(start_from=describe_start(arguments.init_from))
        if train is None or validation is None:
            train, validation = draw_data(recipe, output, accelerator)
    model, optimizer = accelerator.prepare(model, optimizer)
    run = Run(
        recipe, output, accelerator, model, optimizer, scheduler, state, updates_per_epoch, facts, validation, log
    )
    set_seed(recipe.seed + 1 + accelerator.process_index)  # sizes and sampled regions differ between processes
    if checkpoint:
        restore(run, checkpoint)
    watch = build_loader(run, train)
    print_heading(run, train, arguments.init_from, checkpoint)
    progress = progress_bar(run.total_updates, state.update, shown=accelerator.is_main_process)

    # Train
    try:
        with StopSignals() as signals:
            with watch.explained():
                train_epochs(run, iter(watch), progress, arguments.stop_after, signals)
            progress.close()

            # Leave the results
            if state.update < run.total_updates:
                record.stop()
                return stopped_early(run, signals)
            written = save_results(run)
            record.stop(**recorded_facts(run, len(train)))
    except (DivergenceError, LoaderError, TooManyBadImagesError, ValueError, OSError) as error:
        # ValueError: an image that cannot be read; OSError: the disk is full
        progress.close()
        record.stop()
        is_own = not isinstance(error, DivergenceError | TooManyBadImagesError)  # these all processes have
        return fail(accelerator, f"stopped: {last_line(error)}; {after_failure(output)}", by_all=is_own)
    print_results(run, written, time.monotonic() - started)
    uploaded = (
        not hub_id
        or not accelerator.is_main_process
        or publish_results("finetune_detection.py", output, hub_id, public=arguments.hub_public)
    )
    accelerator.end_training()
    return 0 if uploaded else 1


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = run_parser(__doc__, DetectionRecipe, DEFAULT_RECIPE, DEFAULT_OUTPUT, stop_unit="epochs")
    parser.add_argument(
        "--init-from", metavar="MODEL", help="backbone: a pretrained folder or a stock Swin, or its name on the Hub"
    )
    add_hub_flags(parser)
    add_energy_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.init_from:
        raise ValueError("--resume goes on with a run, --init-from starts another one: give one of them")
    check_tracker(arguments.report_to)
    check_energy(arguments.track_energy)
    return arguments


# Model


def build_model(recipe: DetectionRecipe, init_from: str | None, class_names: tuple[str, ...]) -> GreenSwinMaskRCNN:
    """A detector with new heads, its backbone from a folder or from scratch."""
    if init_from is None:
        return GreenSwinMaskRCNN(new_backbone(recipe.model_config()), recipe.detector_settings(class_names))
    backbone = load_backbone(init_from, drop_path_rate=recipe.drop_path_rate)
    channels = backbone.config.num_channels
    if channels != recipe.num_channels:
        raise ValueError(f"--init-from {init_from} takes {channels} channels; give --num-channels {channels}")
    return GreenSwinMaskRCNN(backbone, recipe.detector_settings(class_names, *pixel_statistics(init_from)))


def pixel_statistics(folder: str) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and standard deviation that the images of a folder's model were normalised with, where it says so."""
    try:
        processor = ViTImageProcessor.from_pretrained(folder)
    except Exception:  # no file of that name: as a Hub's or a folder's reader has it
        return None, None
    return tuple(processor.image_mean), tuple(processor.image_std)


# Data


def open_data(recipe: DetectionRecipe) -> tuple[CocoImages, CocoImages] | None:
    """Images to train on and images to measure on; None where shapes are to be drawn on photographs."""
    if recipe.train_annotations is None:
        if recipe.photographs is None:
            raise ValueError("no data given; name a COCO-format file with --train-annotations")
        load_photographs(recipe.photographs)  # raises where there are none
        return None
    if recipe.validation_annotations is None:
        raise ValueError("no images to measure on; name their COCO-format file with --validation-annotations")
    return read_data(recipe, Path(recipe.train_annotations), Path(recipe.validation_annotations))


def draw_data(recipe: DetectionRecipe, output: Path, accelerator: Accelerator) -> tuple[CocoImages, CocoImages]:
    """The same, drawn into the output folder unless a run before has."""
    folders = [output / "drawn_shapes" / name for name in ("train", "validation")]
    if accelerator.is_main_process:
        photographs = load_photographs(cast(str, recipe.photographs))
        sides, radii = cast(tuple[int, int], recipe.drawn_sides), recipe.drawn_radii
        counts = (recipe.drawn_images, recipe.drawn_validation_images)
        for number, (folder, count) in enumerate(zip(folders, counts, strict=True)):
            if not (folder / "annotations.json").is_file():
                seed, most = 2 * recipe.seed + number, recipe.drawn_shapes
                write_coco_shapes(folder, photographs, count, seed, sides=sides, max_shapes=most, radii=radii)
    accelerator.wait_for_everyone()
    return read_data(recipe, *(folder / "annotations.json" for folder in folders))


def read_data(recipe: DetectionRecipe, train: Path, validation: Path) -> tuple[CocoImages, CocoImages]:
    training_data = load_coco(train, recipe.train_images)
    validation_data = load_coco(validation, recipe.validation_images, class_names=training_data.class_names)
    mode: Any = "L" if recipe.num_channels == 1 else "RGB"
    images = CocoImages(training_data.for_training(recipe.skip_empty), mode=mode, seed=recipe.seed, training=True)
    held_out = CocoImages(validation_data, mode=mode)
    if all(o.get("iscrowd") for objects in validation_data.objects for o in objects):
        raise ValueError(f"{validation} annotates no objects to measure on; give a file with some that are no crowds")
    held_out.check_files()  # what cannot be measured on is better known before training
    return images, held_out


def build_loader(run: Run, images: CocoImages) -> LoaderWatch:
    """Batches of this process from the next update to the end of the run; watched."""
    recipe, accelerator = run.recipe, run.accelerator
    batches = UpdateBatches(
        EpochSampler(cast(Any, images), seed=recipe.seed),
        recipe.batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        first_update=run.state.update,
        total_updates=run.total_updates,
    )
    generator = torch.Generator()  # the loader draws from it instead of from the run's random state
    return LoaderWatch(
        images, num_workers=recipe.workers, timeout=recipe.worker_timeout, batch_sampler=batches,
        collate_fn=collate_detection, generator=generator,
    )  # fmt: skip


# Training


def train_epochs(
    run: Run, batches: Iterator[dict[str, Any]], progress: tqdm, stop_after: int | None, signals: StopSignals
) -> None:
    """Do the epochs of this start of the run: to its end, to where it was asked to stop, or until a signal comes."""
    recipe, (first, within) = run.recipe, divmod(run.state.update, run.updates_per_epoch)
    if not within and is_measured(recipe, first):  # before training, or what the log lost when it was cut for resuming
        measure(run)
    for epoch in range(first + 1, min(recipe.epochs, first + (stop_after or recipe.epochs)) + 1):
        if not train_epoch(run, batches, progress, signals):
            if run.state.update % run.updates_per_epoch:  # else it was saved
                save(run)
            return
        save(run)  # first: an image that cannot be read ends the measurement
        if is_measured(recipe, epoch):
            measure(run)


def is_measured(recipe: DetectionRecipe, epoch: int) -> bool:
    """Whether the model after so many epochs is measured."""
    return epoch == recipe.epochs or (recipe.validate_every > 0 and epoch % recipe.validate_every == 0)


def train_epoch(run: Run, batches: Iterator[dict[str, Any]], progress: tqdm, signals: StopSignals) -> bool:
    """Do the rest of an epoch; whether that was possible: a signal ends it."""
    recipe, accelerator, state = run.recipe, run.accelerator, run.state
    run.model.train()
    sums: dict[str, Any] = {}
    since, count = time.monotonic(), 0
    done = state.update % run.updates_per_epoch
    for number in range(done + 1, run.updates_per_epoch + 1):
        if signals.agreed(accelerator.state):
            return False
        losses, bad_images = forward_backward(run, batches)
        learning_rate = run.optimizer.param_groups[0]["lr"]
        _, finite = update_weights(accelerator, run.model, run.optimizer, recipe.max_grad_norm)
        run.scheduler.step()
        state.record_update(finite, recipe.stop_after_skipped, scale=loss_scale(accelerator.scaler))
        run.bad_images.add(bad_images)
        report_skip(accelerator, state.update, finite)
        sums = {name: sums.get(name, 0) + value for name, value in losses.items()}
        count += 1
        if number == run.updates_per_epoch or state.update % recipe.log_every == 0:
            speed = count * run.images_per_update / (time.monotonic() - since)
            log_update(run, progress, {name: value / count for name, value in sums.items()}, learning_rate, speed)
            check_bad_images(run, number == run.updates_per_epoch)
            since, sums, count = time.monotonic(), {}, 0
        progress.update()
    return True


def forward_backward(run: Run, batches: Iterator[dict[str, Any]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Gradients of one update; returns its mean losses on this process, and what of its batches cannot be decoded."""
    accelerator, passes = run.accelerator, run.recipe.gradient_accumulation_steps
    means: dict[str, Any] = {}
    bad_images: list[dict[str, Any]] = []
    for index in range(passes):
        batch = next(batches)
        bad_images.append({name: batch[name] for name in ("skipped", "num_bad")})
        images, targets = send_to_device((batch["images"], batch["targets"]), accelerator.device)
        with contextlib.nullcontext() if index == passes - 1 else accelerator.no_sync(run.model):
            losses = run.model(images, targets)
            loss = total_loss(losses) / passes
            accelerator.backward(loss)
        means = {name: means.get(name, 0) + value.detach() / passes for name, value in losses.items()}
    return means, bad_images


def check_bad_images(run: Run, ends_epoch: bool) -> None:
    """Stop, with a checkpoint, when too many images of the epoch are bad; note their number at its end."""
    entry = {"step": run.state.update, "epoch": run.epoch}
    too_many = run.bad_images.check(f"epoch {math.ceil(run.epoch)}", run.log, entry, ends_epoch=ends_epoch)
    if too_many:
        save(run)
        raise too_many


def log_update(run: Run, progress: tqdm, losses: dict[str, Tensor], learning_rate: float, speed: float) -> None:
    """One line of the log: the losses as means since the line before."""
    means = {name: run.accelerator.reduce(value, "mean").item() for name, value in losses.items()}
    entry = {
        "step": run.state.update,
        "epoch": run.epoch,
        "loss": sum(means.values()),
        **means,
        "learning_rate": learning_rate,
        "images_per_second": round(speed, 1),
        "skipped_updates": run.state.skipped_updates,
    }
    if run.log:
        run.log.write(entry)
    run.accelerator.log({k: v for k, v in entry.items() if k != "step"}, step=run.state.update)
    progress.set_postfix({"loss": f"{entry['loss']:.3f}", "images/s": f"{speed:,.1f}"}, refresh=False)


class NamedSubset(Subset[Any]):
    """Some images of a data set, which a watched loader can name."""

    def describe(self, key: int) -> str:
        images: CocoImages = self.dataset  # type: ignore[assignment]
        return images.image_name(self.indices[key])


def measure(run: Run) -> None:
    """Detect on the validation images, each process on its share, and log COCO's figures."""
    accelerator, images, recipe = run.accelerator, run.validation, run.recipe
    share = NamedSubset(images, range(accelerator.process_index, len(images), accelerator.num_processes))
    watch = LoaderWatch(
        share, num_workers=recipe.workers, timeout=recipe.worker_timeout, batch_size=recipe.batch_size,
        collate_fn=collate_detection, generator=torch.Generator(),
    )  # fmt: skip
    with watch.explained():
        found = detect(accelerator.unwrap_model(run.model), watch, accelerator.device)
    run.found = sorted(gather_object(found), key=lambda detections: detections.index)
    if run.log:
        figures = mean_average_precision(images, run.found)
        run.log.write({"step": run.state.update, "epoch": run.epoch, **figures})
        accelerator.log(figures, step=run.state.update)
    accelerator.wait_for_everyone()


def save(run: Run) -> None:
    """Write a checkpoint from which the run goes on exactly."""
    accelerator, state = run.accelerator, run.state
    random_states = gather_object([random_state()])
    weights = accelerator.get_state_dict(run.model)
    bad_in_run, bad_in_epoch = run.bad_images.totals()
    if run.log:
        scaler = accelerator.scaler
        training_state = {
            "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "random_states": random_states,
        }
        totals = {"skipped_images": bad_in_run, "bad_in_epoch": bad_in_epoch, "log_position": run.log.position()}
        trainer_state = {
            "state": {**dataclasses.asdict(state), **totals},
            "epoch": run.epoch,
            **run.facts,
            "threads": torch.get_num_threads(),
            "recipe": run.recipe.to_dict(),
        }
        save_checkpoint(
            run.output / "checkpoints",
            state.update,
            save_model=functools.partial(accelerator.unwrap_model(run.model).save_pretrained, state_dict=weights),
            training_state=training_state,
            trainer_state=trainer_state,
            keep=run.recipe.keep_checkpoints,
        )
    accelerator.wait_for_everyone()


def restore(run: Run, checkpoint: Path) -> None:
    """All but the weights, which the model was loaded with."""
    saved = read_training_state(checkpoint)
    run.optimizer.load_state_dict(saved["optimizer"])
    run.scheduler.load_state_dict(saved["scheduler"])
    if run.accelerator.scaler and saved["scaler"]:
        run.accelerator.scaler.load_state_dict(saved["scaler"])
    restore_random_state(saved["random_states"][run.accelerator.process_index])
    if not run.accelerator.is_main_process:
        run.state.skipped_images = run.state.bad_in_epoch = 0  # the saved numbers are those of all processes


def open_output(
    recipe: DetectionRecipe, output: Path, accelerator: Accelerator, state: RunState, report_to: str
) -> TrainingLog | None:
    """Make the output folder with the resolved recipe and the log; checkpoints of later updates are set aside."""
    log = None
    if accelerator.is_main_process:
        output.mkdir(parents=True, exist_ok=True)
        for path in prepare_checkpoints(output / "checkpoints", state.update):
            print(f"Kept as {path}: it is of a later update than this run goes on from")
        save_recipe(recipe, output / "recipe.yaml")
        log = TrainingLog(output / "log.jsonl", state.log_position)
    if report_to != "none":
        settings = {name: str(value) for name, value in recipe.to_dict().items()}
        accelerator.init_trackers("green-swin-detection", settings)
    return log


# Results


def save_results(run: Run) -> list[str]:
    """Write model, detections and pictures; returns the names of all files that belong to the result."""
    weights = run.accelerator.get_state_dict(run.model)
    names: list[str] = []
    if run.log:
        from green_swin_hf.detection_figures import detection_figure, training_figure
        from green_swin_hf.visualization import save_figure

        def write(folder: Path) -> None:
            run.accelerator.unwrap_model(run.model).save_pretrained(folder, state_dict=weights)
            (folder / "detections.json").write_text(json.dumps(coco_results(run.validation.data, run.found)))

        names = replace_files(run.output, write)
        save_figure(detection_figure(run.validation, run.found[: run.recipe.pictures]), run.output / "detections.png")
        save_figure(training_figure(run.log.entries()), run.output / "training_curves.png")
        names += ["detections.png", "training_curves.png", "log.jsonl", "recipe.yaml", RECORD_FILE]
    run.accelerator.wait_for_everyone()
    return sorted(names)


def recorded_facts(run: Run, train_images: int) -> dict[str, Any]:
    """What a model card says of this run."""
    recipe, images, names = run.recipe, len(run.validation), run.validation.data.class_names
    given = {"train_images": train_images, "validation_images": images, "classes": len(names)}
    drawn = {"name": "shapes drawn on photographs", "on_hub": False, **given}
    last = [entry for entry in run.log.entries() if "box_map" in entry][-1] if run.log else {}
    titles = {
        "box_map": "Box mAP (COCO, IoU 0.50 to 0.95)",
        "box_map_50": "Box mAP at IoU 0.50",
        "mask_map": "Mask mAP (COCO, IoU 0.50 to 0.95)",
        "mask_map_50": "Mask mAP at IoU 0.50",
    }
    metrics = [metric(title, name, last.get(name), "validation", images) for name, title in titles.items()]
    return {
        "data": describe_data(recipe.train_annotations, **given) if recipe.train_annotations else drawn,
        "model": {"parameters": sum(parameter.numel() for parameter in run.model.parameters())},
        "training": {
            "updates": run.state.update,
            "epochs": run.epoch,
            "images_per_update": run.images_per_update,
            "learning_rate": recipe.learning_rate,
        },
        "metrics": measured(metrics),
    }


# Messages


def print_heading(run: Run, train: CocoImages, init_from: str | None, checkpoint: Path | None) -> None:
    recipe, accelerator = run.recipe, run.accelerator
    model = accelerator.unwrap_model(run.model)
    settings, config = model.settings, model.config
    parameters = sum(parameter.numel() for parameter in model.parameters())
    sides = settings.short_sides
    short = f"{min(sides)} to {max(sides)}" if len(sides) > 1 else str(sides[0])
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    threads, processes = torch.get_num_threads(), accelerator.num_processes
    lines = {
        "data": f"{len(train):,} images, {train.data.num_objects:,} objects of {len(train.data.class_names)} classes "
        f"from {train.data.path}",
        "measured on": f"{len(run.validation):,} images of {run.validation.data.path}",
        "sizes": f"short side {short} px in training, {sides[-1]} px else, long side at most {settings.long_side} px",
        "model": f"Mask R-CNN with FPN, {parameters / 1e6:.1f} M parameters; backbone: patch {config.patch_length}, "
        f"window {config.window_size}, blocks {'-'.join(map(str, config.depths))}, width {config.embed_dim} to "
        f"{config.hidden_size}, {f'weights of {init_from}' if init_from else 'new weights'}",
        "device": f"{accelerator.device}, {precision}, {processes} process{'es' * (processes > 1)}, {threads} "
        f"thread{'s' * (threads > 1)}",
        "updates": f"{run.total_updates:,} ({recipe.epochs} epochs) of {run.images_per_update} images; learning rate "
        f"{recipe.learning_rate:.1e} after {recipe.warmup_updates}, a tenth after epochs "
        f"{', '.join(map(str, recipe.milestones))}",
        "output": str(run.output),
    }
    if checkpoint:
        lines["going on"] = f"after epoch {run.epoch:g} from {checkpoint}"
    accelerator.print("Fine-tuning a detector")
    for name, text in lines.items():
        accelerator.print(f"  {name:<12} {text}")
    sys.stdout.flush()


def print_results(run: Run, written: list[str], seconds: float) -> None:
    if run.log is None:
        return
    measured = [entry for entry in run.log.entries() if "box_map" in entry]
    first, last = measured[0], measured[-1]
    before = f" (before training {first['box_map']:.3f})" if first["step"] == 0 else ""
    masks_before = f" (before training {first['mask_map']:.3f})" if first["step"] == 0 else ""
    print(f"Done in {seconds / 60:.1f} minutes.")
    print(f"On {len(run.validation):,} held-out images, mean average precision (COCO, IoU 0.50 to 0.95):")
    print(f"  boxes {last['box_map']:.3f}{before}, at IoU 0.50 {last['box_map_50']:.3f}, 0.75 {last['box_map_75']:.3f}")
    text = (
        f"{last['mask_map']:.3f}{masks_before}, at IoU 0.50 {last['mask_map_50']:.3f}, 0.75 {last['mask_map_75']:.3f}"
    )
    print(f"  masks {text}")
    print(f"Wrote to {run.output}: {listed_files(written)}")
    image = run.validation.data.image_folder / run.validation.data.images[0]["file_name"]
    print("Next, for example, what it finds on an image:")
    mode = {"L": "GRAY"}.get(run.validation.mode, run.validation.mode)
    print(
        f"""  python -c "import torch; from torchvision.io import decode_image; """
        f"""from green_swin_hf.detection import load_detector; torch.set_grad_enabled(False); """
        f"""model = load_detector('{run.output}'); found = model([decode_image('{image}', mode='{mode}') / 255])[0]; """
        f"""print([model.settings.class_names[label - 1] for label in found['labels'][:3]], """
        """found['boxes'][:3])" """.rstrip()
    )


def stopped_early(run: Run, signals: StopSignals) -> int:
    reason = f"on {signals.received}" if signals.received else "as asked"
    run.accelerator.print(
        f"Stopped after epoch {run.epoch:.4g} of {run.recipe.epochs} {reason}. Go on with: "
        f"{how_to_go_on(run.output, run.accelerator.num_processes)}"
    )
    run.accelerator.end_training()
    return 0


def after_failure(output: Path) -> str:
    """What is there to go on with when a run ends before its end."""
    if list_checkpoints(output / "checkpoints"):
        return f"whole checkpoints are in {output / 'checkpoints'}"
    return "it has no checkpoint yet: one is written after each epoch"


def fail(accelerator: Accelerator, message: str, by_all: bool = False) -> int:
    if by_all or accelerator.is_main_process:
        print(f"finetune_detection.py: {message}", file=sys.stderr)
    accelerator.end_training()
    return 1


if __name__ == "__main__":
    sys.exit(main())
