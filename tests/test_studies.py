"""The studies: their numbers against counts by hand and brute force, and every script once on a micro model."""

import functools
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from benchmarking import interleave
from benchmarking.contenders import Contender
from benchmarking.interleave import Measurement
from evidence_study.recipe import EvidenceRecipe
from matplotlib.image import imread
from studies import energy, group_size, grouping, run_all, study_kit, time_and_memory, window_and_decoder_cost
from test_benchmark import LocalWorker
from tiny import seeded

from green_swin_hf import GreenSwinConfig, SparseGeometry, build_sparse_plan, sample_masks
from green_swin_hf.modeling_green_swin import GreenSwinAttention
from green_swin_hf.recipe_files import load_recipe
from green_swin_hf.token_layout import VisibleLayout
from green_swin_hf.window_grouping import solve_optimal_grouping

ROOT = Path(__file__).resolve().parents[1]
QUICK_RECIPE = ROOT / "examples" / "recipes" / "evidence" / "quick.yaml"


@pytest.fixture
def local_workers(monkeypatch):
    monkeypatch.setattr(interleave, "start_worker", LocalWorker)


def run(script, folder, *words, code=0):
    """A study in quick mode; returns the JSON that it writes."""
    assert script.main(["--quick", "--output-dir", str(folder), *words]) == code
    return json.loads((folder / "results.json").read_text())


def check_folder(folder, study, plots):
    report = json.loads((folder / "results.json").read_text())
    assert report["study"] == study
    assert report["machine"]["cores"] == os.cpu_count()
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert report["arguments"]["threads"] == 1
    table = (folder / "table.md").read_text()
    assert all(title in table for title in report["tables"])
    for plot in plots:
        picture = imread(folder / f"{plot}.png")
        assert picture[..., :3].std() > 0.01  # something is drawn
        assert (picture[..., 3] == 1).all()  # an opaque page, to be read on a dark one too
        assert picture[0, 0, :3].tolist() == [1, 1, 1]


def fewest_groups(sizes, capacity):
    """Bin packing by trying every placement, largest window first."""
    best = len(sizes)

    def place(left, loads):
        nonlocal best
        if len(loads) >= best:
            return
        if not left:
            best = len(loads)
            return
        for index in range(len(loads)):
            if loads[index] + left[0] <= capacity:
                place(left[1:], [*loads[:index], loads[index] + left[0], *loads[index + 1 :]])
        place(left[1:], [*loads, left[0]])

    place(sorted(sizes, reverse=True), [])
    return best


def random_windows(seed, count=7, largest=9):
    generator = random.Random(seed)
    return [generator.randint(1, largest) for _ in range(count)]


# Group size


@pytest.mark.parametrize("seed", range(5))
def test_cost_of_every_group_size_is_that_of_the_fewest_groups(seed):
    sizes, channels = random_windows(seed), 8
    curve = group_size.cost_curve(sizes, 9, channels)
    assert (min(curve), max(curve)) == (max(sizes), sum(sizes))
    for size, cost in curve.items():
        groups = fewest_groups(sizes, size)
        assert cost == groups * (4 * size * channels**2 + 2 * size**2 * channels)


@pytest.mark.parametrize("seed", range(5))
def test_the_sweep_of_the_study_finds_what_the_model_would_take(seed):
    sizes = random_windows(seed, count=20)
    assert min(group_size.cost_curve(sizes, 9, 16).values()) == solve_optimal_grouping(sizes, 16).cost(16)


def test_summary_of_curves_by_hand():
    # Two masks, window area 4: least at 4 and at 6; one group of all 8 tokens costs 30 and 10.
    row = group_size.summarize_curves([{3: 12, 4: 10, 6: 14, 8: 30}, {4: 10, 6: 5, 8: 10}], area=4)
    assert (row["optimum"], row["optimum_min"], row["optimum_max"]) == (5, 4, 6)
    assert row["gain_%"] == pytest.approx(25)  # 7.5 instead of 10
    assert row["one_group_over_area"] == pytest.approx(2)
    assert row["curve"] == [[4, 1], [6, 0.95], [8, 2]]  # sizes that both masks have


@pytest.mark.parametrize("size", [16, 21, 40, 80])
def test_attention_does_not_depend_on_the_group_size_that_is_timed(size):
    config = GreenSwinConfig(image_size=128, embed_dim=8, depths=(1, 1), num_heads=(2, 2), window_size=4, patch_size=8)
    mask = sample_masks(1, (8, 8), 0.7, seeded())
    plan = build_sparse_plan(mask, SparseGeometry.from_config(config)).stages[0].shifted
    torch.manual_seed(0)
    layer = GreenSwinAttention(config, 0).double()
    torch.nn.init.normal_(layer.self.relative_position_bias_table)
    tokens = torch.randn(2, len(plan.scatter_index), 8, dtype=torch.float64)

    def attend(groups):
        return layer(tokens, VisibleLayout(groups, None, groups.relative_position_index), False)[0]

    regrouped = group_size.regroup(plan, size)
    assert regrouped.group_size == size
    torch.testing.assert_close(attend(regrouped), attend(plan))


MICRO = group_size.Settings(
    windows=(7,), sizes=(64,), ratios=(0.5,), timed_ratios=(0.5,), masks=2, rounds=1, variant="tiny"
)


def test_group_size_runs_and_repeats_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(group_size, "QUICK", MICRO)
    report = run(group_size, tmp_path / "study")
    check_folder(tmp_path / "study", "group_size", ["curves", "optimum"])
    assert [len(rows) for rows in report["tables"].values()] == [1, 4, 1, 4]
    rows = (tmp_path / "study" / "rows.jsonl").read_bytes()
    for name in ("measure_cost", "measure_time"):
        monkeypatch.setattr(group_size, name, lambda *words: pytest.fail("measured again"))
    assert run(group_size, tmp_path / "study")["took_s"] == report["took_s"]
    assert (tmp_path / "study" / "rows.jsonl").read_bytes() == rows


def test_nothing_of_the_curves_is_cut_off():
    settings = group_size.Settings(windows=(7,), sizes=(64,), timed_ratios=(0.5,))
    here = {"window": 7, "size": 64, "ratio": 0.5, "area": 49}
    costs = [here | {"stage": stage, "curve": [[20, 0.3], [49, 1.0], [400, 41.0]]} for stage in range(1, 5)]
    points = [{"group_size": size, "relative": relative} for size, relative in ((20, 0.2), (49, 1.0), (400, 30.0))]
    times = [here | {"stage": 1, "points": points}]
    first, second, *_ = group_size.draw_curves(costs, times, settings).axes
    for axes, least in ((first, 0.2), (second, 0.3)):
        low, high = axes.get_ylim()
        assert low < least
        assert high > 41


# Grouping


@pytest.mark.parametrize("seed", range(8))
def test_table_fills_a_group_as_full_as_any_choice_of_windows(seed):
    sizes, capacity = random_windows(seed), 17
    chosen = grouping.fill_group_by_table(sizes, capacity)
    choices = itertools.chain.from_iterable(itertools.combinations(sizes, n) for n in range(len(sizes) + 1))
    assert len(set(chosen)) == len(chosen)
    assert sum(sizes[position] for position in chosen) == max(sum(c) for c in choices if sum(c) <= capacity)


@pytest.mark.parametrize("seed", range(8))
def test_no_rule_beats_brute_force_and_the_exact_one_equals_it(seed):
    pytest.importorskip("ortools")
    sizes, capacity = random_windows(seed, count=8), 12
    found = {method: grouping.pack(method, sizes, capacity, grouping.FULL)[0] for method in grouping.PACKED}
    exact = fewest_groups(sizes, capacity)
    assert found["exact"] == exact
    assert min(found.values()) == exact
    assert all(groups * capacity >= sum(sizes) for groups in found.values())


def test_groups_padding_and_cost_by_hand():
    settings, channels = grouping.FULL, 4
    figures = {m: grouping.describe(m, [[3, 2, 4, 1]], 5, channels, settings) for m in grouping.METHODS[:-1]}
    assert figures["padded windows"]["groups"] == 4
    assert figures["padded windows"]["padding_%"] == pytest.approx(50)  # 10 tokens in 20 slots
    assert figures["ours"] | {"ms": 0} == {"groups": 2, "padding_%": 0, "omega": 2 * (4 * 5 * 16 + 2 * 25 * 4), "ms": 0}
    assert figures["one group"]["omega"] == 4 * 10 * 16 + 2 * 100 * 4
    assert figures["one group"]["ms"] is None


def test_a_pool_that_is_too_long_for_the_table_is_not_measured():
    assert grouping.pack("table DP", [5] * 100, 10, grouping.Settings(most_steps=1000)) is None


def test_grouping_runs(tmp_path, monkeypatch):
    settings = grouping.Settings(windows=(7,), sizes=(96,), images=(1, 2), stages=(1, 2), masks=2, exact_s=1)
    monkeypatch.setattr(grouping, "QUICK", settings)
    report = run(grouping, tmp_path)
    check_folder(tmp_path, "grouping", ["groups", "time", "cost"])
    for row in report["tables"]["Ω over that of ours"]:
        assert row["ours"] == 1
        assert row["padded windows"] >= 1


# Time and memory, window and decoder


def measurement(kind, seconds, activations):
    after = {"weights_bytes": 4e6, "gradients_bytes": 4e6, "optimizer_bytes": 8e6, "activations_bytes": activations}
    rounds = [{"seconds": 10 * each, "cpu_seconds": each} for each in seconds]
    return Measurement(Contender(kind, "micro", 64, 1), {"parameters": 1}, rounds=rounds, after=after)


def test_ratios_are_of_one_round_and_of_the_whole_memory_of_a_step():
    green, dense = measurement("greenswin", [1.0, 2.0, 4.0], 4e6), measurement("simmim", [2.0, 6.0, 16.0], 24e6)
    row = time_and_memory.compare(green, dense, "cpu_seconds")
    assert (row["green_s"], row["simmim_s"], row["speedup"]) == (2, 6, 3)
    assert (row["green_MB"], row["simmim_MB"], row["memory_ratio"]) == (20, 40, 0.5)


def test_time_and_memory_runs_and_goes_on_with_more_points(tmp_path, monkeypatch, local_workers):
    monkeypatch.setattr(time_and_memory, "QUICK", time_and_memory.Settings(rounds=2, pause=0.0))
    run(time_and_memory, tmp_path, "--points", "micro:64:1")
    first = (tmp_path / "rows.jsonl").read_text()
    report = run(time_and_memory, tmp_path, "--points", "micro:64:1,micro:64:2")
    check_folder(tmp_path, "time_and_memory", ["ratios"])
    assert (tmp_path / "rows.jsonl").read_text().startswith(first)
    assert [(row["size"], row["batch"]) for row in report["tables"]["A step of both, in turn"]] == [(64, 1), (64, 2)]


def sizes_measured(report):
    return [row["size"] for row in report["tables"]["A step of both, in turn"]]


def test_a_point_that_fails_is_told_and_tried_again_and_the_others_stay(tmp_path, monkeypatch, capsys, local_workers):
    points = ["--points", "micro:64:1,micro:96:1"]
    # Stock Swin cannot compute images whose last grid is smaller than its window.
    monkeypatch.setitem(time_and_memory.SMALL_WINDOW, 64, 3)
    report = run(time_and_memory, tmp_path, *points, code=1)
    assert sizes_measured(report) == [96]
    assert any("not measured: micro, 64 px, batch 1: RuntimeError" in note for note in report["notes"])
    said = capsys.readouterr()
    assert "Only 1 of 2 rows are measured" in said.err
    assert "the same command tries again" in said.err
    assert "Measured 1 rows" in said.out
    kept = (tmp_path / "rows.jsonl").read_text()

    monkeypatch.delitem(time_and_memory.SMALL_WINDOW, 64)
    report = run(time_and_memory, tmp_path, *points)
    assert sizes_measured(report) == [64, 96]
    assert not any("not measured" in note for note in report["notes"])
    again = (tmp_path / "rows.jsonl").read_text().removeprefix(kept)
    assert [json.loads(line)["size"] for line in again.splitlines()] == [64]


def test_a_point_that_fails_again_is_a_failure_again(tmp_path, monkeypatch, local_workers):
    monkeypatch.setitem(time_and_memory.SMALL_WINDOW, 64, 3)
    for _ in range(2):
        run(time_and_memory, tmp_path, "--points", "micro:64:1", code=1)
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 2
    # It is no failure of a command that does not ask for it.
    assert sizes_measured(run(time_and_memory, tmp_path, "--points", "micro:96:1")) == [96]


def test_a_decoder_block_adds_the_products_of_its_tokens():
    count = functools.partial(window_and_decoder_cost.contender_for, window_and_decoder_cost.FULL, "decoder depth")
    one, three = (window_and_decoder_cost.count_multiply_adds(count("micro", 96, depth)) for depth in (1, 3))
    tokens, width, inner = 9, 32, 64
    block = tokens * (4 * width**2 + 2 * width * inner) + 2 * tokens**2 * width
    assert three - one == 2 * block


def test_window_and_decoder_cost_runs(tmp_path, monkeypatch, local_workers):
    values = {"windows": (4,), "depths": (2,), "widths": (64,)}
    settings = window_and_decoder_cost.Settings(variants=("micro",), sizes=(64,), rounds=1, pause=0.0, **values)
    monkeypatch.setattr(window_and_decoder_cost, "QUICK", settings)
    report = run(window_and_decoder_cost, tmp_path)
    check_folder(tmp_path, "window_and_decoder_cost", ["cost"])
    (row,) = report["tables"]["Decoder depth, against 1"]
    assert row["G"] > row["G default"]
    assert row["M parameters"] > row["M parameters default"]
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    labels = [axes.get_ylabel() for axes in window_and_decoder_cost.draw(rows).axes]
    assert labels[0] == "times that of window 7"


# Energy


class FakeMeter:
    def stop(self):
        return {"kwh": 0.001, "source": "a meter of the tests"}


def test_energy_is_given_for_an_epoch(monkeypatch):
    monkeypatch.setattr(energy, "EnergyMeter", FakeMeter)
    row = energy.metered(lambda: None, images=400)
    assert row["Wh"] == pytest.approx(20)  # 1 Wh for 400 images


def test_ratios_of_energy_are_of_the_two_methods_of_a_round():
    base = {"model": "m", "round": 0, "cpu_s": 1.0, "images": 1, "source": "s"}
    green, dense = (
        base | {"method": "green", "Wh": 2.0, "wall_s": 4.0},
        base | {"method": "dense", "Wh": 6.0, "wall_s": 8.0},
    )
    (row,) = energy.ratio_rows([dense, green])
    assert (row["energy"], row["seconds"], row["computing"]) == (3, 2, 1)


def test_energy_runs(tmp_path, monkeypatch):
    pytest.importorskip("codecarbon")
    monkeypatch.setattr(energy, "EnergyMeter", FakeMeter)
    monkeypatch.setattr(energy, "small_recipe", lambda: load_recipe(QUICK_RECIPE, EvidenceRecipe))
    monkeypatch.setattr(energy, "QUICK", energy.Settings(0.1, steps=1, batch=1, rounds=2, variant="micro", size=64))
    report = run(energy, tmp_path)
    check_folder(tmp_path, "energy", ["energy"])
    assert [row["method"] for row in report["tables"]["An epoch of 8,000 images: means over rounds"]] == [
        "GreenSwin",
        "SimMIM",
    ] * 2


def test_a_missing_package_of_energy_is_one_line_that_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(energy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stopped:
        energy.main(["--quick", "--output-dir", str(tmp_path / "no")])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "codecarbon" in error
    assert "pip install green-swin-hf[studies]" in error
    assert error.count("\n") == 1


def test_the_extra_of_the_studies_holds_what_they_need():
    extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (line,) = (line for line in extras.splitlines() if line.startswith("studies = "))
    assert all(part in line for part in ("energy", "examples", "ortools>="))


# What they share


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(group_size, "QUICK", MICRO)
    measured, whole = [], group_size.measure_cost

    def stop_at_the_third(*words):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(words)
        return whole(*words)

    monkeypatch.setattr(group_size, "measure_cost", stop_at_the_third)
    words = ["--quick", "--output-dir", str(tmp_path)]
    assert group_size.main(words) == 130
    assert "2 of 8 rows are kept; the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "results.json").exists()
    kept = (tmp_path / "rows.jsonl").read_text()
    monkeypatch.setattr(group_size, "measure_cost", whole)
    assert group_size.main(words) == 0
    assert (tmp_path / "rows.jsonl").read_text().startswith(kept)


def test_numbers_of_different_settings_are_not_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(group_size, "QUICK", MICRO)
    run(group_size, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        group_size.main(["--quick", "--output-dir", str(tmp_path), "--masks", "3"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "holds a study with masks 2, not 3; give another --output-dir" in message
    assert message.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


WRONG = {
    "no masks": (grouping, ["--masks", "0"], "'0' must be a whole number of at least 1"),
    "an unknown variant": (time_and_memory, ["--points", "huge:224:1"], "'huge:224:1' must be variant:pixels:batch"),
    "an odd size": (time_and_memory, ["--points", "tiny:200:1"], "multiple of the mask unit size 32"),
    "an unknown study": (run_all, ["--only", "speed"], "'speed' must be one of group_size, grouping"),
    "an unknown flag": (energy, ["--epoch", "1"], "unrecognized arguments: --epoch 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_line(case, tmp_path, monkeypatch, capsys):
    script, words, message = WRONG[case]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main(words)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_the_folder_is_one_line(tmp_path):
    file = tmp_path / "taken"
    file.write_text("mine")
    command = [sys.executable, str(ROOT / "examples/studies/grouping.py"), "--quick", "--output-dir", str(file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "grouping.py: error: output folder" in done.stderr
    assert file.read_text() == "mine"


def test_a_study_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    seen = []

    def run_study(name, flags):
        seen.append(name)
        folder = Path(flags[flags.index("--output-dir") + 1])
        folder.mkdir(parents=True)
        study_kit.replace_text(folder / "table.md", f"# {name}\n\n![plot](plot.png)\n")
        return int(name == "grouping")

    monkeypatch.setattr(run_all, "run_study", run_study)
    assert run_all.main(["--quick", "--output-dir", str(tmp_path)]) == 1
    assert tuple(seen) == run_all.STUDIES
    assert "Failed: grouping" in capsys.readouterr().out
    assert "![plot](energy/plot.png)" in (tmp_path / "README.md").read_text()


SLOW_TO_STOP = """
import pathlib, sys, time
try:
    pathlib.Path("started").touch()
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(1)
    print("Stopped.", flush=True)
    sys.exit(130)
"""


def test_ctrl_c_gives_the_running_study_the_time_to_say_what_is_kept(tmp_path):
    (tmp_path / "grouping.py").write_text(SLOW_TO_STOP)
    code = "import sys, pathlib; from studies import run_all; run_all.FOLDER = pathlib.Path.cwd(); "
    code += "sys.exit(run_all.main(['--only', 'grouping', '--output-dir', 'out']))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "examples")])}
    command = [sys.executable, "-c", code]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what is in its background deaf to Ctrl-C, and tests may run there.
    hear = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, preexec_fn=hear, **pipes
    ) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "started").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to both
        out, error = process.communicate()
    assert (process.returncode, error) == (130, "")
    assert out.endswith("Stopped.\n")
