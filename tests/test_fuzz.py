"""The fuzz targets on a few cases each, drawn by hypothesis; `python tests/fuzz.py` runs 100,000 and more."""

import json
import subprocess
import sys
from pathlib import Path

import fuzz
import fuzz_geometry
import pytest
from fuzz_case import ACCEPTED, REFUSED, BytesChoices, RandomChoices, Target
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

FEW = {"models": 3, "conversions": 3, "plans": 10, "files": 40}


@st.composite
def cases(draw, target):
    return target.draw(fuzz.HypothesisChoices(draw))


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_every_case_gives_a_correct_result_or_a_refusal_in_one_line(name):
    target = fuzz.load_target(name)
    limits = settings(
        max_examples=FEW.get(name, 80), deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )

    @limits
    @given(cases(target))
    def check(case):
        assert target.check(case) in (ACCEPTED, REFUSED)

    check()


def test_choices_stay_within_their_bounds_and_repeat():
    for choices in (RandomChoices(1), BytesChoices(bytes(range(256)))):
        drawn = [choices.integer(-3, high) for high in (-3, 0, 300, 10**30)]
        assert all(-3 <= number <= high for number, high in zip(drawn, (-3, 0, 300, 10**30), strict=True))
    assert BytesChoices(b"").text(5) == ""
    assert [RandomChoices(7).integer(0, 99) for _ in range(3)] == [RandomChoices(7).integer(0, 99) for _ in range(3)]


def test_a_finding_is_kept_with_its_smallest_case_and_the_exit_code_is_1(tmp_path, monkeypatch, capsys):
    def check(case):
        if case["sizes"]:
            raise KeyError("found")
        return "refused"

    broken = Target("groupings", fuzz_geometry.grouping_inputs, check)
    monkeypatch.setattr(fuzz, "load_target", lambda name: broken)
    monkeypatch.setattr(fuzz, "BYTES_FOR_A_CASE", 2**40)
    arguments = ["--target", "groupings", "--cases", "60", "--output-dir", str(tmp_path)]
    assert fuzz.main(arguments) == 1
    assert "60 cases, 1 findings" in capsys.readouterr().out
    kept = tmp_path / "groupings-1.json"
    assert len(json.loads(kept.read_text())["case"]["sizes"]) == 1
    with pytest.raises(KeyError, match="found"):
        fuzz.main(["--replay", str(kept)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["groupings-1.json"]


def test_a_case_that_takes_too_long_is_stopped():
    def forever():
        with fuzz.time_limit(0.05):
            while True:
                pass

    with pytest.raises(fuzz.CaseTimeout, match=r"more than 0\.05 s"):
        forever()


def test_nothing_found_is_exit_code_0(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fuzz, "BYTES_FOR_A_CASE", 2**40)
    assert fuzz.main(["--target", "groupings", "--cases", "50", "--output-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("50 cases, 0 findings (random, seed 0)")


def test_the_command_as_a_user_gives_it():
    root = Path(__file__).resolve().parents[1]
    for flags, said in ((["--cases", "0"], "--cases 0 must be at least 1"), (["--replay", "none.json"], "is no file")):
        command = [sys.executable, "tests/fuzz.py", *flags]
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
        assert result.returncode == 2
        assert said in result.stderr
        assert "Traceback" not in result.stderr
