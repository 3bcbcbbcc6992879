"""Host time of a step's masks and plans: `sample_masks` and `build_sparse_plan` for the whole batch."""

import argparse
import time
from itertools import product
from typing import Any

from tqdm import tqdm

from benchmarking.contenders import SWIN_VARIANTS
from benchmarking.options import WrongInput, add_common, choose_batch, list_of, positive_int, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_plans
from benchmarking.report import Row, print_table
from benchmarking.statistics_of_rounds import percentile_95, summarize

SEED = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser)
    parser.add_argument("--repeats", type=positive_int, help="plans of each kind (default: 50)")
    sizes = list_of(lambda text: text if text in ("window", "optimal") else positive_int(text))
    parser.add_argument("--group-sizes", type=sizes, default=["window"], help="window (default), optimal or numbers")


def time_plans(
    variant: str, size: int, num_masks: int, ratio: float, group_size: str | int, repeats: int
) -> list[dict[str, float]]:
    """Milliseconds of masks and of their plan, for each of `repeats` batches behind one that is not counted."""
    import torch

    from green_swin_hf import GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks

    config = GreenSwinConfig(**SWIN_VARIANTS[variant], image_size=size, group_size=group_size)
    geometry = SparseGeometry.from_config(config)
    generator = torch.Generator().manual_seed(SEED)
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        masks = sample_masks(num_masks, geometry.unit_grid_size, ratio, generator)
        sampled = time.perf_counter()
        build_sparse_plan(masks, geometry)
        built = time.perf_counter()
        times.append({"masks_ms": 1e3 * (sampled - start), "plan_ms": 1e3 * (built - sampled)})
    return times[1:]


def check_group_sizes(arguments: argparse.Namespace) -> None:
    """Raise `WrongInput` for a group size that a model does not take."""
    from green_swin_hf import GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks

    for variant, size, group_size in product(arguments.variants, arguments.sizes, arguments.group_sizes):
        try:
            config = GreenSwinConfig(**SWIN_VARIANTS[variant], image_size=size, group_size=group_size)
            geometry = SparseGeometry.from_config(config)
            build_sparse_plan(sample_masks(1, geometry.unit_grid_size, arguments.mask_ratio), geometry)
        except ValueError as error:
            raise WrongInput(f"--group-sizes: {error}") from error


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    set_defaults(arguments, sizes=[224, 448], precision=["fp32"])
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    repeats = arguments.repeats or (3 if arguments.quick else 50)
    check_group_sizes(arguments)
    rows: list[Row] = []
    raw = []
    grid = list(product(arguments.variants, arguments.group_sizes, arguments.sizes, arguments.masks))
    for variant, group_size, size, masks in tqdm(grid, desc="plans", leave=False):
        batch = choose_batch(arguments, variant, size)
        rows_of_mask = 1 if masks == "shared" else batch
        times = time_plans(variant, size, rows_of_mask, arguments.mask_ratio, group_size, repeats)
        totals = [each["masks_ms"] + each["plan_ms"] for each in times]
        row: Row = {"variant": variant, "group_size": group_size, "size": size, "masks": masks, "batch": batch}
        row |= {"masks_ms": summarize([each["masks_ms"] for each in times])["median"]}
        row |= {"plan_ms": summarize([each["plan_ms"] for each in times])["median"]}
        rows.append(row | {"total_ms": summarize(totals)["median"], "total_p95_ms": percentile_95(totals)})
        raw.append(times)
    print_table("masks and plans of a step on the host: medians and 95th percentile", rows)
    return {"rows": rows, "times": raw}


PART = Part("plans", "host time of a step's masks and plans", add_arguments, measure, draw_plans)
