"""Gram and combination through Triton: the float64 twin, ragged lists, accumulation, no host read.

Runs in Triton's interpreter, or on a GPU where there is one.
"""

import os
import random

import pytest
import torch

from drivekd.functional import combine_gradients, gradient_gram
from drivekd.projection import agp_weights
from drivekd.reference import agp as reference
from tests.helpers.gradients import (
    PRESENCE,
    near_antiparallel,
    patterns_of,
    relative_error,
    task_gradients,
)
from tests.helpers.host_reads import NoHostRead

pytest.importorskip("triton")
pytest.importorskip("drivekd_kernels.gradient_launch")

import triton.language as tl
from drivekd_kernels import gradient_gram as kernels
from drivekd_kernels import gradient_launch, gradient_table
from drivekd_kernels.gradient_table import CHUNK, Kind

from drivekd.ops.triton_backend import gradient as backend

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Nothing; a part of a step; a step and a bit; items, one of them short.
SHAPES = ((5,), (), (63, 3), (0, 4), (2049,), (4097,), (CHUNK + 3,))
# bfloat16 starts with float32 sums of at most 16 exact products.
GRAM_TOLERANCE = {torch.bfloat16: 1e-7}
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}

# The interpreter's own: infinities are data, and numpy would have it read scalars anew.
pytestmark = [
    pytest.mark.usefixtures("exact_bfloat16"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def on_device(lists):
    return [[None if grad is None else grad.to(DEVICE) for grad in own] for own in lists]


def gram_of(lists):
    return gradient_gram(on_device(lists), backend="triton")


def combined(lists, weights, **arguments):
    weights = torch.as_tensor(weights, dtype=torch.float64).to(DEVICE)
    return combine_gradients(on_device(lists), weights, backend="triton", **arguments)


def assert_gram(lists, tolerance=1e-14):
    """Per pattern and in total, against the twin, relative to the norms."""
    gram = gram_of(lists)
    assert list(gram.patterns) == patterns_of(lists)
    norms = reference.gram(lists).diagonal().sqrt()
    size = torch.outer(norms, norms).clamp_min(1e-300)
    rows = list(zip(*lists, strict=True))
    for pattern, values in zip(gram.patterns, gram.values.cpu(), strict=True):
        members = [row for row in rows if patterns_of([[g] for g in row]) == [pattern]]
        want = reference.gram([list(task) for task in zip(*members, strict=True)])
        assert float(((values - want).abs() / size).max()) <= tolerance
        assert torch.equal(values, values.mT)


def assert_combination(lists, weights, **arguments):
    """Rounded once: equal to PyTorch's backend but for the order of the float64 sum."""
    got = combined(lists, weights, **arguments)
    weights = torch.as_tensor(weights, dtype=torch.float64)
    want = reference.combine(lists, weights.tolist())
    for x, y, row in zip(got, want, zip(*lists, strict=True), strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            size = sum(abs(w) * g.double().abs() for w, g in zip(weights, row, strict=True)
                       if g is not None)  # fmt: skip
            bound = 1e-15 * len(weights) * size
            if x.dtype != torch.float64:
                bound = (
                    bound + 1.0002 * ROUNDING[x.dtype] * y.abs() + 3e-8 * (x.dtype.itemsize == 2)
                )
            assert bool(((x.cpu().double() - y).abs() <= bound).all())


@pytest.mark.parametrize("num_tasks", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_tasks_with_random_absences(dtype, num_tasks):
    choose = random.Random(num_tasks)
    shapes = SHAPES if num_tasks <= 3 else SHAPES[:-1]
    presence = ["".join(choose.choice("0111") for _ in range(num_tasks)) for _ in shapes]
    lists = task_gradients(
        num_tasks, shapes=shapes, dtype=dtype, presence=presence, correlation=-0.4
    )
    assert_gram(lists, GRAM_TOLERANCE.get(dtype, 1e-14))
    assert_combination(lists, torch.linspace(-2, 3, num_tasks))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_other_dtypes(dtype):
    lists = task_gradients(3, shapes=SHAPES, dtype=dtype, presence=("111", "101", "011"))
    assert_gram(lists)
    assert_combination(lists, [1.0, -0.3, 2.0])


def test_more_tasks_than_a_program_holds():
    lists = task_gradients(9, shapes=[(63, 3), (4,), (70,)], presence=("1" * 9, "101101000"),
                           dtype=torch.float32)  # fmt: skip
    assert_gram(lists)
    assert_combination(lists, torch.linspace(-2, 3, 9))


def test_weights_may_differ_between_patterns():
    lists = task_gradients(presence=PRESENCE["nested followers"], shapes=SHAPES[:5])
    patterns = patterns_of(lists)
    weights = torch.randn(len(patterns), 4, dtype=torch.float64)
    for entries, got in zip(zip(*lists, strict=True), combined(lists, weights), strict=True):
        present = tuple(k for k in range(4) if entries[k] is not None)
        row = weights[patterns.index(present)]
        want = sum(row[k] * entries[k] for k in present)
        torch.testing.assert_close(got.cpu(), want, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulates_into_out_and_rounds_once(dtype):
    lists = task_gradients(2, shapes=SHAPES[:5], dtype=dtype, presence=("11", "10", "00"))
    before = task_gradients(1, shapes=SHAPES[:5], dtype=dtype, seed=7)[0]
    out = [x.to(DEVICE, copy=True) for x in before]
    result = combined(lists, [0.5, -2.0], out=out, accumulate=True)
    plain = [x.clone() for x in before]
    combine_gradients(
        lists, torch.tensor([0.5, -2.0]), out=plain, accumulate=True, backend="torch"
    )  # fmt: skip
    for got, kept, want in zip(result, out, plain, strict=True):
        assert got is kept
        # The order of float64 sums may flip a tie.
        assert float((got.cpu() != want).double().sum()) <= 1e-3 * want.numel()
        torch.testing.assert_close(got.cpu(), want, rtol=2 * ROUNDING.get(dtype, 1e-14), atol=1e-7)


def test_out_may_be_a_gradient_of_the_same_tensor():
    lists = on_device(task_gradients(3, dtype=torch.float32))
    want = combined(lists, [1.0, 2.0, 3.0])
    out = list(lists[1])
    combined(lists, [1.0, 2.0, 3.0], out=out)
    assert all(torch.equal(x, y) for x, y in zip(out, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_layout_does_not_matter(dtype):
    """Transposed, strided, and starting at an address that 16 does not divide."""
    lists = on_device(task_gradients(3, shapes=[(67, 33)], dtype=dtype))
    plain = lists[0][0]
    wide = torch.zeros(67, 66, dtype=dtype, device=DEVICE)
    wide[:, ::2] = plain
    shifted = torch.zeros(plain.numel() + 1, dtype=dtype, device=DEVICE)
    shifted[1:] = plain.reshape(-1)
    want_gram, want = gram_of(lists).values, combined(lists, [1.0, -0.5, 2.0])[0]
    for moved in (plain.mT.contiguous().mT, wide[:, ::2], shifted[1:].view_as(plain)):
        mixed = [[moved], lists[1], lists[2]]
        torch.testing.assert_close(gram_of(mixed).values, want_gram, rtol=1e-7, atol=1e-6)
        out = torch.empty(33, 67, dtype=dtype, device=DEVICE).mT
        assert combined(mixed, [1.0, -0.5, 2.0], out=[out])[0] is out
        assert torch.equal(out, want)


def test_mixed_dtypes_between_tensors_and_tasks():
    shapes = [(40,), (40,), (7, 5)]
    own = {d: task_gradients(2, shapes=shapes, dtype=d) for d in DTYPES}
    lists = [
        [own[torch.float32][0][0], own[torch.bfloat16][0][1], own[torch.float64][0][2]],
        [own[torch.float32][1][0], own[torch.float16][1][1], own[torch.float16][1][2]],
    ]
    gram, want = gram_of(lists).total.cpu(), reference.gram(lists)
    torch.testing.assert_close(gram, want, rtol=1e-12, atol=1e-12)
    result = combined(lists, [1.0, 3.0])
    assert [x.dtype for x in result] == [torch.float32, torch.float32, torch.float64]
    assert relative_error([x.cpu() for x in result], reference.combine(lists, [1.0, 3.0])) < 1e-7


def test_only_empty_tensors():
    lists = [[torch.ones(0, 3)], [torch.ones(0, 3)]]
    assert torch.equal(gram_of(lists).total.cpu(), torch.zeros(2, 2, dtype=torch.float64))
    assert combined(lists, [1.0, 1.0])[0].shape == (0, 3)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_gradients_are_not_hidden(value):
    for dtype in (torch.float32, torch.bfloat16):
        lists = task_gradients(2, shapes=[(300,)], dtype=dtype)
        lists[1][0][100] = value
        total = gram_of(lists).total
        assert not bool(total[1, 1].isfinite()) and bool(total[0, 0].isfinite())
        assert not bool(combined(lists, [1.0, 0.0])[0].isfinite().all())


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
def test_near_antiparallel_gradients_do_not_blow_up(dtype, bound, scale):
    """A Gram held in fp32 gives 2e26 or inf here; bf16 has 1.7e-3 from rounding the update."""
    lists = near_antiparallel(scale, 1e-3, dtype, size=10_003)
    update = [x.cpu() for x in combined(lists, agp_weights(gram_of(lists)))]
    assert relative_error(update, reference.agp(lists)) < bound


def test_repeated_calls_are_bitwise_equal():
    lists = on_device(task_gradients(3, presence=("111", "110"), dtype=torch.float32))
    first, second = (gram_of(lists).values for _ in range(2))
    assert torch.equal(first, second)
    results = [combined(lists, [1.0, -0.3, 2.0]) for _ in range(2)]
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


def test_nothing_is_read_back():
    """The backend itself: a dispatch mode does not see into the op around it."""
    grads = on_device(task_gradients(1, shapes=[(70,), (70,), (2049,)]))[0]
    layout = [0, 2, 1], [0, 2, 3], [0, 1]
    weights = torch.ones(2, 3, dtype=torch.float64, device=DEVICE)
    out = [torch.empty_like(grads[0]), torch.empty_like(grads[2])]
    with NoHostRead():
        values = backend.gradient_gram(grads, *layout, 3, 2)
        backend.combine_gradients(out, grads, *layout, weights, False)
    assert values.device.type == DEVICE
    torch.testing.assert_close(out[1], grads[2])


def test_captured_tables_come_from_spare_memory_and_are_kept(monkeypatch):
    """Pinned memory is stood for by plain memory; which, the addresses tell."""
    empty, capturing = torch.empty, [False]
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: empty(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for name in ("_spares", "_captured"):
        monkeypatch.setattr(gradient_table, name, [])
    small, large = (torch.arange(length) for length in (100, 1000))
    for table in (small, large):
        assert torch.equal(gradient_table._pinned(table), table)
    addresses = {spare.data_ptr() for spare in gradient_table._spares}
    assert len(addresses) == gradient_table._NUM_SPARES
    capturing[0] = True
    taken = [gradient_table._pinned(large) for _ in range(gradient_table._NUM_SPARES)]
    assert {table.data_ptr() for table in taken} == addresses
    assert all(torch.equal(table, large) for table in taken)
    assert torch.equal(gradient_table._pinned(small), small)  # none is left: up to torch
    assert len(gradient_table._captured) == gradient_table._NUM_SPARES + 1
    capturing[0] = False
    gradient_table._pinned(small)
    new = {spare.data_ptr() for spare in gradient_table._spares}
    assert len(new) == gradient_table._NUM_SPARES and not new & addresses


@pytest.mark.interpreter  # on a GPU a real tensor of that size is used
def test_offsets_beyond_32_bits():
    """Item 70,000 of a tensor begins at element 2.3e9: its address lies so much before the data."""
    data = torch.randn(100, dtype=torch.float64)
    start = 70_000 * CHUNK
    record = [start + 100, -70_000, 0, data.data_ptr() - 8 * start]
    table = torch.tensor([*record, 0], dtype=torch.int64)
    partials = torch.empty(1, 70_001, dtype=torch.float64)
    kind = Kind(1, torch.float64, True)
    kernels.gram_kernel[(1,)](
        table, partials, 4, 70_001, EXACT=tl.float64, **gradient_launch._meta(kind, 2)
    )
    torch.testing.assert_close(partials[0, 70_000], data.square().sum(), rtol=1e-14, atol=0)
