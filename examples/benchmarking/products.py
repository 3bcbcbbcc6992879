"""The matrix products of a step: recorded below autograd, then timed one by one with operands of the same layout.

Products are matrix multiplications and convolutions of the forward and the backward pass; kernels that fuse a whole
attention are recorded as well and told apart, since their time is more than that of their products.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "_scaled_mm", "linear", "convolution", "convolution_backward"}
PRODUCTS |= {"mkldnn_linear", "mkldnn_linear_backward_input", "mkldnn_linear_backward_weights", "_addmm_activation"}
ATTENTION_KERNELS = ("_scaled_dot_product", "_flash_attention", "_efficient_attention")
LEAST_POOL_BYTES = 128 * 2**20  # more than the caches of most machines, so that operands come from memory


@dataclass(frozen=True)
class Operand:
    """Layout of a tensor argument."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def extent(self) -> int:
        """Elements of memory from the first to the last one."""
        steps = zip(self.shape, self.stride, strict=True)
        return 1 + sum((size - 1) * stride for size, stride in steps) if prod(self.shape) else 0


@dataclass
class Product:
    """One operation with its arguments; tensors stand as `Operand`.

    Attributes:
        count: how often the step runs it.
        flops: floating-point operations of one run, a multiply-add being two; `None` if torch has no formula.
    """

    function: Any
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    flops: int | None
    count: int = 0

    @property
    def name(self) -> str:
        return self.function.overloadpacket.__name__

    @property
    def is_attention_kernel(self) -> bool:
        return is_attention_kernel(self.name)

    @property
    def operands(self) -> list[Operand]:
        leaves = tree_leaves((self.arguments, self.keywords))
        return [leaf for leaf in leaves if isinstance(leaf, Operand)]

    def describe(self) -> dict[str, Any]:
        matrices = [operand for operand in self.operands if len(operand.shape) > 1]
        shapes = " @ ".join("x".join(map(str, operand.shape)) for operand in matrices[-2:])
        return {
            "operation": self.name,
            "shapes": shapes,
            "dtype": str(matrices[-1].dtype).removeprefix("torch."),
            "count": self.count,
            "flops": self.flops,
            "attention_kernel": self.is_attention_kernel,
        }


def is_attention_kernel(name: str) -> bool:
    return any(part in name for part in ATTENTION_KERNELS)


def count_flops(function: Any, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Any) -> int | None:
    """Floating-point operations by torch's formulas; of the fused attention on a CPU by ours."""
    name = function.overloadpacket.__name__
    if function.overloadpacket in flop_registry:
        return int(flop_registry[function.overloadpacket](*arguments, **keywords, out_val=output))
    if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        is_backward = name.endswith("backward")
        query, key = tensors[1:3] if is_backward else tensors[:2]
        batch_heads_queries_width = query.numel()
        return (10 if is_backward else 4) * batch_heads_queries_width * key.shape[2]
    return None


@dataclass
class ProductRecorder(TorchDispatchMode):
    """Records every product run inside its context, also by the backward pass."""

    found: dict[str, Product] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in PRODUCTS or is_attention_kernel(name):
            arguments, keywords = tree_map(_as_operand, (args, kwargs))
            key = f"{func} {arguments} {keywords}"
            if key not in self.found:
                flops = count_flops(func, args, kwargs, output)
                self.found[key] = Product(func, arguments, keywords, flops)
            self.found[key].count += 1
        return output


def _as_operand(value: Any) -> Any:
    return Operand(tuple(value.shape), tuple(value.stride()), value.dtype) if isinstance(value, Tensor) else value


def record_products(function: Callable[[], Any]) -> list[Product]:
    """The different products that a call runs, in the order of their first run."""
    with ProductRecorder() as recorder:
        function()
    return list(recorder.found.values())


class OperandPool:
    """Memory with random numbers from which operands are cut, each at another place than the one before.

    So an operand is not in the cache because it was used a moment ago, as weights are not in a step.
    """

    def __init__(self, products: list[Product], device: str):
        self._memory: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}
        for product in products:
            for dtype in {operand.dtype for operand in product.operands}:
                wanted = 2 * sum(_rounded(operand) for operand in product.operands if operand.dtype == dtype)
                least = LEAST_POOL_BYTES // dtype.itemsize
                if len(self._memory.get(dtype, ())) < max(wanted, least):
                    self._memory[dtype] = _random_numbers(max(wanted, least), dtype, device)
                    self._next[dtype] = 0

    def take(self, operand: Operand) -> Tensor:
        memory, start = self._memory[operand.dtype], self._next[operand.dtype]
        if start + operand.extent > len(memory):
            start = 0
        self._next[operand.dtype] = start + _rounded(operand)
        return memory.as_strided(operand.shape, operand.stride, start)


def _rounded(operand: Operand) -> int:
    """Elements that keep the next operand aligned to 64 bytes."""
    return -(-operand.extent // 64) * 64


def _random_numbers(count: int, dtype: torch.dtype, device: str) -> Tensor:
    if not dtype.is_floating_point:
        return torch.zeros(count, dtype=dtype, device=device)
    return torch.randn(count, device=device).mul_(0.1).to(dtype)


@torch.no_grad()
def time_product(product: Product, pool: OperandPool, repeats: int, synchronize: Callable[[], None]) -> float:
    """Seconds of one run, averaged over `repeats` with different operands."""
    calls = []
    for _ in range(repeats):
        cut = [pool.take(leaf) if isinstance(leaf, Operand) else leaf for leaf in _leaves(product)]
        calls.append(_rebuild(product, cut))
    synchronize()
    start = time.perf_counter()
    for arguments, keywords in calls:
        product.function(*arguments, **keywords)
    synchronize()
    return (time.perf_counter() - start) / repeats


def _leaves(product: Product) -> list[Any]:
    return tree_leaves((product.arguments, product.keywords))


def _rebuild(product: Product, leaves: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    remaining = iter(leaves)
    return tree_map(lambda _: next(remaining), (product.arguments, product.keywords))
