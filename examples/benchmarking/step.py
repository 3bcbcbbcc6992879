"""One step of a contender: a training step (masks, plan, forward, backward, optimizer) or an inference pass."""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarking.contenders import MASK_UNIT_SIZE, NUM_LABELS, Contender, build_model
from green_swin_hf import SparseGeometry, build_sparse_plan, sample_masks

SEED = 0
ADAMW = {"lr": 1e-4, "weight_decay": 0.05, "betas": (0.9, 0.95), "fused": True}


class CountingCompiler:
    """A backend of `torch.compile` that counts the graphs it is given: one at first, another at each recompilation."""

    def __init__(self, backend: str):
        from torch._dynamo.backends.registry import lookup_backend

        self.num_graphs = 0
        self._compile = lookup_backend(backend)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.num_graphs += 1
        return self._compile(graph, inputs)


class Step:
    """A contender that is ready to step: its model, optimizer, images and source of masks.

    Every call is one step on the same images; new masks are drawn for each, on the host and inside the measured time.
    """

    def __init__(self, contender: Contender):
        self.contender = contender
        torch.manual_seed(SEED)
        model, encoder = build_model(contender)
        self.model = model.to(contender.device)
        self.encoder_parameters = sum(parameter.numel() for parameter in encoder.parameters())
        self.is_training = contender.task == "train"
        self.model.train(self.is_training)
        self.compiler = None if contender.backend is None else CountingCompiler(contender.backend)
        self.forward = self.model if self.compiler is None else torch.compile(model, backend=self.compiler)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), **ADAMW) if self.is_training else None  # type: ignore[arg-type]
        self.generator = torch.Generator().manual_seed(SEED)
        self.fixed_inputs = self._draw_images()

    def _draw_images(self) -> dict[str, Tensor]:
        size, batch, device = self.contender.image_size, self.contender.batch, self.contender.device
        images = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(SEED)).to(device)
        if not self.contender.kind.endswith("dense"):
            return {"pixel_values": images}
        labels = torch.arange(batch, device=device) % NUM_LABELS
        return {"pixel_values": images, "labels": labels} if self.is_training else {"pixel_values": images}

    def draw_masks(self) -> dict[str, Any]:
        """What `forward` gets besides the images, new for each step; Hiera and ViT-MAE draw theirs in `forward`."""
        contender = self.contender
        if contender.same_masks:
            self.generator.manual_seed(SEED)
        side = contender.image_size // MASK_UNIT_SIZE
        if contender.kind == "greenswin":
            rows = 1 if contender.masks == "shared" else contender.batch
            masks = sample_masks(rows, (side, side), contender.mask_ratio, self.generator)
            geometry = SparseGeometry.from_config(self.model.config)
            return {"sparse_plan": build_sparse_plan(masks, geometry).to(contender.device)}
        if contender.kind == "simmim":
            masks = sample_masks(contender.batch, (side, side), contender.mask_ratio, self.generator)
            patches = MASK_UNIT_SIZE // 4
            squares = masks.view(-1, side, 1, side, 1).expand(-1, -1, patches, -1, patches)
            return {"bool_masked_pos": squares.flatten(1).to(contender.device)}
        return {}

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it, before a clock is read."""
        if self.contender.device == "cuda":
            torch.cuda.synchronize()

    def compute(self, masks: dict[str, Any]) -> None:
        """Forward pass, and in training backward pass and optimizer; gradients stay for the caller to look at."""
        use_bf16 = self.contender.precision == "bf16"
        with torch.set_grad_enabled(self.is_training):
            with torch.autocast(self.contender.device, torch.bfloat16, enabled=use_bf16):
                output = self.forward(**self.fixed_inputs, **masks)
            if self.optimizer is not None:
                output.loss.backward()
                self.optimizer.step()

    def clear_gradients(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> dict[str, float]:
        """One step: its seconds by the wall clock, those that this process computed (all its threads together), and the
        part of the wall time spent on masks and plans on the host."""
        self.synchronize()
        start, computed = time.perf_counter(), time.process_time()
        self.clear_gradients()
        before_masks = time.perf_counter()
        masks = self.draw_masks()
        host_seconds = time.perf_counter() - before_masks
        self.compute(masks)
        self.synchronize()
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - computed
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "host_seconds": host_seconds}

    def describe(self) -> dict[str, Any]:
        """Sizes of the model in parameters, and the attention in use."""
        config: Any = self.model.config
        return {
            "encoder_parameters": self.encoder_parameters,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "attention": getattr(config, "_attn_implementation", None),
            "threads": torch.get_num_threads(),
        }
