"""Pretrain GreenSwin by masked image modeling.

    accelerate launch examples/pretrain.py                     # embedded data, minutes on a bare CPU
    accelerate launch examples/pretrain.py --recipe examples/recipes/pretraining/swin_base_window7.yaml --data my/images
    accelerate launch examples/pretrain.py --output-dir outputs/pretrain --resume auto

Every key of a recipe is a flag as well. Exit codes: 0 done, 1 failed while training (too many bad images and a worker
of the loader that died or hung are such failures), 2 wrong input, nothing written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device, set_seed
from tqdm.auto import tqdm
from transformers import ViTImageProcessor

from green_swin_hf import GreenSwinConfig, GreenSwinForMaskedImageModeling, SparseGeometry
from green_swin_hf.bad_images import BadImageCount, TooManyBadImagesError
from green_swin_hf.checkpointing import (
    listed_files,
    load_weights,
    prepare_checkpoints,
    random_state,
    read_trainer_state,
    read_training_state,
    replace_files,
    restore_random_state,
    save_checkpoint,
)
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.data import (
    EpochSampler,
    EvaluationTransform,
    ImageSource,
    MaskedImageCollator,
    PretrainingImages,
    PretrainingTransform,
    StreamingPretrainingImages,
    load_images,
    mask_unit_multiple,
)
from green_swin_hf.energy import add_energy_flag, check_energy
from green_swin_hf.feature_probes import Accuracy
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.image_decoding import BrokenDataError
from green_swin_hf.image_processing_green_swin import GreenSwinImageProcessor
from green_swin_hf.loader_watch import LoaderError, LoaderWatch
from green_swin_hf.lost_process import end_without_peers, is_lost_peer
from green_swin_hf.numerics import loss_scale
from green_swin_hf.online_probe import OnlineProbe, open_probe
from green_swin_hf.optimization import build_optimizer, cosine_schedule, scaled_learning_rate, set_schedule
from green_swin_hf.pretrained_start import load_for_continued_training
from green_swin_hf.pretraining_recipe import PretrainingRecipe
from green_swin_hf.publish import publish_results
from green_swin_hf.recipe_files import save_recipe
from green_swin_hf.run_record import RECORD_FILE, RunRecord, describe_data, describe_start, measured, metric
from green_swin_hf.run_setup import (
    RECIPE_FILE,
    build_accelerator,
    check_changes,
    find_run,
    how_to_go_on,
    positive_count,
    process_state,
    progress_bar,
    read_recipe,
    run_parser,
    set_up_process,
)
from green_swin_hf.sharding import load_optimizer_state, optimizer_state, whole_model
from green_swin_hf.sparse_plan import num_masked_units
from green_swin_hf.stop_signals import StopSignals
from green_swin_hf.training import (
    DivergenceError,
    RunState,
    TrainingLog,
    UpdateBatches,
    check_tracker,
    count_updates,
    fixed_batches,
    held_out_loss,
    hold_out,
    last_line,
    mean_prediction_loss,
    model_inputs,
    one_line_errors,
    report_skip,
    update_weights,
)

DEFAULT_RECIPE = Path(__file__).resolve().parent / "recipes" / "pretraining" / "fashion_mnist_tiny.yaml"
DEFAULT_OUTPUT = Path("outputs/pretrain")
NUM_PICTURES = 12
STREAM_COUNT = 10_000  # images of a stream that count as an epoch where bad ones are counted


@dataclass
class Run:
    """What the steps of a run share."""

    recipe: PretrainingRecipe
    output: Path
    accelerator: Accelerator
    processor: ViTImageProcessor
    model: Any
    optimizer: Any
    scheduler: Any
    state: RunState
    images_per_update: int
    updates_per_epoch: int | None
    total_updates: int
    num_images: int | None
    data_fingerprint: str | None
    fixed_batches: list[dict[str, Any]]
    reference_loss: float | None
    has_held_out: bool
    online_probe: OnlineProbe | None = None
    log: TrainingLog | None = None  # of the main process only
    final_loss: float | None = None
    probed: Accuracy | None = None
    bad_images: BadImageCount = field(init=False)
    saved_update: int | None = None  # of the newest checkpoint

    def __post_init__(self) -> None:
        images, share = self.counted_updates * self.images_per_update, self.recipe.max_bad_share
        self.bad_images = BadImageCount(self.output, self.accelerator, self.state, images, share)

    @property
    def epoch(self) -> float | None:
        return self.state.update / self.updates_per_epoch if self.updates_per_epoch else None

    @property
    def counted_updates(self) -> int:
        """Updates over which bad images are counted: those of an epoch, or of so many images of a stream."""
        return self.updates_per_epoch or math.ceil(STREAM_COUNT / self.images_per_update)


def main(argv: list[str] | None = None) -> int:
    started = time.monotonic()
    # All that can be wrong with the input shows in this block, before anything is written.
    with one_line_errors("pretrain.py"):
        arguments = parse_arguments(argv)
        process_state(arguments.peer_timeout)
        output, checkpoint = find_run(arguments.output_dir, arguments.resume, DEFAULT_OUTPUT)
        resumed = read_trainer_state(checkpoint) if checkpoint else None
        before = PretrainingRecipe().replace(**resumed["recipe"]) if resumed else None
        recipe = read_recipe(arguments, PretrainingRecipe, output, DEFAULT_RECIPE, before)
        if not recipe.data:
            raise ValueError("no data given; name a folder of images or a data set with --data")
        config = recipe.model_config()
        precision = set_up_process(recipe.precision, recipe.threads, resumed["threads"] if resumed else None)
        accelerator = build_accelerator(precision, arguments.report_to, output)

        # Data: images to train on, and batches with fixed masks to measure on
        source, held_out = open_data(recipe)
        transform, unchanged = build_transforms(recipe, config)
        collator = build_collator(recipe, config)
        fixed = fixed_batches(
            held_out or source,
            unchanged,
            collator,
            count=recipe.validation_images,
            batch_size=64,
            seed=recipe.seed,
        )
        online_probe = open_probe(recipe, unchanged)
        images_per_update = recipe.batch_size * accelerator.num_processes * recipe.gradient_accumulation_steps
        updates_per_epoch, total_updates = count_run(recipe, source, accelerator.num_processes)
        now = {
            "num_processes": accelerator.num_processes,
            "num_images": source.num_images,
            "data_fingerprint": source.fingerprint(),
        }
        facts = {name: (resumed.get(name, value), value) for name, value in now.items()} if resumed else {}
        changes = check_changes(before, recipe, facts, allowed=arguments.override)

        # Model, optimizer, schedule
        set_seed(recipe.seed)
        if arguments.init_from:
            model = load_for_continued_training(arguments.init_from, config)
        else:
            model = GreenSwinForMaskedImageModeling(config)
        if checkpoint:
            load_weights(model, checkpoint)
        peak = scaled_learning_rate(recipe.learning_rate, images_per_update)
        optimizer = build_optimizer(model, peak, weight_decay=recipe.weight_decay, betas=recipe.betas)
        warmup = count_warmup(recipe, updates_per_epoch, total_updates)
        scheduler = cosine_schedule(optimizer, warmup, total_updates, recipe.min_lr_ratio)
        hub_id = open_hub(arguments, output)

    # Prepare. From here on files are written.
    model, optimizer = accelerator.prepare(model, optimizer)
    state = RunState(**resumed["state"]) if resumed else RunState()
    reference = mean_prediction_loss(fixed, config.mask_unit_size, config.norm_pix_loss) if fixed else None
    run = Run(
        recipe, output, accelerator, build_processor(recipe, config), model, optimizer, scheduler, state,
        images_per_update, updates_per_epoch, total_updates, source.num_images, now["data_fingerprint"], fixed,
        reference, held_out is not None, online_probe,
    )  # fmt: skip
    set_seed(recipe.seed + 1 + accelerator.process_index)  # stochastic depth differs between processes
    if checkpoint:
        restore(run, checkpoint)
        run.saved_update = state.update
    with one_line_errors("pretrain.py"):
        open_output(run, arguments.report_to)
        record = RunRecord(
            output, "pretraining", "pretrain.py", is_resumed=checkpoint is not None, device=accelerator.device,
            precision=accelerator.mixed_precision, track_energy=arguments.track_energy,
        )  # fmt: skip
        if not checkpoint:
            record.note(start_from=describe_start(arguments.init_from))
        note_changes(run, record, changes)
    watch = build_loader(run, source, transform, collator)
    print_heading(run, config, source, peak, warmup, checkpoint)
    progress = progress_bar(total_updates, state.update, shown=accelerator.is_main_process)

    # Train
    model.train()
    try:
        with StopSignals() as signals:
            with watch.explained():
                train(run, watch, progress, arguments.stop_after, signals)
            progress.close()

            # Leave the results
            if state.update < total_updates:
                record.stop()
                return stopped_early(run, signals)
            written = save_results(run, config)
            record.stop(**recorded_facts(run, peak))
    except (LoaderError, BrokenDataError, TooManyBadImagesError) as error:
        progress.close()
        record.stop()
        is_common = isinstance(error, TooManyBadImagesError)  # the others are of this process alone
        return fail(accelerator, f"stopped: {last_line(error)}; {after_failure(run)}", by_all=not is_common)
    except (DivergenceError, OSError) as error:  # OSError: the disk is full or gone
        progress.close()
        record.stop()
        whole = f"whole checkpoints are in {output / 'checkpoints'}"  # going on exactly would diverge again
        left = after_failure(run) if isinstance(error, OSError) else whole
        message = f"stopped: {last_line(error)}; {left}"
        return fail(accelerator, message, by_all=isinstance(error, OSError))
    except RuntimeError as error:
        if not is_lost_peer(error, accelerator):
            raise
        progress.close()
        end_without_peers(
            f"pretrain.py: process {accelerator.process_index} stopped: another process of the run is gone or does not "
            f"answer ({last_line(error)}). Go on with: {how_to_go_on(output, accelerator.num_processes)}"
        )
    print_results(run, config, written, time.monotonic() - started)
    uploaded = (
        not hub_id
        or not accelerator.is_main_process
        or publish_results("pretrain.py", output, hub_id, public=arguments.hub_public)
    )
    accelerator.end_training()
    return 0 if uploaded else 1


# Settings


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = run_parser(__doc__, PretrainingRecipe, DEFAULT_RECIPE, DEFAULT_OUTPUT, stop_unit="updates")
    parser.add_argument("--init-from", metavar="FOLDER", help="start a new run from these weights (also stock Swin)")
    parser.add_argument("--override", action="store_true", help="let --resume go on with other settings, and note them")
    parser.add_argument(
        "--peer-timeout", type=positive_count, default=600, metavar="SECONDS",
        help="how long processes wait for one that does not answer (default: 600)",
    )  # fmt: skip
    add_hub_flags(parser)
    add_energy_flag(parser)
    arguments = parser.parse_args(argv)
    if arguments.resume and arguments.init_from:
        raise ValueError("--resume goes on with a run, --init-from starts another one: give one of them")
    if arguments.override and not arguments.resume:
        raise ValueError("--override is for a run that goes on; give --resume as well, or leave it out")
    check_tracker(arguments.report_to)
    check_energy(arguments.track_energy)
    return arguments


def count_run(recipe: PretrainingRecipe, source: ImageSource, num_processes: int) -> tuple[int | None, int]:
    """Updates of an epoch (None: not known of a stream) and of the run."""
    if source.num_images is None:
        if recipe.max_steps is None:
            raise ValueError("a streamed data set has no known end; give --max-steps")
        return None, recipe.max_steps
    accumulation = recipe.gradient_accumulation_steps
    updates_per_epoch = count_updates(source.num_images, recipe.batch_size, accumulation, num_processes)
    return updates_per_epoch, recipe.max_steps or max(1, round(recipe.epochs * updates_per_epoch))


def count_warmup(recipe: PretrainingRecipe, updates_per_epoch: int | None, total_updates: int) -> int:
    """Updates of warm-up; its share of the run where an epoch has no known length or --max-steps ends before it."""
    share = round(total_updates * recipe.warmup_epochs / recipe.epochs)
    warmup = round(recipe.warmup_epochs * updates_per_epoch) if updates_per_epoch else share
    return warmup if warmup < total_updates else share


# Data


def open_data(recipe: PretrainingRecipe) -> tuple[ImageSource, ImageSource | None]:
    """Images to train on and images to measure on (None: none can be spared)."""
    open_split = functools.partial(
        load_images,
        recipe.data,
        streaming=recipe.streaming,
        image_column=recipe.image_column,
        subset=recipe.subset,
    )
    source = open_split(split=recipe.split)
    if recipe.validation_images == 0:
        return source, None
    if recipe.validation_split:
        return source, open_split(split=recipe.validation_split)
    return (source, None) if recipe.streaming else hold_out(source, recipe.validation_images, recipe.seed)


def build_transforms(
    recipe: PretrainingRecipe, config: GreenSwinConfig
) -> tuple[PretrainingTransform, EvaluationTransform]:
    size = as_pair(config.image_size)
    shared: dict[str, Any] = {
        "num_channels": recipe.num_channels,
        "pad": recipe.pad,
        "mean": recipe.pixel_mean,
        "std": recipe.pixel_std,
    }
    crop: dict[str, Any] = {"crop_scale": recipe.crop_scale, "crop_ratio": recipe.crop_ratio}
    training = PretrainingTransform(size, flip=0.5 if recipe.flip else 0.0, **crop, **shared)
    return training, EvaluationTransform(size, **shared)


def build_collator(recipe: PretrainingRecipe, config: GreenSwinConfig) -> MaskedImageCollator:
    multiple = mask_unit_multiple(recipe.mask_unit_size or config.mask_unit_size, config.mask_unit_size)
    geometry = SparseGeometry.from_config(config)
    sharing = cast("Literal['image', 'batch']", recipe.mask_sharing)
    return MaskedImageCollator(geometry, recipe.mask_ratio, sharing, unit_multiple=multiple)


def build_loader(
    run: Run, source: ImageSource, transform: PretrainingTransform, collator: MaskedImageCollator
) -> LoaderWatch:
    """Batches of this process from the next update to the end of the run, masks and plans included; watched."""
    recipe, accelerator = run.recipe, run.accelerator
    shared: dict[str, Any] = {
        "collate_fn": collator,
        "pin_memory": accelerator.device.type == "cuda",
        "generator": torch.Generator(),  # the loader draws from it instead of from the run's random state
        "timeout": recipe.worker_timeout,
    }
    place = {"num_processes": accelerator.num_processes, "process_index": accelerator.process_index}
    if source.num_images is None:
        # Going on with a stream does not repeat it exactly: it starts over in an order of its own.
        rank, world_size, epoch = *reversed(place.values()), run.state.update
        stream = StreamingPretrainingImages(
            source, transform, seed=recipe.seed, rank=rank, world_size=world_size, epoch=epoch
        )
        workers = min(recipe.workers, stream.num_shards)
        return LoaderWatch(stream, batch_size=recipe.batch_size, num_workers=workers, **shared)
    images = PretrainingImages(source, transform, seed=recipe.seed)
    batches = UpdateBatches(
        EpochSampler(images, seed=recipe.seed),
        recipe.batch_size,
        accumulation=recipe.gradient_accumulation_steps,
        first_update=run.state.update,
        total_updates=run.total_updates,
        **place,
    )
    return LoaderWatch(images, batch_sampler=batches, num_workers=recipe.workers, **shared)


def build_processor(recipe: PretrainingRecipe, config: GreenSwinConfig) -> ViTImageProcessor:
    """What prepares images for the finished model as `EvaluationTransform` does here."""
    height, width = as_pair(config.image_size)
    # Colour needs nothing of ours, so its file names the class that everybody has.
    kind = ViTImageProcessor if recipe.num_channels == 3 else GreenSwinImageProcessor
    return kind(
        size={"height": height, "width": width},
        resample=3,  # bicubic
        image_mean=list(recipe.pixel_mean),
        image_std=list(recipe.pixel_std),
        do_convert_rgb=recipe.num_channels == 3 or None,
    )


# Training


def train(run: Run, loader: LoaderWatch, progress: tqdm, stop_after: int | None, signals: StopSignals) -> None:
    """Do the updates of this start of the run: to its end, to where it was asked to stop, or until a signal comes."""
    recipe, accelerator, state = run.recipe, run.accelerator, run.state
    if state.update == 0:
        probe(run)
    stop_at = min(run.total_updates, state.update + (stop_after or run.total_updates))
    batches = iter(loader)
    since, images_since = time.monotonic(), 0
    while state.update < stop_at and not signals.agreed(accelerator.state):
        loss, bad_images = forward_backward(run, batches)
        learning_rate = run.optimizer.param_groups[0]["lr"]
        grad_norm, finite = update_weights(accelerator, run.model, run.optimizer, recipe.max_grad_norm)
        run.scheduler.step()
        state.record_update(finite, recipe.stop_after_skipped, loss=loss, scale=loss_scale(accelerator.scaler))
        images_since += run.images_per_update
        run.bad_images.add(bad_images)
        report_skip(accelerator, state.update, finite)

        ends_epoch = state.update % run.counted_updates == 0
        too_many = check_bad_images(run, ends_epoch) if ends_epoch or due(run, recipe.log_every) else None
        if due(run, recipe.log_every) or not finite:
            speed = images_since / (time.monotonic() - since)
            log_update(run, progress, loss, learning_rate, grad_norm, speed)
            since, images_since = time.monotonic(), 0
        aside = time.monotonic()
        if due(run, recipe.probe_every * (run.updates_per_epoch or 0)):
            probe(run)
        if due(run, recipe.validate_every):
            measure(run)
        if due(run, recipe.save_every):
            save(run)
        since += time.monotonic() - aside
        progress.update()
        if too_many:
            if run.saved_update != state.update:
                save(run)
            raise too_many


def forward_backward(run: Run, batches: Iterator[dict[str, Any]]) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """Gradients of one update; returns its mean loss on this process, and what of its batches could not be decoded."""
    accelerator, passes = run.accelerator, run.recipe.gradient_accumulation_steps
    total, bad_images = torch.zeros((), device=accelerator.device), []
    for index in range(passes):
        batch = next(batches)
        bad_images.append({name: batch[name] for name in ("skipped", "num_bad")})
        inputs = send_to_device(model_inputs(batch), accelerator.device, non_blocking=True)
        is_last = index == passes - 1
        with contextlib.nullcontext() if is_last else accelerator.no_sync(run.model):
            loss = run.model(**inputs).loss / passes
            accelerator.backward(loss)
        total += loss.detach()
    return total, bad_images


def due(run: Run, every: int) -> bool:
    """Whether something done every so many updates (0: never), and at the end of the run, is to be done now."""
    return every > 0 and (run.state.update % every == 0 or run.state.update == run.total_updates)


def check_bad_images(run: Run, ends_epoch: bool) -> TooManyBadImagesError | None:
    """The error to stop with where too many images of the epoch, or of a part of a stream, are bad."""
    period = (run.state.update - 1) // run.counted_updates + 1
    when = f"epoch {period}" if run.updates_per_epoch else f"part {period} of the stream"
    entry = {"step": run.state.update, "epoch": run.epoch}
    return run.bad_images.check(when, run.log, entry, ends_epoch=ends_epoch)


def log_update(
    run: Run, progress: tqdm, loss: torch.Tensor, learning_rate: float, grad_norm: torch.Tensor, speed: float
) -> None:
    accelerator, state = run.accelerator, run.state
    entry = {
        "step": state.update,
        "epoch": run.epoch,
        "loss": accelerator.reduce(loss, "mean").item(),
        "learning_rate": learning_rate,
        "grad_norm": float(grad_norm),
        "images_per_second": round(speed, 1),
        "skipped_images": run.bad_images.totals()[0],
        "skipped_updates": state.skipped_updates,
    }
    if (scale := loss_scale(accelerator.scaler)) is not None:
        entry["loss_scale"] = scale
    if run.log:
        run.log.write(entry)
    accelerator.log({k: v for k, v in entry.items() if k != "step" and v is not None}, step=state.update)
    shown = {"loss": f"{entry['loss']:.4f}", "lr": f"{learning_rate:.2e}", "images/s": f"{speed:,.0f}"}
    if run.probed:
        shown["k-NN"] = f"{run.probed.value:.3f}"
    progress.set_postfix(shown, refresh=False)


def measure(run: Run) -> float | None:
    """Loss on the images and masks that stay the same, logged once an update; computed by the main process."""
    loss, model = None, whole_model(run.accelerator, run.model)
    if run.log and run.fixed_batches:
        last = run.log.last_entry() or {}
        if last.get("step") == run.state.update and "validation_loss" in last:
            return last["validation_loss"]
        loss = held_out_loss(model, run.fixed_batches, run.accelerator.device)
        entry = {"validation_loss": loss, "mean_prediction_loss": run.reference_loss}
        run.log.write({"step": run.state.update, "epoch": run.epoch, **entry})
        run.accelerator.log(entry, step=run.state.update)
    return loss


def probe(run: Run) -> None:
    """Accuracy of weighted k-NN on frozen features, logged; computed by the main process, the others wait for it."""
    model: Any = whole_model(run.accelerator, run.model) if run.online_probe else None
    if run.log and run.online_probe:
        run.probed = run.online_probe(model.swin, run.accelerator.device)
        entry = {"probe_accuracy": run.probed.value, "probe_standard_error": run.probed.standard_error}
        run.log.write({"step": run.state.update, "epoch": run.epoch, **entry})
        run.accelerator.log(entry, step=run.state.update)


def save(run: Run) -> None:
    """Write a checkpoint from which the run goes on exactly."""
    accelerator, state = run.accelerator, run.state
    check_output(run)
    random_states = gather_object([random_state()])
    model = whole_model(accelerator, run.model)
    optimizer = optimizer_state(accelerator, run.model, run.optimizer)
    bad_in_run, bad_in_epoch = run.bad_images.totals()
    if run.log:
        scaler = accelerator.scaler
        training_state = {
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler else None,
            "random_states": random_states,
        }
        totals = {"skipped_images": bad_in_run, "bad_in_epoch": bad_in_epoch, "log_position": run.log.position()}
        trainer_state = {
            "state": {**dataclasses.asdict(state), **totals},
            "epoch": run.epoch,
            "total_updates": run.total_updates,
            "num_processes": accelerator.num_processes,
            "num_images": run.num_images,
            "data_fingerprint": run.data_fingerprint,
            "threads": torch.get_num_threads(),
            "recipe": run.recipe.to_dict(),
        }
        save_checkpoint(
            run.output / "checkpoints",
            state.update,
            save_model=functools.partial(save_model, run, model),
            training_state=training_state,
            trainer_state=trainer_state,
            keep=run.recipe.keep_checkpoints,
        )
    run.saved_update = state.update
    accelerator.wait_for_everyone()


def check_output(run: Run) -> None:
    """Raise an `OSError` where the output folder is gone.

    A mount that vanished leaves an empty folder: what is written there goes to another disk.
    """
    if run.log and not (run.output / RECIPE_FILE).is_file():
        raise OSError(f"the output folder {run.output} is gone, or its {RECIPE_FILE} is")


def save_model(run: Run, model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    run.processor.save_pretrained(folder)


def restore(run: Run, checkpoint: Path) -> None:
    """Take up the state of a checkpoint but for the weights; rates, decay and schedule are those of the recipe."""
    accelerator = run.accelerator
    saved = read_training_state(checkpoint)
    load_optimizer_state(accelerator, run.model, run.optimizer, saved["optimizer"]["state"])
    set_schedule(run.scheduler, run.optimizer, run.state.update)
    if accelerator.scaler and saved["scaler"]:
        accelerator.scaler.load_state_dict(saved["scaler"])
    if len(saved["random_states"]) == accelerator.num_processes:  # others only with --override
        restore_random_state(saved["random_states"][accelerator.process_index])
    if not accelerator.is_main_process:
        run.state.skipped_images = run.state.bad_in_epoch = 0  # the saved numbers are those of all processes


def open_output(run: Run, report_to: str) -> None:
    """Make the output folder with the resolved recipe and the log; checkpoints of later updates are set aside."""
    if run.accelerator.is_main_process:
        run.output.mkdir(parents=True, exist_ok=True)
        for path in prepare_checkpoints(run.output / "checkpoints", run.state.update):
            print(f"Kept as {path}: it is of a later update than this run goes on from")
        save_recipe(run.recipe, run.output / RECIPE_FILE)
        run.log = TrainingLog(run.output / "log.jsonl", run.state.log_position)
        unusable = (image for batch in run.fixed_batches for image in batch["skipped"])
        for name, reason in run.bad_images.listed.add(unusable):
            print(f"Bad image {name}: {reason}; it is not measured on", file=sys.stderr)
    if report_to != "none":
        settings = {name: str(value) for name, value in run.recipe.to_dict().items()}
        run.accelerator.init_trackers("green-swin-pretraining", settings)


def note_changes(run: Run, record: RunRecord, changes: dict[str, tuple[Any, Any]]) -> None:
    """Say and keep, in the log and the record, which settings are others from this update on.

    What the record holds of changes that no checkpoint was saved after goes: the run is back before them.
    """
    noted = record.content.get("changed_settings", [])
    earlier = [entry for entry in noted if entry["after_update"] < run.state.update]
    if earlier != noted:
        record.note(changed_settings=earlier)
    if not changes:
        return
    shown = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
    run.accelerator.print(f"Going on with other settings: {shown}")
    settings = {name: list(pair) for name, pair in changes.items()}
    if run.log:
        run.log.write({"step": run.state.update, "epoch": run.epoch, "changed_settings": settings})
    record.note(changed_settings=[*earlier, {"after_update": run.state.update, "settings": settings}])


# Results


def save_results(run: Run, config: GreenSwinConfig) -> list[str]:
    """Write model, processor, pictures; returns the names of all files that belong to the result."""
    check_output(run)
    run.final_loss = measure(run)
    model = whole_model(run.accelerator, run.model)
    names: list[str] = []
    if run.log:
        names = replace_files(run.output, functools.partial(save_model, run, model))
        draw_loss_curve(run)
        names += ["loss_curve.png", "log.jsonl", RECIPE_FILE, RECORD_FILE]
        if run.fixed_batches:
            draw_reconstructions(run, config, model)
            names.append("reconstructions.png")
    run.accelerator.wait_for_everyone()
    return sorted(names)


def recorded_facts(run: Run, peak: float) -> dict[str, Any]:
    """What a model card says of this run."""
    state, images = run.state, sum(len(batch["pixel_values"]) for batch in run.fixed_batches)
    metrics = [
        metric(
            "Loss on the masked units", "loss", run.final_loss, "held out" if run.has_held_out else "training", images,
            baseline=run.reference_loss, baseline_name="predicting each unit's mean",
        )
    ]  # fmt: skip
    if run.probed:
        error, count = run.probed.standard_error, run.probed.num_images
        name = f"Weighted k-NN on frozen features ({run.online_probe})"
        metrics.append(metric(name, "accuracy", run.probed.value, "held out", count, standard_error=error))
    held_out = images if run.has_held_out and images else None
    return {
        "data": describe_data(run.recipe.data, train_images=run.num_images, validation_images=held_out),
        "model": {"parameters": sum(parameter.numel() for parameter in run.model.parameters())},
        "training": {
            "updates": state.update,
            "epochs": run.epoch,
            "images_per_update": run.images_per_update,
            "learning_rate": peak,
            "skipped_updates": state.skipped_updates,
        },
        "metrics": measured(metrics),
    }


def draw_loss_curve(run: Run) -> None:
    from green_swin_hf.visualization import loss_figure, save_figure

    assert run.log is not None
    entries = run.log.entries()
    x = "epoch" if run.updates_per_epoch else "step"
    validation = [(entry[x], entry["validation_loss"]) for entry in entries if "validation_loss" in entry]
    figure = loss_figure(
        entries,
        mean_prediction_loss=run.reference_loss,
        validation=validation,
        validated_on="held-out images" if run.has_held_out else "some training images",
        probes=[
            (entry[x], entry["probe_accuracy"], entry["probe_standard_error"])
            for entry in entries
            if "probe_accuracy" in entry
        ],
        x=x,
    )
    save_figure(figure, run.output / "loss_curve.png")


@torch.no_grad()
def draw_reconstructions(run: Run, config: GreenSwinConfig, model: Any) -> None:
    from green_swin_hf.visualization import (
        masked_images,
        paste_reconstruction,
        reconstruction_figure,
        save_figure,
        to_display,
    )

    batch, unit = run.fixed_batches[0], config.mask_unit_size
    output = model.eval()(**send_to_device(model_inputs(batch), run.accelerator.device))
    pixels, masks = batch["pixel_values"][:NUM_PICTURES], output.bool_masked_pos[:NUM_PICTURES].cpu()
    predicted = output.reconstruction[:NUM_PICTURES].cpu()
    pasted = paste_reconstruction(pixels, predicted, masks, unit, norm_pix_loss=config.norm_pix_loss)
    originals, completed = (
        to_display(images, run.recipe.pixel_mean, run.recipe.pixel_std) for images in (pixels, pasted)
    )
    figure = reconstruction_figure(originals, masked_images(originals, masks, unit), completed)
    save_figure(figure, run.output / "reconstructions.png")


# Messages


def print_heading(
    run: Run,
    config: GreenSwinConfig,
    source: ImageSource,
    peak: float,
    warmup: int,
    checkpoint: Path | None,
) -> None:
    recipe, accelerator = run.recipe, run.accelerator
    rows, columns = as_pair(config.image_size)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    known = "a stream" if source.num_images is None else f"{source.num_images:,} images"
    unit = recipe.mask_unit_size or config.mask_unit_size
    squares = (rows // unit) * (columns // unit)
    masks = "one for each image" if recipe.mask_sharing == "image" else "one for each batch"
    precision = {"no": "fp32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    threads = torch.get_num_threads()
    processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
    epochs = f" ({run.total_updates / run.updates_per_epoch:.3g} epochs)" if run.updates_per_epoch else ""
    lines = {
        "data": f"{known} of {source.name} at {rows}x{columns} px, {'grey' if recipe.num_channels == 1 else 'colour'}",
        "measured on": f"{measured_on(run)} with fixed masks" if run.fixed_batches else "nothing",
        "model": f"{parameters / 1e6:.1f} M parameters: patch {config.patch_length}, window {config.window_size}, "
        f"blocks {'-'.join(map(str, config.depths))}, width {config.embed_dim} to {config.hidden_size}",
        "masks": f"{num_masked_units(squares, recipe.mask_ratio)} of {squares} units of {unit} px, {masks}",
        "device": f"{accelerator.device}, {precision}, {processes}, {threads} thread{'s' * (threads > 1)}",
        "updates": f"{run.total_updates:,}{epochs} of {run.images_per_update} images; "
        f"learning rate {peak:.2e} after {warmup}",
        "output": str(run.output),
    }
    if run.online_probe:
        lines["k-NN probe"] = f"every {recipe.probe_every} epochs: {run.online_probe}"
    accelerator.print("Pretraining GreenSwin")
    for name, text in lines.items():
        accelerator.print(f"  {name:<12} {text}")
    if checkpoint:
        accelerator.print(f"  {'going on':<12} after update {run.state.update:,} from {checkpoint}")
    sys.stdout.flush()


def measured_on(run: Run) -> str:
    count = sum(len(batch["pixel_values"]) for batch in run.fixed_batches)
    return f"{count} held-out images" if run.has_held_out else f"{count} training images (none could be held out)"


def print_results(run: Run, config: GreenSwinConfig, written: list[str], seconds: float) -> None:
    say = run.accelerator.print
    say(f"Done in {seconds / 60:.1f} minutes.")
    if run.final_loss is not None and not math.isfinite(run.final_loss):
        say(f"The loss on {measured_on(run)} is not finite: this model is of no use; lower --learning-rate")
    elif run.final_loss is not None and run.reference_loss:
        change = run.final_loss / run.reference_loss - 1
        say(
            f"Loss on {measured_on(run)} with fixed masks: {run.final_loss:.4f}. "
            f"Predicting each unit's mean scores {run.reference_loss:.4f} on the same: "
            f"the model's loss is {abs(change):.0%} {'lower' if change < 0 else 'higher'}."
        )
    if run.probed and run.log:
        before = next(entry for entry in run.log.entries() if "probe_accuracy" in entry)
        say(
            f"Weighted k-NN on frozen features, {run.online_probe}: accuracy {run.probed} at the end, "
            f"{before['probe_accuracy']:.3f} after update {before['step']}."
        )
    say(f"Wrote to {run.output}: {listed_files(written)}")
    rows, columns = as_pair(config.image_size)
    say("Next, for example, the features of an image:")
    say(
        f"""  python -c "import torch, green_swin_hf; from transformers import AutoModel; """
        f"""model = AutoModel.from_pretrained('{run.output}'); """
        f"""print(model(torch.zeros(1, {config.num_channels}, {rows}, {columns})).last_hidden_state.shape)" """.rstrip()
    )


def stopped_early(run: Run, signals: StopSignals) -> int:
    if run.saved_update != run.state.update:
        save(run)
    reason = f"on {signals.received}" if signals.received else "as asked"
    run.accelerator.print(
        f"Stopped after update {run.state.update:,} of {run.total_updates:,} {reason}. Go on with: "
        f"{how_to_go_on(run.output, run.accelerator.num_processes)}"
    )
    run.accelerator.end_training()
    return 0


def after_failure(run: Run) -> str:
    """What is there to go on with when a run ends before its end."""
    if run.saved_update is None:
        return "it has no checkpoint yet (--save-every)"
    command = how_to_go_on(run.output, run.accelerator.num_processes)
    return f"the checkpoint after update {run.saved_update:,} was written whole, go on with: {command}"


def fail(accelerator: Accelerator, message: str, by_all: bool = False) -> int:
    if by_all or accelerator.is_main_process:
        print(f"pretrain.py: {message}", file=sys.stderr)
    accelerator.end_training()
    return 1


if __name__ == "__main__":
    sys.exit(main())
