"""Pretraining on storage that fails, on a real small file system: full, read-only, gone.

The file system is mounted in a namespace of its own, which Linux lets any user do in most places; the tests are skipped
elsewhere.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_examples import TINY, grey_images, list_checkpoints, run_command, run_pretrain  # noqa: F401

NAMESPACE = ["unshare", "--map-root-user", "--mount"]

# Runs inside the namespace: one interpreter for all cases, as each start costs seconds.
INSIDE = """
import contextlib, io, json, subprocess, sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from test_examples import list_checkpoints, pretrain, run_pretrain, weights

from green_swin_hf.checkpointing import find_damage

place, flags = Path({place!r}), {flags!r}
log_update, results = pretrain.log_update, {{}}


def mount(*options):
    subprocess.run(["mount", *options, str(place)], check=True)


def attempt(*more, at=None, harm=None):
    def harmed(run, *arguments):
        log_update(run, *arguments)
        if run.state.update == at:
            harm()

    pretrain.log_update = harmed
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = run_pretrain("--output-dir", place / "run", *flags, *more)
        except SystemExit as stopped:
            code = stopped.code
    return code, said.getvalue()


def note(name, code, said):
    folder = place / "run" / "checkpoints"
    found = list_checkpoints(folder)
    results[name] = {{
        "code": code, "said": said.strip().splitlines()[-1:], "traceback": "Traceback" in said,
        "whole": [path.name for path in found if find_damage(path) is None],
        "others": sorted(path.name for path in folder.iterdir() if path not in found) if folder.exists() else [],
    }}


mount("-t", "tmpfs", "-o", "size={size}k", "tmpfs")
note("full", *attempt())
mount("-o", "remount,size=100m")
code, _ = attempt("--resume", "auto")
pairs = zip(weights(place / "run").values(), weights(Path({whole!r})).values(), strict=True)
results["after"] = {{"code": code, "same": all(bool((left == right).all()) for left, right in pairs)}}
mount("-o", "remount,ro")
results["read-only start"] = dict(zip(("code", "said"), attempt("--output-dir", place / "other")))
subprocess.run(["umount", "--lazy", str(place)], check=True)

mount("-t", "tmpfs", "-o", "size=100m", "tmpfs")
note("read-only", *attempt(at=2, harm=lambda: mount("-o", "remount,ro")))
mount("-o", "remount,rw")
note("read-write again", *attempt("--resume", "auto"))
subprocess.run(["umount", "--lazy", str(place)], check=True)

mount("-t", "tmpfs", "-o", "size=100m", "tmpfs")
code, said = attempt(at=2, harm=lambda: subprocess.run(["umount", "--lazy", str(place)], check=True))
left = [path.name for path in place.rglob("*")]
results["gone"] = {{"code": code, "said": said.strip().splitlines()[-1:], "left": left}}
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(grey_images, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("storage")
    place, whole = folder / "mount", folder / "whole"
    place.mkdir()
    mount = [*NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(place)]
    if shutil.which(NAMESPACE[0]) is None or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("no namespace with a file system of its own may be made here")
    flags = ["--data", str(grey_images), *TINY, "--max-steps", "4", "--save-every", "1", "--keep-checkpoints", "9"]
    assert run_pretrain("--output-dir", whole, *flags) == 0
    # Room for two checkpoints and a half.
    (first, *_) = list_checkpoints(whole / "checkpoints")
    size = 5 * sum(-(-path.stat().st_size // 4096) * 4 for path in first.iterdir()) // 2
    code = INSIDE.format(tests=str(Path(__file__).parent), place=str(place), flags=flags, whole=str(whole), size=size)
    done = run_command(*NAMESPACE, sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_full_disk_leaves_whole_checkpoints_and_the_run_goes_on_exactly_when_there_is_room(results):
    full = results["full"]
    assert full["code"] == 1
    assert "step-00000003 cannot be written" in full["said"][0]
    assert "No space left on device" in full["said"][0]
    assert not full["traceback"]
    assert full["whole"] == ["step-00000001", "step-00000002"]
    assert full["others"] == []
    assert results["after"] == {"code": 0, "same": True}


def test_a_disk_that_becomes_read_only_ends_the_run_with_what_was_saved(results):
    assert results["read-only"]["code"] == 1
    assert "Read-only file system" in results["read-only"]["said"][0]
    assert not results["read-only"]["traceback"]
    assert results["read-only"]["whole"] == ["step-00000001"]
    assert results["read-write again"]["code"] == 0
    assert results["read-write again"]["whole"] == [f"step-{step:08d}" for step in (1, 2, 3, 4)]


def test_a_read_only_folder_is_refused_before_the_start(results):
    assert results["read-only start"]["code"] == 2
    assert "cannot be written" in results["read-only start"]["said"]
    assert len(results["read-only start"]["said"].strip().splitlines()) == 1


def test_a_mount_that_is_gone_ends_the_run_and_nothing_is_written_elsewhere(results):
    gone = results["gone"]
    assert gone["code"] == 1
    assert "is gone" in gone["said"][0]
    assert gone["left"] == []
