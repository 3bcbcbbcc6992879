"""What is compared: models of one size class, built with random weights and without any drop rate."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from green_swin_hf import (
    VARIANTS,
    GreenSwinConfig,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
)
from green_swin_hf.sparse_plan import num_masked_units

MASK_UNIT_SIZE = 32  # pixels, of every contender with mask units; the patches of ViT-MAE are 16 px
NUM_LABELS = 1000
# Named, since transformers' loss otherwise finds it out in the first step and changes the config, which makes
# `torch.compile` compile again.
CLASSIFICATION = {"num_labels": NUM_LABELS, "problem_type": "single_label_classification"}

# "micro" is for checks of the benchmark itself: it computes in milliseconds and says nothing about speed.
SWIN_VARIANTS: dict[str, dict[str, Any]] = {
    **VARIANTS,
    "micro": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 2},
}
# Published sizes of the same name; Hiera keeps its decoder of 8 blocks of width 512, 16 heads at every size.
HIERA_VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"embed_dim": 96, "depths": [1, 2, 7, 2], "num_heads": [1, 2, 4, 8]},
    "small": {"embed_dim": 96, "depths": [1, 2, 11, 2], "num_heads": [1, 2, 4, 8]},
    "base": {"embed_dim": 96, "depths": [2, 3, 16, 3], "num_heads": [1, 2, 4, 8]},
    "large": {"embed_dim": 144, "depths": [2, 6, 36, 4], "num_heads": [2, 4, 8, 16]},
    "micro": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
# ViT-S stands beside Swin-T, which it matches in parameters; ViT-MAE's own decoder at every size.
VIT_VARIANTS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "intermediate_size": 4096,
    },
    "micro": {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 64},
}


class NotBuilt(Exception):
    """A contender that does not exist in this setting; the message says why."""


@dataclass(frozen=True)
class Contender:
    """One model in one setting: everything that a worker needs to build it and to take its steps.

    Attributes:
        kind: key of `BUILDERS`.
        variant: key of `SWIN_VARIANTS`.
        image_size: side of the square images in pixels.
        batch: images of a step.
        precision: "fp32", or "bf16" for autocast to bfloat16.
        masks: "shared" by the batch or "per-image"; of GreenSwin only, the others mask each image.
        mask_ratio: share of masked units.
        task: "train" for forward, backward and optimizer; "infer" for a forward pass without gradients.
        device: "cpu" or "cuda".
        threads: of the worker's CPU computation; torch's default if `None`.
        attention: attention implementation of transformers; the model's default if `None`.
        backend: of `torch.compile`; eager if `None`.
        same_masks: whether every step draws the masks of the first one, so that all have the same shapes.
        config: fields of a Swin's configuration that differ from the variant's.
    """

    kind: str
    variant: str
    image_size: int
    batch: int
    precision: str = "fp32"
    masks: str = "per-image"
    mask_ratio: float = 0.75
    task: str = "train"
    device: str = "cpu"
    threads: int | None = None
    attention: str | None = None
    backend: str | None = None
    same_masks: bool = False
    config: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Short name in tables, unique among the contenders of one setting."""
        words = [NAMES[self.kind]]
        if self.kind == "greenswin":
            words.append(f"{self.masks} masks")
        if self.kind == "hiera":
            words.append(f"ratio {self.mask_ratio:g}")
        words += [f"{name} {value}" for name, value in self.config.items()]
        words += [word for word in (self.attention, self.backend and "compiled") if word]
        return ", ".join(words)

    @property
    def visible_tokens(self) -> int:
        """Tokens of the first stage that a step of GreenSwin computes, of all images."""
        units = (self.image_size // MASK_UNIT_SIZE) ** 2
        patches_of_unit = (MASK_UNIT_SIZE // 4) ** 2
        return self.batch * patches_of_unit * (units - num_masked_units(units, self.mask_ratio))


NAMES = {
    "greenswin": "GreenSwin",
    "simmim": "SimMIM (stock Swin)",
    "hiera": "Hiera",
    "vitmae": "ViT-MAE",
    "greenswin-dense": "GreenSwin",
    "swin-dense": "stock Swin",
}


def build_model(contender: Contender) -> tuple[nn.Module, nn.Module]:
    """The model on the CPU and the part of it that is the encoder.

    Raises:
        NotBuilt: no such model in this setting.
    """
    return BUILDERS[contender.kind](contender)


def _options(contender: Contender) -> dict[str, Any]:
    return {} if contender.attention is None else {"attn_implementation": contender.attention}


def _green_swin_config(contender: Contender, **overrides: Any) -> GreenSwinConfig:
    small = {"decoder_hidden_size": 32, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 64}
    overrides |= small if contender.variant == "micro" else {}
    fields = SWIN_VARIANTS[contender.variant] | {"image_size": contender.image_size, "drop_path_rate": 0.0}
    fields |= {"mask_ratio": contender.mask_ratio} | overrides | contender.config
    return GreenSwinConfig(**fields, **_options(contender))


def _swin_config(contender: Contender, **overrides: Any) -> Any:
    from transformers import SwinConfig

    fields = SWIN_VARIANTS[contender.variant] | {"image_size": contender.image_size, "drop_path_rate": 0.0}
    fields |= overrides | contender.config
    return SwinConfig(**fields, encoder_stride=MASK_UNIT_SIZE, **_options(contender))


def _build_green_swin(contender: Contender) -> tuple[nn.Module, nn.Module]:
    model = GreenSwinForMaskedImageModeling(_green_swin_config(contender))
    return model, model.swin


def _build_simmim(contender: Contender) -> tuple[nn.Module, nn.Module]:
    from transformers import SwinForMaskedImageModeling

    model = SwinForMaskedImageModeling(_swin_config(contender))
    return model, model.swin


def _build_hiera(contender: Contender) -> tuple[nn.Module, nn.Module]:
    from transformers import HieraConfig, HieraForPreTraining

    micro = contender.variant == "micro"
    decoder = {
        "decoder_hidden_size": 32 if micro else 512,
        "decoder_depth": 1 if micro else 8,
        "decoder_num_heads": 2 if micro else 16,
    }
    size = [contender.image_size] * 2
    fields = HIERA_VARIANTS[contender.variant] | decoder | _options(contender)
    model = HieraForPreTraining(HieraConfig(image_size=size, mask_ratio=contender.mask_ratio, **fields))
    return model, model.hiera


def _build_vit_mae(contender: Contender) -> tuple[nn.Module, nn.Module]:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    if contender.variant not in VIT_VARIANTS:
        raise NotBuilt(f"no ViT stands beside Swin of size {contender.variant!r}")
    decoder: dict[str, Any] = {}
    if contender.variant == "micro":
        decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    fields = VIT_VARIANTS[contender.variant] | decoder | _options(contender)
    config = ViTMAEConfig(
        image_size=contender.image_size, mask_ratio=contender.mask_ratio, norm_pix_loss=True, **fields
    )
    model = ViTMAEForPreTraining(config)
    return model, model.vit


def _build_dense_green_swin(contender: Contender) -> tuple[nn.Module, nn.Module]:
    model = GreenSwinForImageClassification(_green_swin_config(contender, **CLASSIFICATION))
    return model, model.swin


def _build_dense_swin(contender: Contender) -> tuple[nn.Module, nn.Module]:
    from transformers import SwinForImageClassification

    model = SwinForImageClassification(_swin_config(contender, **CLASSIFICATION))
    return model, model.swin


BUILDERS: dict[str, Callable[[Contender], tuple[nn.Module, nn.Module]]] = {
    "greenswin": _build_green_swin,
    "simmim": _build_simmim,
    "hiera": _build_hiera,
    "vitmae": _build_vit_mae,
    "greenswin-dense": _build_dense_green_swin,
    "swin-dense": _build_dense_swin,
}
