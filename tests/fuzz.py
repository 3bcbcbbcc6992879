"""Fuzz what strangers and mistakes can hand to the package; every case must give a correct result or a `ValueError`.

    python tests/fuzz.py                                      # 100,000 cases over all targets
    python tests/fuzz.py --target recipes --cases 20000       # one target
    python tests/fuzz.py --engine atheris                     # guided by the branches that a case reaches
    python tests/fuzz.py --replay outputs/fuzz/recipes-1.json # a case that was kept

Every target runs in a process of its own with limits on time and memory for each case. Exit codes: 0 nothing found,
1 findings, each kept with its smallest case, 2 wrong input.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz_case import BytesChoices, HypothesisChoices, RandomChoices
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st

if __name__ == "__main__":  # before torch is imported: the cases are tiny, and threads cost more than they bring
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # where the package is not installed
# Shares of all cases
TARGETS = {
    "masks": 0.25, "plans": 0.06, "groupings": 0.25, "models": 0.003,
    "configs": 0.2, "recipes": 0.16, "files": 0.075, "conversions": 0.002,
}  # fmt: skip
SECONDS_FOR_A_CASE = 5  # of the processor
BYTES_FOR_A_CASE = 2 * 1024**3  # of address space, on top of what the imports take


class CaseTimeout(BaseException):
    """A case took too long. No `Exception`, so that nothing under test takes it for an error of its own."""


def load_target(name: str) -> Any:
    """The target, with everything that it needs imported."""
    import fuzz_geometry
    import fuzz_settings
    import fuzz_weights
    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = {
        target.name: target for module in (fuzz_geometry, fuzz_settings, fuzz_weights) for target in module.TARGETS
    }
    assert found.keys() == TARGETS.keys(), found.keys()
    return found[name]


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Of the processor's time, which a busy machine does not stretch."""

    def stop(number: int, frame: Any) -> None:
        raise CaseTimeout(f"more than {seconds:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)  # again: the first may hit a callback that drops it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


class Campaign:
    """Cases of one target so far: their outcomes, and of every kind of finding the smallest case."""

    def __init__(self, target: Any, folder: Path):
        self.target, self.folder = target, folder
        self.outcomes: collections.Counter[str] = collections.Counter()
        self.findings: dict[str, dict[str, Any]] = {}
        self.slowest = 0.0
        self._current = os.open(folder / f".{target.name}-current.json", os.O_RDWR | os.O_CREAT | os.O_TRUNC)

    @property
    def done(self) -> int:
        return sum(self.outcomes.values())

    def run(self, case: Any) -> None:
        text = json.dumps(case)
        content = text.encode()
        os.pwrite(self._current, content, 0)  # a case that ends the process is known all the same
        os.ftruncate(self._current, len(content))
        started = time.process_time()
        try:
            with time_limit(SECONDS_FOR_A_CASE):
                self.outcomes[self.target.check(case)] += 1
        except (Exception, CaseTimeout) as error:
            self.outcomes["found"] += 1
            kind = signature(error)
            if kind not in self.findings or len(text) < len(json.dumps(self.findings[kind]["case"])):
                shown = "".join(traceback.format_exception(error, limit=-6))
                self.findings[kind] = {"target": self.target.name, "case": case, "error": shown}
        self.slowest = max(self.slowest, time.process_time() - started)

    def report(self, seconds: float) -> None:
        """Leave the result where the parent process reads it."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        result = {
            "outcomes": dict(self.outcomes),
            "seconds": seconds,
            "slowest": self.slowest,
            "peak_megabytes": peak,
            "findings": list(self.findings.values()),
        }
        (self.folder / f".{self.target.name}-result.json").write_text(json.dumps(result))


def signature(error: BaseException) -> str:
    """What makes two findings the same: kind of error and the last two places it went through."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "green_swin_hf" in f.filename or Path(f.filename).name.startswith("fuzz_")]
    return f"{type(error).__name__} {[(Path(f.filename).name, f.lineno) for f in ours[-2:]]}"


def run_target(arguments: argparse.Namespace) -> int:
    """What a child process does: all cases of one target by one engine."""
    if arguments.engine == "atheris":
        import atheris

        with atheris.instrument_imports(include=["green_swin_hf"]):
            target = load_target(arguments.target)
    else:
        target = load_target(arguments.target)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES_FOR_A_CASE, resource.RLIM_INFINITY))
    campaign, started = Campaign(target, arguments.output_dir), time.monotonic()
    ENGINES[arguments.engine](campaign, arguments.cases, arguments.seed)
    campaign.report(time.monotonic() - started)
    return 0


def run_with_random(campaign: Campaign, cases: int, seed: int) -> None:
    for number in range(cases):
        campaign.run(campaign.target.draw(RandomChoices(hash((seed, number)))))


def run_with_hypothesis(campaign: Campaign, cases: int, seed: int) -> None:
    @st.composite
    def drawn(draw: Any) -> Any:
        return campaign.target.draw(HypothesisChoices(draw))

    while campaign.done < cases:  # a search that is exhausted starts anew
        options = settings(
            max_examples=min(cases - campaign.done, 5_000),  # what it remembers of former cases grows
            phases=[Phase.generate],
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        with_seed(seed)(options(given(drawn())(campaign.run)))()
        seed += 1


def run_with_atheris(campaign: Campaign, cases: int, seed: int) -> None:
    import atheris

    started = time.monotonic()

    def run(data: bytes) -> None:
        campaign.run(campaign.target.draw(BytesChoices(data)))
        if campaign.done >= cases:
            campaign.report(time.monotonic() - started)
            os._exit(0)  # libFuzzer has no other end

    corpus = campaign.folder / f"corpus-{campaign.target.name}"
    corpus.mkdir(exist_ok=True)
    flags = [f"-seed={seed + 1}", "-max_len=256", "-len_control=0", "-rss_limit_mb=0", "-timeout=60"]
    atheris.Setup([sys.argv[0], *flags, f"-artifact_prefix={campaign.folder}/", str(corpus)], run)
    atheris.Fuzz()


ENGINES = {"random": run_with_random, "hypothesis": run_with_hypothesis, "atheris": run_with_atheris}


def fuzz(arguments: argparse.Namespace) -> int:
    """Run the targets, some at a time, print a line for each, keep the findings."""
    names = list(TARGETS) if arguments.target == "all" else [arguments.target]
    whole = sum(TARGETS[name] for name in names)
    counts = {name: max(1, round(arguments.cases * TARGETS[name] / whole)) for name in names}
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    if arguments.engine != "atheris":
        load_target(names[0])  # the processes that are forked inherit what is imported
    print(f"{'target':<12} {'cases':>8} {'accepted':>9} {'refused':>8} {'findings':>9} {'slowest':>9} {'seconds':>8}")
    total, kept, running = 0, [], {}
    while names or running:
        while names and len(running) < arguments.jobs:
            name = names.pop(0)
            running[start_target(name, counts[name], arguments)] = name
        pid, status = os.wait()
        result = read_result(running.pop(pid), os.waitstatus_to_exitcode(status), arguments.output_dir)
        total += sum(result["outcomes"].values())
        kept += show_result(result, arguments.output_dir)
    print(f"{total:,} cases, {len(kept)} findings ({arguments.engine}, seed {arguments.seed})")
    if kept:
        print(f"Repeat one: python tests/fuzz.py --replay {kept[0]}")
    return 1 if kept else 0


def start_target(name: str, cases: int, arguments: argparse.Namespace) -> int:
    """Start the process of a target; its number."""
    for kind in ("result", "current"):
        (arguments.output_dir / f".{name}-{kind}.json").unlink(missing_ok=True)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    with (arguments.output_dir / f".{name}-shown.txt").open("w") as shown:
        os.dup2(shown.fileno(), 1)
        os.dup2(shown.fileno(), 2)
    child = argparse.Namespace(**{**vars(arguments), "target": name, "cases": cases})
    try:
        run_target(child)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def read_result(name: str, exit_code: int, folder: Path) -> dict[str, Any]:
    result, current, shown = (folder / f".{name}-{kind}" for kind in ("result.json", "current.json", "shown.txt"))
    if result.is_file():
        content = json.loads(result.read_text())
    else:  # it died, which is a finding in itself
        last = json.loads(current.read_text()) if current.is_file() and current.stat().st_size else None
        error = f"{shown.read_text(errors='replace')[-3000:]}\nthe process ended with {exit_code}"
        content = {"outcomes": {"found": 1}, "seconds": 0.0, "slowest": 0.0}
        content["findings"] = [{"target": name, "case": last, "error": error}]
    for path in (result, current, shown):
        path.unlink(missing_ok=True)
    return {"name": name, **content}


def show_result(result: dict[str, Any], folder: Path) -> list[Path]:
    """Print the line of a target and its findings, and keep these; their files."""
    name, outcomes, findings = result["name"], result["outcomes"], result["findings"]
    print(
        f"{name:<12} {sum(outcomes.values()):>8,} {outcomes.get('accepted', 0):>9,} {outcomes.get('refused', 0):>8,} "
        f"{len(findings):>9} {result['slowest']:>7.2f} s {result['seconds']:>8.0f}",
        flush=True,
    )
    paths = []
    for number, finding in enumerate(findings, start=1):
        paths.append(folder / f"{name}-{number}.json")
        paths[-1].write_text(json.dumps(finding, indent=1))
        print(f"  {finding['error'].strip().splitlines()[-1][:200]}\n  kept: {paths[-1]}", flush=True)
    return paths


def replay(path: Path) -> int:
    """Run a kept case again, with its stack trace."""
    content = json.loads(path.read_text())
    target = load_target(content["target"])
    print(json.dumps(content["case"]))
    with time_limit(SECONDS_FOR_A_CASE):
        print(target.check(content["case"]))
    return 0


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=("all", *TARGETS), default="all", help="what is fuzzed (default: all)")
    parser.add_argument("--cases", type=int, default=100_000, help="over all targets together (default: 100,000)")
    parser.add_argument("--engine", choices=tuple(ENGINES), default="random", help="what draws the cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output-dir", type=Path, default=Path("outputs/fuzz"), help="where findings are kept")
    parser.add_argument("--replay", type=Path, metavar="FILE", help="run a case that was kept")
    parser.add_argument("--jobs", type=int, default=1, help="targets that run at once")
    arguments = parser.parse_args(argv)
    for name in ("cases", "jobs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} {getattr(arguments, name)} must be at least 1")
    if arguments.replay and not arguments.replay.is_file():
        parser.error(f"--replay {arguments.replay} is no file; give a case that was kept")
    if arguments.engine == "atheris" and importlib.util.find_spec("atheris") is None:
        parser.error('--engine atheris needs the extra fuzz: pip install -e ".[fuzz]"')
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.replay:
        return replay(arguments.replay)
    return fuzz(arguments)


if __name__ == "__main__":
    sys.exit(main())
