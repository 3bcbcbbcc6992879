"""Put a trained or converted model on the Hub, with its card, its code and what its run left, in one commit.

    python -m green_swin_hf.publish outputs/finetune --repo-id user/name            # a private repository
    python -m green_swin_hf.publish outputs/finetune --repo-id user/name --dry-run  # show it, contact nobody

Nothing in the folder is changed. A README.md in it is taken as the card; without one, the card is written from what the
run recorded. Exit codes: 0 done, 1 the upload failed (the repository is as it was; repeat it), 2 wrong input.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from . import image_processing_green_swin, modeling_green_swin
from .configuration_green_swin import AUTO_MAP
from .hub_upload import prepare_upload, upload_files
from .model_cards import PICTURES, CardFacts, render_card
from .redaction import one_line, redacted, without_local_paths
from .run_record import RECORD_FILE, read_record, weight_checksums
from .training import OneLineParser, one_line_errors

_CARD, _CONFIG, _PROCESSOR, _DETECTOR = "README.md", "config.json", "preprocessor_config.json", "detector.json"
_LOG = "log.jsonl"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_JSON_FILES = ("metrics.json", "detections.json", RECORD_FILE)
# Files of a result: those in a repository that are not among the new ones are of an earlier one, and go with it.
_OWN_FILES = re.compile(
    r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?|(config|preprocessor_config|detector|metrics|detections|run)\.json"
    r"|recipe\.yaml|log\.jsonl|(\w+_green_swin|gpu_attention|sparse_plan|token_layout|triton_attention|window_grouping)\.py|"
    + "|".join(re.escape(name) for name in PICTURES)
)
_KINDS = {  # by the class that was saved
    "GreenSwinModel": "pretrained",
    "GreenSwinBackbone": "backbone",
    "GreenSwinForMaskedImageModeling": "pretrained",
    "GreenSwinForImageClassification": "classification",
}


@dataclass(frozen=True)
class Result:
    """A folder with a model that can be published.

    Attributes:
        folder: where it is.
        kind: of its card, a key of `model_cards.TASKS`.
        config: entries of `config.json`, of a detector and of UperNet those of the backbone.
        classes: names of the classes.
        weights: names of the files with weights.
    """

    folder: Path
    kind: str
    config: dict[str, Any]
    classes: tuple[str, ...]
    weights: tuple[str, ...]


@contextlib.contextmanager
def _whole(folder: Path) -> Iterator[None]:
    """Files of a folder that hold other kinds of values than ours do are a `ValueError`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, jinja2.UndefinedError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"a file of {folder} does not hold what a run writes ({reason}); save it again, or remove {RECORD_FILE}"
        ) from None


def find_result(folder: Path) -> Result:
    """What is in a folder.

    Raises:
        ValueError: no GreenSwin, or one without weights, or a file that is not what a run or `save_pretrained` writes.
    """
    with _whole(folder):
        return _find_result(folder)


def _find_result(folder: Path) -> Result:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; give the output folder of a run, or one that save_pretrained wrote")
    if (folder / _DETECTOR).is_file():
        content = _read_json(folder / _DETECTOR)
        classes = tuple(content["settings"]["class_names"])
        return Result(folder, "detection", content["backbone"], classes, _weight_files(folder))
    if not (folder / _CONFIG).is_file():
        unfinished = (folder / "checkpoints").is_dir()
        hint = "its run has not finished: --resume auto" if unfinished else "give the output folder of a run"
        raise ValueError(f"{folder} holds no {_CONFIG} and no {_DETECTOR}; {hint}")
    config = _read_json(folder / _CONFIG)
    architecture = (config.get("architectures") or [None])[0]
    classes = tuple(name for _, name in sorted(config.get("id2label", {}).items(), key=lambda item: int(item[0])))
    backbone = config.get("backbone_config") or {}
    if architecture == "UperNetForSemanticSegmentation" and backbone.get("model_type") == "green_swin":
        return Result(folder, "segmentation", backbone, classes, _weight_files(folder))
    if config.get("model_type") != "green_swin" or architecture not in _KINDS:
        raise ValueError(
            f"{folder} holds no GreenSwin but a {architecture or 'model'} of type {config.get('model_type')!r}; give a "
            "folder that a script of green-swin-hf or save_pretrained of its models wrote"
        )
    kind = _KINDS[architecture]
    return Result(folder, kind, config, classes if kind == "classification" else (), _weight_files(folder))


def _weight_files(folder: Path) -> tuple[str, ...]:
    has_one, has_shards = ((folder / name).is_file() for name in (_WEIGHTS, _INDEX))
    if has_one and has_shards:
        raise ValueError(f"{folder} holds both {_WEIGHTS} and {_INDEX}; remove the one that is out of date")
    if has_one:
        return (_WEIGHTS,)
    if not has_shards:
        raise ValueError(f"{folder} holds no weights ({_WEIGHTS}); give the output folder of a run that has finished")
    shards = sorted(set(_read_json(folder / _INDEX)["weight_map"].values()))
    # An index from elsewhere may name any file of this machine.
    other = [name for name in shards if not _SHARD.fullmatch(name)]
    if other:
        raise ValueError(f"{folder / _INDEX} names {other[0]!r}, which is no file of weights beside it; save it again")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{folder} lacks {missing[0]}, which {_INDEX} names; save the model again")
    return (_INDEX, *shards)


def collect_files(
    result: Result, repo_id: str, *, license: str | None = None, base_model: str | None = None
) -> dict[str, Path | bytes]:
    """All that is uploaded: for each name the file, or the content where it differs from the folder's or is made.

    Args:
        result: from `find_result`.
        repo_id: `user/name`, for the card.
        license, base_model: of the weights, in place of what the run recorded.

    Raises:
        ValueError: a file leads out of the folder, is not what a run writes, or the record is of other weights.
    """
    with _whole(result.folder):
        return _collect_files(result, repo_id, license, base_model)


def _collect_files(
    result: Result, repo_id: str, license: str | None, base_model: str | None
) -> dict[str, Path | bytes]:
    folder = result.folder
    paths = {name: folder / name for name in (*result.weights, _DETECTOR, _LOG, *PICTURES)}
    files: dict[str, Path | bytes] = {name: path for name, path in paths.items() if path.is_file()}
    _refuse_links(folder)
    if _LOG in files:
        files[_LOG] = redacted(paths[_LOG].read_text(encoding="utf-8")).encode()
    present = [name for name in (_CONFIG, _PROCESSOR, *_JSON_FILES) if (folder / name).is_file()]
    contents = {name: _read_json(folder / name) for name in present}
    contents = {
        name: _without_name(content) if name in (_CONFIG, _PROCESSOR) else without_local_paths(content)
        for name, content in contents.items()
    }
    if result.kind in ("pretrained", "backbone", "classification"):
        contents[_CONFIG] = {**contents[_CONFIG], "auto_map": AUTO_MAP}
        files |= _code_files(contents.get(_PROCESSOR, {}))
    files |= {name: _json_bytes(content) for name, content in contents.items()}
    recipe = _read_recipe(folder / "recipe.yaml")
    if recipe:
        files["recipe.yaml"] = yaml.safe_dump(recipe, sort_keys=False, default_flow_style=None).encode()
    record = without_local_paths(read_record(folder))
    _refuse_other_weights(folder, record)
    facts = CardFacts(
        result.kind, repo_id, result.config, result.classes, recipe, record, frozenset(files), license, base_model
    )
    own_card = folder / _CARD
    files[_CARD] = own_card if own_card.is_file() else str(render_card(facts)).encode()
    return files


def _refuse_links(folder: Path) -> None:
    """Raise a `ValueError` where an entry leads out of the folder, but for those of the Hub's cache."""
    inside = (folder.resolve(), (folder / ".." / ".." / "blobs").resolve())
    for path in folder.iterdir():
        if path.is_symlink() and path.resolve().parent not in inside:
            raise ValueError(f"{path} leads to {path.resolve()}, outside the folder; put a copy in its place")


def _refuse_other_weights(folder: Path, record: dict[str, Any]) -> None:
    """Raise a `ValueError` where the record is that of other weights than those in the folder."""
    recorded = record.get("weights")
    if recorded is not None and recorded != weight_checksums(folder):
        raise ValueError(
            f"the weights in {folder} are not those that its {RECORD_FILE} was written for; save changed weights to a "
            f"folder of their own, or remove {RECORD_FILE}"
        )


def _without_name(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key != "_name_or_path"}


def _code_files(processor: dict[str, Any]) -> dict[str, Path | bytes]:
    """This package's modules that a reader without it needs; of a grey model the image processor's as well."""
    module = Path(modeling_green_swin.__file__)
    paths = [module, *map(Path, get_relative_import_files(module))]
    name = str(processor.get("image_processor_type", ""))
    if name.startswith("GreenSwin"):
        paths.append(Path(image_processing_green_swin.__file__))
        processor["auto_map"] = {"AutoImageProcessor": f"{paths[-1].stem}.{name}"}
    return {path.name: path for path in paths}


def _read_recipe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return without_local_paths(yaml.safe_load(path.read_text(encoding="utf-8"))) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}; remove or mend it") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def _json_bytes(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def publish(folder: Path, repo_id: str, *, license: str | None = None, base_model: str | None = None) -> str:
    """Upload a folder to a repository that `prepare_upload` made ready; returns the address of the commit.

    Raises:
        ValueError: the folder holds nothing to publish.
        OSError: the upload failed; the repository is as it was, and the same call repeats it.
    """
    result = find_result(folder)
    files = collect_files(result, repo_id, license=license, base_model=base_model)
    return upload_files(repo_id, files, f"Add {result.kind} model", own=_OWN_FILES)


def publish_results(program: str, folder: Path, repo_id: str, *, public: bool = False) -> bool:
    """`publish` at the end of a script, whose results stay in `folder` in any case; whether it went well."""
    try:
        print(f"Uploaded to {publish(folder, repo_id)}")
    except (ValueError, OSError) as error:
        reason = one_line(error)
        words = ["python", "-m", "green_swin_hf.publish", str(folder), "--repo-id", repo_id]
        again = shlex.join([*words, "--public"] if public else words)
        print(f"\n{program}: the upload to {repo_id} failed: {reason}; send it later: {again}", file=sys.stderr)
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    with one_line_errors("publish"):
        arguments = parse_arguments(argv)
        _check_name(arguments.repo_id)
        result = find_result(arguments.folder)
        given = {"license": arguments.license, "base_model": arguments.base_model}
        files = collect_files(result, arguments.repo_id, **given)
        if arguments.dry_run:
            print_files(result, files, arguments.repo_id, arguments)
            return 0
        repo_id = prepare_upload(arguments.repo_id, private=not arguments.public)
        files = collect_files(result, repo_id, **given)
    print_files(result, files, repo_id, arguments)
    try:
        address = upload_files(repo_id, files, f"Add {result.kind} model", own=_OWN_FILES)
    except OSError as error:
        # the line of a progress bar may be open
        print(f"\npublish: the upload failed: {error}; {repo_id} is as it was, repeat the command", file=sys.stderr)
        return 1
    print(f"Uploaded to {address}")
    return 0


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"the repository {repo_id!r} has no valid name: {one_line(error)}") from None


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(prog="python -m green_swin_hf.publish", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="output folder of a run, or what save_pretrained wrote")
    parser.add_argument("--repo-id", required=True, metavar="USER/NAME", help="repository, made if it does not exist")
    parser.add_argument("--public", action="store_true", help="make a new repository public (default: private)")
    parser.add_argument("--license", metavar="NAME", help="licence of the weights, such as apache-2.0")
    parser.add_argument("--base-model", metavar="USER/NAME", help="model on the Hub that the weights derive from")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded and the card")
    return parser.parse_args(argv)


def print_files(result: Result, files: Mapping[str, Path | bytes], repo_id: str, arguments: argparse.Namespace) -> None:
    """What is uploaded, with sizes; in a dry run also the card."""
    sizes = {name: len(item) if isinstance(item, bytes) else item.stat().st_size for name, item in files.items()}
    visibility = "public" if arguments.public else "private"
    verb = "Would upload" if arguments.dry_run else "Uploading"
    print(f"{verb} {result.folder} ({result.kind}) to {repo_id}, {visibility} if it is new:")
    for name in sorted(sizes):
        print(f"  {sizes[name]:>12,}  {name}")
    print(f"  {sum(sizes.values()):>12,}  bytes in {len(sizes)} files, in one commit")
    card = files[_CARD]
    if isinstance(card, Path):
        print(f"The card is yours: {card}")
    elif arguments.dry_run:
        print(f"The card ({_CARD}), as it would be uploaded:\n\n{card.decode()}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
