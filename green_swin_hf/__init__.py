"""GreenSwin: visible-only Swin for masked image modeling, on the `transformers` API.

Importing the package registers the models with transformers' Auto classes. It needs torch and transformers only; what
reads data sets or draws pictures imports more and stands in modules of its own.
"""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    AutoVideoProcessor,
)
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.utils import is_torchvision_available, is_vision_available

from .configuration_green_swin import AUTO_MAP, VARIANTS, GreenSwinConfig
from .modeling_green_swin import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
    GreenSwinImageClassifierOutput,
    GreenSwinMaskedImageModelingOutput,
    GreenSwinModel,
    GreenSwinModelOutput,
    GreenSwinPreTrainedModel,
)
from .sparse_plan import SparseGeometry, SparsePlan, build_sparse_plan, sample_masks
from .window_grouping import WindowGrouping, choose_grouping, solve_grouping

__version__ = "0.1.0"

_OWN_CLASSES = (
    GreenSwinModel,
    GreenSwinForMaskedImageModeling,
    GreenSwinForImageClassification,
    GreenSwinBackbone,
)


def _register_auto_classes() -> None:
    AutoConfig.register(GreenSwinConfig.model_type, GreenSwinConfig)
    AutoModel.register(GreenSwinConfig, GreenSwinModel)
    AutoModelForMaskedImageModeling.register(GreenSwinConfig, GreenSwinForMaskedImageModeling)
    AutoModelForImageClassification.register(GreenSwinConfig, GreenSwinForImageClassification)
    AutoBackbone.register(GreenSwinConfig, GreenSwinBackbone)
    if is_vision_available():  # image processors need Pillow
        from .image_processing_green_swin import image_processors

        AutoImageProcessor.register(GreenSwinConfig, image_processor_classes=image_processors())
        for processor_class in image_processors().values():
            processor_class.register_for_auto_class()
        if is_torchvision_available():  # without it transformers has no video processors
            AutoVideoProcessor.register(GreenSwinConfig, _NoVideoProcessor)


class _NoVideoProcessor:
    """Images only, which pipelines are to know without asking whether a folder's code may be run.

    transformers looks for a video processor wherever a folder has an image processor of its own, and finding none
    registered asks about the code. It goes on without one where loading fails.
    """

    @classmethod
    def from_pretrained(cls, name: str, *args: object, **options: object) -> None:
        raise ValueError(f"{name} is a model of images; there is no video processor")


def _register_code() -> None:
    """Saved folders hold the code that they need where the package is not installed."""
    GreenSwinConfig.register_for_auto_class()
    for own_class in _OWN_CLASSES:
        auto_class = next(name for name, path in AUTO_MAP.items() if path.endswith(f".{own_class.__name__}"))
        own_class.register_for_auto_class(auto_class)


def _register_weight_names() -> None:
    """GreenSwin keeps the parameter names of Swin files in memory, stock Swin renames them on loading and saving.

    Stock classes must do so for a GreenSwin folder as well; our classes never, also not for a stock folder.
    """
    register_checkpoint_conversion_mapping(
        GreenSwinConfig.model_type, get_checkpoint_conversion_mapping("swin"), overwrite=True
    )
    for own_class in _OWN_CLASSES:
        register_checkpoint_conversion_mapping(own_class.__name__, [], overwrite=True)


_register_auto_classes()
_register_code()
_register_weight_names()

__all__ = [
    "VARIANTS",
    "GreenSwinBackbone",
    "GreenSwinConfig",
    "GreenSwinForImageClassification",
    "GreenSwinForMaskedImageModeling",
    "GreenSwinImageClassifierOutput",
    "GreenSwinMaskedImageModelingOutput",
    "GreenSwinModel",
    "GreenSwinModelOutput",
    "GreenSwinPreTrainedModel",
    "SparseGeometry",
    "SparsePlan",
    "WindowGrouping",
    "build_sparse_plan",
    "choose_grouping",
    "sample_masks",
    "solve_grouping",
]
