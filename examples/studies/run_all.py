"""All studies, one after another, and their tables and plots on one page.

    python examples/studies/run_all.py --quick     # do they run? four minutes on one core
    python examples/studies/run_all.py             # hours; goes on where it was stopped

Each study is a script of its own beside this one, with flags of its own, and writes to its folder in the output folder.
Exit codes: 0 all done, 1 a study failed (the others are done), 2 wrong input, nothing written, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this folder's scripts use the examples beside it
from benchmarking.options import list_of, one_of, positive_int
from evidence_study.interruption import INTERRUPTED

from green_swin_hf.training import OneLineParser, check_output_folder, one_line_errors
from studies import study_kit as kit

FOLDER = Path(__file__).resolve().parent
STUDIES = ("group_size", "grouping", "time_and_memory", "window_and_decoder_cost", "quality", "energy")
PAGE = "README.md"
SECONDS_TO_STOP = 10


def main(argv: Sequence[str] | None = None) -> int:
    with one_line_errors("run_all.py"):
        parser = OneLineParser(description=__doc__, formatter_class=kit.RawDescription)
        parser.add_argument("--quick", action="store_true", help="small numbers that show that everything runs")
        parser.add_argument("--output-dir", type=Path, help=f"default: {kit.OUTPUT}, with --quick {kit.OUTPUT}_quick")
        parser.add_argument("--threads", type=positive_int, default=1, help="of CPU computation (default: 1)")
        parser.add_argument("--only", type=list_of(one_of(*STUDIES)), help=f"which of {', '.join(STUDIES)}")
        arguments = parser.parse_args(argv)
        output = arguments.output_dir or Path(f"{kit.OUTPUT}_quick" if arguments.quick else kit.OUTPUT)
        check_output_folder(output)
    flags = ["--threads", str(arguments.threads), *(["--quick"] if arguments.quick else [])]
    failed = []
    started = time.monotonic()
    for name in arguments.only or STUDIES:
        code = run_study(name, [*flags, "--output-dir", str(output / name)])
        if code == INTERRUPTED:
            return code
        failed += [name] if code else []
    write_page(output)
    print(f"{kit.duration(time.monotonic() - started)}. Tables and plots of all studies: {output / PAGE}")
    if failed:
        print(f"Failed: {', '.join(failed)}; the same command tries again and repeats nothing that is done.")
    return 1 if failed else 0


def run_study(name: str, flags: Sequence[str]) -> int:
    """Its exit code; a process of its own, so that no study has the memory or the threads of the one before."""
    print(f"\n== {name}", flush=True)
    with subprocess.Popen([sys.executable, str(FOLDER / f"{name}.py"), *flags]) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the study as well, which says what is kept if it gets the time
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
            process.kill()
            return INTERRUPTED


def write_page(output: Path) -> None:
    """What the studies wrote, one after another; pictures are found from there."""
    pages = [output / name / kit.TABLE for name in STUDIES]
    parts = []
    for page in pages:
        if page.is_file():
            parts.append(page.read_text(encoding="utf-8").replace("](", f"]({page.parent.name}/"))
    if parts:
        kit.replace_text(output / PAGE, "\n".join(parts))


if __name__ == "__main__":
    sys.exit(main())
