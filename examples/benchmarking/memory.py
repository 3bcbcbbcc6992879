"""Memory of one step: an exact account of what torch's allocator gave out, and the peak of the whole process.

The account follows every allocation and release of the step. Gradients are told by their address at the end of the
step and taken out of the running total, so that activations are what is left: everything that a step needs beyond
weights, gradients and optimizer state (saved tensors, temporaries, casts of weights). Memory that kernels take past
torch's allocator (scratch space of oneDNN, say) is in the peak of the process only.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile


def give_back_freed_memory() -> None:
    """Hand memory that is free back to the system, where the C library knows how (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Allocation(NamedTuple):
    """One event of the allocator: bytes given out (positive) or taken back (negative) at an address."""

    address: int
    num_bytes: int


def trace_allocations(function: Callable[[], Any]) -> list[Allocation]:
    """The allocations and releases of tensors during a call, in order; on the GPU only its own where there is one."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, profile_memory=True) as profiler:
        function()
    tree: Any = profiler.profiler.kineto_results.experimental_event_tree()  # type: ignore[union-attr]
    events = [event for event in _flatten(tree) if event.tag == _EventType.Allocation]
    events.sort(key=lambda event: event.start_time_ns)
    on_gpu = [event for event in events if event.extra_fields.device.type == "cuda"]
    return [Allocation(event.extra_fields.ptr, event.extra_fields.alloc_size) for event in on_gpu or events]


def _flatten(events: Iterable[Any]) -> Iterator[Any]:
    for event in events:
        yield event
        yield from _flatten(event.children)


def peak_of(allocations: Iterable[Allocation], except_addresses: frozenset[int] = frozenset()) -> int:
    """The highest running total in bytes above the level at the start.

    Args:
        except_addresses: blocks that are not counted if they are still held at the end of the trace.

    >>> peak_of([Allocation(1, 8), Allocation(2, 4), Allocation(1, -8), Allocation(3, 2)])
    12
    """
    allocations = list(allocations)
    last_at = {event.address: index for index, event in enumerate(allocations)}
    left_out = {last_at[address] for address in except_addresses if address in last_at}
    left_out = {index for index in left_out if allocations[index].num_bytes > 0}
    total = peak = 0
    for index, event in enumerate(allocations):
        total += 0 if index in left_out else event.num_bytes
        peak = max(peak, total)
    return peak


def measure_memory(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, step: Callable[[], Any]
) -> dict[str, int]:
    """Bytes of weights, gradients, optimizer state and activations of one step.

    Args:
        step: takes the step from gradients of `None`; what it leaves in `.grad` counts as gradients.
    """
    if optimizer is not None:
        optimizer.zero_grad(set_to_none=True)
    allocations = trace_allocations(step)
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    addresses = frozenset(gradient.untyped_storage().data_ptr() for gradient in gradients)
    state = optimizer.state.values() if optimizer is not None else []
    held = [value for entry in state for value in entry.values() if isinstance(value, Tensor)]
    return {
        "weights_bytes": sum(parameter.nbytes for parameter in [*model.parameters(), *model.buffers()]),
        "gradients_bytes": sum(gradient.nbytes for gradient in gradients),
        "optimizer_bytes": sum(tensor.nbytes for tensor in held),
        "activations_bytes": peak_of(allocations, addresses),
        "peak_above_start_bytes": peak_of(allocations),
    }


def measure_cuda_peak(step: Callable[[], Any]) -> dict[str, int]:
    """The allocator's own peak during a step, and what it held before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return {"cuda_before_bytes": before, "cuda_peak_bytes": torch.cuda.max_memory_allocated()}


def read_process_peak() -> int:
    """The most memory in bytes that this process has had in RAM."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    import resource

    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
