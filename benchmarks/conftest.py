"""Every benchmark says on what it ran."""

import os
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import write_machine
from tests.conftest import pytest_collection_modifyitems as pytest_collection_modifyitems


def pytest_sessionstart():
    """On a GPU's stages the facts of the machine go into a file of their own."""
    if path := os.environ.get("DRIVEKD_MACHINE"):
        write_machine(Path(path))


@pytest.fixture(autouse=True)
def said_where(benchmark):
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
