"""What the command needs to know of a part."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Part:
    """A subcommand.

    Attributes:
        name: of the subcommand.
        help: one line.
        add_arguments: declares its options.
        measure: does the work, prints tables as they are ready, and returns all that the JSON report is to hold.
        draw: writes a picture of the results to a PNG file; `None` for a part without one.
    """

    name: str
    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    measure: Callable[[argparse.Namespace], dict[str, Any]]
    draw: Callable[[dict[str, Any], Path], None] | None = None
