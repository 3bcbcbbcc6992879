"""Models that start from the weights of a folder or a repository on the Hub: of a GreenSwin, or of a stock Swin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from .configuration_green_swin import GreenSwinConfig
from .image_sources import looks_local
from .modeling_green_swin import (
    GreenSwinBackbone,
    GreenSwinForImageClassification,
    GreenSwinForMaskedImageModeling,
)

_SWIN_TYPES = ("green_swin", "swin")  # `model_type` of the configurations with an encoder to start from


def load_for_continued_training(
    folder: str | os.PathLike[str], config: GreenSwinConfig
) -> GreenSwinForMaskedImageModeling:
    """A model for pretraining with the weights of a folder as a start; a missing decoder stays random.

    Args:
        folder: of a GreenSwin, or of a stock Swin with its published parameter names.
        config: of the model that is to be trained.

    Raises:
        ValueError: the folder does not load, is of another shape than `config`, or holds no encoder.
    """
    flag = f"--init-from {folder}"
    model, report = _load(
        GreenSwinForMaskedImageModeling, folder, flag, lambda: {"config": config, "ignore_mismatched_sizes": True}
    )
    if report["mismatched_keys"]:
        # an encoder's weight says more than the decoder's, whose sizes follow
        mismatched = sorted(report["mismatched_keys"], key=lambda entry: (not entry[0].startswith("swin."), entry[0]))
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"{flag} does not fit the recipe: {name} is {list(found)} there and {list(wanted)} here; "
            "give the variant, patch_size, window_size, image_size and num_channels that it was made with"
        )
    _refuse_missing(flag, report, but="decoder.", remedy="give the variant and depths that it was made with")
    return model


def load_for_finetuning(folder: str, class_names: Sequence[str], **changes: Any) -> GreenSwinForImageClassification:
    """A classifier with the encoder of a folder, and with its head where the classes are the same.

    Args:
        folder: of a GreenSwin of any class, or of a stock Swin.
        class_names: the classes, in the order of the labels.
        **changes: fields of the configuration, such as `drop_path_rate`.

    Raises:
        ValueError: nothing there, nothing that loads, no whole encoder, or another geometry than `changes` ask for.
    """
    flag, same_classes = f"--model {folder}", False

    def options() -> dict[str, Any]:
        nonlocal same_classes
        same_classes = _class_names(GreenSwinConfig.from_pretrained(folder)) == tuple(class_names)
        return {"ignore_mismatched_sizes": True, **changes, **class_entries(class_names)}

    model, report = _load(GreenSwinForImageClassification, folder, flag, options, otherwise=", or none")
    mismatched = sorted(entry for entry in report["mismatched_keys"] if not entry[0].startswith("classifier."))
    if mismatched:
        name, found, wanted = mismatched[0]
        raise ValueError(
            f"{flag} does not fit: {name} is {list(found)} there and {list(wanted)} here; leave out "
            "image_size and num_channels, or give those that it was made with"
        )
    _refuse_missing(flag, report, but="classifier.")
    if not same_classes:
        model.classifier = nn.Linear(model.config.hidden_size, len(class_names))
        model._init_weights(model.classifier)
    return model


def load_backbone(folder: str | os.PathLike[str], **changes: Any) -> GreenSwinBackbone:
    """A backbone with the weights of a folder, all stages in its output.

    The norms of the feature maps, which pretraining has not, start anew where the folder has none.

    Args:
        folder: of a GreenSwin of any kind, or of a stock Swin.
        changes: fields of the configuration, such as `drop_path_rate`.

    Raises:
        ValueError: the folder does not load, or holds no encoder.
    """
    flag = f"--init-from {folder}"

    def options() -> dict[str, Any]:
        config = GreenSwinConfig.from_pretrained(folder, **changes)
        config.out_features = config.stage_names[1:]
        return {"config": config}

    backbone, report = _load(GreenSwinBackbone, folder, flag, options)
    _refuse_missing(flag, report, but="hidden_states_norms.")
    return backbone


def class_entries(class_names: Sequence[str]) -> dict[str, Any]:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def check_model_type(model_type: str, title: str) -> None:
    """Raise a `ValueError` for a model that is neither a GreenSwin nor a stock Swin.

    Args:
        model_type: as the configuration has it.
        title: what the message calls the folder, such as "--model FOLDER".
    """
    if model_type not in _SWIN_TYPES:
        raise ValueError(f"{title} is a {model_type}; give the folder of a GreenSwin or a Swin")


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within it transformers reports errors only."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def _load(
    kind: Any, folder: str | os.PathLike[str], flag: str, options: Callable[[], dict[str, Any]], otherwise: str = ""
) -> Any:
    """(model, report) of `from_pretrained`; `options` may read the folder, too."""
    name = os.fspath(folder)
    if looks_local(name) and not Path(name).exists():
        raise ValueError(f"{flag} does not exist; give a folder with a model, or a name on the Hub{otherwise}")
    with _loading(flag):
        content, _ = PretrainedConfig.get_config_dict(name)
        model_type = content.get("model_type")
    if model_type is not None:  # what has weights and no configuration shows by the names of the weights
        check_model_type(model_type, flag)
    with _loading(flag):
        loaded = kind.from_pretrained(name, output_loading_info=True, **options())
    return loaded


@contextlib.contextmanager
def _loading(flag: str) -> Iterator[None]:
    try:
        with quiet_transformers():
            yield
    except Exception as error:  # readers of files that are no weights raise what they like
        raise ValueError(f"{flag} cannot be loaded: {' '.join(str(error).split())[:300]}") from None


def _refuse_missing(
    flag: str, report: dict[str, Any], *, but: str, remedy: str = "give the folder of a GreenSwin or a Swin"
) -> None:
    """Raise a `ValueError` where a weight is missing whose name does not start with `but`."""
    if missing := sorted(name for name in report["missing_keys"] if not name.startswith(but)):
        raise ValueError(f"{flag} lacks {len(missing)} weights of a Swin encoder, such as {missing[0]}; {remedy}")


def _class_names(config: GreenSwinConfig) -> tuple[str, ...]:
    names: dict[Any, str] = dict(config.id2label or {})
    return tuple(names[index] for index in range(len(names)))


__all__ = [
    "check_model_type",
    "class_entries",
    "load_backbone",
    "load_for_continued_training",
    "load_for_finetuning",
    "quiet_transformers",
]
