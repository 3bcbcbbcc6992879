"""Attention of visible tokens alone: its implementations against each other, stage by stage.

Forward and backward of one attention between the projections, from tokens to tokens: gathers, bias and window mask are
inside. All implementations take turns in one process on the same tensors.
"""

import argparse
import time
from collections.abc import Callable
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarking.contenders import SWIN_VARIANTS
from benchmarking.options import add_common, choose_batch, list_of, one_of, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_attention
from benchmarking.report import Row, print_table
from benchmarking.statistics_of_rounds import summarize, summarize_ratios

ON_A_CPU = ("eager", "sdpa")
ON_A_GPU = (*ON_A_CPU, "flex_attention", "triton_window")
REFERENCE = "eager"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument(
        "--attention",
        type=list_of(one_of(*ON_A_GPU)),
        help=f"implementations (default: {', '.join(ON_A_CPU)}; on a GPU also {', '.join(ON_A_GPU[2:])})",
    )


def build_steps(arguments: argparse.Namespace, config: Any, plan: Any, stage: int) -> dict[str, Callable[[], None]]:
    """Forward and backward of the shifted partition of one stage (of the regular one where it has none)."""
    import torch

    from green_swin_hf.attention_variants import window_attention

    partition = plan.stages[stage].shifted.to(arguments.device)
    rows = arguments.images if plan.is_shared else 1
    shape = (rows, len(plan.stages[stage].position), config.stage_channels[stage])
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).to(arguments.device, dtype) for _ in range(3)]
    entries = ((2 * config.stage_window_sizes[stage] - 1) ** 2, config.num_heads[stage])
    tensors.append(torch.randn(entries, generator=generator).to(arguments.device))
    for tensor in tensors:
        tensor.requires_grad_()

    query, key, value, table = tensors

    def step(implementation: str) -> None:
        output = window_attention(implementation, query, key, value, table, partition)
        torch.autograd.grad(output, tensors, output.detach())
        if arguments.device == "cuda":
            torch.cuda.synchronize()

    return {name: lambda name=name: step(name) for name in arguments.attention}  # type: ignore[misc]


def time_in_turns(steps: dict[str, Callable[[], None]], warmup: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after rounds that are not counted."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(warmup + rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= warmup:
                times[name].append(time.perf_counter() - start)
    return times


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
    arguments.attention = arguments.attention or list(ON_A_GPU if arguments.device == "cuda" else ON_A_CPU)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    settings = []
    for variant, size, precision in product(arguments.variants, arguments.sizes, arguments.precision):
        config = GreenSwinConfig(**SWIN_VARIANTS[variant], image_size=size)
        geometry = SparseGeometry.from_config(config)
        arguments.images, arguments.dtype = choose_batch(arguments, variant, size), precision
        title = f"attention: {variant}, {size} px, batch {arguments.images}, {precision}"
        rows: list[Row] = []
        raw = []
        grid = list(product(arguments.masks, range(config.num_layers)))
        for masks, stage in tqdm(grid, desc=title, leave=False):
            num_masks = 1 if masks == "shared" else arguments.images
            generator = torch.Generator().manual_seed(0)
            drawn = sample_masks(num_masks, geometry.unit_grid_size, arguments.mask_ratio, generator)
            plan = build_sparse_plan(drawn, geometry)
            times = time_in_turns(build_steps(arguments, config, plan, stage), arguments.warmup, arguments.rounds)
            partition = plan.stages[stage].shifted
            labels: Row = {"masks": masks, "stage": stage + 1}
            labels |= {"groups": partition.num_groups, "group_size": partition.group_size}
            rows += build_rows(labels, times)
            raw.append(labels | {"seconds": times})
        print_table(title, rows, ["forward and backward; ratio: median over rounds"])
        settings.append({"title": title, "rows": rows, "times": raw})
    return {"settings": settings}


PART = Part("attention", "attention implementations against each other", add_arguments, measure, draw_attention)
