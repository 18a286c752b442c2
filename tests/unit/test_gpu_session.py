"""A session of stages: what fails or finds no time does not keep the next from running."""

import os
import re
import subprocess
import sys
import tarfile

import pytest

from tests.helpers.stages import QUICK, ROOT

SCRIPT = ROOT / "benchmarks" / "gpu_session.sh"


def session(out, *arguments, **environment):
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={**QUICK, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )


@pytest.mark.slow
def test_a_stage_that_fails_is_said_and_the_next_one_runs(tmp_path):
    done = session(tmp_path, "nonsense", "ceilings", PACK="1")
    assert done.returncode == 1
    assert [file.name for file in tmp_path.iterdir()] == ["results.tar.gz"]
    with tarfile.open(tmp_path / "results.tar.gz") as archive:
        names = {os.path.normpath(name) for name in archive.getnames()}
        said = archive.extractfile("./session.txt").read().decode()
    assert {"ceilings.json", "machine.json", "session.txt"} <= names
    first, second = said.splitlines()
    assert re.fullmatch(r"nonsense: exit status 2 after \d+ s", first)
    assert re.fullmatch(r"ceilings: exit status 0 after \d+ s", second)


def test_stages_that_find_no_time_are_left_out(tmp_path):
    done = session(tmp_path, "numbers", SECONDS_IN_ALL="3")
    assert done.returncode == 1
    said = (tmp_path / "session.txt").read_text().splitlines()
    assert said[0] == "step: left out, no time left"
    assert len(said) == 6


def test_every_stage_of_a_plan_exists():
    plans = re.findall(r"plan=\((.*)\) ;;", SCRIPT.read_text())
    stages = {stage for plan in plans for stage in re.findall(r'"\d+ (\w+)', plan)}
    known = (ROOT / "benchmarks" / "on_gpu.sh").read_text()
    (cases,) = re.findall(r"^  ([\w |]+)\) ;;$", known, flags=re.MULTILINE)[:1]
    assert len(plans) == 3
    assert stages <= set(cases.split(" | "))


def test_a_session_must_be_named(tmp_path):
    assert "which session?" in session(tmp_path).stderr
