"""Image processors of ViT that also prepare images for models of grey images.

Pipelines turn every picture into colour before a processor sees it. A processor whose `image_mean` has one entry
belongs to a model with one channel and turns it back.
"""

from __future__ import annotations

import math
from typing import Any

from PIL import Image
from transformers import ViTImageProcessorPil
from transformers.utils import is_torchvision_available


def _as_expected(image: Any, num_channels: int) -> Any:
    """The image in grey where one channel is expected; arrays and tensors have the channels that they should.

    Raises:
        ValueError: pixels that are NaN or infinite, which would make all outputs NaN.
    """
    if isinstance(image, Image.Image):
        return image.convert("L") if num_channels == 1 and image.mode != "L" else image
    is_float = "float" in str(getattr(image, "dtype", ""))  # an array or a tensor
    if is_float and not (abs(image) < math.inf).all():
        raise ValueError("an image has pixels that are NaN or infinite; mend it, or fill them: numpy.nan_to_num(image)")
    return image


class GreenSwinImageProcessorPil(ViTImageProcessorPil):
    """`GreenSwinImageProcessor` without torchvision."""

    def process_image(self, image: Any, *args: Any, **options: Any) -> Any:
        return super().process_image(_as_expected(image, len(self.image_mean)), *args, **options)


if is_torchvision_available():
    from transformers import ViTImageProcessor

    class GreenSwinImageProcessor(ViTImageProcessor):
        """Resizes and normalises as `ViTImageProcessor`; pictures become grey where `image_mean` has one entry."""

        def process_image(self, image: Any, *args: Any, **options: Any) -> Any:
            return super().process_image(_as_expected(image, len(self.image_mean)), *args, **options)

    def image_processors() -> dict[str, Any]:
        """Classes by backend, for `AutoImageProcessor.register`."""
        return {"torchvision": GreenSwinImageProcessor, "pil": GreenSwinImageProcessorPil}

else:
    GreenSwinImageProcessor = GreenSwinImageProcessorPil  # type: ignore[assignment, misc] # the name in saved folders

    def image_processors() -> dict[str, Any]:
        """Classes by backend, for `AutoImageProcessor.register`."""
        return {"pil": GreenSwinImageProcessorPil}
