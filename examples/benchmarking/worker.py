"""A process that holds one contender and does what its parent asks: `python -m benchmarking.worker`.

One JSON object on each line of standard input, `{"do": "step"}`, and one on standard output in answer. The first line
is the contender. Between two requests the process waits in a read and computes nothing.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

import torch

from benchmarking.contenders import Contender
from benchmarking.memory import give_back_freed_memory, measure_cuda_peak, measure_memory, read_process_peak
from benchmarking.products import OperandPool, Product, record_products, time_product
from benchmarking.profiling import profile_step
from benchmarking.step import Step
from green_swin_hf.host_memory import keep_freed_memory


class Session:
    """The requests that a worker answers, each a method that returns something JSON can hold."""

    def __init__(self, contender: Contender):
        if contender.threads is not None:
            torch.set_num_threads(contender.threads)
        self.start_bytes = read_process_peak()
        self.step_once = Step(contender)
        self.use_cuda = contender.device == "cuda"
        self.products: list[Product] = []
        self.pool: OperandPool | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to a request, or its error as `{"error": one line}`."""
        arguments = dict(request)
        try:
            return getattr(self, arguments.pop("do"))(**arguments)
        except Exception as error:
            return {"error": describe_error(error)}

    def describe(self) -> dict[str, Any]:
        return self.step_once.describe()

    def step(self) -> dict[str, Any]:
        """One timed step behind one that is not, as steps of a training follow each other.

        While the others had their turn, caches and clock went cold. The processes share the memory of the machine, and
        each gives back what it does not hold after its turn.
        """
        timing = self._step_twice()
        self._release()
        return timing

    def _step_twice(self) -> dict[str, Any]:
        first = self.step_once()
        return {**self.step_once(), "untimed_seconds": first["seconds"]}

    def _release(self) -> None:
        self.step_once.clear_gradients()
        if self.use_cuda:
            torch.cuda.empty_cache()
        else:
            give_back_freed_memory()

    def process_peak(self) -> dict[str, Any]:
        return {"process_start_bytes": self.start_bytes, "process_peak_bytes": read_process_peak()}

    def memory(self) -> dict[str, Any]:
        step = self.step_once

        def whole_step() -> None:
            step.compute(step.draw_masks())

        figures: dict[str, Any] = measure_memory(step.model, step.optimizer, whole_step)
        if self.use_cuda:
            step.clear_gradients()
            figures |= measure_cuda_peak(whole_step)
        self._release()
        return figures

    def record(self) -> dict[str, Any]:
        """Find the products of a step and prepare to time them."""
        step = self.step_once
        step.clear_gradients()
        masks = step.draw_masks()
        self.products = record_products(lambda: step.compute(masks))
        self.pool = OperandPool(self.products, step.contender.device)
        for product in self.products:  # the first run of a shape also makes its kernel
            time_product(product, self.pool, 1, step.synchronize)
        return {"products": [product.describe() for product in self.products]}

    def floor_round(self) -> dict[str, Any]:
        """One step, the optimizer alone, and every product once: seconds of each."""
        timing = self._step_twice()
        step = self.step_once
        assert self.pool is not None
        repeats = 10 if self.use_cuda else 2
        times = [time_product(product, self.pool, repeats, step.synchronize) for product in self.products]
        return timing | {"optimizer_seconds": self._time_optimizer(), "product_seconds": times}

    def _time_optimizer(self) -> float:
        step = self.step_once
        if step.optimizer is None:
            return 0.0
        step.synchronize()
        start = time.perf_counter()
        step.optimizer.step()
        step.synchronize()
        return time.perf_counter() - start

    def profile(self) -> dict[str, Any]:
        """The step by category; masks and plans are drawn before, their time is measured apart."""
        step = self.step_once
        step.clear_gradients()
        start = time.perf_counter()
        masks = step.draw_masks()
        masks_seconds = time.perf_counter() - start
        found = profile_step(lambda: step.compute(masks), step.contender.image_size, self.use_cuda)
        return found | {"masks_seconds": masks_seconds}

    def warm_graphs(self) -> dict[str, Any]:
        return {"warm_graphs": self._num_graphs()}

    def recompilations(self, steps: int) -> dict[str, Any]:
        """How many graphs `torch.compile` has made, after some more steps with new masks."""
        if self.step_once.compiler is not None:
            for _ in range(steps):
                self.step_once()
        return {"graphs": self._num_graphs(), "extra_steps": steps}

    def _num_graphs(self) -> int:
        return 0 if self.step_once.compiler is None else self.step_once.compiler.num_graphs


def describe_error(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def serve(requests: TextIO, reply: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests until there are no more."""
    try:
        session = Session(Contender(**json.loads(requests.readline())))
    except Exception as error:
        reply({"error": describe_error(error)})
        return
    reply(session.describe())
    for line in requests:
        reply(session.answer(json.loads(line)))


def main() -> None:
    keep_freed_memory()  # as the training scripts do, here for every contender
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not get between the answers

    def reply(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    serve(sys.stdin, reply)


if __name__ == "__main__":
    main()
