"""No GPU is needed to see tensors of two devices meet, or that a call would wait for the GPU.

The calls of `tests/helpers/fake_cuda/calls.py` run on tensors that are only said to be on one.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.fake_cuda.calls import CALLS

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers" / "fake_cuda"
RUN = """
import ctypes
device = {device!r} and ctypes.CDLL({device!r})
import torch
if device:
    device.set_guard()
from tests.helpers.fake_cuda.calls import main
main()
"""
# What each of the calls that must be refused is refused for.
REFUSALS = {
    "refused_a_value_read_back": "_local_scalar_dense",
    "refused_a_branch_on_a_tensor": "_local_scalar_dense",
    "refused_two_devices": "two .*devices",
    "refused_a_copy_of_a_list": "_to_copy.*waits",
    "refused_a_copy_from_pageable_memory": "not pinned",
    "refused_a_copy_to_the_host": "_to_copy.*waits",
    "refused_an_index_made_of_a_list": "_to_copy.*waits|copies its index",
    "refused_an_index_that_is_a_mask": "mask waits",
    "refused_a_backward_that_reads": "_local_scalar_dense",
}


def build_device(folder: Path) -> Path:
    """device.cpp as a library for the torch of this interpreter."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    home, library = Path(torch.__file__).parent, folder / "device.so"
    where = [f"-I{home}/include", f"-L{home}/lib", f"-Wl,-rpath,{home}/lib"]
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", str(HELPERS / "device.cpp"), *where, "-lc10",
         "-ltorch_cpu", "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What was wrong with each call; None: nothing."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("device")
    device = None if torch.cuda.is_available() else str(build_device(folder))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(device=device)],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", sorted(set(CALLS) - set(REFUSALS)))
def test_runs_on_a_gpu_without_waiting_for_it(found, name):
    assert found[name] is None, found[name]


@pytest.mark.parametrize("name", sorted(REFUSALS))
def test_these_tests_would_fail(found, name):
    assert found[name] is not None
    assert re.search(REFUSALS[name], found[name].splitlines()[0]), found[name]


def test_every_refusal_is_expected():
    assert {name for name in CALLS if name.startswith("refused")} == set(REFUSALS)
