"""What the demo shows, apart from its interface: one picture masked, reconstructed, and its windows in groups.

Wrong input is a `ValueError` of one line that names value and remedy.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoImageProcessor

from green_swin_hf import (
    GreenSwinConfig,
    GreenSwinForMaskedImageModeling,
    SparseGeometry,
    SparsePlan,
    build_sparse_plan,
    sample_masks,
)
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.data import EvaluationTransform
from green_swin_hf.image_decoding import CorruptImageError, decode_image
from green_swin_hf.visualization import grouping_figure, masked_images, paste_reconstruction, to_display

SMALLEST_SIDE = 16
_SHOWN_SIDE = 256  # smaller pictures are enlarged pixel by pixel, so that a browser does not blur them
_DRAWING_DPI = 140

NO_MODEL = (
    "**No reconstruction: no model is given.** Enter a model, or set `MODEL_ID` in the environment (on a Space: "
    "Settings, Variables) to a Hub id or a folder that pretraining wrote. Windows and groups need no weights; "
    "they are those of Swin-T with windows of 7 at 224 px."
)
NORMALISED = (
    "**How to read the reconstruction.** Visible pixels are pasted. The model predicts each masked unit up to its mean "
    "and contrast, since it was trained on normalised targets; both were taken from the true pixels to show it. So the "
    "structure inside a unit is the model's, its overall brightness and colour are not."
)
NOT_NORMALISED = (
    "**How to read the reconstruction.** Visible pixels are pasted; masked units are the predictions as they are."
)


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model, and how its images are normalised."""

    model: GreenSwinForMaskedImageModeling
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Demonstration:
    """Pictures, [H, W] or [H, W, 3] uint8, and a text in Markdown.

    Attributes:
        original, masked: the picture as the model gets it, whole and without its masked units.
        reconstruction: None without a model.
        drawing: windows and groups, a PNG file.
        stage, num_stages: the stage that is drawn, of how many.
        text: what is to be known of these pictures.
    """

    original: np.ndarray
    masked: np.ndarray
    reconstruction: np.ndarray | None
    drawing: bytes
    stage: int
    num_stages: int
    text: str


def demonstrate(
    picture: str | None, model_name: str, mask_ratio: float | None, seed: float | None, stage: int, shifted: bool
) -> Demonstration:
    """Mask the centre of a picture, reconstruct it and draw its groups.

    Args:
        picture: path of an image file.
        model_name: a Hub id or a folder; blank for none, which leaves the reconstruction out.
        mask_ratio: share of mask units to hide, in (0, 1).
        seed: of the mask, a whole number of at least 0.
        stage: 1 for the first one; a model with fewer stages gets its last one.
        shifted: draw the windows of every second block.

    Raises:
        ValueError: no picture, a damaged or very small one, a ratio or seed out of range, no such model.
    """
    loaded = load_model(model_name.strip()) if model_name.strip() else None
    config = loaded.model.config if loaded else GreenSwinConfig()
    channels = config.num_channels
    image = prepare_picture(picture, as_pair(config.image_size), channels)
    geometry = SparseGeometry.from_config(config)
    mask = draw_mask(geometry, mask_ratio, seed)
    plan = build_sparse_plan(mask, geometry)
    stage = min(stage, len(geometry.stages))
    texts = [NO_MODEL if loaded is None else NORMALISED if config.norm_pix_loss else NOT_NORMALISED]
    if shifted and not geometry.stages[stage - 1].shift_size:
        texts.append(f"Stage {stage} has no shifted windows: its grid is no larger than one window.")
    return Demonstration(
        original=_as_picture(image),
        masked=_as_picture(masked_images(image[None], mask, config.mask_unit_size)[0]),
        reconstruction=_as_picture(reconstruct(loaded, image, plan)) if loaded else None,
        drawing=draw_groups(image, plan, stage, shifted),
        stage=stage,
        num_stages=len(geometry.stages),
        text="\n\n".join(texts),
    )


@lru_cache(maxsize=2)
def load_model(name: str) -> LoadedModel:
    """A pretrained GreenSwin with its decoder; its code is this package's, its weights are safetensors.

    Args:
        name: a Hub id or a folder.

    Raises:
        ValueError: nothing there, another kind of model, or one without a decoder or its image processor.
    """
    try:
        entries, _ = GreenSwinConfig.get_config_dict(name)
    except Exception as error:  # of the Hub's client, which raises many kinds
        raise ValueError(
            f"Model {name!r} is neither a folder with a model nor one on the Hub: {_short(error)}"
        ) from None
    if entries.get("model_type") != GreenSwinConfig.model_type:
        kind = entries.get("model_type", "no known kind")
        raise ValueError(f"Model {name!r} is of type {kind}; give a GreenSwin that was pretrained by masked images")
    try:
        loaded: Any = GreenSwinForMaskedImageModeling.from_pretrained(
            name, output_loading_info=True, use_safetensors=True
        )
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # readers of files that are no weights raise what they like
        raise ValueError(f"Model {name!r} cannot be loaded: {_short(error)}") from None
    model, report = loaded
    if report["missing_keys"]:
        saved = ", ".join(entries.get("architectures") or ["another class"])
        raise ValueError(
            f"Model {name!r} has no pretraining decoder (saved as {saved}); give one as pretraining wrote it"
        )
    if model.config.num_channels not in (1, 3):
        raise ValueError(
            f"Model {name!r} takes images of {model.config.num_channels} channels; give a grey or colour one"
        )
    return LoadedModel(model.eval(), tuple(processor.image_mean), tuple(processor.image_std))


def prepare_picture(picture: str | None, image_size: tuple[int, int], channels: int) -> Tensor:
    """The centre of a picture with the model's proportions and size: [C, rows, columns] in 0 … 1.

    Raises:
        ValueError: no picture, or one that cannot be read or is smaller than `SMALLEST_SIDE`.
    """
    if picture is None:
        raise ValueError("No picture: upload one or click an example")
    try:
        pixels = decode_image({"path": picture}, "L" if channels == 1 else "RGB")
    except CorruptImageError as error:
        reason = error.reason.replace(f" '{picture}'", "")
        raise ValueError(f"The picture cannot be read ({reason}); upload another one, such as JPEG or PNG") from None
    height, width = pixels.shape[1:]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"The picture is {width}x{height} px; give one of at least {SMALLEST_SIDE}x{SMALLEST_SIDE} px")
    plain = (0.0,) * channels, (1.0,) * channels
    return EvaluationTransform(image_size, channels, 0, *plain, crop_fraction=1.0)(pixels)


def draw_mask(geometry: SparseGeometry, mask_ratio: float | None, seed: float | None) -> Tensor:
    """[1, units] bool, True = masked. An empty field of the interface is None."""
    if mask_ratio is None or not 0 < mask_ratio < 1:
        raise ValueError(f"The masked share {mask_ratio} must be greater than 0 and less than 1")
    if seed is None or not 0 <= seed < 2**63 or seed != int(seed):
        raise ValueError(f"The seed {seed} must be a whole number of at least 0")
    return sample_masks(1, geometry.unit_grid_size, mask_ratio, torch.Generator().manual_seed(int(seed)))


@torch.no_grad()
def reconstruct(loaded: LoadedModel, image: Tensor, plan: SparsePlan) -> Tensor:
    """The picture with its masked units as the model predicts them: [C, H, W] in 0 … 1."""
    config, shape = loaded.model.config, (1, -1, 1, 1)
    pixel_values = (image[None] - torch.tensor(loaded.mean).view(shape)) / torch.tensor(loaded.std).view(shape)
    predicted = loaded.model(pixel_values, sparse_plan=plan).reconstruction
    pasted = paste_reconstruction(
        pixel_values, predicted, plan.bool_masked_pos, config.mask_unit_size, norm_pix_loss=config.norm_pix_loss
    )
    return to_display(pasted, loaded.mean, loaded.std)[0]


def draw_groups(image: Tensor, plan: SparsePlan, stage: int, shifted: bool) -> bytes:
    """Windows and groups as a PNG file."""
    file = io.BytesIO()
    grouping_figure(image, plan, stage=stage, shifted=shifted).savefig(file, format="png", dpi=_DRAWING_DPI)
    return file.getvalue()


def _as_picture(image: Tensor) -> np.ndarray:
    """[C, H, W] in 0 … 1 to [H, W] or [H, W, 3] uint8, at least `_SHOWN_SIDE` high or wide."""
    factor = max(1, _SHOWN_SIDE // max(image.shape[1:]))
    large = image.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
    pixels = (large.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return pixels[..., 0] if pixels.shape[2] == 1 else pixels


def _short(error: Exception) -> str:
    """The first sentence."""
    return " ".join(str(error).split()).partition(". ")[0][:160].strip()
