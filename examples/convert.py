"""Convert Swin weights into a GreenSwin folder, and back into stock Swin or timm.

    python examples/convert.py swin_tiny.pth outputs/from_file          # of Microsoft, SimMIM, GreenMIM or timm
    python examples/convert.py path/to/swin outputs/from_folder         # of transformers' Swin, or user/name on the Hub
    python examples/convert.py green_mim.pth outputs/from_greenmim --legacy-merge-order   # its code before 2023
    python examples/convert.py swin_tiny.pth outputs/window14 --window-size 14 --image-size 448 --drop-head
    python examples/convert.py outputs/finetune outputs/swin --to swin  # loads without this package
    python examples/convert.py outputs/finetune outputs/timm --to timm

Every tensor must be accounted for, and the outputs of source and result on a photograph must agree; otherwise nothing
is written. Files are opened without running code from them. The weights keep the licence of their source: that of its
card, or what --license states; the card of the result says it, or that it is not known.
Exit codes: 0 done, 1 done but for the upload, 2 wrong input or a conversion that is refused, nothing written.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

import green_swin_hf  # noqa: F401 (registers the models)
from green_swin_hf.checkpointing import listed_files, new_folder
from green_swin_hf.configuration_green_swin import as_pair
from green_swin_hf.hub_upload import add_hub_flags, open_hub
from green_swin_hf.model_cards import render_export_card
from green_swin_hf.pretrained_start import quiet_transformers
from green_swin_hf.publish import publish_results
from green_swin_hf.run_record import describe_start, weight_checksums, write_record
from green_swin_hf.training import OneLineParser, check_output_folder, one_line_errors
from green_swin_hf.weight_conversion import (
    Conversion,
    ConversionOptions,
    convert_to_green_swin,
    written_comparison,
)
from green_swin_hf.weight_conversion_check import Comparison
from green_swin_hf.weight_conversion_export import Export, export_to_swin, export_to_timm
from green_swin_hf.weight_conversion_files import fetch_source, refusal_in_one_line
from green_swin_hf.weight_conversion_images import build_processor, processor_options
from green_swin_hf.weight_conversion_names import FORMATS

PHOTO = Path(__file__).resolve().parent / "data" / "photos" / "astronaut.png"


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="file (.pth, .safetensors), folder, or repository on the Hub (user/name)")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--to", choices=("green-swin", "swin", "timm"), default="green-swin", help="kind of the output")
    parser.add_argument("--source-format", choices=tuple(FORMATS), help="overrules what the names say")
    parser.add_argument(
        "--legacy-merge-order",
        action="store_true",
        help="weights of the published GreenMIM code before January 2023, which merges patches in another order",
    )
    head = parser.add_mutually_exclusive_group()
    head.add_argument("--keep-head", dest="keep_head", action="store_true", default=None, help="fail if there is none")
    head.add_argument("--drop-head", dest="keep_head", action="store_false", help="leave out the classifier or decoder")
    parser.add_argument(
        "--image-size", type=positive, nargs="+", metavar="PIXELS", help="one side, or rows and columns"
    )
    parser.add_argument(
        "--window-size", type=positive, metavar="TOKENS", help="position tables are resized bicubically"
    )
    parser.add_argument("--num-channels", type=positive, metavar="N", help="1: summed; else repeated in turn, rescaled")
    parser.add_argument("--decoder-heads", type=positive, metavar="N", help="of a GreenMIM decoder not 512 wide")
    parser.add_argument("--layer-norm-eps", type=float, metavar="EPS", help="of a file that differs from its recipe")
    parser.add_argument("--license", metavar="NAME", help="of the weights, such as mit, where their card says none")
    add_hub_flags(parser)
    parser.add_argument("--photo", type=Path, default=PHOTO, help="picture on which outputs are compared")
    return parser


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def read_options(arguments: argparse.Namespace) -> ConversionOptions:
    if arguments.push_to_hub and arguments.to != "green-swin":
        raise ValueError(
            f"--push-to-hub is for GreenSwin folders; upload one for {arguments.to} by: hf upload USER/NAME "
            f"{arguments.output}"
        )
    size = arguments.image_size
    if size is not None and len(size) > 2:
        raise ValueError(f"--image-size takes one or two numbers, not {len(size)}")
    if arguments.layer_norm_eps is not None and not 0 < arguments.layer_norm_eps < float("inf"):
        raise ValueError(f"--layer-norm-eps {arguments.layer_norm_eps} must be a finite number greater than 0")
    return ConversionOptions(
        source_format=arguments.source_format,
        legacy_merge_order=arguments.legacy_merge_order,
        keep_head=arguments.keep_head,
        image_size=None if size is None else (size[0] if len(set(size)) == 1 else tuple(size)),
        window_size=arguments.window_size,
        num_channels=arguments.num_channels,
        decoder_heads=arguments.decoder_heads,
        layer_norm_eps=arguments.layer_norm_eps,
    )


def check_paths(output: Path, photo: Path) -> None:
    """Raise a `ValueError` before any work where the output is in use or the photograph is missing."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists; give a folder that does not, or is empty")
    check_output_folder(output, "OUTPUT")
    if not photo.is_file():
        raise ValueError(f"--photo {photo} is no file; give a picture to compare outputs on")


def read_origin(arguments: argparse.Namespace, fetched: Path) -> dict[str, Any]:
    """What is known of the source, and its licence.

    Raises:
        ValueError: --license contradicts the source's own card or record.
    """
    stated: str | None = arguments.license
    if stated is not None and not re.fullmatch(r"[\w.+-]+", stated):
        raise ValueError(f"--license {stated!r} must be one word, such as mit, apache-2.0 or other")
    origin = describe_start(str(arguments.source), fetched) or {}
    known = origin.get("license")
    if stated is not None and known not in (None, stated):
        raise ValueError(
            f"--license {stated}: the card of {arguments.source} says {known}, and converted weights keep their "
            "licence; leave --license out"
        )
    return {**origin, **({"license": stated} if stated else {})}


def write(
    conversion: Conversion, origin: dict[str, Any], arguments: argparse.Namespace
) -> tuple[Export | None, Comparison, list[str]]:
    """Make the output folder; returns what an export says, how it compares with the model, and names of its files."""
    model: Any = conversion.model
    processor = processor_options(conversion.checkpoint, model.config)
    record = {"kind": "conversion", "script": "convert.py", "start_from": origin}
    record["model"] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    export = None
    with new_folder(arguments.output) as folder:
        if arguments.to == "green-swin":
            model.save_pretrained(folder)
            build_processor(processor).save_pretrained(folder)
            comparison = written_comparison(model, folder, arguments.photo)
        else:
            to = export_to_swin if arguments.to == "swin" else export_to_timm
            export = to(model, processor, folder, arguments.photo)
            comparison = export.comparison
            library = "timm" if arguments.to == "timm" else "transformers"
            name = arguments.output.resolve().name
            card = render_export_card(name, library, export.kind, model.config, str(comparison), record)
            (folder / "README.md").write_text(str(card), encoding="utf-8")
        write_record(folder, {**record, "weights": weight_checksums(folder)})
        names = sorted(path.name for path in folder.iterdir())
    return export, comparison, names


def report(
    conversion: Conversion,
    origin: dict[str, Any],
    written: tuple[Export | None, Comparison, list[str]],
    arguments: argparse.Namespace,
) -> None:
    export, comparison, names = written
    config = conversion.model.config
    decoder = f", decoder {config.decoder_hidden_size} wide with {config.decoder_num_attention_heads} heads"
    has_decoder = type(conversion.model).__name__ == "GreenSwinForMaskedImageModeling"
    stages = f"depths {listed(config.depths)}, heads {listed(config.num_heads)}"
    count = sum(parameter.numel() for parameter in conversion.model.parameters())
    rows, columns = as_pair(config.image_size)
    print(f"Source: {arguments.source}, {FORMATS[conversion.source_format]}")
    print(
        f"Model: {type(conversion.model).__name__}, {count:,} parameters; image {rows}x{columns}, patch "
        f"{config.patch_length}, window {config.window_size}, width {config.embed_dim}, {stages}, "
        f"epsilon {config.layer_norm_eps:g}{decoder if has_decoder else ''}"
    )
    print(f"Converted: {conversion.num_tensors} tensors of {len(conversion.checkpoint.tensors)}")
    if export is not None:
        print(f"Exported: {export.num_tensors} tensors under the names of {FORMATS[arguments.to]}")
    for line in conversion.left_out + (export.left_out if export else []):
        print(f"Left out: {line}")
    for line in conversion.changes + (export.changes if export else []):
        print(f"Changed: {line}")
    when = ", before the change of sizes" if conversion.is_adapted else ""
    print(f"Compared on {arguments.photo.name}{when}: {conversion.comparison}")
    print(f"Compared on {arguments.photo.name}, as written: {comparison}")
    print(f"Wrote {arguments.output}: {listed_files(names)}")
    unknown = "not known, and the card claims none; if you know it, convert with --license NAME"
    print(f"Licence of the weights: {origin.get('license', unknown)}")
    print(f"Next: {next_step(conversion, arguments)}")


def listed(values: Sequence[int]) -> str:
    return " ".join(map(str, values))


def next_step(conversion: Conversion, arguments: argparse.Namespace) -> str:
    if arguments.to == "timm":
        # by hand: before 1.0.31 timm's own loader misreads a Swin without a head
        make = f"model = timm.create_model('local-dir:{arguments.output}')"
        load = f"model.load_state_dict(load_file('{arguments.output}/model.safetensors'))"
        return f'python -c "import timm; from safetensors.torch import load_file; {make}; print({load})"'
    is_classifier = type(conversion.model).__name__ == "GreenSwinForImageClassification"
    auto_class = "AutoModelForImageClassification" if is_classifier else "AutoModel"
    if arguments.to == "swin":
        return f"python -c \"import transformers; transformers.{auto_class}.from_pretrained('{arguments.output}')\""
    if is_classifier:
        return f"python examples/evaluate_model.py --model {arguments.output} --data path/to/images"
    return f"python examples/finetune.py --model {arguments.output} --data path/to/images"


def main(argv: Sequence[str] | None = None) -> int:
    transformers_logging.disable_progress_bar()
    with one_line_errors("convert.py"), quiet_transformers():  # what is left out is said here
        arguments = build_parser().parse_args(argv)
        options = read_options(arguments)
        check_paths(arguments.output, arguments.photo)
        source = fetch_source(arguments.source)
        origin = read_origin(arguments, source)
        conversion = convert_to_green_swin(source, arguments.photo, options)
        hub_id = open_hub(arguments, arguments.output)
        with refusal_in_one_line(arguments.source):
            written = write(conversion, origin, arguments)
    report(conversion, origin, written, arguments)
    uploaded = not hub_id or publish_results("convert.py", arguments.output, hub_id, public=arguments.hub_public)
    return 0 if uploaded else 1


if __name__ == "__main__":
    sys.exit(main())
