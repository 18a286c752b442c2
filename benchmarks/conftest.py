"""Every benchmark says on what it ran."""

import platform

import pytest
import torch

from tests.conftest import pytest_collection_modifyitems as pytest_collection_modifyitems


@pytest.fixture(autouse=True)
def said_where(benchmark):
    benchmark.extra_info.update(
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        machine=platform.machine(),
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    )
