"""The recipe of the quality studies: what all settings have in common."""

from __future__ import annotations

from dataclasses import dataclass

from evidence_study.recipe import StudyRecipe

from green_swin_hf.recipe_files import check_minima, option


@dataclass(frozen=True)
class QualityRecipe(StudyRecipe):
    """One fixed budget for every setting."""

    probe_labels: float = option(1.0, "share of the training images with a label, for k-NN and the linear probe")
    finetune_labels: float = option(0.1, "share of the training images with a label, for fine-tuning")
    finetune_updates: int = option(1500, "updates of a fine-tuning; nothing is chosen on the way")
    finetune_learning_rate: float = option(1e-3, "peak learning rate of fine-tuning")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_minima(self, {"finetune_updates": 1, "finetune_learning_rate": 0})
        self.check_is_share("probe_labels", "finetune_labels")
