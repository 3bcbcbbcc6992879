"""Fused attention of visible tokens against the plain path: values, gradients, and who runs when.

Where there is a CUDA GPU the kernels run on it. Elsewhere `test_kernels_through_the_interpreter` runs this file once
more with Triton's interpreter, which must be chosen before Triton is imported.
"""

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import images, masks, randomised, seeded, tiny_config
from torch import Tensor
from transformers import AutoModelForMaskedImageModeling
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForMaskedImageModeling,
    GreenSwinModel,
    SparseGeometry,
    build_sparse_plan,
    gpu_attention,
    modeling_green_swin,
)
from green_swin_hf.attention_variants import IMPLEMENTATIONS, window_attention
from green_swin_hf.sparse_plan import GroupingPlan
from green_swin_hf.token_layout import VisibleLayout

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
runs_kernels = pytest.mark.skipif(
    not (HAS_TRITON and (INTERPRETED or HAS_GPU)),
    reason="no CUDA GPU: run by test_kernels_through_the_interpreter where Triton is installed",
)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="no CUDA GPU")
not_interpreted = pytest.mark.skipif(INTERPRETED, reason="not through the interpreter")
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")


@not_interpreted
@needs_triton
def test_kernels_through_the_interpreter():
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = {**hidden, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=", str(Path(__file__))]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1], timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    assert "test_kernels" not in done.stdout or "passed" in done.stdout


@pytest.fixture(autouse=True)
def _interpreted_bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as integers, which its matrix product takes for numbers."""
    if INTERPRETED:
        import triton.language as tl
        from triton.runtime.interpreter import InterpreterBuilder

        plain = InterpreterBuilder.create_dot

        def widened(self, left, right, *rest):
            if left.dtype.scalar == tl.bfloat16:
                left, right = self.cast_impl(left, tl.float32), self.cast_impl(right, tl.float32)
            return plain(self, left, right, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_dot", widened)


# One attention


@dataclass(frozen=True)
class Case:
    """One attention: a window partition, rows, heads and channels of a head."""

    window: int = 7
    shifted: bool = False
    stage: int = 0
    group_size: int | str = "optimal"
    kind: str = "shared"
    rows: int = 2
    heads: int = 2
    d: int = 16
    grid_of_units: int = 4
    changes: dict[str, Any] = field(default_factory=dict)

    def plan(self) -> GroupingPlan:
        config = GreenSwinConfig(
            image_size=8 * self.grid_of_units,
            patch_size=2,
            embed_dim=8,
            depths=(2, 2, 2),
            num_heads=(1, 2, 4),
            window_size=self.window,
            group_size=self.group_size,
        )
        images_of_plan = 1 if self.kind == "shared" else 3
        plan = build_sparse_plan(
            masks(self.kind, images_of_plan, (self.grid_of_units,) * 2), SparseGeometry.from_config(config)
        )
        stage = plan.stages[self.stage]
        return (stage.shifted if self.shifted else stage.regular).to(DEVICE)

    def inputs(self, plan: GroupingPlan, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Query, key and value as slices of one product, and the position table; leaves of the graph."""
        tokens = plan.slot_window.numel() if plan.scatter_index is None else len(plan.scatter_index)
        rows, channels = (self.rows if self.kind == "shared" else 1), self.heads * self.d
        product = torch.randn(rows, tokens, 3 * channels, generator=seeded(1)).to(DEVICE, dtype)
        table = torch.randn((2 * plan.table_window_size - 1) ** 2, self.heads, generator=seeded(2)).to(DEVICE)
        return [tensor.detach().requires_grad_() for tensor in (*product.chunk(3, dim=-1), table)]


CASES = {
    "window 7": Case(rows=2),
    "window 7, shifted, one head of 32": Case(shifted=True, rows=1, heads=1, d=32),
    "mask per image, three heads of 24": Case(kind="per_image", rows=1, heads=3, d=24),
    "unequal counts, shifted, four heads": Case(kind="unequal", shifted=True, rows=1, heads=4, stage=1),
    "window 14, groups of 196": Case(window=14, group_size=196, kind="unequal", heads=1, grid_of_units=7),
    "windows of a group in several blocks": Case(window=4, group_size=80, shifted=True, rows=1, grid_of_units=5),
    "tokens as they stand": Case(stage=2, rows=3, d=64),
    "narrow heads, table of a larger window": Case(window=9, stage=1, d=8),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def test_the_cases_are_what_they_say():
    plans = {name: case.plan() for name, case in CASES.items()}
    assert plans["tokens as they stand"].gather_index is None
    assert plans["window 14, groups of 196"].group_size == 196
    assert plans["windows of a group in several blocks"].group_size == 80
    moved = [plan for plan in plans.values() if plan.gather_index is not None]
    assert sum(plan.num_groups > 1 for plan in moved) >= 4
    assert any((plan.slot_window < 0).any() for plan in moved)


def values_and_gradients(implementation: str, inputs: list[Tensor], plan: GroupingPlan) -> list[Tensor]:
    output = window_attention(implementation, *inputs, VisibleLayout(plan, None))
    weights = torch.randn(output.shape, generator=seeded(3)).to(output)
    return [output, *torch.autograd.grad(output, inputs, weights)]


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Differences relative to the largest number of each tensor."""
    for name, ours, theirs in zip(("output", "query", "key", "value", "table"), found, expected, strict=False):
        assert ours.shape == theirs.shape, name
        error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
        assert error <= tolerance, f"{name}: {error:.1e}"


@runs_kernels
@each_case
def test_triton_equals_the_plain_path(case):
    plan = case.plan()
    inputs = case.inputs(plan)
    expected = values_and_gradients("eager", [tensor.double() for tensor in inputs], plan)
    found = values_and_gradients("triton_window", inputs, plan)
    assert [tensor.dtype for tensor in found] == [torch.float32] * 5
    assert_close(found, expected, 1e-5)


@runs_kernels
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)], ids=["bf16", "fp16"])
def test_triton_in_half_precision(dtype, tolerance):
    case = CASES["window 7, shifted, one head of 32"]
    plan = case.plan()
    inputs = case.inputs(plan, dtype)
    expected = values_and_gradients("eager", [tensor.detach().double().requires_grad_() for tensor in inputs], plan)
    found = values_and_gradients("triton_window", inputs, plan)
    assert [tensor.dtype for tensor in found] == [dtype] * 4 + [torch.float32]
    assert_close(found, expected, tolerance)


@runs_kernels
def test_triton_takes_tensors_of_any_strides():
    case = CASES["tokens as they stand"]
    plan = case.plan()
    query, key, value, table = case.inputs(plan)
    expected = values_and_gradients("triton_window", [query, key, value, table], plan)
    half = table.detach().to(torch.bfloat16).float()
    transposed = key.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    found = values_and_gradients(
        "triton_window", [query.detach().clone().requires_grad_(), transposed, value, table], plan
    )
    assert_close(found, expected, 1e-6)
    stored = half.t().contiguous().t().to(torch.bfloat16).requires_grad_()
    in_half = values_and_gradients("triton_window", [query, key, value, stored], plan)
    assert in_half[4].dtype == torch.bfloat16
    assert_close(in_half, values_and_gradients("triton_window", [query, key, value, half.requires_grad_()], plan), 1e-2)


@runs_kernels
def test_other_windows_and_pads_have_no_part_in_triton():
    """Bit for bit: the output of a window's tokens does not depend on the other tokens."""
    case = CASES["windows of a group in several blocks"]
    plan = case.plan()
    query, key, value, table = (tensor.detach() for tensor in case.inputs(plan))
    before = window_attention("triton_window", query, key, value, table, VisibleLayout(plan, None))
    window = plan.slot_window.flatten()[plan.scatter_index]
    own = window == window[0]
    assert not own.all()
    changed = [torch.where(own[:, None], tensor, 100 * tensor) for tensor in (key, value)]
    after = window_attention("triton_window", query, *changed, table, VisibleLayout(plan, None))
    assert torch.equal(before[:, own], after[:, own])


@runs_kernels
def test_the_operators_keep_torchs_rules():
    from green_swin_hf.triton_attention import _window_attention

    case = CASES["tokens as they stand"]
    plan = case.plan()
    arguments = (*case.inputs(plan), None, plan.slot_window, plan.slot_position, plan.table_window_size)
    checks = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(_window_attention, arguments, test_utils=checks)


@runs_kernels
def test_triton_in_torch_compile():
    case = CASES["unequal counts, shifted, four heads"]
    plan = case.plan()
    inputs = case.inputs(plan)
    compiled = torch.compile(window_attention, backend="inductor" if HAS_GPU else "aot_eager", fullgraph=True)
    output = compiled("triton_window", *inputs, VisibleLayout(plan, None))
    gradients = torch.autograd.grad(output.square().sum(), inputs)
    plain = window_attention("triton_window", *inputs, VisibleLayout(plan, None))
    expected = torch.autograd.grad(plain.square().sum(), inputs)
    assert_close([output, *gradients], [plain, *expected], 1e-5)


@runs_kernels
@pytest.mark.parametrize(
    ("channels", "dtype"), [(32, torch.float64), (2 * 136, torch.float32), (33, torch.float32)], ids=str
)
def test_triton_refuses_what_it_cannot(channels, dtype):
    plan = CASES["tokens as they stand"].plan()
    tokens = torch.zeros(1, plan.group_size, channels, dtype=dtype, device=DEVICE)
    table = torch.zeros((2 * plan.table_window_size - 1) ** 2, 2, device=DEVICE)
    with pytest.raises(
        ValueError, match="Triton kernels take float32, float16 or bfloat16 on CUDA and heads of at most"
    ):
        window_attention("triton_window", tokens, tokens, tokens, table, VisibleLayout(plan, None))


@runs_kernels
def test_triton_refuses_a_plan_of_other_tokens():
    case = CASES["tokens as they stand"]
    plan = case.plan()
    query, key, value, table = case.inputs(plan)
    fewer = [tensor[:, 1:] for tensor in (query, key, value)]
    for wrong in ((*fewer, table), (query, key[:1], value, table), (query, key, value, table[1:])):
        with pytest.raises(ValueError, match=r"do not fit a plan of \d+ tokens and \d+ rows"):
            window_attention("triton_window", *wrong, VisibleLayout(plan, None))


@not_interpreted
@each_case
def test_flex_attention_equals_the_plain_path(case):
    plan = case.plan()
    inputs = case.inputs(plan)
    if HAS_GPU and case.d >= 16:
        expected = values_and_gradients("eager", [tensor.double() for tensor in inputs], plan)
        assert_close(values_and_gradients("flex_attention", inputs, plan), expected, 1e-5)
    elif not HAS_GPU:  # torch has no gradients of it on a CPU
        inputs = [tensor.detach() for tensor in inputs]
        expected = window_attention("eager", *(tensor.double() for tensor in inputs), VisibleLayout(plan, None))
        assert_close([window_attention("flex_attention", *inputs, VisibleLayout(plan, None))], [expected], 1e-5)


@not_interpreted
@each_case
def test_sdpa_equals_the_plain_path(case):
    plan = case.plan()
    inputs = [tensor.detach() for tensor in case.inputs(plan)]
    expected = window_attention("eager", *inputs, VisibleLayout(plan, None))
    assert_close([window_attention("sdpa", *inputs, VisibleLayout(plan, None))], [expected], 1e-5)


def test_an_unknown_implementation_is_named():
    plan = CASES["tokens as they stand"].plan()
    with pytest.raises(ValueError, match="implementation 'nonsense' must be one of"):
        window_attention("nonsense", *CASES["tokens as they stand"].inputs(plan), VisibleLayout(plan, None))


@needs_gpu
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_waits_for_the_gpu(implementation):
    case = CASES["window 7"]
    plan = case.plan()
    inputs = case.inputs(plan)
    values_and_gradients(implementation, inputs, plan)  # compiles
    weights = torch.randn_like(inputs[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.grad(window_attention(implementation, *inputs, VisibleLayout(plan, None)), inputs, weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Kernels for GPUs that are not here


@not_interpreted
@needs_triton
@pytest.mark.parametrize(
    ("capability", "type_name", "d", "block"),
    [(80, "bf16", 32, 64), (90, "fp16", 24, 16)],
)
def test_kernels_compile_without_a_gpu(capability, type_name, d, block, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from green_swin_hf import triton_attention

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"d": d, "D": 32, "BLOCK": block, "COPIES": 32}
    floats = {"table_ptr", "log_sum_ptr", "table_gradient_ptr", "product_ptr"}
    types = {"index_ptr": "*i64", "window_ptr": "*i32", "position_ptr": "*i32", "scale": "fp32"}

    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in types:
            return types[name]
        return ("*fp32" if name in floats else f"*{type_name}") if name.endswith("_ptr") else "i32"

    for kernel in ("_forward_kernel", "_query_gradient_kernel", "_key_gradient_kernel"):
        function = getattr(triton_attention, kernel)
        signature = {name: type_of(name) for name in function.arg_names}
        own = {(i,): constants[name] for i, name in enumerate(function.arg_names) if name in constants}
        options = {"num_warps": max(block // 16, 1), "num_stages": 1}
        binary = compile(ASTSource(function, signature, own), target=GPUTarget("cuda", capability, 32), options=options)
        assert binary.metadata.shared <= 99 * 1024, "more shared memory than the smallest of these GPUs has"
        assert "mma" in binary.asm["ptx"], "tensor cores"


# The model


@pytest.fixture
def kernel_calls(monkeypatch):
    """Heads of every call of the Triton kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from green_swin_hf import triton_attention

    calls, real = [], triton_attention.triton_window_attention

    def counted(query, key, value, table, plan):
        calls.append(table.shape[1])
        return real(query, key, value, table, plan)

    monkeypatch.setattr(triton_attention, "triton_window_attention", counted)
    return calls


def pretraining(**changes: Any) -> GreenSwinForMaskedImageModeling:
    return randomised(GreenSwinForMaskedImageModeling(tiny_config(**changes))).to(DEVICE).train()


def loss_and_gradients(model: torch.nn.Module, implementation: str, **given: Any) -> dict[str, Tensor]:
    model.set_attn_implementation(implementation)
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return {"loss": loss.detach(), **{name: value.grad.clone() for name, value in model.named_parameters()}}


@runs_kernels
def test_a_model_trains_the_same_with_triton(kernel_calls):
    model = pretraining(depths=(2, 1, 1))
    given = {"pixel_values": images(2).to(DEVICE), "bool_masked_pos": masks("unequal", 2)}
    expected = loss_and_gradients(model, "eager", **given)
    assert kernel_calls == []
    found = loss_and_gradients(model, "triton_window", **given)
    assert kernel_calls == [1, 1, 2, 4]
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


@needs_gpu
def test_a_model_trains_the_same_with_flex_attention(monkeypatch):
    calls, real = [], gpu_attention.flex_window_attention
    monkeypatch.setattr(gpu_attention, "flex_window_attention", lambda *given: calls.append(1) or real(*given))
    model = pretraining(embed_dim=16)
    given = {"pixel_values": images(2).to(DEVICE), "bool_masked_pos": masks("unequal", 2)}
    expected = loss_and_gradients(model, "eager", **given)
    found = loss_and_gradients(model, "flex_attention", **given)
    assert len(calls) == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=1e-4)


@runs_kernels
def test_autocast_with_triton(kernel_calls):
    model = pretraining(depths=(1, 1, 1))
    given = {"pixel_values": images(2).to(DEVICE), "bool_masked_pos": masks("shared", 2)}
    losses = []
    for implementation in ("eager", "triton_window"):
        with torch.autocast(DEVICE.type, torch.bfloat16):
            losses.append(loss_and_gradients(model, implementation, **given)["loss"])
    assert kernel_calls
    torch.testing.assert_close(losses[1], losses[0], atol=0, rtol=2e-2)


FALLBACKS: dict[str, dict[str, Any]] = {
    "whole images": {"masked": False},
    "probabilities": {"arguments": {"output_attentions": True}},
    "dropout": {"fields": {"attention_probs_dropout_prob": 0.5}},
    "float64": {"dtype": torch.float64},
    "determinism": {"deterministic": True},
    "a CPU": {"on_cpu": True},
}


@pytest.mark.parametrize("implementation", ["flex_attention", "triton_window"])
@pytest.mark.parametrize("case", FALLBACKS.values(), ids=FALLBACKS.keys())
def test_the_plain_path_takes_what_the_kernels_do_not(implementation, case, request, monkeypatch):
    calls = request.getfixturevalue("kernel_calls") if implementation == "triton_window" else []
    on_cpu = case.get("on_cpu", False)
    if INTERPRETED and on_cpu:
        pytest.skip("the interpreter is what runs the kernels on a CPU")
    device = torch.device("cpu") if on_cpu else DEVICE
    model = pretraining(**case.get("fields", {})).swin.to(device, case.get("dtype", torch.float32))
    given = {"pixel_values": images(2).to(device, case.get("dtype", torch.float32)), **case.get("arguments", {})}
    if case.get("masked", True):
        given["bool_masked_pos"] = masks("shared", 2)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: case.get("deterministic", False))
    outputs = []
    for name in ("eager", implementation):
        model.set_attn_implementation(name)
        torch.manual_seed(0)
        outputs.append(model(**given).last_hidden_state)
    assert calls == []
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=1e-5)


# Choosing


@not_interpreted
@pytest.mark.parametrize("name", ["flex_attention", pytest.param("triton_window", marks=needs_triton)])
def test_ways_to_choose(name, tmp_path):
    model = GreenSwinForMaskedImageModeling(tiny_config())
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path)
    chosen = [
        GreenSwinForMaskedImageModeling.from_pretrained(tmp_path, attn_implementation=name),
        AutoModelForMaskedImageModeling.from_pretrained(tmp_path, attn_implementation=name),
        AutoModelForMaskedImageModeling.from_config(tiny_config(), attn_implementation=name),
        GreenSwinForMaskedImageModeling(tiny_config(attn_implementation=name)),
    ]
    model.set_attn_implementation(name)
    for each in (*chosen, model):
        attentions = [module for module in each.modules() if hasattr(module, "relative_position_bias_table")]
        assert {attention.config._attn_implementation for attention in attentions} == {name}
    chosen[0].save_pretrained(tmp_path / "again")  # a choice for this machine, not part of the weights
    assert GreenSwinModel.from_pretrained(tmp_path / "again").config._attn_implementation == "sdpa"


def test_without_triton_the_choice_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "green_swin_hf.triton_attention", raising=False)
    with pytest.raises(ImportError, match="need the package triton; choose another attn_implementation"):
        GreenSwinModel._from_config(tiny_config(), attn_implementation="triton_window")
    model = GreenSwinModel(tiny_config())
    with pytest.raises(ImportError, match="need the package triton"):
        model.set_attn_implementation("triton_window")


def test_the_kernels_travel_with_weights_and_ask_nobody_for_triton():
    files = get_relative_import_files(modeling_green_swin.__file__)
    assert {"gpu_attention.py", "triton_attention.py"} <= {Path(file).name for file in files}
    assert not any("triton" in get_imports(file) for file in files)
