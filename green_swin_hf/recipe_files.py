"""Settings of a run as a YAML file, as command-line flags, and as one checked value; what kinds of recipes share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import functools
import math
import os
import types
import typing
import unicodedata
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from .configuration_green_swin import shown

_LARGEST_FILE = 2**17  # bytes
_LARGEST_INTEGER = 2**63
_DEEPEST = 8  # lists in lists
MOST_CHANNELS = 4096  # of images; means and deviations have a number for each

RecipeT = TypeVar("RecipeT", bound="RecipeFile")


def option(default: Any, description: str, choices: tuple[str, ...] | None = None) -> Any:
    return field(default=default, metadata={"help": description, "choices": choices})


@dataclass(frozen=True)
class RecipeFile:
    """Base of a kind of recipe: a frozen dataclass whose fields are keys of a file and flags.

    A subclass declares its fields with `option` and checks their ranges in `__post_init__`. `image_size` is the flag
    `--image-size`.

    Attributes:
        path_keys: fields that may hold a path; a file names them relative to itself.
        free_on_resume: fields that may differ between a run and its continuation.
    """

    path_keys: ClassVar[tuple[str, ...]] = ()
    free_on_resume: ClassVar[tuple[str, ...]] = ()

    def replace(self: RecipeT, **changes: Any) -> RecipeT:
        """The same recipe with some keys changed; values are checked as those of a file are.

        Raises:
            ValueError: a key is unknown, or a value has the wrong type or is out of range.
        """
        return dataclasses.replace(self, **checked(changes, type(self)))

    def with_flags(self: RecipeT, flags: dict[str, Any]) -> RecipeT:
        """The recipe with flags on top: `replace`, where a kind of recipe has no keys that depend on others."""
        return dataclasses.replace(self, **checked(flags, type(self)))

    def differences(self, other: RecipeFile) -> dict[str, tuple[Any, Any]]:
        """Keys that change what is trained and differ, each with both values (this recipe's first)."""
        names = (item.name for item in dataclasses.fields(self) if item.name not in self.free_on_resume)
        pairs = {name: (getattr(self, name), getattr(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def existing_paths(self, folder: Path = Path()) -> dict[str, Path]:
        """What the `path_keys` name that exists, relative to `folder` or absolute."""
        named = {key: folder / value for key in self.path_keys if (value := getattr(self, key))}
        return {key: path for key, path in named.items() if _exists(path)}

    def to_dict(self) -> dict[str, Any]:
        """Keys and values in the order of the class, sequences as lists, without what is not set."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items() if v is not None}


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text too long for a path is a name of something else, or of nothing
        return False


class _RecipeLoader(yaml.SafeLoader):
    """YAML of plain values whose mappings name no key twice: the standard loader takes the last one without a word.

    Flat and without aliases, too: a recipe needs neither, a few hundred bytes of aliases can stand for a billion
    entries, and the time for brackets in brackets grows with their square.
    """

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(problem="aliases (*name) are not allowed")
        if self._depth == _DEEPEST:
            raise yaml.composer.ComposerError(problem="it nests too deeply")
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def fetch_flow_collection_start(self, kind: Any) -> None:
        if self.flow_level == _DEEPEST:
            raise yaml.scanner.ScannerError(problem="it nests too deeply")
        super().fetch_flow_collection_start(kind)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            if not isinstance(name, Hashable):
                raise yaml.constructor.ConstructorError(problem=f"key {shown(name)} must be a word")
            if name in names:
                raise yaml.constructor.ConstructorError(problem=f"key {shown(name)} is given twice")
            names.add(name)
        return super().construct_mapping(node, deep)


def load_recipe(path: str | os.PathLike[str], kind: type[RecipeT]) -> RecipeT:
    """Read a recipe file of a kind. A relative path in `path_keys` that exists beside the file is meant from there.

    Raises:
        ValueError: the file is missing or no YAML mapping, a key is unknown (the closest known one is named), or a
            value has the wrong type or is out of range.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"recipe {path} is not a file; give the path of a YAML file")
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"recipe {path} has more than {_LARGEST_FILE:,} bytes; give a file of settings")
    content = path.read_bytes()
    try:
        entries = yaml.load(content.decode("utf-8"), _RecipeLoader)
    except Exception as error:  # values that are none, such as a 13th month, raise what their reader stumbles on
        raise ValueError(f"recipe {path} is not valid YAML: {_in_one_line(error)}") from None
    if entries is None:
        raise ValueError(f"recipe {path} is empty; give one with the keys of a run")
    if not isinstance(entries, dict):
        raise ValueError(f"recipe {path} must be a mapping of keys to values, not {type(entries).__name__}")
    try:
        recipe = kind().with_flags(entries)
    except ValueError as error:
        raise ValueError(f"recipe {path}: {_in_one_line(error)}") from None
    return recipe.replace(**{key: str(beside.resolve()) for key, beside in recipe.existing_paths(path.parent).items()})


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]}…"


def save_recipe(recipe: RecipeFile, path: str | os.PathLike[str]) -> None:
    """Write a recipe that `load_recipe` reads back as the same one, whole or not at all.

    What is given by an absolute path, and exists, is named relative to the file.
    """
    entries = recipe.to_dict()
    for key in recipe.existing_paths():
        if Path(entries[key]).is_absolute():
            entries[key] = os.path.relpath(entries[key], Path(path).resolve().parent)
    text = yaml.safe_dump(entries, sort_keys=False, default_flow_style=None, allow_unicode=True)
    partial = Path(f"{os.fspath(path)}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # or a full disk would leave a folder that is taken for one in use
        raise


def add_recipe_flags(parser: argparse._ActionsContainer, kind: type[RecipeFile]) -> None:
    """Add a flag for every key of a kind of recipe; one that is not given leaves no entry in the parsed arguments."""
    for item in dataclasses.fields(kind):
        kinds = _kinds(kind, item.name)
        options: dict[str, Any] = {
            "help": item.metadata["help"],
            "default": argparse.SUPPRESS,
            "dest": item.name,
        }
        if bool in kinds:
            options["action"] = argparse.BooleanOptionalAction
        else:
            choices = item.metadata["choices"]
            options["metavar"] = "{" + ",".join(choices) + "}" if choices else "VALUE"
        if any(typing.get_origin(kind) is tuple for kind in kinds):
            options["nargs"] = "+"
        parser.add_argument("--" + item.name.replace("_", "-"), **options)


def flag_overrides(arguments: argparse.Namespace, kind: type[RecipeFile]) -> dict[str, Any]:
    """The recipe keys among parsed arguments, with values as typed (text); `with_flags` checks them."""
    names = [item.name for item in dataclasses.fields(kind) if hasattr(arguments, item.name)]
    values = {name: getattr(arguments, name) for name in names}
    # A flag that takes several values gives a list; a field that takes one or several wants one as such.
    single = {name for name, value in values.items() if isinstance(value, list) and len(value) == 1}
    return {name: value[0] if name in single and int in _kinds(kind, name) else value for name, value in values.items()}


def _kinds(kind: Any, name: str) -> tuple[Any, ...]:
    """Types that a field accepts: `int | None` is `(int, NoneType)`."""
    hint = _hints(kind)[name]
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


@functools.cache  # evaluating them takes milliseconds
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def checked(entries: dict[str, Any], kind: type[RecipeFile]) -> dict[str, Any]:
    """The entries, of a file or flags, with every value in its field's type.

    Raises:
        ValueError: an unknown key, a value of the wrong type, or none of its choices.
    """
    known = {item.name: item for item in dataclasses.fields(kind)}
    for name in entries:
        if name not in known:
            text = name if isinstance(name, str) else shown(name)
            close = difflib.get_close_matches(text[:80], known, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {shown(text)}; the closest valid key is {close!r}")
    checked = {name: _typed(kind, name, value) for name, value in entries.items()}
    for name, value in checked.items():
        choices = known[name].metadata["choices"]
        items = value if isinstance(value, tuple) else (value,)
        if choices and not all(item is None or item in choices for item in items):
            wrong = next(item for item in items if item not in choices)
            raise ValueError(f"{name} {shown(wrong)} must be one of {', '.join(choices)}")
    return checked


def _typed(recipe: type[RecipeFile], name: str, value: Any) -> Any:
    """`value` in the type of field `name`; numbers may come as text, from flags and from YAML's `1e-4`."""
    for kind in _kinds(recipe, name):
        converted = _convert(value, kind)
        if converted is not _NO_MATCH:
            return converted
    names = [_KIND_NAMES[kind] for kind in _kinds(recipe, name)]
    raise ValueError(f"{name} {shown(value)} must be {' or '.join(names)}")


_NO_MATCH = object()
_KIND_NAMES = {
    int: "an integer",
    float: "a number",
    str: "text in one line",
    bool: "true or false",
    types.NoneType: "null",
    tuple[int, ...]: "a list of integers",
    tuple[float, ...]: "a list of numbers",
    tuple[str, ...]: "a list of words",
    tuple[float, float]: "two numbers",
    tuple[str, ...]: "a list of names",
}


def _convert(value: Any, kind: Any) -> Any:
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple) or not value:
            return _NO_MATCH
        kinds = typing.get_args(kind)
        if kinds[-1] is not Ellipsis and len(value) != len(kinds):
            return _NO_MATCH
        items = tuple(_convert(item, kinds[0]) for item in value)
        return _NO_MATCH if _NO_MATCH in items else items
    if kind is types.NoneType:
        return None if value is None else _NO_MATCH
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else _NO_MATCH
    if kind is str:
        return _text(value)
    return _number(value, kind)


def _text(value: Any) -> Any:
    """A name or a path, which holds no control characters and no halves of others."""
    if not isinstance(value, str) and not (isinstance(value, int) and abs(value) < _LARGEST_INTEGER):
        return _NO_MATCH
    text = str(value)
    return _NO_MATCH if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in text) else text


def _number(value: Any, kind: type[int] | type[float]) -> Any:
    if not isinstance(value, str | int | float) or (
        kind is int and isinstance(value, float) and not value.is_integer()
    ):
        return _NO_MATCH
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        return _NO_MATCH
    return number if kind is float or abs(number) < _LARGEST_INTEGER else _NO_MATCH


def check_finite(recipe: RecipeFile) -> None:
    """Raise a `ValueError` for a number of the recipe that is infinite or none."""
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{item.name} {value} must be finite")


def check_minima(recipe: RecipeFile, minima: Mapping[str, float]) -> None:
    """Raise a `ValueError` for a value, where one is set, below its minimum."""
    for name, minimum in minima.items():
        value = getattr(recipe, name)
        if value is not None and not value >= minimum:
            raise ValueError(f"{name} {value} must be at least {minimum}")


__all__ = [
    "MOST_CHANNELS",
    "RecipeFile",
    "add_recipe_flags",
    "check_finite",
    "check_minima",
    "checked",
    "flag_overrides",
    "load_recipe",
    "option",
    "save_recipe",
]
