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
def exact_bfloat16(monkeypatch):
    """Triton's interpreter rounds to bfloat16 as GPUs do, and multiplies it in float32.

    By itself it cuts float32 off, and tl.dot multiplies the raw bits.
    """
    if ON_GPU:
        return
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    cast, dot = builder.cast_impl, builder.create_dot

    def is_bfloat16(kind):
        return kind.scalar == tl.bfloat16

    def widened(x):
        values = torch.from_numpy(x.data.copy()).view(torch.bfloat16).float().numpy()
        return handle(values.reshape(x.data.shape), tl.float32)

    def cast_impl(self, src, dst_type):
        if src.dtype.scalar == tl.float32 and is_bfloat16(dst_type):
            bits = torch.from_numpy(src.data.copy()).bfloat16().view(torch.uint16).numpy()
            return handle(bits.reshape(src.data.shape), tl.bfloat16)
        if is_bfloat16(src.dtype) and dst_type.scalar == tl.float32:
            return widened(src)
        return cast(self, src, dst_type)

    def create_dot(self, a, b, *others):
        if is_bfloat16(a.dtype) and is_bfloat16(b.dtype):
            a, b = widened(a), widened(b)
        return dot(self, a, b, *others)

    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    monkeypatch.setattr(builder, "create_dot", create_dot)


@pytest.fixture
def few_programs(monkeypatch):
    """In the interpreter dk's work is shared by 5 programs, not by the 264 of an H200."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        specialize = pytest.importorskip("drivekd_kernels.specialize")
        monkeypatch.setattr(specialize, "programs", lambda tensor: 5)
