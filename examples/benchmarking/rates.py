"""The rate of one square matrix product: what a forecast and the choice of precisions go by."""

import time


def measure_rate(device: str, precision: str) -> float:
    """Floating-point operations per second, the best of twenty runs behind one that is not counted."""
    import torch

    side = 4096 if device == "cuda" else 256
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    times = []
    for _ in range(21):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()  # reading a value waits for the device
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times[1:])


def leave_out_slow_bf16(precisions: list[str], device: str) -> list[str]:
    """The precisions without bf16 on a processor that has no instructions for it, where a step would take minutes."""
    if device == "cuda" or "bf16" not in precisions:
        return precisions
    rates = {precision: measure_rate(device, precision) / 1e9 for precision in ("fp32", "bf16")}
    if rates["bf16"] > rates["fp32"] / 4:
        return precisions
    print(
        f"bf16 is left out: a product reaches {rates['bf16']:.1f} GFLOP/s here, {rates['fp32']:.1f} in fp32; "
        "--precision bf16 measures it nevertheless\n",
        flush=True,
    )
    return [precision for precision in precisions if precision != "bf16"]
