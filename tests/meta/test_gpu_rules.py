"""With DRIVEKD_REQUIRE_GPU=1 no test of the GPU goes unnoticed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: {gpus} > 0, lambda: {gpus}
from tests.conftest import (
    pytest_collection_modifyitems, pytest_make_collect_report, pytest_runtest_makereport,
)
"""
TESTS = """
import pytest

@pytest.mark.gpu
def test_runs():
    pass

@pytest.mark.gpu
def test_gives_up():
    pytest.skip("some package is missing")

@pytest.mark.gpu
@pytest.mark.skipif(True, reason="built without CUDA")
def test_is_not_tried():
    pass

@pytest.mark.several_gpus
def test_two():
    pass

@pytest.mark.gpu
@pytest.mark.optional_package
def test_of_a_package():
    pytest.skip("not installed")

def test_of_the_cpu():
    pytest.skip("not here")
"""


@pytest.fixture
def outcome(tmp_path):
    """Numbers of tests by outcome, and what pytest printed."""

    def run(tests, gpus, required, folder="unit"):
        (tmp_path / "conftest.py").write_text(CONFTEST.format(gpus=gpus))
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "test_some.py").write_text(tests)
        marks = ["gpu: a", "several_gpus: b", "optional_package: c"]
        settings = "[pytest]\nmarkers =\n" + "".join(f"  {mark}\n" for mark in marks)
        (tmp_path / "pytest.ini").write_text(settings)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(tmp_path)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DRIVEKD_REQUIRE_GPU": required},
            capture_output=True,
            text=True,
            timeout=120,
        )
        said = done.stdout + done.stderr
        names = ("passed", "failed", "error", "skipped")
        ends = [line for line in said.splitlines() if " in " in line and "s" in line][-1:]
        words = ends[0].replace(",", "").split() if ends else []
        counts = {n: int(words[words.index(n) - 1]) if n in words else 0 for n in names}
        return counts, said

    return run


def test_a_skip_of_a_gpu_test_is_a_failure_where_a_gpu_is_required(outcome):
    counts, said = outcome(TESTS, 1, "1")
    assert counts == {"passed": 1, "failed": 1, "error": 1, "skipped": 3}, said
    assert "skipped although DRIVEKD_REQUIRE_GPU=1" in said and "some package is missing" in said


def test_a_second_gpu_is_not_required(outcome):
    counts, said = outcome(TESTS, 2, "1")
    assert counts == {"passed": 2, "failed": 1, "error": 1, "skipped": 2}, said


def test_skips_stay_skips_where_nothing_is_required(outcome):
    assert outcome(TESTS, 1, "0")[0] == {"passed": 1, "failed": 0, "error": 0, "skipped": 5}
    assert outcome(TESTS, 0, "0")[0] == {"passed": 0, "failed": 0, "error": 0, "skipped": 6}


def test_a_machine_without_gpu_is_refused(outcome):
    counts, said = outcome(TESTS, 0, "1")
    assert sum(counts.values()) == 0 and "needs an NVIDIA GPU" in said


def test_a_module_of_kernels_that_skips_itself_is_a_failure_too(outcome):
    module = "import pytest\npytest.importorskip('no_such_package')\n"
    _, said = outcome(module, 1, "1", "kernels")
    assert "skipped although DRIVEKD_REQUIRE_GPU=1" in said, said
