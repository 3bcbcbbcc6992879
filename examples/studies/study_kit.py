"""What the studies share: flags, rows that are kept, results (table, JSON, plots), and how plots look."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarking.options import positive_int
from benchmarking.plots import COLOURS, HATCHES, new_figure
from benchmarking.report import describe_run, read_version
from evidence_study.folder import replace_text
from evidence_study.interruption import until_interrupted
from evidence_study.report import markdown_table
from kept_rows import KeptRows, Row
from tqdm.auto import tqdm

from green_swin_hf.training import OneLineParser, check_output_folder
from green_swin_hf.visualization import save_figure

ROWS, SETTINGS, RESULTS, TABLE = "rows.jsonl", "settings.json", "results.json", "table.md"
OUTPUT = Path("outputs/studies")
# The first colours of Okabe and Ito that show on white; marker and dashes tell lines apart for who sees no colour.
MARKERS = "os^Dvx"
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 2)))
PAPER_STYLE: dict[str, Any] = {"color": "#000000", "linestyle": (0, (4, 3)), "linewidth": 1}
EXTRA_VERSIONS = ("codecarbon", "matplotlib")

RawDescription = argparse.RawDescriptionHelpFormatter

Settings = TypeVar("Settings")


# Flags and settings


def build_parser(description: str | None, name: str) -> OneLineParser:
    """A parser with the flags that every study has."""
    parser = OneLineParser(description=description, formatter_class=RawDescription)
    parser.add_argument("--quick", action="store_true", help="small numbers that show that it runs: a minute or two")
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="FOLDER",
        help=f"default: {OUTPUT / name}, with --quick {OUTPUT / f'{name}_quick'}; a study there is gone on with",
    )
    parser.add_argument("--threads", type=positive_int, default=1, help="of CPU computation (default: 1)")
    return parser


def choose_settings(arguments: Namespace, quick: Settings, full: Settings) -> Settings:
    """The settings of the mode, with every flag of the same name that was given on top."""
    settings: Any = quick if arguments.quick else full
    names = [field.name for field in dataclasses.fields(settings)]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return dataclasses.replace(settings, **{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


@dataclass(frozen=True)
class Study:
    """One study in its folder.

    Attributes:
        name: of the script and the folder.
        title: heading of the table.
        settings: all that decides its numbers, as JSON holds it.
        rows: what has been measured; one with a "failure" was not, for that reason, and is tried again.
    """

    name: str
    title: str
    output: Path
    settings: dict[str, Any]
    rows: KeptRows

    def is_measured(self, name: Row) -> bool:
        kept = self.rows.get(name)
        return kept is not None and "failure" not in kept

    def measure(self, name: Row, make: Callable[[], Row]) -> None:
        """Keep a new row of that name, with the seconds that it took."""
        start = time.monotonic()
        made = make()
        self.rows.add({**name, **made, "took_s": round(time.monotonic() - start, 2)})

    def measure_all(self, cells: Sequence[tuple[Row, Callable[[], Row]]]) -> None:
        """`measure` of each (name, make) that is missing or failed, behind a progress bar."""
        missing = [cell for cell in cells if not self.is_measured(cell[0])]
        with tqdm(total=len(cells), initial=len(cells) - len(missing), desc=self.name, unit="row") as progress:
            for name, make in missing:
                progress.set_postfix_str(", ".join(str(value) for value in name.values()))
                self.measure(name, make)
                progress.update()


def open_study(
    name: str,
    title: str,
    arguments: Namespace,
    settings: Any,
    keys: Sequence[str],
    free: Sequence[str] = (),
    optional_keys: Sequence[str] = (),
) -> Study:
    """The study in its folder, new or as it was left; writes nothing.

    Args:
        settings: a dataclass.
        keys, optional_keys: what names a row, see `KeptRows`.
        free: settings that add rows or leave some out, but change none.

    Raises:
        ValueError: matplotlib is missing, the folder cannot be written, or it holds a study with other settings.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib, which draws the plots, is not installed: pip install green-swin-hf[studies]")
    output = arguments.output_dir or OUTPUT / (f"{name}_quick" if arguments.quick else name)
    check_output_folder(output)
    now = json.loads(json.dumps(dataclasses.asdict(settings)))
    if (output / SETTINGS).is_file():
        then = _read_settings(output / SETTINGS)
        for key in now:
            if key not in free and then.get(key) != now[key]:
                raise ValueError(f"{output} holds a study with {key} {then.get(key)}, not {now[key]}; give another "
                                 "--output-dir")  # fmt: skip
    return Study(name, title, output, now, KeptRows(output / ROWS, keys, optional_keys))


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise ValueError(f"{path} is damaged; delete its folder or give another --output-dir") from None


def run_study(
    study: Study, cells: Sequence[tuple[Row, Callable[[], Row]]], write: Callable[[], None], next_step: str
) -> int:
    """Measure what is missing, write the results; returns the exit code.

    Returns:
        0, or 1 where a row of `cells` could not be measured, or 130 where it was interrupted.
    """
    study.output.mkdir(parents=True, exist_ok=True)
    replace_text(study.output / SETTINGS, json.dumps(study.settings, indent=2) + "\n")
    print(
        f"{study.title}\n  {', '.join(f'{key} {_short(value)}' for key, value in study.settings.items())}", flush=True
    )

    def measured() -> str:
        return f"{sum(study.is_measured(name) for name, _ in cells)} of {len(cells)} rows are"

    def measure_and_write() -> int:
        study.measure_all(cells)
        write()
        if all(study.is_measured(name) for name, _ in cells):
            print(f"Next: {next_step}")
            return 0
        why = f"the notes of {study.output / TABLE} say what is not, and why"
        print(f"Only {measured()} measured; {why}; the same command tries again.", file=sys.stderr, flush=True)
        return 1

    return until_interrupted(measure_and_write, lambda: f"{measured()} kept")


def _short(value: Any) -> str:
    """
    >>> _short([["tiny", 224, 1], ["base", 224, 1]]), _short([7, 14]), _short("fp32")
    ('tiny:224:1 base:224:1', '7 14', 'fp32')
    """
    if not isinstance(value, list):
        return str(value)
    return " ".join(":".join(map(str, each)) if isinstance(each, list) else str(each) for each in value)


def clock_for(threads: int) -> Callable[[], float]:
    """Seconds that this process computed where it has one thread, which leaves out what others took; else wall time."""
    return time.process_time if threads == 1 else time.perf_counter


def clock_key(threads: int) -> str:
    """The same choice among the answers of a benchmark's worker."""
    return "cpu_seconds" if threads == 1 else "seconds"


# Results


def write_results(
    study: Study, tables: Mapping[str, Sequence[Row]], figures: Mapping[str, Any], notes: Sequence[str] = (),
    summary: Row | None = None,
) -> None:  # fmt: skip
    """`results.json`, `table.md` and the plots, each whole or not at all.

    Args:
        tables: rows under their headings.
        figures: by the name of their file, without ending.
        notes: lines behind the tables.
        summary: what else the JSON is to hold.
    """
    rows = study.rows.all()
    took = round(sum(row["took_s"] for row in rows))
    report = describe_run(Namespace(**study.settings))
    report["versions"] |= {name: read_version(name) for name in EXTRA_VERSIONS}
    report = {"study": study.name, **report, "clock": _clock_words(study), "took_s": took, **(summary or {})}
    report |= {"tables": tables, "notes": list(notes)}
    for name, figure in figures.items():
        save_figure(figure, study.output / f"{name}.png", dpi=120)
    replace_text(study.output / RESULTS, json.dumps(report, indent=2) + "\n")
    replace_text(study.output / TABLE, _page(study, report, tables, figures, notes))
    written = [TABLE, RESULTS, ROWS, *(f"{name}.png" for name in figures)]
    measured = sum("failure" not in row for row in rows)
    print(f"Measured {measured} rows in {duration(took)}. Wrote to {study.output}: {', '.join(written)}", flush=True)


def _clock_words(study: Study) -> str:
    one = study.settings.get("threads") == 1
    return "computing time of the process" if one else "wall time"


def _page(
    study: Study, report: Row, tables: Mapping[str, Sequence[Row]], figures: Mapping[str, Any], notes: Sequence[str]
) -> str:
    machine, versions = report["machine"], report["versions"]
    about = f"{machine['cpu']}, {machine['cores']} cores; torch {versions['torch']}, transformers "
    about += f"{versions['transformers']}; {report['date'][:10]}; {duration(report['took_s'])}; times are "
    about += f"{report['clock']}"
    parts = [f"# {study.title}", about + "."]
    parts += [f"**{title}**\n\n{to_markdown(rows)}" for title, rows in tables.items() if rows]
    parts += ["\n".join(f"- {note}" for note in notes)] if notes else []
    parts += [f"![{name.replace('_', ' ')}]({name}.png)" for name in figures]
    return "\n\n".join(parts) + "\n"


def to_markdown(rows: Sequence[Row]) -> str:
    """The rows under the keys of the first; a value that was not measured is a dash."""
    header = list(rows[0])
    return markdown_table(header, [[format_cell(row[key]) for key in header] for row in rows])


def format_cell(value: Any) -> str:
    """
    >>> [format_cell(value) for value in (None, 7, 0.12345, 1234.5, "yes")]
    ['-', '7', '0.123', '1,234', 'yes']
    """
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


# Plots


def draw_line(axes: Any, x: Sequence[float], y: Sequence[float], index: int, label: str, **style: Any) -> None:
    """A line with the colour, marker and dashes of its index."""
    own = {"color": COLOURS[index % 6], "marker": MARKERS[index % 6], "linestyle": DASHES[index % 6]}
    axes.plot(x, y, label=label, **{**own, "markersize": 5, "linewidth": 1.6, **style})


def finish(axes: Any, x: str, y: str, title: str = "", legend: bool = True) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_title(title, fontsize=10)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if legend and axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def plain_ticks(axes: Any, values: Sequence[float], axis: str = "x") -> None:
    """Ticks at these values, written as numbers, on a logarithmic axis."""
    place = axes.set_xticks if axis == "x" else axes.set_yticks
    place(values, [f"{value:g}" for value in values])
    (axes.xaxis if axis == "x" else axes.yaxis).set_minor_locator(_no_ticks())


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


__all__ = [
    "COLOURS",
    "HATCHES",
    "OUTPUT",
    "PAPER_STYLE",
    "TABLE",
    "RawDescription",
    "Row",
    "Study",
    "build_parser",
    "choose_settings",
    "clock_for",
    "clock_key",
    "draw_line",
    "duration",
    "finish",
    "format_cell",
    "new_figure",
    "open_study",
    "plain_ticks",
    "replace_text",
    "run_study",
    "to_markdown",
    "write_results",
]
