"""How far a step is from its floor, and where its time goes.

The floor is the time of all matrix products of the step, each at the rate that its shapes reach alone, and of the
optimizer. Rounds hold one step, the optimizer and every product once, so that a drift of the machine cancels. Operands
come from memory, while some of a step's were just written and are in a cache still: the floor is a little high. All
steps draw the same masks, so that their products have the same shapes.
"""

import argparse
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement, Schedule, measure_interleaved
from benchmarking.options import add_common, choose_batch, set_defaults
from benchmarking.part import Part
from benchmarking.plots import draw_floor
from benchmarking.report import Row, print_table
from benchmarking.statistics_of_rounds import summarize, summarize_ratios
from benchmarking.tables import failures
from benchmarking.training import setting_of

TOP_PRODUCTS = 12


def build_contenders(arguments: argparse.Namespace, variant: str, size: int, precision: str) -> list[Contender]:
    batch = choose_batch(arguments, variant, size)
    options = {"mask_ratio": arguments.mask_ratio, "device": arguments.device, "threads": arguments.threads}
    ours = [
        Contender("greenswin", variant, size, batch, precision, masks, same_masks=True, **options)
        for masks in arguments.masks
    ]
    return [*ours, Contender("simmim", variant, size, batch, precision, same_masks=True, **options)]


def product_seconds(products: Sequence[Row], seconds: Sequence[float], attention_kernels: bool) -> float:
    """Seconds of all products of a step, or of all fused attention kernels, from those of one run of each."""
    pairs = zip(products, seconds, strict=True)
    return sum((each["count"] * time for each, time in pairs if each["attention_kernel"] == attention_kernels), 0.0)


def summarize_floor(measurement: Measurement) -> Row:
    """Floor, its parts and the step's distance from it, as medians over rounds."""
    products, rounds = measurement.after["products"], measurement.rounds
    matrices = [product_seconds(products, each["product_seconds"], False) for each in rounds]
    kernels = [product_seconds(products, each["product_seconds"], True) for each in rounds]
    optimizer = measurement.values("optimizer_seconds")
    floors = [sum(parts) for parts in zip(matrices, kernels, optimizer, strict=True)]
    distance = summarize_ratios(measurement.values("seconds"), floors)
    flops = sum(each["count"] * (each["flops"] or 0) for each in products)
    timed = median(matrices) + median(kernels)
    return {
        "contender": measurement.contender.label,
        "step_s": summarize(measurement.values("seconds"))["median"],
        "floor_s": median(floors),
        "products_s": median(matrices),
        "attention_kernels_s": median(kernels),
        "optimizer_s": median(optimizer),
        "distance": distance["median"],
        "distance_q1": distance["q1"],
        "distance_q3": distance["q3"],
        "GFLOP": flops / 1e9,
        "GFLOP/s_of_products": flops / timed / 1e9,
        "GFLOP/s_of_step": flops / median(measurement.values("seconds")) / 1e9,
    }


def list_products(measurement: Measurement) -> list[Row]:
    """Every product, that with the most time of the step first."""
    rows = []
    for index, each in enumerate(measurement.after["products"]):
        seconds = median(times[index] for times in measurement.values("product_seconds"))  # type: ignore[misc,index]
        rate = each["flops"] / seconds / 1e9 if each["flops"] else None
        row = {name: each[name] for name in ("operation", "shapes", "dtype", "count")}
        rows.append(row | {"ms_each": 1e3 * seconds, "ms_of_step": 1e3 * seconds * each["count"], "GFLOP/s": rate})
    return sorted(rows, key=lambda row: -row["ms_of_step"])


def profile_row(measurement: Measurement) -> Row:
    """Per cent of the profiled step by category; the host is what no operator accounts for, masks stand apart."""
    after = measurement.after
    seconds = dict(after["categories"])
    seconds["host"] += max(0.0, after["wall_seconds"] - sum(seconds.values()))
    total = sum(seconds.values()) + after["masks_seconds"]
    shares = {name: 100 * value / total for name, value in seconds.items()}
    return {"contender": measurement.contender.label} | shares | {"masks+plan": 100 * after["masks_seconds"] / total}


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    set_defaults(arguments, sizes=[224], precision=["fp32", "bf16"])
    schedule = Schedule(arguments.rounds, arguments.warmup, arguments.pause)
    settings = []
    for variant, size, precision in product(arguments.variants, arguments.sizes, arguments.precision):
        contenders = build_contenders(arguments, variant, size, precision)
        setting = setting_of(contenders[0])
        measurements = measure_interleaved(
            contenders,
            schedule,
            action="floor_round",
            before=[{"do": "record"}],
            after=[{"do": "profile"}],
            title=f"floor: {setting}",
        )
        settings.append({"title": setting} | report_setting(setting, measurements))
    return {"settings": settings}


def report_setting(setting: str, measurements: Sequence[Measurement]) -> dict[str, Any]:
    done = [measurement for measurement in measurements if not measurement.failure]
    floors, profiles = [summarize_floor(each) for each in done], [profile_row(each) for each in done]
    products = {each.contender.label: list_products(each) for each in done}
    print_table(f"floor: {setting}", floors, failures(measurements))
    for label, rows in products.items():
        print_table(f"products with the most time, {label}: {setting}", rows[:TOP_PRODUCTS])
    others = [f"most of other, {each.contender.label}: {', '.join(each.after['other'])}" for each in done]
    print_table(f"per cent of a profiled step: {setting}", profiles, others)
    raw = [measurement.as_json() for measurement in measurements]
    return {"floors": floors, "products": products, "profiles": profiles, "measurements": raw}


PART = Part("floor", "distance from the time of all products; profile by category", add_common, measure, draw_floor)
