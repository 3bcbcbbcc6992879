"""Pictures of the results, one PNG file for each part; colours of Okabe and Ito, told apart by any eye."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarking.report import Row

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "oo", "++")
Results = dict[str, Any]


def new_figure(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes, always in two dimensions; drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"Wrote {path}", flush=True)


def draw_bars(
    axes: Any, labels: Sequence[str], values: Sequence[float], spread: Sequence[Sequence[float]] | None
) -> None:
    """Horizontal bars from the top down with their value beside them.

    Args:
        spread: (lower, upper) quartile of each value, drawn as a whisker.
    """
    places = range(len(labels))
    errors = None
    if spread is not None:
        errors = [[value - low for value, (low, _) in zip(values, spread, strict=True)]]
        errors += [[high - value for value, (_, high) in zip(values, spread, strict=True)]]
    colours = [COLOURS[place % len(COLOURS)] for place in places]
    axes.barh(places, values, xerr=errors, color=colours, edgecolor="black", linewidth=0.5, capsize=3)
    ends = [high for _, high in spread] if spread is not None else values
    for place, (value, end) in enumerate(zip(values, ends, strict=True)):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_yticks(places, labels, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(left=0)


def draw_time_and_memory(results: Results, path: Path) -> None:
    """A line of panels for each setting: seconds per step, megabytes of activations and of the static part."""
    settings = [setting for setting in results["settings"] if setting["rows"]]
    if not settings:
        return
    tallest = max(len(setting["rows"]) for setting in settings)
    figure, axes = new_figure(len(settings), 3, 4.6, 1.2 + 0.36 * tallest)
    for line, setting in zip(axes, settings, strict=True):
        rows = setting["rows"]
        labels = [row["contender"] for row in rows]
        draw_bars(line[0], labels, [row["step_s"] for row in rows], [(row["q1"], row["q3"]) for row in rows])
        line[0].set_xlabel("seconds per step, median and quartiles")
        draw_bars(line[1], [""] * len(rows), [row["activations_MB"] for row in rows], None)
        line[1].set_xlabel("activations, MB")
        draw_bars(line[2], [""] * len(rows), [row["weights+optimizer_MB"] for row in rows], None)
        line[2].set_xlabel("weights, gradients and optimizer, MB")
        line[1].set_title(setting["title"], fontsize=10)
    save(figure, path)


draw_training: Callable[[Results, Path], None] = draw_time_and_memory
draw_dense: Callable[[Results, Path], None] = draw_time_and_memory


def draw_floor(results: Results, path: Path) -> None:
    """For each setting the step above its floor, split into its parts, and the profile in per cent."""
    settings = [setting for setting in results["settings"] if setting["floors"]]
    if not settings:
        return
    figure, axes = new_figure(len(settings), 2, 6.5, 3.2)
    for (left, right), setting in zip(axes, settings, strict=True):
        draw_floor_of(left, setting["floors"])
        left.set_title(setting["title"], fontsize=10)
        names = [name for name in setting["profiles"][0] if name != "contender"]
        parts = {name: [row[name] for row in setting["profiles"]] for name in names}
        draw_stacked(right, [row["contender"] for row in setting["profiles"]], parts)
        right.set_xlabel("per cent of a profiled step")
    save(figure, path)


def draw_floor_of(axes: Any, rows: Sequence[Row]) -> None:
    parts = {
        "products": [row["products_s"] for row in rows],
        "fused attention": [row["attention_kernels_s"] for row in rows],
        "optimizer": [row["optimizer_s"] for row in rows],
        "the rest of the step": [max(0.0, row["step_s"] - row["floor_s"]) for row in rows],
    }
    labels = [f"{row['contender']}\n{row['distance']:.2f} times its floor" for row in rows]
    draw_stacked(axes, labels, parts)
    axes.set_xlabel("seconds per step")


def draw_stacked(axes: Any, labels: Sequence[str], parts: dict[str, list[float]]) -> None:
    """Horizontal bars made of parts; colour and hatch name the part."""
    starts = [0.0] * len(labels)
    for index, (name, values) in enumerate(parts.items()):
        style = {"color": COLOURS[index % len(COLOURS)], "hatch": HATCHES[index // len(COLOURS)]}
        axes.barh(labels, values, left=starts, label=name, edgecolor="white", linewidth=0.5, **style)
        starts = [start + value for start, value in zip(starts, values, strict=True)]
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))


def draw_scaling(results: Results, path: Path) -> None:
    """Seconds per step against visible tokens with the line through the points, by image size and by batch."""
    figure, axes = new_figure(1, 2, 5.5, 4.2)
    names = {"size": "image size, fixed batch", "batch": "batch, fixed image size"}
    for panel, (axis, title) in zip(axes[0], names.items(), strict=True):
        for index, setting in enumerate(results["settings"]):
            draw_points(panel, setting["title"], setting[axis], COLOURS[index % len(COLOURS)], "osv^Dx"[index % 6])
        panel.set_title(f"by {title}", fontsize=10)
        panel.set_xlabel("visible tokens of a step (stage 1)")
        panel.set_ylabel("seconds per step")
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    save(figure, path)


def draw_points(axes: Any, label: str, part: Results, colour: str, marker: str) -> None:
    rows = part["rows"]
    tokens, seconds = [row["visible_tokens"] for row in rows], [row["step_s"] for row in rows]
    errors = [[row["step_s"] - row["q1"] for row in rows], [row["q3"] - row["step_s"] for row in rows]]
    axes.errorbar(tokens, seconds, yerr=errors, fmt=marker, color=colour, capsize=3, label=label)
    if part["line"] is not None:
        ends = [0, max(tokens)]
        axes.plot(ends, [part["line"]["intercept"] + part["line"]["slope"] * x for x in ends], color=colour, alpha=0.6)


def draw_plans(results: Results, path: Path) -> None:
    """Milliseconds of masks and plans of a step, the 95th percentile as a whisker."""
    rows = results["rows"]
    figure, axes = new_figure(1, 1, 7.5, 1.2 + 0.3 * len(rows))
    names = [f"{row['variant']}, {row['size']} px, {row['masks']}, batch {row['batch']}" for row in rows]
    if len({row["group_size"] for row in rows}) > 1:
        names = [f"{name}, groups: {row['group_size']}" for name, row in zip(names, rows, strict=True)]
    spread = [(row["total_ms"], row["total_p95_ms"]) for row in rows]
    draw_bars(axes[0][0], names, [row["total_ms"] for row in rows], spread)
    axes[0][0].set_xlabel("masks and plans of a step, ms (median, whisker to the 95th percentile)")
    save(figure, path)


def draw_compilation(results: Results, path: Path) -> None:
    """Eager and compiled step of each model, with the ratio of the two."""
    settings = [setting for setting in results["settings"] if setting["rows"]]
    if not settings:
        return
    figure, axes = new_figure(len(settings), 1, 8.0, 3.4)
    for (panel,), setting in zip(axes, settings, strict=True):
        labels, values = [], []
        for row in setting["rows"]:
            labels += [
                f"{row['model']}: eager",
                f"compiled ({row['ratio']:.2f} of the time, {row['recompilations']} recompilations)",
            ]
            values += [row["eager_s"], row["step_s"]]
        draw_bars(panel, labels, values, None)
        panel.set_xlabel("seconds per step, median")
        panel.set_title(setting["title"], fontsize=10)
    save(figure, path)


def draw_attention(results: Results, path: Path) -> None:
    """Milliseconds of each implementation, a panel for each setting and kind of mask."""
    panels = [
        (f"{setting['title']}, {masks} masks", [row for row in setting["rows"] if row["masks"] == masks])
        for setting in results["settings"]
        for masks in dict.fromkeys(row["masks"] for row in setting["rows"])
    ]
    figure, axes = new_figure(len(panels), 1, 8.0, 1.2 + 0.25 * max(len(rows) for _, rows in panels))
    for (panel,), (title, rows) in zip(axes, panels, strict=True):
        labels = [f"stage {row['stage']}, {row['attention']}" for row in rows]
        draw_bars(panel, labels, [row["ms"] for row in rows], [(row["q1"], row["q3"]) for row in rows])
        panel.set_xlabel("forward and backward, ms (median and quartiles)")
        panel.set_title(title, fontsize=10)
    save(figure, path)
