"""Energy of an epoch as codecarbon estimates it: visible-only GreenSwin against dense SimMIM.

    python examples/studies/energy.py --quick     # does it run? a minute or two
    python examples/studies/energy.py             # the study; goes on where it was stopped

Two models: a small Swin on the 8,000 embedded images, whole epochs with all that a training does, and Swin-T at 224 px,
some steps, given for as many images. Both methods take turns, one after the other in each round. Without counters of
power (Intel RAPL, say) the estimate is the processor's rated power times its load, for the whole machine: it follows
the time, and what else the machine does is in it. Exit codes: 0 done, 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.contenders import Contender
from benchmarking.options import positive_int
from benchmarking.step import Step
from evidence_study.pretraining import pretrain
from evidence_study.recipe import EvidenceRecipe
from evidence_study.tasks import Task, load_task

from green_swin_hf.energy import EnergyMeter
from green_swin_hf.recipe_files import load_recipe
from green_swin_hf.training import one_line_errors
from studies import study_kit as kit
from studies.study_kit import Row, Study

NAME, TITLE = "energy", "Energy of an epoch, visible-only against dense"
KEYS = ("model", "round", "method")
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "evidence" / "placed_embedded.yaml"
COUNTERS = Path("/sys/class/powercap")
METHODS = {"green": "GreenSwin", "dense": "SimMIM"}
SMALL, TINY = "small, 32 px", "Swin-T, 224 px"
EPOCH = 8000  # images, those of the embedded data set


@dataclass(frozen=True)
class Settings:
    """`epochs` of the small model and `steps` of Swin-T in each round."""

    epochs: float = 1
    steps: int = 4
    batch: int = 8
    rounds: int = 3
    threads: int = 1
    precision: str = "fp32"
    variant: str = "tiny"
    size: int = 224


FULL = Settings()
QUICK = Settings(epochs=0.25, steps=1, batch=2, rounds=1)


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors(f"{NAME}.py"):
        parser = kit.build_parser(__doc__, NAME)
        parser.add_argument("--rounds", type=positive_int, help=f"of both methods (default: {FULL.rounds})")
        arguments: Namespace = parser.parse_args(argv)
        settings = kit.choose_settings(arguments, QUICK, FULL)
        if importlib.util.find_spec("codecarbon") is None:
            raise ValueError("codecarbon, which estimates the energy, is missing: pip install green-swin-hf[studies]")
        study = kit.open_study(NAME, TITLE, arguments, settings, KEYS, ("rounds",))
    torch.set_num_threads(settings.threads)
    next_step = "python examples/pretrain.py --track-energy writes the estimate of a training into its record."
    return kit.run_study(study, build_cells(settings), lambda: write(study), next_step)


def build_cells(settings: Settings) -> list[tuple[Row, Callable[[], Row]]]:
    """Both methods in each round, who begins in turn."""
    cells: list[tuple[Row, Callable[[], Row]]] = []
    for model, measure in ((SMALL, measure_small), (TINY, measure_steps)):
        for index in range(settings.rounds):
            for method in list(METHODS)[:: -1 if index % 2 else 1]:
                name = {"model": model, "round": index, "method": method}
                cells.append((name, functools.partial(measure, settings, method)))
    return cells


def small_recipe() -> EvidenceRecipe:
    return replace(load_recipe(RECIPE, EvidenceRecipe), placements=1)


@functools.cache
def small_task() -> Task:
    return load_task(small_recipe())


def measure_small(settings: Settings, method: str) -> Row:
    """Whole epochs of the small model, from random weights."""
    recipe, task = small_recipe(), small_task()
    with tempfile.TemporaryDirectory() as folder:
        return metered(
            lambda: pretrain(method, recipe, task, 0, Path(folder), torch.device("cpu"), settings.epochs),
            round(settings.epochs * len(task.unlabelled)),
        )


def measure_steps(settings: Settings, method: str) -> Row:
    """Steps behind one that is not counted."""
    kind = {"green": "greenswin", "dense": "simmim"}[method]
    contender = Contender(
        kind, settings.variant, settings.size, settings.batch, settings.precision, threads=settings.threads
    )
    step = Step(contender)
    step()

    def take_steps() -> None:
        for _ in range(settings.steps):
            step()

    return metered(take_steps, settings.steps * settings.batch)


def metered(work: Callable[[], Any], images: int) -> Row:
    """Energy and time of some work for an epoch of `EPOCH` images."""
    meter = EnergyMeter()
    wall, computed = time.perf_counter(), time.process_time()
    work()
    wall, computed = time.perf_counter() - wall, time.process_time() - computed
    found = meter.stop()
    scale = EPOCH / images
    watt_hours = 1000 * scale * found["kwh"] if found else None
    return {
        "images": images,
        "Wh": watt_hours,
        "wall_s": scale * wall,
        "cpu_s": scale * computed,
        "source": found.get("source"),
    }


def has_power_counters() -> bool:
    """Whether Linux offers counters of energy; codecarbon also needs the right to read them."""
    return any(COUNTERS.glob("intel-rapl:*")) if COUNTERS.is_dir() else False


# Results


def write(study: Study) -> None:
    rows = study.rows.all()
    tables = {
        f"An epoch of {EPOCH:,} images: means over rounds": mean_rows(rows),
        "SimMIM's over GreenSwin's, in each round": ratio_rows(rows),
    }
    rated = "it has none: power is the processor's rated one times its load, and a fixed one of the memory"
    source = next((row["source"] for row in rows if row["source"]), "codecarbon, which gave no estimate")
    notes = [
        f"energy: {source}; what else it was doing is in it",
        "counters of power: " + ("this machine has some" if has_power_counters() else rated),
        "seconds of computing are those of the process alone; the epoch of Swin-T is scaled up from a few steps",
    ]
    kit.write_results(study, tables, {"energy": draw(rows)}, notes, {"power_counters": has_power_counters()})


def mean_rows(rows: Sequence[Row]) -> list[Row]:
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for method, title in METHODS.items():
            mine = [row for row in rows if (row["model"], row["method"]) == (model, method)]
            line: Row = {"model": model, "method": title, "rounds": len(mine), "images metered": mine[0]["images"]}
            line |= {"Wh": mean_of(mine, "Wh"), "seconds": mean_of(mine, "wall_s"), "computing": mean_of(mine, "cpu_s")}
            table.append(line)
    return table


def mean_of(rows: Sequence[Row], key: str) -> float | None:
    values = [row[key] for row in rows if row[key] is not None]
    return statistics.mean(values) if values else None


def ratio_rows(rows: Sequence[Row]) -> list[Row]:
    table = []
    for model in dict.fromkeys(row["model"] for row in rows):
        for index in sorted({row["round"] for row in rows if row["model"] == model}):
            pair = {row["method"]: row for row in rows if (row["model"], row["round"]) == (model, index)}
            green, dense = pair["green"], pair["dense"]
            line: Row = {"model": model, "round": index + 1}
            for key, title in {"Wh": "energy", "wall_s": "seconds", "cpu_s": "computing"}.items():
                line[title] = dense[key] / green[key] if dense[key] is not None and green[key] else None
            table.append(line)
    return table


def draw(rows: Sequence[Row]) -> Any:
    """Watt-hours of an epoch by method, each round as a point; a panel for each model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = kit.new_figure(1, len(models), 4.4, 3.4)
    for axes, model in zip(panels[0], models, strict=True):
        for index, method in enumerate(METHODS):
            mine = [row for row in rows if (row["model"], row["method"]) == (model, method) and row["Wh"] is not None]
            if not mine:
                continue
            values = [row["Wh"] for row in mine]
            style = {"color": kit.COLOURS[index], "hatch": kit.HATCHES[index], "edgecolor": "white"}
            axes.bar(index, statistics.mean(values), width=0.6, **style)
            axes.plot([index] * len(values), values, "o", color="#000000", markersize=4)
            text = {"xytext": (0, 6), "textcoords": "offset points", "ha": "center", "fontsize": 9}
            axes.annotate(f"{statistics.mean(values):.3g}", (index, max(values)), **text)
        axes.set_xticks(range(len(METHODS)), list(METHODS.values()))
        axes.margins(y=0.15)
        kit.finish(axes, "", f"estimated Wh for {EPOCH:,} images", model, False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
