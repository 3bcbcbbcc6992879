"""Attention of visible tokens alone: its implementations against each other, stage by stage.

Forward and backward of one attention between the projections, from tokens to tokens: gathers, bias and window mask are
inside; the index of the position table that "eager" and "sdpa" read is not, for a model makes it once for all blocks of
a stage. All implementations take turns in one process on the same tensors. On a CPU there is only "eager": "sdpa" is
the same there where the bias is learned, and the other two are kernels of GPUs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarking.contenders import SWIN_VARIANTS
from benchmarking.options import WrongInput, add_common, choose_batch, list_of, one_of, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_attention
from benchmarking.report import Row, print_table
from benchmarking.statistics_of_rounds import summarize, summarize_ratios

ON_A_CPU = ("eager",)
ON_A_GPU = ("eager", "sdpa", "flex_attention", "triton_window")
REFERENCE = "eager"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--attention",
        type=list_of(one_of(*ON_A_GPU)),
        help=f"implementations (default: {','.join(ON_A_GPU)}; on a CPU {','.join(ON_A_CPU)})",
    )


def choose_attention(arguments: argparse.Namespace) -> list[str]:
    """The implementations to measure.

    Raises:
        WrongInput: one that does not run on the device.
    """
    possible = ON_A_GPU if arguments.device == "cuda" else ON_A_CPU
    for name in arguments.attention or ():
        if name not in possible:
            raise WrongInput(f"--attention {name} does not run on cpu: add --device cuda or leave it out")
    return arguments.attention or list(possible)


def draw_inputs(config: Any, plan: Any, stage: int, images: int, precision: str, device: str) -> list[Any]:
    """Query, key, value [R, T, C] of one stage and its position table, all of which take a gradient."""
    import torch

    shape = (images if plan.is_shared else 1, len(plan.stages[stage].position), config.stage_channels[stage])
    entries = ((2 * config.stage_window_sizes[stage] - 1) ** 2, config.num_heads[stage])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
    tensors.append(torch.randn(entries, generator=generator).to(device))
    return [tensor.requires_grad_() for tensor in tensors]


def time_in_turns(
    steps: dict[str, Callable[[], None]], warmup: int, rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each step in each round, after rounds that are not counted; who begins changes from round to round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for index in range(warmup + rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            steps[name]()
            if index >= warmup:
                times[name].append(clock() - start)
    return times


def time_stage(inputs: list[Any], partition: Any, names: list[str], warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of forward and backward in one window partition, by implementation."""
    import torch

    from green_swin_hf.attention_variants import window_attention
    from green_swin_hf.token_layout import VisibleLayout

    query, key, value, table = inputs
    layout = VisibleLayout(partition, None, partition.relative_position_index)

    def step(implementation: str) -> None:
        output = window_attention(implementation, query, key, value, table, layout)
        torch.autograd.grad(output, inputs, output.detach())
        if query.is_cuda:
            torch.cuda.synchronize()

    torch.compiler.reset()  # flex_attention is compiled for each size, and torch limits how often
    return time_in_turns({name: partial(step, name) for name in names}, warmup, rounds)


def build_rows(labels: Row, times: dict[str, list[float]]) -> list[Row]:
    rows = []
    for name, seconds in times.items():
        figures = summarize([1e3 * value for value in seconds])
        row: Row = labels | {"attention": name, "ms": figures["median"], "q1": figures["q1"], "q3": figures["q3"]}
        ratio = summarize_ratios(seconds, times[REFERENCE])["median"] if REFERENCE in times else None
        rows.append(row | {f"over_{REFERENCE}": ratio})
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from green_swin_hf import GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks

    set_defaults(arguments, sizes=[224], precision=["fp32", "bf16"])
    names = choose_attention(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = []
    for variant, size, precision in product(arguments.variants, arguments.sizes, arguments.precision):
        config = GreenSwinConfig(**SWIN_VARIANTS[variant], image_size=size)
        geometry = SparseGeometry.from_config(config)
        images = choose_batch(arguments, variant, size)
        title = f"attention: {variant}, {size} px, batch {images}, {precision}"
        rows: list[Row] = []
        raw = []
        for masks, stage in tqdm(list(product(arguments.masks, range(config.num_layers))), desc=title, leave=False):
            num_masks = 1 if masks == "shared" else images
            generator = torch.Generator().manual_seed(0)
            drawn = sample_masks(num_masks, geometry.unit_grid_size, arguments.mask_ratio, generator)
            plan = build_sparse_plan(drawn, geometry)
            partition = plan.stages[stage].shifted.to(arguments.device)
            inputs = draw_inputs(config, plan, stage, images, precision, arguments.device)
            times = time_stage(inputs, partition, names, arguments.warmup, arguments.rounds)
            labels: Row = {"masks": masks, "stage": stage + 1}
            labels |= {"groups": partition.num_groups, "group_size": partition.group_size}
            rows += build_rows(labels, times)
            raw.append(labels | {"seconds": times})
        print_table(title, rows, [f"forward and backward; over_{REFERENCE}: ratio in the same round, median"])
        settings.append({"title": title, "rows": rows, "times": raw})
    return {"settings": settings}


PART = Part("attention", "attention implementations against each other", add_arguments, measure, draw_attention)
