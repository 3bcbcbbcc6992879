"""Attention inside windows of visible tokens as Triton kernels: nothing of the size of the scores is ever stored.

The kernels read the query, key and value of a slot where its token stands (`GroupingPlan.gather_index`), take the
relative position bias and the window mask from the coordinates of the slots, and write the result where the token
stands: no gather, no scatter, no [G, S, S] tensor. Blocks of keys without a window in common with the block of queries
are skipped, so that a group costs about as much as its windows.

Importing this file raises an `ImportError` where Triton is missing. With TRITON_INTERPRET=1, set before Triton is
first imported, the same kernels run on a CPU (slowly: for tests).

Letters as in `modeling_green_swin`: R rows, T tokens of a row, C channels, h heads, d channels of a head, G groups,
S slots of each, P rows of the position table. In the kernels M are the slots of a block of queries, N those of a block
of keys, D is d padded to a power of two.
"""

# No `from __future__ import annotations`: torch reads the types of the operators from their annotations.

import re

import torch
from torch import Tensor

from .sparse_plan import GroupingPlan

try:  # not on macOS; inside `try`, transformers does not ask every user of remote code to install it
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton kernels need the package triton; choose another attn_implementation") from error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
MAX_HEAD_CHANNELS = 128
# Chosen without a GPU at hand, by the registers that ptxas reports for compute capability 8.0 and 9.0: benchmarks may
# set them before a call. Slots of a block of queries or keys at most (half of them for float32 and wide heads, which
# spilled registers), and slots for each warp.
MAX_BLOCK = 64
SLOTS_PER_WARP = 16
# The gradient of the table is summed by atomic additions from every pair of tokens to few addresses: copies of it,
# added up at the end, keep them from waiting for each other.
TABLE_COPIES = 32

_LOG2E = tl.constexpr(1.4426950408889634)
_MASKED = tl.constexpr(-1e30)  # finite, so that a row whose keys were all masked so far gives no NaN
# Counts that change with every batch: no variant of a kernel for 1 or for multiples of 16.
_COUNTS = ["num_tokens", "num_groups", "num_slots"]


@triton.jit
def _program(num_groups, num_slots, num_heads, BLOCK: tl.constexpr):
    """Row (int64), group, head and block of this program; heads vary fastest, for they share lines of memory."""
    program = tl.program_id(0)
    head = program % num_heads
    program = program // num_heads
    num_blocks = tl.cdiv(num_slots, BLOCK)
    block = program % num_blocks
    program = program // num_blocks
    return (program // num_groups).to(tl.int64), program % num_groups, head, block


@triton.jit
def _load_slots(index_ptr, window_ptr, position_ptr, group, num_slots, start, BLOCK: tl.constexpr):
    """Token (int64), window and position of a block of slots of a group; pads, and what follows the last slot, have
    negative windows."""
    slot = start + tl.arange(0, BLOCK)
    inside = slot < num_slots
    place = group * num_slots + slot
    window = tl.load(window_ptr + place, mask=inside, other=-1)
    position = tl.load(position_ptr + place, mask=inside, other=0)
    token = place.to(tl.int64) if index_ptr is None else tl.load(index_ptr + place, mask=inside, other=0)
    return token, window, position


@triton.jit
def _tile(token, window, stride, d: tl.constexpr, D: tl.constexpr):
    """Offsets of [block, D] channels from the first channel of a head, and which of them are of a real token."""
    channel = tl.arange(0, D)
    return token[:, None] * stride + channel[None, :], (window >= 0)[:, None] & (channel < d)[None, :]


@triton.jit
def _load(base_ptr, token, window, stride, d: tl.constexpr, D: tl.constexpr):
    offset, real = _tile(token, window, stride, d, D)
    return tl.load(base_ptr + offset, mask=real, other=0.0)


@triton.jit
def _store(base_ptr, values, token, window, stride, d: tl.constexpr, D: tl.constexpr):
    offset, real = _tile(token, window, stride, d, D)
    tl.store(base_ptr + offset, values.to(base_ptr.dtype.element_ty), mask=real)


@triton.jit
def _share_a_window(query_window, key_window):
    """[M, N]: who may attend to whom; nobody to a pad."""
    return (query_window[:, None] == key_window[None, :]) & (key_window >= 0)[None, :]


@triton.jit
def _any(mask):
    return tl.max(mask.to(tl.int32)) > 0


@triton.jit
def _scores(query, key, table_ptr, table_row, allowed, scale):
    """Scores to the base of two, [M, N]: scaled products plus the bias of each pair, `_MASKED` where not allowed."""
    bias = tl.load(table_ptr + table_row, mask=allowed, other=0.0)
    # "ieee": products of float32 are not rounded to TF32
    scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale + bias
    return tl.where(allowed, scores * _LOG2E, _MASKED)


@triton.jit(do_not_specialize=_COUNTS)
def _forward_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, index_ptr, window_ptr, position_ptr, output_ptr, log_sum_ptr,
    row_stride, token_stride, num_tokens, num_groups, num_slots, num_heads, table_rows, middle, scale,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Output [R, T, C] and logarithm (base 2) of the softmax denominators [R, h, T] of a block of queries."""
    row, group, head, block = _program(num_groups, num_slots, num_heads, BLOCK)
    token, window, position = _load_slots(index_ptr, window_ptr, position_ptr, group, num_slots, block * BLOCK, BLOCK)
    if tl.max(window, axis=0) < 0:
        return  # pads only
    first = row * row_stride + head * d
    query = _load(query_ptr + first, token, window, token_stride, d, D)
    highest = tl.full([BLOCK], _MASKED, tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    output = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, num_slots, BLOCK):
        key_token, key_window, key_position = _load_slots(
            index_ptr, window_ptr, position_ptr, group, num_slots, start, BLOCK
        )
        allowed = _share_a_window(window, key_window)
        if _any(allowed):
            key = _load(key_ptr + first, key_token, key_window, token_stride, d, D)
            value = _load(value_ptr + first, key_token, key_window, token_stride, d, D)
            table_row = position[:, None] - key_position[None, :] + middle
            scores = _scores(query, key, table_ptr + head * table_rows, table_row, allowed, scale)
            new_highest = tl.maximum(highest, tl.max(scores, axis=1))
            weight = tl.exp2(scores - new_highest[:, None])
            # what a row summed up while all of its keys were masked vanishes here: exp2(-1e30 - score) is zero
            decay = tl.exp2(highest - new_highest)
            denominator = denominator * decay + tl.sum(weight, axis=1)
            output = output * decay[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
            highest = new_highest
    output = output / denominator[:, None]
    stride = num_heads * d
    _store(output_ptr + row * num_tokens * stride + head * d, output, token, window, stride, d, D)
    log_sum_ptr += (row * num_heads + head) * num_tokens
    tl.store(log_sum_ptr + token, highest + tl.log2(denominator), mask=window >= 0)


@triton.jit(do_not_specialize=_COUNTS)
def _query_gradient_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, index_ptr, window_ptr, position_ptr, output_ptr, log_sum_ptr,
    output_gradient_ptr, query_gradient_ptr, table_gradient_ptr, product_ptr,
    row_stride, token_stride, num_tokens, num_groups, num_slots, num_heads, table_rows, middle, scale,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, COPIES: tl.constexpr,
):  # fmt: skip
    """For a block of queries: their gradients, their part of the table's, and output times its gradient [R, h, T]."""
    row, group, head, block = _program(num_groups, num_slots, num_heads, BLOCK)
    token, window, position = _load_slots(index_ptr, window_ptr, position_ptr, group, num_slots, block * BLOCK, BLOCK)
    if tl.max(window, axis=0) < 0:
        return
    first, stride = row * row_stride + head * d, num_heads * d
    first_dense, first_scalar = row * num_tokens * stride + head * d, (row * num_heads + head) * num_tokens
    query = _load(query_ptr + first, token, window, token_stride, d, D)
    output = _load(output_ptr + first_dense, token, window, stride, d, D)
    output_gradient = _load(output_gradient_ptr + first_dense, token, window, stride, d, D)
    log_sum = tl.load(log_sum_ptr + first_scalar + token, mask=window >= 0, other=0.0)
    product = tl.sum(output.to(tl.float32) * output_gradient.to(tl.float32), axis=1)
    tl.store(product_ptr + first_scalar + token, product, mask=window >= 0)
    table_gradient_ptr += ((tl.program_id(0) // num_heads % COPIES) * num_heads + head) * table_rows
    gradient = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, num_slots, BLOCK):
        key_token, key_window, key_position = _load_slots(
            index_ptr, window_ptr, position_ptr, group, num_slots, start, BLOCK
        )
        allowed = _share_a_window(window, key_window)
        if _any(allowed):
            key = _load(key_ptr + first, key_token, key_window, token_stride, d, D)
            value = _load(value_ptr + first, key_token, key_window, token_stride, d, D)
            table_row = position[:, None] - key_position[None, :] + middle
            scores = _scores(query, key, table_ptr + head * table_rows, table_row, allowed, scale)
            weight_gradient = tl.dot(output_gradient, tl.trans(value), input_precision="ieee")
            weight = tl.where(allowed, tl.exp2(scores - log_sum[:, None]), 0.0)
            score_gradient = weight * (weight_gradient - product[:, None])
            tl.atomic_add(table_gradient_ptr + table_row, score_gradient, mask=allowed, sem="relaxed")
            gradient += tl.dot(score_gradient.to(key.dtype), key, input_precision="ieee")
    _store(query_gradient_ptr + first_dense, gradient * scale, token, window, stride, d, D)


@triton.jit(do_not_specialize=_COUNTS)
def _key_gradient_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, index_ptr, window_ptr, position_ptr, log_sum_ptr,
    output_gradient_ptr, product_ptr, key_gradient_ptr, value_gradient_ptr,
    row_stride, token_stride, num_tokens, num_groups, num_slots, num_heads, table_rows, middle, scale,
    d: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of keys and values, [R, T, C] each."""
    row, group, head, block = _program(num_groups, num_slots, num_heads, BLOCK)
    token, window, position = _load_slots(index_ptr, window_ptr, position_ptr, group, num_slots, block * BLOCK, BLOCK)
    if tl.max(window, axis=0) < 0:
        return
    first, stride = row * row_stride + head * d, num_heads * d
    first_dense, first_scalar = row * num_tokens * stride + head * d, (row * num_heads + head) * num_tokens
    key = _load(key_ptr + first, token, window, token_stride, d, D)
    value = _load(value_ptr + first, token, window, token_stride, d, D)
    key_gradient = tl.zeros([BLOCK, D], tl.float32)
    value_gradient = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, num_slots, BLOCK):
        query_token, query_window, query_position = _load_slots(
            index_ptr, window_ptr, position_ptr, group, num_slots, start, BLOCK
        )
        allowed = _share_a_window(query_window, window)
        if _any(allowed):
            query = _load(query_ptr + first, query_token, query_window, token_stride, d, D)
            output_gradient = _load(output_gradient_ptr + first_dense, query_token, query_window, stride, d, D)
            log_sum = tl.load(log_sum_ptr + first_scalar + query_token, mask=query_window >= 0, other=0.0)
            product = tl.load(product_ptr + first_scalar + query_token, mask=query_window >= 0, other=0.0)
            table_row = query_position[:, None] - position[None, :] + middle
            scores = _scores(query, key, table_ptr + head * table_rows, table_row, allowed, scale)
            weight = tl.where(allowed, tl.exp2(scores - log_sum[:, None]), 0.0)
            weight_gradient = tl.dot(output_gradient, tl.trans(value), input_precision="ieee")
            score_gradient = weight * (weight_gradient - product[:, None])
            value_gradient += tl.dot(
                tl.trans(weight.to(output_gradient.dtype)), output_gradient, input_precision="ieee"
            )
            key_gradient += tl.dot(tl.trans(score_gradient.to(query.dtype)), query, input_precision="ieee")
    _store(key_gradient_ptr + first_dense, key_gradient * scale, token, window, stride, d, D)
    _store(value_gradient_ptr + first_dense, value_gradient, token, window, stride, d, D)


# Operators, so that torch.compile sees one node for each and traces nothing inside. Each copy of this file (the
# package, remote code beside weights) has its own.

_NAMESPACE = re.sub(r"\W", "_", __name__)


def _launch(query: Tensor, table: Tensor, slot_window: Tensor, table_window_size: int) -> tuple:
    """Grid, the arguments that all kernels end with, and their constants."""
    rows, num_tokens, channels = query.shape
    num_groups, num_slots = slot_window.shape
    table_rows, heads = table.shape
    d = channels // heads
    padded_d = max(triton.next_power_of_2(d), 16)  # tl.dot takes no less than 16
    largest = MAX_BLOCK if query.dtype.itemsize == 2 and padded_d <= 64 else max(MAX_BLOCK // 2, 16)
    block = min(max(triton.next_power_of_2(num_slots), 16), largest)
    grid = (rows * num_groups * triton.cdiv(num_slots, block) * heads,)
    middle = 2 * table_window_size * (table_window_size - 1)  # row of the table for a token and itself
    sizes = (*query.stride()[:2], num_tokens, num_groups, num_slots, heads, table_rows, middle, d**-0.5)
    constants = {
        "d": d,
        "D": padded_d,
        "BLOCK": block,
        "num_warps": max(block // SLOTS_PER_WARP, 1),
        "num_stages": 1,  # the loop over keys holds a condition and reads through an index: nothing to prefetch
    }
    return grid, sizes, constants


def _inputs(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As the kernels read them: one pair of strides for all three, the channels of a token side by side, and the table
    by heads, [h, P] float32, for a program reads the entries of one head all over."""
    if not query.stride() == key.stride() == value.stride() or query.stride(2) != 1:
        query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    return query, key, value, table.float().t().contiguous()


@torch.library.custom_op(f"{_NAMESPACE}::window_attention", mutates_args=())
def _window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    gather_index: Tensor | None,
    slot_window: Tensor,
    slot_position: Tensor,
    table_window_size: int,
) -> tuple[Tensor, Tensor]:
    """Output [R, T, C] and the logarithms (base 2) of the softmax denominators [R, h, T]."""
    inputs = (*_inputs(query, key, value, table), gather_index, slot_window, slot_position)
    grid, sizes, constants = _launch(inputs[0], table, slot_window, table_window_size)
    output = query.new_empty(query.shape)
    log_sum = query.new_empty(len(query), table.shape[1], query.shape[1], dtype=torch.float32)
    with torch.cuda.device_of(query):  # Triton launches on the current device
        _forward_kernel[grid](*inputs, output, log_sum, *sizes, **constants)
    return output, log_sum


@_window_attention.register_fake
def _(query, key, value, table, gather_index, slot_window, slot_position, table_window_size):
    log_sum = query.new_empty(len(query), table.shape[1], query.shape[1], dtype=torch.float32)
    return query.new_empty(query.shape), log_sum


@torch.library.custom_op(f"{_NAMESPACE}::window_attention_backward", mutates_args=())
def _window_attention_backward(
    output_gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    table: Tensor,
    gather_index: Tensor | None,
    slot_window: Tensor,
    slot_position: Tensor,
    output: Tensor,
    log_sum: Tensor,
    table_window_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value [R, T, C] and of the table [P, h]."""
    inputs = (*_inputs(query, key, value, table), gather_index, slot_window, slot_position)
    grid, sizes, constants = _launch(inputs[0], table, slot_window, table_window_size)
    output_gradient, product = output_gradient.contiguous(), torch.empty_like(log_sum)
    query_gradient, key_gradient, value_gradient = (query.new_empty(query.shape) for _ in range(3))
    table_gradient = torch.zeros(TABLE_COPIES, *table.t().shape, dtype=torch.float32, device=table.device)
    with torch.cuda.device_of(query):
        _query_gradient_kernel[grid](
            *inputs, output, log_sum, output_gradient, query_gradient, table_gradient, product, *sizes,
            COPIES=TABLE_COPIES, **constants,
        )  # fmt: skip
        _key_gradient_kernel[grid](
            *inputs, log_sum, output_gradient, product, key_gradient, value_gradient, *sizes, **constants
        )
    table_gradient = table_gradient.sum(dim=0).t().contiguous().to(table.dtype)
    return query_gradient, key_gradient, value_gradient, table_gradient


@_window_attention_backward.register_fake
def _(output_gradient, query, key, value, table, *rest):
    return (*(query.new_empty(query.shape) for _ in range(3)), table.new_empty(table.shape))


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.table_window_size = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, output_gradient, log_sum_gradient):
    gradients = _window_attention_backward(output_gradient, *ctx.saved_tensors, ctx.table_window_size)
    return (*gradients, None, None, None, None)


_window_attention.register_autograd(_backward, setup_context=_save_for_backward)


def is_supported(query: Tensor, heads: int) -> bool:
    """Whether the kernels take such queries (their device, type and channels of a head)."""
    runs_here = query.device.type == "cuda" or not isinstance(_forward_kernel, triton.JITFunction)  # interpreted
    return runs_here and query.dtype in DTYPES and query.shape[2] <= heads * MAX_HEAD_CHANNELS


def triton_window_attention(query: Tensor, key: Tensor, value: Tensor, table: Tensor, plan: GroupingPlan) -> Tensor:
    """Multi-head attention of visible tokens inside their windows: [R, T, C] in the order of the tokens.

    Products and sums are in float32 (without TF32), the result in the type of the queries. Differentiable once. The
    gradient of the table is summed by atomic additions whose order differs from run to run, so that its last bits do;
    the other gradients are the same each time.

    Args:
        query, key, value: [R, T, C] float32, float16 or bfloat16 in the order of the tokens; slices of one product of
            all three are read where they stand.
        table: [P, h], the learned `relative_position_bias_table` for the plan's table window; d = C / h is at most 128.
        plan: the window partition, on the device of the queries.

    Raises:
        ValueError: another type, device or shape than the kernels take (there is no dropout either).
    """
    heads = table.shape[1]
    if not is_supported(query, heads) or not query.dtype == key.dtype == value.dtype or query.shape[2] % heads:
        raise ValueError(
            f"the Triton kernels take float32, float16 or bfloat16 on CUDA and heads of at most {MAX_HEAD_CHANNELS} "
            f'channels, not {query.dtype} on {query.device} and {query.shape[2]} / {heads}; use "sdpa" or "eager"'
        )
    tokens = plan.slot_window.numel() if plan.scatter_index is None else len(plan.scatter_index)
    table_rows = (2 * plan.table_window_size - 1) ** 2
    if not query.shape == key.shape == value.shape or query.shape[1] != tokens or len(table) != table_rows:
        raise ValueError(  # a kernel would read and write elsewhere in memory
            f"query, key and value {[tuple(tensor.shape) for tensor in (query, key, value)]} and the table of "
            f"{len(table)} rows do not fit a plan of {tokens} tokens and {table_rows} rows"
        )
    output, _ = _window_attention(
        query, key, value, table, plan.gather_index, plan.slot_window, plan.slot_position, plan.table_window_size
    )
    return output


__all__ = ["is_supported", "triton_window_attention"]
