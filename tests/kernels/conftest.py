"""Kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import functools
import inspect
import os

import pytest
import torch

ON_GPU = torch.cuda.is_available()
NEEDS_NO_GPU = ("offline", "gradient_offline", "offsets", "triton_chunks")


def pytest_collection_modifyitems(items):
    """On a GPU everything here is a test of the GPU, but for what needs none or cannot have one."""
    for item in items:
        if not ON_GPU or "kernels" not in item.path.parts:
            continue
        if item.get_closest_marker("interpreter") is not None:
            item.add_marker(pytest.mark.skip(reason="for the interpreter only"))
        elif item.path.stem.removeprefix("test_") not in NEEDS_NO_GPU:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def memory_of_a_gpu_that_others_use():
    """Several processes share a GPU under xdist: what a test has left goes back to it."""
    yield
    if ON_GPU:
        torch.cuda.empty_cache()


@pytest.fixture(autouse=True, scope="package")
def quick_interpreter():
    """Triton's interpreter looks its own modules over again for every call of a helper."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    original = interpreter.inspect
    patched = type(inspect)("inspect")
    patched.__dict__.update(inspect.__dict__)
    patched.getmembers = functools.cache(inspect.getmembers)
    interpreter.inspect = patched
    yield
    interpreter.inspect = original


@pytest.fixture
def few_programs(monkeypatch):
    """In the interpreter dk's work is shared by 5 programs, not by the 264 of an H200."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        launch = pytest.importorskip("drivekd_kernels.launch")
        monkeypatch.setattr(launch, "programs", lambda tensor: 5)
