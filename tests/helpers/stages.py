"""Stages of benchmarks/on_gpu.sh, gone through on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The torch backend stands in for the kernels, whose interpreter takes its time.
QUICK = {**os.environ, "DRIVEKD_DRY": "1", "TRITON_INTERPRET": "0"}


def stage(out, *arguments, **environment):
    return subprocess.run(
        ["bash", "benchmarks/on_gpu.sh", *arguments],
        cwd=ROOT,
        env={**QUICK, "OUT": str(out), "PYTHON": sys.executable, **environment},
        capture_output=True,
        text=True,
        timeout=280,
    )
