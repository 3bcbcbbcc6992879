"""Where a step's time goes: the self time of every operator, summed by category.

An operator without a category of its own (an allocation, a copy) counts where its caller does: the copy inside a cast
is a cast, the one that makes a tensor contiguous is a copy.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

CATEGORIES: dict[str, tuple[str, ...]] = {
    "products": ("mm", "addmm", "convolution", "mkldnn_convolution", "convolution_backward", "linear", "addbmm"),
    "attention": (
        "bmm", "baddbmm", "_softmax", "_softmax_backward_data", "_safe_softmax", "scaled_dot_product_attention",
    ),
    "gathers": (
        "index_select", "index", "index_add", "index_add_", "index_copy", "index_copy_", "_index_put_impl_",
        "index_put_", "index_put", "gather", "scatter", "scatter_", "scatter_add", "scatter_add_", "embedding",
        "embedding_dense_backward", "index_select_backward", "masked_select", "take", "roll", "index_backward",
    ),
    "casts": ("_to_copy",),
    "copies": ("clone", "contiguous", "cat", "stack", "constant_pad_nd", "_copy_from"),
    "norm": ("native_layer_norm", "native_layer_norm_backward", "native_batch_norm"),
    "activation": ("gelu", "gelu_backward", "relu", "silu"),
    "elementwise": (
        "add", "add_", "sub", "sub_", "rsub", "mul", "mul_", "div", "div_", "pow", "sqrt", "neg", "where",
        "masked_fill", "masked_fill_", "fill_", "zero_", "sum", "mean", "var", "std", "sin", "cos", "exp", "abs",
        "l1_loss", "mse_loss", "nll_loss_forward", "_log_softmax", "sgn", "rand", "argsort", "sort", "arange",
        "new_zeros", "zeros", "zeros_like", "ones_like", "ne", "eq", "sigmoid", "log", "_log_softmax_backward_data",
        "var_mean", "select_backward", "slice_backward", "unfold_backward", "var_backward", "random_", "clamp",
    ),
    "optimizer": ("_fused_adamw_", "_foreach_add_", "_foreach_zero_"),
}  # fmt: skip
CATEGORY_OF = {name: category for category, names in CATEGORIES.items() for name in names}
# Bookkeeping of torch and of Python between the operators.
HOST_OPERATORS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "t", "permute", "expand", "unsqueeze", "squeeze",
    "flatten", "unflatten", "as_strided", "as_strided_", "select", "slice", "narrow", "split", "chunk", "detach",
    "detach_", "empty", "empty_like", "empty_strided", "resize_", "to", "item", "_local_scalar_dense", "matmul",
    "layer_norm", "dropout", "softmax", "result_type", "new_empty", "unbind", "alias", "expand_as", "lift_fresh",
    "unfold", "conv2d", "_convolution", "unsafe_split", "view_as", "new_empty_strided", "is_nonzero",
}  # fmt: skip
SCORE_OPERATORS = {"add", "add_", "mul", "div", "masked_fill", "masked_fill_", "where"}


def categorize(name: str, shapes: list[list[int]], image_size: int) -> str | None:
    """Category of an operator by its own name; `None` where its caller decides.

    Args:
        name: as the profiler gives it, "aten::mm".
        shapes: of its tensor arguments.
        image_size: side of the images, which are no attention scores though they are square.
    """
    short = name.removeprefix("aten::")
    if "scaled_dot_product" in short or "flash_attention" in short or "efficient_attention" in short:
        return "attention"
    first = shapes[0] if shapes else []
    is_square = len(first) > 3 and first[-1] == first[-2] and first[-1] not in (1, image_size)
    if short in SCORE_OPERATORS and is_square:
        return "attention"  # scores of queries and keys: the bias and the scale
    if short.startswith("Optimizer."):
        return "optimizer"
    return CATEGORY_OF.get(short)


def category_of_event(event: Any, image_size: int) -> str:
    """Category of a profiler's event: its own, else the nearest caller's, else what its name says of the host."""
    ancestor = event
    while ancestor is not None:
        category = categorize(ancestor.name, ancestor.input_shapes or [], image_size)
        if category is not None:
            return category
        ancestor = ancestor.cpu_parent
    short = event.name.removeprefix("aten::")
    if short == "copy_":
        return "copies"
    return "host" if short in HOST_OPERATORS or not event.name.startswith("aten::") else "other"


def profile_step(compute: Callable[[], Any], image_size: int, use_cuda: bool) -> dict[str, Any]:
    """Wall time of a step and self time by category in seconds, and the operators without category that took most.

    Profiling itself costs time, mostly that of the host: shares are to be read, not seconds.

    Args:
        use_cuda: sum the time of the GPU's kernels instead of the CPU's operators.
    """
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if use_cuda else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        start = time.perf_counter()
        compute()
        if use_cuda:
            torch.cuda.synchronize()
        wall_seconds = time.perf_counter() - start
    seconds: Counter[str] = Counter(dict.fromkeys([*CATEGORIES, "host", "other"], 0))
    others: Counter[str] = Counter()
    for event in profiler.events() or ():
        own: Any = event
        if own.device_type != torch.autograd.DeviceType.CPU:
            continue  # kernels are counted at the operator that launched them
        taken = 1e-6 * (own.self_device_time_total if use_cuda else own.self_cpu_time_total)
        category = category_of_event(own, image_size)
        seconds[category] += taken  # type: ignore[assignment]
        if category == "other":
            others[own.name] += taken  # type: ignore[assignment]
    return {"wall_seconds": wall_seconds, "categories": dict(seconds), "other": dict(others.most_common(5))}
