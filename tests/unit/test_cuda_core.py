"""csrc/cuda without a GPU: its kernels emulated on CPU threads, called through the C interface."""

import ctypes
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from drivekd.functional import combine_gradients, gradient_gram
from drivekd.ops.gradient_layout import promoted_dtype
from tests.helpers.gradients import patterns_of, task_gradients

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # as in drivekd_core.h
SHAPES = ((5,), (), (63, 3), (0, 4), (2049,), (4097,))
LAUNCH = re.compile(r"(\w+_kernel(?:<[^<>]*>)?)\s*<<<(\w+), kThreads, 0, [\w.]+>>>\(")


class Gradients(ctypes.Structure):
    """drivekd_tensor."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("first", ctypes.c_int64),
        ("count", ctypes.c_int32),
        ("row", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Lists(ctypes.Structure):
    """drivekd_lists."""

    _fields_ = [
        ("tensors", ctypes.c_void_p),
        ("num_tensors", ctypes.c_int64),
        ("grads", ctypes.c_void_p),
        ("tasks", ctypes.c_void_p),
        ("num_tasks", ctypes.c_int64),
    ]


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    """The core, its kernel launches replaced by loops over blocks, and its tables made small."""
    folder = tmp_path_factory.mktemp("cuda_core")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("needs g++ or clang++")
    (folder / "cuda").mkdir()
    for path in (ROOT / "csrc" / "cuda").iterdir():
        text, launches = LAUNCH.subn(
            r"emulation::launch(dim3(\2), kThreads, \1, ", path.read_text()
        )
        assert (launches > 0) == (path.suffix == ".cu") and "<<<" not in text
        text = text.replace("kTableBytes = 32000", "kTableBytes = 1000")
        (folder / "cuda" / path.name.replace(".cu", ".cpp" if launches else ".cu")).write_text(text)
    sources = list((folder / "cuda").glob("*.cpp"))
    emulation = ROOT / "tests" / "helpers" / "cuda_emulation"
    includes = [f"-I{each}" for each in (emulation, folder, ROOT / "csrc")]
    library = folder / "core.so"
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-w", *includes]
    done = subprocess.run(
        [*command, *sources, "-o", library], capture_output=True, text=True, timeout=240
    )
    if "barrier" in done.stderr:
        pytest.skip(f"{compiler} has no std::barrier")
    assert done.returncode == 0, done.stderr
    loaded = ctypes.CDLL(str(library))
    loaded.drivekd_cuda_gram_partials.restype = ctypes.c_int64
    return loaded


def as_lists(task_grads):
    """drivekd_lists, positions of the tensors that have gradients, and what keeps it alive."""
    patterns = patterns_of(task_grads)
    tensors, grads, tasks, positions = [], [], [], []
    for position, entries in enumerate(zip(*task_grads, strict=True)):
        present = tuple(k for k, grad in enumerate(entries) if grad is not None)
        if not present:
            continue
        own = [entries[k] for k in present]
        positions.append(position)
        dtype = DTYPES.index(promoted_dtype(own))
        row = patterns.index(present)
        tensors.append(Gradients(own[0].numel(), len(grads), len(own), row, dtype))
        grads += own
        tasks += present
    arrays = (
        (Gradients * len(tensors))(*tensors),
        (ctypes.c_void_p * len(grads))(*[grad.data_ptr() for grad in grads]),
        (ctypes.c_int64 * len(tasks))(*tasks),
    )
    table, pointers, own_tasks = (ctypes.cast(each, ctypes.c_void_p) for each in arrays)
    return Lists(table, len(tensors), pointers, own_tasks, len(task_grads)), positions, arrays


def at(tensor):
    return ctypes.c_void_p(tensor.data_ptr())


def gram(core, task_grads):
    lists, _, kept = as_lists(task_grads)
    rows, tasks = len(patterns_of(task_grads)), len(task_grads)
    partials = torch.empty(
        core.drivekd_cuda_gram_partials(ctypes.byref(lists)), dtype=torch.float64
    )
    values = torch.empty(rows, tasks, tasks, dtype=torch.float64)
    status = core.drivekd_cuda_gram(
        ctypes.byref(lists), ctypes.c_int64(rows), at(partials), at(values), None
    )
    assert kept and status == 0
    return values


def combine(core, task_grads, weights, out, accumulate):
    lists, positions, kept = as_lists(task_grads)
    targets = (ctypes.c_void_p * len(positions))(*[out[p].data_ptr() for p in positions])
    status = core.drivekd_cuda_combine(
        ctypes.byref(lists), at(weights), ctypes.c_int32(accumulate), targets, None
    )
    assert kept and status == 0


def assert_like_torch(core, lists):
    want = gradient_gram(lists, backend="torch")
    norms = want.total.diagonal().sqrt()
    size = torch.outer(norms, norms).clamp_min(1e-300)
    bound = 1e-7 if lists[0][-1] is not None and lists[0][-1].dtype == torch.bfloat16 else 1e-13
    assert float(((gram(core, lists) - want.values).abs() / size).max()) < bound
    # Simple fractions would make exact ties, which the last bit of a float64 sum decides.
    weights = torch.randn(len(want.patterns), len(lists), dtype=torch.float64)
    for accumulate in (False, True):
        first = [next((g for g in row if g is not None), None) for row in zip(*lists, strict=True)]
        before = [None if g is None else torch.randn(g.shape).to(g.dtype) for g in first]
        got = [None if x is None else x.clone() for x in before]
        combine(core, lists, weights, got, accumulate)
        wanted = [None if x is None else x.clone() for x in before]
        combine_gradients(lists, weights, out=wanted, accumulate=accumulate, backend="torch")
        for x, y in zip(got, wanted, strict=True):
            if x is not None:
                exact = x.dtype != torch.float64
                torch.testing.assert_close(
                    x, y, rtol=0 if exact else 1e-14, atol=0 if exact else 1e-14
                )


@pytest.mark.parametrize("num_tasks", [1, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_with_random_absences(core, dtype, num_tasks):
    choose = random.Random(num_tasks)
    presence = ["".join(choose.choice("0111") for _ in range(num_tasks)) for _ in SHAPES]
    assert_like_torch(
        core, task_gradients(num_tasks, shapes=SHAPES, dtype=dtype, presence=presence)
    )


def test_several_items_unaligned_tensors_and_mixed_dtypes(core):
    lists = task_gradients(2, shapes=[(70_000,), (40,), (130,)], dtype=torch.float32)
    for own in lists:
        own[1] = own[1].half()
        own[2] = torch.cat([own[2][:1], own[2]])[1:]
    assert_like_torch(core, lists)


def test_more_tensors_and_patterns_than_a_table_holds(core):
    """With tables of 1000 bytes: of some 20 tensors, and of 17 patterns."""
    lists = task_gradients(2, shapes=[(3,)] * 70, dtype=torch.float32)
    assert_like_torch(core, lists)
    every = [f"{mask:05b}" for mask in range(1, 32)]
    assert_like_torch(core, task_gradients(5, shapes=[(3,)] * 31, presence=every))


def test_more_gradients_than_the_core_takes_are_refused(core):
    lists, _, _ = as_lists([[torch.ones(1)] for _ in range(9)])
    assert core.drivekd_cuda_gram(ctypes.byref(lists), ctypes.c_int64(1), None, None, None) == -1
    assert core.drivekd_cuda_combine(ctypes.byref(lists), None, 0, None, None) == -1


def test_repeated_calls_are_bitwise_equal_and_out_may_be_a_gradient(core):
    lists = task_gradients(3, shapes=SHAPES, dtype=torch.float32)
    assert torch.equal(gram(core, lists), gram(core, lists))
    weights = torch.randn(1, 3, dtype=torch.float64)
    want = combine_gradients(lists, weights, backend="torch")
    combine(core, lists, weights, lists[1], False)
    assert all(torch.equal(x, y) for x, y in zip(lists[1], want, strict=True))
