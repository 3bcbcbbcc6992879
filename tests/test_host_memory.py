"""A process on the CPU keeps the memory that its tensors freed: the next ones cost no new pages of the system."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import resource, sys, torch
from green_swin_hf.host_memory import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else False
for _ in range(12):
    torch.ones(2**24)  # 64 MiB, freed at once; their places settle
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(argument, **environment):
    """(what `keep_freed_memory` said, page faults of four tensors of 64 MiB)."""
    clean = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "GLIBC_TUNABLES")}
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True, check=True, cwd=ROOT,
        env={**clean, **environment},
    ).stdout.split()  # fmt: skip
    return found[0] == "True", int(found[1])


@pytest.mark.skipif(not hasattr(os, "confstr") or "glibc" not in str(os.confstr("CS_GNU_LIBC_VERSION")), reason="glibc")
def test_freed_memory_is_used_again_without_new_pages():
    _, left_faults = run("leave")  # 16,384 for each tensor with pages of 4 KiB
    kept, kept_faults = run("keep")
    assert kept
    assert kept_faults < left_faults / 10


def test_an_allocator_that_the_user_chose_is_left_alone():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
