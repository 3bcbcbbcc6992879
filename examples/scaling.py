"""What pretraining on 1 to 512 GPUs would take: parts measured here, the rest assumed and said.

    python examples/scaling.py                                              # Swin-B, 128 images for each GPU
    python examples/scaling.py --variant large --images-in-all 2048 --gpu-tflops 400

Measured on one thread of this machine: operations of a training step, reading and cropping images, masks and plans,
size and time of a checkpoint. Assumed, each a flag: rate of a GPU, links within and between machines, disk. Exit codes:
0 done, 2 wrong input.
"""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarking.report import describe_run, write_json
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils import logging as transformers_logging

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForMaskedImageModeling,
    SparseGeometry,
    build_sparse_plan,
    sample_masks,
)
from green_swin_hf.checkpointing import save_checkpoint
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.data import PretrainingImages, PretrainingTransform, load_images
from green_swin_hf.optimization import build_optimizer
from green_swin_hf.training import OneLineParser, one_line_errors

PHOTOS = Path(__file__).resolve().parent / "data" / "photos"
GPUS_OF_A_MACHINE = 8
GPUS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES = 4  # of a weight, a gradient, and each of AdamW's two moments


@dataclass(frozen=True)
class Parts:
    """What was measured.

    Attributes:
        parameters: of the model with its decoder.
        flops: operations of a training step for each image (a product and a sum are two).
        images_per_second: read, decoded and cropped by one core.
        plan_seconds: masks and plan of one image, one core.
        checkpoint_bytes, checkpoint_seconds: of a checkpoint written to this machine's disk, checksums included.
    """

    parameters: int
    flops: float
    images_per_second: float
    plan_seconds: float
    checkpoint_bytes: int
    checkpoint_seconds: float


def main(argv: list[str] | None = None) -> int:
    with one_line_errors("scaling.py"):
        arguments = parse_arguments(argv)
        config = GreenSwinConfig.from_variant(arguments.variant, image_size=arguments.image_size)
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    parts = measure(config)
    rows = [row_of(parts, arguments, gpus) for gpus in GPUS]
    print_parts(parts)
    print_markdown(rows)
    if arguments.output:
        with one_line_errors("scaling.py"):
            write_json({**describe_run(arguments), "parts": vars(parts), "rows": rows}, arguments.output)
    return 0


def parse_arguments(argv: list[str] | None) -> Namespace:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--variant", default="base", choices=("tiny", "small", "base", "large"))
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    parser.add_argument("--images-per-gpu", type=int, default=128, help="in one update (default: 128)")
    parser.add_argument("--images-in-all", type=int, help="in one update of all GPUs, instead of --images-per-gpu")
    for name, default, help in (
        ("gpu-tflops", 125.0, "10^12 operations a second of a GPU in this training (default: 125, 40%% of an A100's)"),
        ("link-within", 200.0, "GB/s of a GPU to the others of its machine (default: 200)"),
        ("link-between", 50.0, "GB/s of a machine to others, all its adapters together (default: 50)"),
        ("disk", 1.0, "GB/s that a checkpoint is written at (default: 1)"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=help)
    parser.add_argument("--save-every", type=int, default=500, help="updates between two checkpoints (default: 500)")
    parser.add_argument("--output", type=Path, help="also write all figures to this JSON file")
    arguments = parser.parse_args(argv)
    for name, value in vars(arguments).items():
        if isinstance(value, int | float) and value <= 0:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be greater than 0")
    return arguments


# Measured


def measure(config: GreenSwinConfig) -> Parts:
    model = GreenSwinForMaskedImageModeling(config)
    plan_of, read = plan_maker(config), image_reader(config)
    checkpoint_bytes, checkpoint_seconds = measure_checkpoint(model)
    return Parts(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        flops=count_flops(model, plan_of),
        images_per_second=len(read()) / seconds_of(read),
        plan_seconds=seconds_of(lambda: plan_of(16)) / 16,
        checkpoint_bytes=checkpoint_bytes,
        checkpoint_seconds=checkpoint_seconds,
    )


def plan_maker(config: GreenSwinConfig) -> Callable[[int], Any]:
    geometry, generator = SparseGeometry.from_config(config), torch.Generator().manual_seed(0)

    def make(images: int) -> Any:
        return build_sparse_plan(sample_masks(images, geometry.unit_grid_size, 0.75, generator), geometry)

    return make


def count_flops(model: GreenSwinForMaskedImageModeling, plan_of: Callable[[int], Any]) -> float:
    """Operations of forward and backward for one image."""
    images = torch.zeros(2, model.config.num_channels, *as_pair(model.config.image_size))
    with FlopCounterMode(display=False) as counter:
        model(images, sparse_plan=plan_of(2)).loss.backward()
    return counter.get_total_flops() / 2


def image_reader(config: GreenSwinConfig) -> Callable[[], list[Any]]:
    """Reads, decodes and crops every embedded photograph once a call."""
    source = load_images(str(PHOTOS))
    transform = PretrainingTransform(as_pair(config.image_size), 3, mean=(0.5,) * 3, std=(0.5,) * 3)
    images = PretrainingImages(source, transform, seed=0)
    epochs = itertools.count()
    return lambda: [images[epoch * len(images) + index] for epoch in (next(epochs),) for index in range(len(images))]


def seconds_of(work: Callable[[], Any], rounds: int = 9) -> float:
    """Median time of a call."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]


def measure_checkpoint(model: GreenSwinForMaskedImageModeling) -> tuple[int, float]:
    optimizer = build_optimizer(model, 1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        path = save_checkpoint(
            Path(folder), 1, save_model=model.save_pretrained, training_state={"optimizer": optimizer.state_dict()},
            trainer_state={}, keep=1,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        return sum(os.path.getsize(file) for file in path.iterdir()), seconds


# Computed


def row_of(parts: Parts, assumed: Namespace, gpus: int) -> dict[str, Any]:
    """One update of a run on so many GPUs.

    Ring collectives: of B bytes each of N GPUs sends and receives B (N - 1) / N for an all-gather or a reduce-scatter,
    and an all-reduce is both, at the rate of the slowest link that the ring passes. DDP reduces all gradients; FSDP
    gathers all weights twice and scatters the gradients. What is sent while the GPU computes costs nothing: DDP sends
    during the backward pass, two thirds of the step, and FSDP all the time.
    """
    images = assumed.images_per_gpu if assumed.images_in_all is None else assumed.images_in_all / gpus
    compute = images * parts.flops / (assumed.gpu_tflops * 1e12)
    link = (assumed.link_within if gpus <= GPUS_OF_A_MACHINE else assumed.link_between) * 1e9
    one_way = BYTES * parts.parameters * (gpus - 1) / gpus / link
    ddp, fsdp = 2 * one_way, 3 * one_way
    step = max(compute, compute / 3 + ddp)
    fsdp_step = max(compute, fsdp)
    saving = parts.checkpoint_bytes / (assumed.disk * 1e9) / assumed.save_every
    return {
        "GPUs": gpus,
        "images per update": round(images * gpus),
        "computing, ms": 1e3 * compute,
        "DDP sends, ms": 1e3 * ddp,
        "DDP efficiency": compute / (step + saving),
        "FSDP sends, ms": 1e3 * fsdp,
        "FSDP efficiency": compute / (fsdp_step + saving),
        "DDP state, GB per GPU": 4 * BYTES * parts.parameters / 1e9,
        "FSDP state, GB per GPU": 4 * BYTES * parts.parameters / gpus / 1e9,
        "images/s": images * gpus / (step + saving),
        "loader cores per GPU": images / step * (1 / parts.images_per_second + parts.plan_seconds),
        "saving": saving / (step + saving),
    }


# Shown


def print_parts(parts: Parts) -> None:
    print("Measured on one thread of this machine:")
    print(
        f"- {parts.parameters / 1e6:.1f} M parameters, {parts.flops / 1e9:.1f} GFLOP for each image of a training step"
    )
    print(
        f"- {parts.images_per_second:.0f} images/s read, decoded and cropped (the photographs in examples/data/photos)"
    )
    print(f"- {1e3 * parts.plan_seconds:.2f} ms for the mask and plan of an image")
    size, seconds = parts.checkpoint_bytes / 1e9, parts.checkpoint_seconds
    print(f"- a checkpoint has {size:.2f} GB; written here in {seconds:.1f} s, checksums included\n")


def print_markdown(rows: list[dict[str, Any]]) -> None:
    names = list(rows[0])
    print("| " + " | ".join(names) + " |\n|" + "---:|" * len(names))
    for row in rows:
        print("| " + " | ".join(shown(name, row[name]) for name in names) + " |")
    print()


def shown(name: str, value: Any) -> str:
    if "efficiency" in name or name == "saving":
        return f"{value:.1%}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1e3 else f"{value:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
