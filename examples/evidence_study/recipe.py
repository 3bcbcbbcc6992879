"""The recipes of studies: what decides every number that they give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from green_swin_hf import GreenSwinConfig
from green_swin_hf.feature_probes import FEATURE_KINDS
from green_swin_hf.recipe_files import RecipeFile, check_finite, check_minima, option

from .arms import ARMS


@dataclass(frozen=True)
class StudyRecipe(RecipeFile):
    """Images, encoder and pretraining: what the recipes of all studies on images in memory share."""

    path_keys: ClassVar = ("data", "photos")
    # They add or leave out cells, or change the time that they take, but no number in them.
    free_on_resume: ClassVar[tuple[str, ...]] = ("data", "photos", "seeds", "threads", "device")

    # Data
    data: str = option("", "labelled data set of grey images: folder, Parquet file, or name of a data set on the Hub")
    task: str = option("placed", "the images as they are, or placed at random over photographs", ("plain", "placed"))
    photos: str = option("", "folder of photographs for backgrounds")
    train_images: int | None = option(None, "use the first so many training images; all by default")
    validation_images: int = option(1000, "images that choose learning rates and end trainings")
    test_images: int | None = option(None, "use the first so many test images; all by default")
    image_size: int = option(48, "pixels of a side; images as they are get a black margin")
    placed_scale: tuple[float, float] = option((0.45, 0.85), "range of the side of a placed image, as a share")
    placements: int = option(1, "images made of each placed garment to pretrain on; labels are of the first one")
    test_placements: int = option(1, "images made of each placed garment of the test split")
    placed_degrees: float = option(20.0, "largest rotation of a placed image to either side")
    placed_gain: tuple[float, float] = option((0.5, 1.0), "range of a placed image's brightness, as a factor")
    background_gain: tuple[float, float] = option((1.0, 1.0), "range of a photograph's brightness, as a factor")
    shift: int = option(4, "largest shift of an image in training, in pixels to each side")
    flip: bool = option(True, "mirror half of the images in training")
    mean: float = option(0.4, "mean of pixels in 0 … 1")
    std: float = option(0.25, "standard deviation of pixels in 0 … 1")
    # Model
    patch_size: int = option(3, "side of a patch in pixels")
    embed_dim: int = option(32, "channels of the first stage")
    depths: tuple[int, ...] = option((2, 2, 2), "blocks of each stage")
    num_heads: tuple[int, ...] = option((1, 2, 4), "attention heads of each stage")
    window_size: int = option(4, "side of an attention window in tokens")
    decoder_hidden_size: int = option(128, "width of GreenSwin's decoder")
    decoder_num_hidden_layers: int = option(1, "blocks of GreenSwin's decoder")
    decoder_num_attention_heads: int = option(4, "attention heads of GreenSwin's decoder")
    decoder_intermediate_size: int = option(512, "width of the MLP of GreenSwin's decoder")
    # Pretraining
    epochs: float = option(100.0, "passes over the training images")
    mask_ratio: float = option(0.75, "share of an image that is masked for GreenSwin")
    batch_size: int = option(128, "images of an update in pretraining")
    learning_rate: float = option(1.5e-3, "peak learning rate of GreenSwin's pretraining")
    warmup: float = option(0.1, "share of the updates until the learning rate is at its peak")
    weight_decay: float = option(0.05, "decay of weight matrices")
    # Judging
    finetune_batch_size: int = option(64, "images of an update in fine-tuning")
    drop_path_rate: float = option(0.1, "stochastic depth of the last block in fine-tuning")
    features: str = option("pooled", f"what probes see: {', '.join(FEATURE_KINDS)}", tuple(FEATURE_KINDS))
    # What is run
    seeds: tuple[int, ...] = option((0, 1, 2), "of weights, masks, and labelled subsets; a cell for each")
    threads: int = option(1, "threads on the CPU")
    device: str = option("auto", "auto, cpu or cuda")

    def __post_init__(self) -> None:
        check_finite(self)
        counts = ("batch_size", "finetune_batch_size", "threads", "placements", "test_placements")
        check_minima(self, dict.fromkeys((*counts, "validation_images", "train_images", "test_images"), 1))
        check_minima(self, {"shift": 0, "weight_decay": 0, "warmup": 0, "learning_rate": 0, "placed_degrees": 0})
        self._check_choices()
        self._check_shares()
        self.model_config()

    def _check_choices(self) -> None:
        for name in ("placements", "test_placements"):
            if self.task == "plain" and getattr(self, name) > 1:
                raise ValueError(f"{name} {getattr(self, name)} must be 1 for task plain; there is nothing to place")
        if self.device not in ("auto", "cpu", "cuda"):
            raise ValueError(f"device {self.device!r} must be auto, cpu or cuda")
        self.check_unique("seeds")

    def _check_shares(self) -> None:
        if not self.epochs > 0:
            raise ValueError(f"epochs {self.epochs} must be greater than 0")
        self.check_is_share("placed_scale")
        if self.warmup > 1:
            raise ValueError(f"warmup {self.warmup} must be at most 1, a share of the updates")
        for name in ("placed_scale", "placed_gain", "background_gain"):
            low, high = getattr(self, name)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"{name} {[low, high]} must be in 0 … 1, the smaller first")
        if self.std <= 0:
            raise ValueError(f"std {self.std} must be greater than 0")

    def check_is_share(self, *names: str) -> None:
        """Raise a `ValueError` for a value of these fields that is not in (0, 1]."""
        for name in names:
            value = getattr(self, name)
            for share in value if isinstance(value, tuple) else (value,):
                if not 0 < share <= 1:
                    raise ValueError(f"{name} {share} must be greater than 0 and at most 1")

    def check_unique(self, *names: str) -> None:
        """Raise a `ValueError` for one of these fields that names something twice."""
        for name in names:
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} {list(getattr(self, name))} must not name one twice")

    def model_config(self) -> GreenSwinConfig:
        """The encoder of every setting, with GreenSwin's decoder.

        Raises:
            ValueError: fields contradict each other (see `GreenSwinConfig`).
        """
        names = ("image_size", "patch_size", "embed_dim", "depths", "num_heads", "window_size", "mask_ratio")
        parts = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
        fields = {name: getattr(self, name) for name in (*names, *(f"decoder_{part}" for part in parts))}
        # Stock Swin takes 1e-5 for some of its norms whatever the config says: with it everywhere both are the same.
        return GreenSwinConfig(num_channels=1, drop_path_rate=0.0, layer_norm_eps=1e-5, **fields)

    def choose_device(self) -> torch.device:
        """The device that the recipe names; for `auto` a GPU where there is one.

        Raises:
            ValueError: `cuda` on a machine without.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device 'cuda' is not available here; give --device cpu")
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.device(wanted if self.device == "auto" else self.device)


@dataclass(frozen=True)
class EvidenceRecipe(StudyRecipe):
    """The study of what pretraining is worth. Every field is a key of a recipe file and a flag."""

    free_on_resume: ClassVar = (*StudyRecipe.free_on_resume, "arms", "budgets", "finetune_learning_rates")

    # Pretraining
    dense_mask_ratio: float = option(0.6, "share of an image that is masked for dense SimMIM")
    dense_learning_rate: float = option(1.5e-3, "peak learning rate of dense SimMIM's pretraining")
    # Fine-tuning, alike for every arm
    finetune_learning_rates: tuple[float, ...] = option((3e-4, 1e-3, 3e-3), "tried for each arm and budget")
    layer_decay: float = option(1.0, "factor of the learning rate from a block to the one before; not for scratch")
    evaluate_every: int = option(
        100, "updates between two looks at the validation images; more where a quarter pass is"
    )
    patience: int = option(20, "looks without a better validation accuracy until the learning rate falls, or the end")
    max_steps: int = option(60000, "updates at most; an end by this is told")
    compile: bool = option(False, "compile the classifier in fine-tuning (torch.compile), worth it for long ones")
    # What is run
    arms: tuple[str, ...] = option(("scratch", "green", "dense"), f"which of {', '.join(ARMS)}")
    budgets: tuple[float, ...] = option((0.001, 0.01, 0.1, 1.0), "shares of the training images with a label")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minima(self, {"evaluate_every": 1, "patience": 1, "max_steps": 1, "dense_learning_rate": 0})
        for arm in self.arms:
            if arm not in ARMS:
                raise ValueError(f"arms {arm!r} must be one of {', '.join(ARMS)}")
        timed = [arm for arm in self.arms if ARMS[arm].time_of_dense is not None]
        if timed and not {"green", "dense"} <= set(self.arms):
            raise ValueError(f"arms {timed[0]!r} takes its time from those of 'green' and 'dense'; add both to arms")
        self.check_unique("budgets", "arms")
        self.check_is_share("dense_mask_ratio", "layer_decay", "budgets")
        if min(self.finetune_learning_rates) <= 0:
            raise ValueError("finetune_learning_rates must be greater than 0")
