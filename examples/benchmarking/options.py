"""The command line that the parts share: types of values, options, and their defaults."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarking.rates import leave_out_slow_bf16

MASK_UNIT_SIZE = 32
SWIN_VARIANTS = ("tiny", "small", "base", "large", "micro")
# Images of a step at 224 px on a CPU, so that a step of the dense baseline takes some seconds on two cores.
CPU_BATCHES = {"tiny": 16, "small": 8, "base": 8, "large": 4, "micro": 2}
CUDA_BATCH = 128


class WrongInput(Exception):
    """Something the user has to change; the message is one line with the remedy."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line."""

    def error(self, message: str) -> Any:
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number of at least 1")
    return int(text)


def image_size(text: str) -> int:
    size = positive_int(text)
    if size % MASK_UNIT_SIZE:
        raise argparse.ArgumentTypeError(f"{size} must be a multiple of the mask unit size {MASK_UNIT_SIZE}")
    return size


def masked_image_size(text: str) -> int:
    size = image_size(text)
    if size == MASK_UNIT_SIZE:
        raise argparse.ArgumentTypeError(f"{size} must be at least {2 * MASK_UNIT_SIZE}, for units to mask and to see")
    return size


def ratio(text: str, with_zero: bool = False) -> float:
    """A share of masked units; 0 only where nothing has to be masked."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not (0 <= value < 1 if with_zero else 0 < value < 1):
        least = "of at least 0" if with_zero else "above 0"
        raise argparse.ArgumentTypeError(f"{text!r} must be a number {least} and below 1")
    return value


def json_file(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".json" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} must be the name of a file that ends in .json")
    try:  # now, not after hours of measuring
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: {error.strerror}") from error
    if not path.stat().st_size:
        path.unlink()
    return path


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3600:
        raise argparse.ArgumentTypeError(f"{text!r} must be a number of seconds of at least 0")
    return value


def list_of(read: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A reader of values with commas between them, each once."""

    def read_list(text: str) -> list[Any]:
        return list(dict.fromkeys(read(word.strip()) for word in text.split(",")))

    return read_list


def one_of(*choices: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in choices:
            raise argparse.ArgumentTypeError(f"{text!r} must be one of {', '.join(choices)}")
        return text

    return read


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=json_file, help="write everything measured to this JSON file, plots beside it")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Options of every part that runs models."""
    parser.add_argument("--device", type=one_of("cpu", "cuda"), default="cpu", help="cpu (default) or cuda")
    variants = list_of(one_of(*SWIN_VARIANTS))
    parser.add_argument("--variants", type=variants, help="sizes of the models (default: tiny,base)")
    parser.add_argument("--sizes", type=list_of(masked_image_size), help="pixels of an image's side")
    parser.add_argument(
        "--precision",
        type=list_of(one_of("fp32", "bf16")),
        help="default: fp32, and bf16 where the device is good at it",
    )
    masks = list_of(one_of("shared", "per-image"))
    parser.add_argument("--masks", type=masks, help="of GreenSwin (default: shared,per-image)")
    parser.add_argument("--mask-ratio", type=ratio, default=0.75, help="default: 0.75")
    parser.add_argument("--batch", type=positive_int, help="images of a step (default: by variant, size and device)")
    parser.add_argument("--rounds", type=positive_int, help="timed steps of each contender (default: 7)")
    parser.add_argument("--warmup", type=positive_int, help="untimed steps before them (default: 2)")
    parser.add_argument("--pause", type=seconds, help="seconds of rest before a step (default: 0.3)")
    parser.add_argument("--threads", type=positive_int, help="of CPU computation (default: torch's)")
    parser.add_argument("--quick", action="store_true", help="check that it runs: a micro model, few rounds")
    add_output(parser)


def set_defaults(arguments: argparse.Namespace, sizes: Sequence[int], precision: Sequence[str]) -> None:
    """Fill what was not given.

    Args:
        sizes, precision: the part's own defaults; with `--quick` small images and the first precision. The default
            is without bf16 on a CPU that is slow at it.

    Raises:
        WrongInput: no GPU where one is asked for.
    """
    quick = arguments.quick
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise WrongInput(
                "--device cuda: torch finds no GPU here; install a CUDA build of torch or use --device cpu"
            )
    if arguments.precision is None and not quick:
        arguments.precision = leave_out_slow_bf16(list(precision), arguments.device)
    defaults = {
        "variants": ["micro"] if quick else ["tiny", "base"],
        "sizes": [64 * (index + 1) for index in range(min(len(sizes), 3))] if quick else list(sizes),
        "precision": [precision[0]],
        "masks": ["shared", "per-image"],
        "rounds": 2 if quick else 7,
        "warmup": 1 if quick else 2,
        "pause": 0.0 if quick else 0.3,
    }
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)


def choose_batch(arguments: argparse.Namespace, variant: str, size: int) -> int:
    """Images of a step: as given, or so many that all image sizes have about the same number of pixels."""
    if arguments.batch is not None:
        return arguments.batch
    at_224 = CUDA_BATCH if arguments.device == "cuda" and variant != "micro" else CPU_BATCHES[variant]
    return at_224 if variant == "micro" else max(1, at_224 * 224**2 // size**2)
