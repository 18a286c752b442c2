"""What every test gets: NaN-filled uninitialised memory, fixed seeds, GPU rules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses to be deterministic


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
        return
    reason = "needs an NVIDIA GPU; on one, run benchmarks/on_gpu.sh"
    for item in items:
        if "gpu" in item.keywords:
            if os.environ.get("DRIVEKD_REQUIRE_GPU") == "1":
                raise pytest.UsageError(f"{item.nodeid} {reason}, and DRIVEKD_REQUIRE_GPU=1")
            item.add_marker(pytest.mark.skip(reason=reason))
