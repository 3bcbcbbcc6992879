"""Opening checkpoints of others without running code from them."""

from __future__ import annotations

import argparse
import json
import pickle
import re
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor

# Keys under which training scripts keep the weights; the first that is there counts.
_WRAPPERS = ("model", "state_dict", "model_state_dict")
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
# Settings that training scripts save beside the weights: harmless, and read as plain values. `yacs` (Microsoft's
# configuration) need not be installed, its nodes become dictionaries.
_ASK = "ask for a .safetensors file, or a state dict saved by torch.save"
_SAFE_GLOBALS: list[Any] = [argparse.Namespace, (OrderedDict, "yacs.config.CfgNode"), set]


@dataclass(frozen=True)
class Checkpoint:
    """What a file or folder of weights holds.

    Attributes:
        path: the file or folder.
        tensors: parameters and buffers under the names they have there.
        config: `config.json` of a folder.
        processor: `preprocessor_config.json` of a folder.
        settings: values of the training script that were saved beside the weights, names in lower case.
    """

    path: Path
    tensors: dict[str, Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def open_checkpoint(path: Path) -> Checkpoint:
    """The weights in a folder of transformers or timm, a `.safetensors` file or a pickled file of torch.

    Raises:
        ValueError: nothing there, not readable, without weights, or a file that would run code when opened.
    """
    if path.is_dir():
        config, processor = (_read_json(path / f"{name}.json") for name in ("config", "preprocessor_config"))
        for name in ("pretrained_cfg", "model_args"):  # timm's
            if not isinstance(config.get(name, {}), dict):
                raise ValueError(f"{path / 'config.json'}: {name} must be a JSON object, not {config[name]!r}")
        tensors = {}
        for file in _weight_files(path):
            tensors.update(_read_file(file).tensors)
        return Checkpoint(path, tensors, config, processor)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give a file (.safetensors, .pth) or a folder with weights")
    return _read_file(path)


def fetch_source(source: str) -> Path:
    """`source` as a path, fetched first where it is no path and reads like a repository on the Hub (`user/name`).

    With the weights comes the card, which tells their licence.

    Raises:
        ValueError: it cannot be fetched.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        return path
    try:
        folder = Path(snapshot_download(source, allow_patterns=["*config.json", "model*.safetensors*", "README.md"]))
        if not any(folder.glob("model*.safetensors")):
            snapshot_download(source, allow_patterns=["pytorch_model*.bin*"])
        return folder
    except Exception as error:  # the HTTP library's own types, which differ between versions of huggingface_hub
        raise ValueError(
            f"{source} does not exist here and cannot be fetched from the Hub ({type(error).__name__}); give a file, a "
            "folder, or user/name of a repository"
        ) from None


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        if (folder / f"{name}.index.json").is_file():
            return [folder / shard for shard in _shard_names(folder / f"{name}.index.json")]
    raise ValueError(f"{folder} holds neither of {', '.join(_WEIGHT_FILES)}; give a folder with weights, or the file")


def _shard_names(index: Path) -> list[str]:
    """Names of the files that an index lists.

    Raises:
        ValueError: it lists none, or something else than files beside it.
    """
    listed = _read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise ValueError(f"{index}: weight_map must be a JSON object from names of tensors to names of files")
    for name in listed.values():
        if not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name):
            raise ValueError(f"{index}: weight_map lists {name!r}; it must list names of files beside it, not paths")
    return sorted(set(listed.values()))


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {_one_line(error)}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must hold a JSON object, not {type(entries).__name__}")
    return entries


def _read_file(path: Path) -> Checkpoint:
    if path.suffix != ".safetensors":
        return _from_pickled(path, _read_pickled(path))
    try:
        return Checkpoint(path, load_file(path))
    except Exception as error:  # damaged files raise what the reader of the moment stumbles on
        raise ValueError(f"{path} is no readable safetensors file: {_one_line(error)}") from None


def _read_pickled(path: Path) -> Any:
    """What `torch.save` wrote: tensors, plain values and the settings above. Everything else is refused unread."""
    try:
        with torch.serialization.safe_globals(_SAFE_GLOBALS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, on the pickle protocol of strangers
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"{path} is not readable: {error.strerror or _one_line(error)}") from None
    except Exception as error:  # damaged files raise what the reader of the moment stumbles on
        wanted = re.search(r"GLOBAL ([\w.]{1,100})", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        if wanted is None:  # torch's own words advise to run the code of the file
            raise ValueError(
                f"{path} is no readable checkpoint of torch: it is damaged, or of a kind that would run code when "
                f"opened (a plain pickle, a TorchScript archive, a file of before torch 1.6); {_ASK}"
            ) from None
        raise ValueError(
            f"{path} is refused: opening it would run {wanted[1]}, and weights need no code; {_ASK}"
        ) from None


def _from_pickled(path: Path, content: Any) -> Checkpoint:
    settings: dict[str, Any] = {}
    if isinstance(content, dict):
        for key in ("args", "config"):
            settings.update(_flat_settings(content.get(key)))
        content = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), dict)), content)
    if not isinstance(content, dict) or not content or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path} holds no weights: a dictionary from names to tensors is expected")
    others = [key for key, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{path}: {others[0]!r} is no tensor; weights are looked for under {', '.join(_WRAPPERS)} or at the top"
        )
    wrapped = all(key.startswith("module.") for key in content)  # by DistributedDataParallel
    tensors = {key.removeprefix("module.") if wrapped else key: value.detach() for key, value in content.items()}
    return Checkpoint(path, tensors, settings=settings)


def _flat_settings(node: Any) -> dict[str, Any]:
    """Settings by their last name in lower case: `DATA.IMG_SIZE` of a nested configuration is `img_size`."""
    flat: dict[str, Any] = {}
    waiting, seen = [node], set()
    while waiting:  # not by recursion: a file may hold a dictionary that contains itself
        found = waiting.pop()
        entries = vars(found) if isinstance(found, argparse.Namespace) else found
        if isinstance(entries, dict) and id(entries) not in seen:
            seen.add(id(entries))
            waiting.extend(value for value in entries.values() if isinstance(value, dict))
            flat.update({str(key).lower(): value for key, value in entries.items() if not isinstance(value, dict)})
    return flat


def _one_line(error: Exception, longest: int = 200) -> str:
    return " ".join(str(error).split())[:longest] or type(error).__name__


@contextmanager
def refusal_in_one_line(path: Path | str) -> Iterator[None]:
    """Turn what nobody foresaw of a stranger's file into a `ValueError` of one line that names the file."""
    try:
        yield
    except OSError:
        raise
    except ValueError as error:  # it may quote names of the file, which may hold anything
        raise ValueError(_one_line(error, longest=800)) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {_one_line(error)}"
        if "weights_only" in str(error):  # torch's advice to run the code of the file
            reason = f"its weights are no plain state dict; {_ASK}"
        raise ValueError(f"{path} cannot be converted: {reason}") from error


__all__ = ["Checkpoint", "fetch_source", "open_checkpoint", "refusal_in_one_line"]
