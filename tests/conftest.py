"""What every test gets: NaN-filled uninitialised memory, fixed seeds, GPU rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXCUSES = {"several_gpus", "optional_package"}
ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic
# On a GPU, too, float32 is float32: convolutions would else round it to TF32.
for each in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
    each.fp32_precision = "ieee"


@pytest.fixture(autouse=True)
def nan_filled_empty():
    """Uninitialised memory is NaN, so that a kernel that forgets a cell is seen.

    That takes the deterministic mode, which some operations do not have on a GPU.
    """
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def run_python():
    """Run code in a fresh interpreter in the repository root, warnings shown, failing loudly."""

    def run(code: str, **environment: str) -> str:
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        for item in items:
            several = item.get_closest_marker("several_gpus")
            if several is not None:
                item.add_marker(pytest.mark.gpu)
                if torch.cuda.device_count() < 2:
                    item.add_marker(pytest.mark.skip(reason="needs two GPUs"))
        return
    reason = "needs an NVIDIA GPU; on one, run benchmarks/on_gpu.sh"
    for item in items:
        if "gpu" in item.keywords or "several_gpus" in item.keywords:
            if _gpu_is_required():
                raise pytest.UsageError(f"{item.nodeid} {reason}, and DRIVEKD_REQUIRE_GPU=1")
            item.add_marker(pytest.mark.skip(reason=reason))


def _gpu_is_required():
    return os.environ.get("DRIVEKD_REQUIRE_GPU") == "1"


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """With DRIVEKD_REQUIRE_GPU=1 a test of the GPU that skips has failed.

    A skip is how a test would go unnoticed on the one machine that can run it. It may want a second
    GPU or an optional package; then a marker says so.
    """
    report = (yield).get_result()
    required = _gpu_is_required() and "gpu" in item.keywords
    if report.skipped and required and not EXCUSES & set(item.keywords):
        report.outcome = "failed"
        report.longrepr = f"skipped although DRIVEKD_REQUIRE_GPU=1: {report.longrepr}"


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report(collector):
    """The same for a module of kernels that skips itself; elsewhere packages may be missing."""
    report = (yield).get_result()
    if (
        report.skipped
        and "kernels" in collector.path.parts
        and _gpu_is_required()
        and torch.cuda.is_available()
    ):
        report.outcome = "failed"
        report.longrepr = f"skipped although DRIVEKD_REQUIRE_GPU=1: {report.longrepr}"
