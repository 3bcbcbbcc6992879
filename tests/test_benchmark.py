"""The benchmark: what its figures mean, by hand computation, and every part on a micro model."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch
from benchmarking import attention, interleave
from benchmarking.contenders import Contender
from benchmarking.floor import product_seconds
from benchmarking.interleave import Schedule, WorkerFailed, measure_interleaved, round_order
from benchmarking.memory import Allocation, measure_memory, peak_of
from benchmarking.products import Operand, OperandPool, record_products, time_product
from benchmarking.profiling import CATEGORIES, profile_step
from benchmarking.rates import leave_out_slow_bf16
from benchmarking.statistics_of_rounds import fit_line, summarize, summarize_ratios
from benchmarking.worker import Session
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
COMMAND = ROOT / "examples" / "benchmark.py"


class LocalWorker:
    """A contender in this process: the same requests without the seconds that a new process takes to start."""

    def __init__(self, contender):
        self.session = Session(contender)
        self.description = {}

    def wait_until_ready(self):
        self.description = self.session.describe()

    def ask(self, do, **arguments):
        reply = json.loads(json.dumps(self.session.answer({"do": do, **arguments})))
        if "error" in reply:
            raise WorkerFailed(reply["error"])
        return reply

    def close(self):
        pass


@pytest.fixture
def local_workers(monkeypatch):
    monkeypatch.setattr(interleave, "start_worker", LocalWorker)


def run_quick(tmp_path, *words):
    output = tmp_path / "report.json"
    assert benchmark.main([*map(str, words), "--quick", "--output", str(output)]) == 0
    return json.loads(output.read_text())


class TestStatistics:
    def test_summary(self):
        assert summarize([4.0, 1.0, 3.0, 2.0]) == {"median": 2.5, "q1": 1.75, "q3": 3.25, "min": 1.0, "max": 4.0}
        assert summarize([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "min": 2.0, "max": 2.0}

    def test_ratio_is_the_median_of_pairs_so_that_a_drift_cancels(self):
        drift = [1.0, 2.0, 8.0]
        ratio = summarize_ratios([0.5 * each for each in drift], drift)
        assert (ratio["median"], ratio["min"], ratio["max"]) == (0.5, 0.5, 0.5)
        assert summarize_ratios([1, 10, 6], [1, 5, 2])["median"] == 2  # the ratio of the medians would be 3

    def test_line(self):
        line = fit_line([1, 2, 4], [5, 7, 11])
        assert (line["intercept"], line["slope"], line["r2"]) == pytest.approx((3, 2, 1))


class TestInterleaving:
    def test_each_contender_stands_at_each_place_equally_often(self):
        orders = [round_order("ABC", index) for index in range(6)]
        assert ["".join(order) for order in orders] == ["ABC", "BCA", "CAB", "CBA", "ACB", "BAC"]
        assert ["".join(round_order("AB", index)) for index in range(4)] == ["AB", "BA", "BA", "AB"]

    def test_rounds_interleave_and_a_failing_contender_is_left_out(self, monkeypatch):
        asked = []

        class Scripted:
            def __init__(self, contender):
                self.contender, self.description = contender, {"name": contender.variant}

            def wait_until_ready(self):
                if self.contender.variant == "never ready":
                    raise WorkerFailed("not supported")

            def ask(self, do, **arguments):
                asked.append((self.contender.variant, do))
                if self.contender.variant == "C" and do == "timed":
                    raise WorkerFailed("out of memory")
                return {"seconds": 1.0, "do": do}

            def close(self):
                asked.append((self.contender.variant, "close"))

        monkeypatch.setattr(interleave, "start_worker", Scripted)
        contenders = [Contender("greenswin", variant, 64, 1) for variant in ("A", "B", "C", "never ready")]
        schedule = Schedule(rounds=2, warmup=1, pause=0)
        done = measure_interleaved(contenders, schedule, action="timed", after=[{"do": "memory"}])
        assert asked == [
            *[(name, "step") for name in "ABC"],
            *[(name, "timed") for name in "ABC"],
            *[(name, "timed") for name in "BA"],
            *[(name, "memory") for name in "AB"],
            *[(name, "close") for name in ("A", "B", "C", "never ready")],
        ]
        assert [each.failure for each in done] == ["", "", "out of memory", "not supported"]
        assert [len(each.rounds) for each in done] == [2, 2, 0, 0]
        assert done[0].after == {"seconds": 1.0, "do": "memory"}


class TestMemory:
    def test_peak_by_hand(self):
        trace = [Allocation(1, 8), Allocation(2, 4), Allocation(1, -8), Allocation(3, 6), Allocation(2, -4)]
        assert peak_of(trace) == 12
        assert peak_of(trace, frozenset({3})) == 12  # block 3 came after the peak
        assert peak_of(trace, frozenset({2})) == 12  # given back: not held at the end, so it counts
        assert peak_of([Allocation(1, 8), Allocation(2, 4)], frozenset({1})) == 4
        # The address of a released block is used again by one that is left out.
        assert peak_of([Allocation(1, 8), Allocation(1, -8), Allocation(1, 9)], frozenset({1})) == 8

    def test_activations_of_a_known_model_to_the_byte(self):
        model = nn.Sequential(nn.Linear(16, 64, bias=False), nn.ReLU(), nn.Linear(64, 32, bias=False))
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        images = torch.randn(8, 16)

        def step():
            model(images).sum().backward()
            optimizer.step()

        step()
        found = measure_memory(model, optimizer, step)
        weights = 4 * (16 * 64 + 64 * 32)
        assert found["weights_bytes"] == found["gradients_bytes"] == weights
        assert found["optimizer_bytes"] == 2 * weights + 2 * 4  # two moments, and a step count for each tensor
        # Most is held when the ReLU's backward pass ends: its output, the gradients of its output and of its input,
        # and of one number each the loss and the loss's gradient. Gradients of weights are not among them.
        hidden, scalar = 4 * 8 * 64, 4
        assert found["activations_bytes"] == 3 * hidden + 2 * scalar
        assert found["peak_above_start_bytes"] > found["activations_bytes"]

    def test_an_inference_pass_has_no_gradients(self):
        model = nn.Linear(4, 4)

        @torch.no_grad()
        def step():
            model(torch.ones(2, 4))

        found = measure_memory(model, None, step)
        assert (found["gradients_bytes"], found["optimizer_bytes"]) == (0, 0)
        assert found["activations_bytes"] == 2 * 4 * 4 * 2  # input and output


class TestProducts:
    def test_flops_of_a_linear_layer_by_hand(self):
        layer, images = nn.Linear(5, 7), torch.randn(2, 3, 5, requires_grad=True)
        products = record_products(lambda: layer(images).sum().backward())
        # Forward, gradient of the input, gradient of the weight: each 2 * 6 * 5 * 7 operations.
        assert sum(product.count for product in products) == 3
        assert [product.flops for product in products] == [420, 420, 420]
        assert {product.name for product in products} == {"addmm", "mm"}

    def test_equal_products_are_counted_and_layouts_told_apart(self):
        a = torch.randn(4, 4)
        products = record_products(lambda: (a @ a, a @ a, a.t() @ a))
        assert [product.count for product in products] == [2, 1]
        assert products[1].operands[0] == Operand((4, 4), (1, 4), torch.float32)

    def test_autocast_products_are_recorded_in_bfloat16(self):
        layer = nn.Linear(8, 8)

        def forward():
            with torch.autocast("cpu", torch.bfloat16):
                layer(torch.randn(2, 8))

        (product,) = record_products(forward)
        assert {operand.dtype for operand in product.operands} == {torch.bfloat16}

    def test_fused_attention_is_a_product_with_a_time_of_its_own(self):
        query = torch.randn(2, 3, 16, 8, requires_grad=True)

        def attend():
            nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()

        products = [product for product in record_products(attend) if product.is_attention_kernel]
        forward, backward = 4 * 2 * 3 * 16 * 16 * 8, 10 * 2 * 3 * 16 * 16 * 8
        assert [product.flops for product in products] == [forward, backward]
        pool = OperandPool(products, "cpu")
        assert all(time_product(product, pool, 2, lambda: None) > 0 for product in products)

    def test_operands_have_the_recorded_layout_and_never_stand_at_the_same_place_twice_running(self):
        product = record_products(lambda: torch.randn(3, 4).t() @ torch.randn(3, 1).expand(3, 5))[0]
        pool = OperandPool([product], "cpu")
        for operand in product.operands:
            tensors = [pool.take(operand) for _ in range(2)]
            assert all(Operand(tuple(t.shape), t.stride(), t.dtype) == operand for t in tensors)
            assert tensors[0].data_ptr() != tensors[1].data_ptr()

    def test_time_of_a_step_is_count_times_time_of_one_run(self):
        products = [{"count": 3, "attention_kernel": False}, {"count": 2, "attention_kernel": True}]
        assert product_seconds(products, [0.5, 7.0], attention_kernels=False) == 1.5
        assert product_seconds(products, [0.5, 7.0], attention_kernels=True) == 14


class TestProfile:
    def test_time_goes_to_the_categories_of_what_ran(self):
        layer, norm = nn.Linear(64, 64), nn.LayerNorm(64)
        x, index = torch.randn(512, 64), torch.randint(512, (512,))

        def compute():
            scores = torch.randn(2, 2, 16, 16) + torch.randn(16, 16)
            nn.functional.gelu(norm(layer(x)).index_select(0, index)).to(torch.float64).sum()
            scores.softmax(-1) @ scores

        found = profile_step(compute, image_size=64, use_cuda=False)
        used = {name for name, seconds in found["categories"].items() if seconds > 0}
        assert {"products", "attention", "norm", "gathers", "activation", "casts"} <= used
        assert found["categories"]["optimizer"] == 0
        assert set(found["categories"]) == {*CATEGORIES, "host", "other"}


class TestParts:
    """Each part with `--quick`; nothing is said of times."""

    def test_training_in_processes_as_a_user_runs_it(self, tmp_path):
        words = ["training", "--quick", "--contenders", "greenswin,simmim", "--masks", "per-image"]
        output = tmp_path / "deep" / "report.json"
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(COMMAND), *words, "--output", str(output)],
            capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert f"Wrote {output}" in done.stdout
        assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        report = json.loads(output.read_text())
        assert {"machine", "versions", "date", "arguments", "results"} == set(report)
        assert {"torch", "transformers", "python", "green-swin-hf"} <= set(report["versions"])
        (setting,) = report["results"]["settings"]
        ours, simmim = setting["rows"]
        assert simmim["ratio"] == simmim["activations_ratio"] == 1
        assert ours["activations_ratio"] < 1
        assert ours["process_peak_MB"] > ours["activations_MB"] + ours["weights+optimizer_MB"]
        assert ours["weights+optimizer_MB"] == pytest.approx(16 * ours["all_M"], rel=0.02)
        steps = [len(each["rounds"]) for each in setting["measurements"]]
        assert steps == [2, 2]

    def test_training_of_all_contenders(self, tmp_path, local_workers):
        report = run_quick(tmp_path, "training", "--precision", "bf16")
        (setting,) = report["results"]["settings"]
        labels = [row["contender"] for row in setting["rows"]]
        assert labels == [
            "GreenSwin, shared masks",
            "GreenSwin, per-image masks",
            "SimMIM (stock Swin)",
            "Hiera, ratio 0.6",
            "Hiera, ratio 0.75",
            "ViT-MAE",
        ]
        assert setting["masks"]["activations_ratio"] > 0
        assert setting["masks"]["time_ratio"]["min"] <= setting["masks"]["time_ratio"]["median"]

    def test_a_contender_that_does_not_exist_is_named_with_the_reason(self, tmp_path, monkeypatch, capsys):
        class Missing(LocalWorker):
            def wait_until_ready(self):
                raise WorkerFailed("NotBuilt: no such model")

        monkeypatch.setattr(interleave, "start_worker", Missing)
        report = run_quick(tmp_path, "training", "--contenders", "vitmae")
        assert report["results"]["settings"][0]["rows"] == []
        assert "not measured: ViT-MAE: NotBuilt: no such model" in capsys.readouterr().out

    def test_dense(self, tmp_path, local_workers):
        inference, training = run_quick(tmp_path, "dense")["results"]["settings"]
        assert [row["contender"] for row in inference["rows"]] == ["GreenSwin", "stock Swin"]
        assert len({row["all_M"] for row in [*inference["rows"], *training["rows"]]}) == 1
        assert training["rows"][0]["weights+optimizer_MB"] > 3.9 * inference["rows"][0]["weights+optimizer_MB"]

    def test_floor(self, tmp_path, local_workers):
        (setting,) = run_quick(tmp_path, "floor", "--masks", "shared")["results"]["settings"]
        for row, measurement in zip(setting["floors"], setting["measurements"], strict=True):
            assert row["floor_s"] > 0
            assert row["distance"] > 0
            flops = sum(product["count"] * product["flops"] for product in measurement["after"]["products"])
            assert row["GFLOP"] == pytest.approx(flops / 1e9)
        ours, dense = setting["floors"]
        assert ours["GFLOP"] < dense["GFLOP"]
        for row in setting["profiles"]:
            assert sum(value for name, value in row.items() if name != "contender") == pytest.approx(100)
            assert row["other"] < 15, row

    def test_scaling(self, tmp_path, local_workers):
        (setting,) = run_quick(tmp_path, "scaling", "--masks", "shared")["results"]["settings"]
        # 64 px: 4 mask units, 3 masked; 128 px: 16 and 12; 192 px: 36 and 27; 64 patches of each unit are tokens.
        assert [row["visible_tokens"] for row in setting["size"]["rows"]] == [64, 256, 576]
        assert [row["visible_tokens"] for row in setting["batch"]["rows"]] == [64, 128, 256]
        assert setting["size"]["rows"][0]["relative"] == 1
        assert setting["size"]["line"]["slope"] != 0

    def test_plans(self, tmp_path):
        results = run_quick(tmp_path, "plans")["results"]
        assert [(row["size"], row["masks"]) for row in results["rows"]] == [
            (64, "shared"), (64, "per-image"), (128, "shared"), (128, "per-image"),
        ]  # fmt: skip
        assert [len(times) for times in results["times"]] == [3] * 4

    def test_attention(self, tmp_path):
        (setting,) = run_quick(tmp_path, "attention", "--masks", "per-image")["results"]["settings"]
        assert [(row["stage"], row["attention"]) for row in setting["rows"]] == [
            (stage, "eager") for stage in (1, 2, 3, 4)
        ]
        assert [len(times["seconds"]["eager"]) for times in setting["times"]] == [2] * 4

    def test_implementations_of_attention_take_turns_at_being_first(self):
        asked = []
        steps = {name: functools.partial(asked.append, name) for name in "abc"}
        times = attention.time_in_turns(steps, warmup=1, rounds=2)
        assert "".join(asked) == "abcbcacab"
        assert {name: len(seconds) for name, seconds in times.items()} == {"a": 2, "b": 2, "c": 2}

    def test_compile(self, tmp_path, local_workers):
        torch.compiler.reset()
        (setting,) = run_quick(tmp_path, "compile", "--masks", "per-image")["results"]["settings"]
        dense, visible = setting["rows"]
        assert dense["recompilations"] == 0
        assert dense["graphs"] >= 1
        assert visible["over_masks"] == 2 * 2 + 4

    def test_everything_one_after_another(self, tmp_path, monkeypatch, capsys):
        asked = []

        def pretend(part):
            def measure(arguments):
                asked.append((part.name, getattr(arguments, "sizes", None)))
                return {"rows": []}

            return SimpleNamespace(**vars(part) | {"measure": measure, "draw": None})

        monkeypatch.setattr(benchmark, "PARTS", tuple(map(pretend, benchmark.PARTS)))
        output = tmp_path / "all.json"
        assert benchmark.main(["--sizes", "96", "--output", str(output)]) == 0
        names = ["training", "dense", "floor", "attention", "scaling", "plans", "compile", "grouping"]
        assert asked == [(name, None if name == "grouping" else [96]) for name in names]
        assert list(json.loads(output.read_text())["results"]) == names
        assert "one after another" in capsys.readouterr().out


WRONG_INPUT = {
    "part": ("trainin", "invalid choice: 'trainin'"),
    "size": ("training --sizes 100", "100 must be a multiple of the mask unit size 32"),
    "size of one unit": ("plans --sizes 32", "32 must be at least 64"),
    "variant": ("--variants huge", "'huge' must be one of tiny, small, base, large, micro"),
    "precision": ("floor --precision fp8", "'fp8' must be one of fp32, bf16"),
    "masks": ("scaling --masks both", "'both' must be one of shared, per-image"),
    "ratio": ("training --mask-ratio 1", "'1' must be a number above 0 and below 1"),
    "rounds": ("dense --rounds 0", "'0' must be a whole number of at least 1"),
    "contender": ("training --contenders mae", "'mae' must be one of greenswin, simmim, hiera, vitmae"),
    "output": ("plans --output report.png", "'report.png' must be the name of a file that ends in .json"),
    "output that cannot be written": ("plans --output /dev/null/report.json", "cannot be written: "),
    "attention": ("attention --attention flash", "'flash' must be one of eager, sdpa, flex_attention, triton_window"),
    "grouping": ("grouping --image-size 100", "100 must be a multiple of the mask unit size 32"),
}


@pytest.mark.parametrize(("words", "message"), WRONG_INPUT.values(), ids=WRONG_INPUT.keys())
def test_wrong_input_is_one_line_and_exit_code_2(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(words.split())
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2
    assert len(lines) == 1, lines
    assert message in lines[0]


def test_bf16_is_left_out_by_default_where_it_is_slow_and_that_is_said(monkeypatch, capsys):
    rates = {"fp32": 60e9, "bf16": 2e9}
    monkeypatch.setattr("benchmarking.rates.measure_rate", lambda device, precision: rates[precision])
    assert leave_out_slow_bf16(["fp32", "bf16"], "cpu") == ["fp32"]
    assert "bf16 is left out: a product reaches 2.0 GFLOP/s here, 60.0 in fp32" in capsys.readouterr().out
    assert leave_out_slow_bf16(["fp32", "bf16"], "cuda") == ["fp32", "bf16"]
    rates["bf16"] = 100e9
    assert leave_out_slow_bf16(["fp32", "bf16"], "cpu") == ["fp32", "bf16"]


def test_an_unknown_backend_is_one_line_and_exit_code_2(capsys):
    assert benchmark.main(["compile", "--backend", "inducter"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--backend 'inducter' must be one of" in line
    assert "inductor" in line


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plans --quick --group-sizes 3", "--group-sizes: group_size 3 must be"),
        ("attention --attention triton_window", "--attention triton_window does not run on cpu"),
    ],
)
def test_what_a_part_refuses_is_one_line_and_exit_code_2(words, message, capsys):
    assert benchmark.main(words.split()) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert message in line


def test_a_missing_gpu_is_one_line_and_exit_code_2(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main(["training", "--device", "cuda"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "--device cuda: torch finds no GPU here" in line
