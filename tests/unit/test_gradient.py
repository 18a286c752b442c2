"""gradient_gram and combine_gradients: values, absent gradients, strides, accumulation, errors."""

import math

import pytest
import torch
from torch import distributed
from torch.distributed.tensor import distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from drivekd.errors import BackendUnavailableError
from drivekd.functional.gradient import GradientGram, combine_gradients, gradient_gram
from drivekd.ops.dispatch import unavailable_reason
from drivekd.ops.torch_backend import gradient as torch_backend
from drivekd.reference import agp as reference
from tests.helpers.gradients import (
    PRESENCE,
    every_presence_of,
    patterns_of,
    relative_error,
    task_gradients,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Products are exact in float64 for 16- and 32-bit gradients. What remains is the order of float64
# sums and, natively, fp32 sums of at most 32 products of 16-bit gradients.
GRAM_TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-14,
    torch.bfloat16: 2e-7,
    torch.float16: 2e-7,
}
# One rounding of the result: half a unit in the last place, and a 2^-13th of it where a conversion
# from float64 goes through float32. Half of float16's smallest subnormal is 3e-8.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SMALLEST = {torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 3e-8}


NO_NATIVE = unavailable_reason("native")
BACKENDS = (
    "torch",
    pytest.param("native", marks=pytest.mark.skipif(NO_NATIVE is not None, reason=f"{NO_NATIVE}")),
)


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


def assert_rounded_once(got, want, terms):
    """`want` is the sum of `terms` in float64, rounded to the dtype of `got` and nothing more."""
    size = sum(term.double().abs() for term in terms)
    bound = 1e-15 * len(terms) * size
    if got.dtype != torch.float64:
        bound = bound + 1.0002 * ROUNDING[got.dtype] * want.abs() + SMALLEST[got.dtype]
    assert bool(((got.double() - want).abs() <= bound).all())


def gram_error(gram, lists):
    expected = reference.gram(lists)
    norms = expected.diagonal().sqrt()
    return float(
        ((gram.total - expected).abs() / torch.outer(norms, norms).clamp_min(1e-300)).max()
    )


@pytest.mark.parametrize("num_tasks", range(1, 9))
@pytest.mark.parametrize("dtype", DTYPES)
def test_gram_matches_the_reference(backend, dtype, num_tasks):
    lists = task_gradients(num_tasks, dtype=dtype, correlation=-0.4)
    gram = gradient_gram(lists, backend=backend)
    assert gram.values.dtype == torch.float64
    assert gram.values.shape == (1, num_tasks, num_tasks)
    assert gram_error(gram, lists) < GRAM_TOLERANCE[dtype]


@pytest.mark.parametrize("presence", PRESENCE.values(), ids=PRESENCE)
def test_patterns_keep_inner_products_apart(backend, presence):
    lists = task_gradients(presence=presence)
    gram = gradient_gram(lists, backend=backend)
    assert list(gram.patterns) == patterns_of(lists)
    rows = list(zip(*lists, strict=True))
    for pattern, values in zip(gram.patterns, gram.values, strict=True):
        members = [row for row in rows if patterns_of([[g] for g in row]) == [pattern]]
        own = [list(task) for task in zip(*members, strict=True)]
        torch.testing.assert_close(values, reference.gram(own), rtol=1e-13, atol=1e-13)


def test_every_presence_of_two_tasks_at_three_tensors(backend):
    for presence in every_presence_of(2, 3):
        lists = task_gradients(2, shapes=[(3,), (2, 2), (5,)], presence=presence)
        gram = gradient_gram(lists, backend=backend)
        assert list(gram.patterns) == patterns_of(lists)
        assert gram_error(gram, lists) < 1e-14
        result = combine_gradients(lists, torch.tensor([0.7, -1.3]), backend=backend)
        assert relative_error(result, reference.combine(lists, [0.7, -1.3])) < 1e-7


@pytest.mark.parametrize("num_tasks", (1, 2, 5, 9, 17))
@pytest.mark.parametrize("dtype", DTYPES)
def test_combination_is_rounded_once(backend, dtype, num_tasks):
    lists = task_gradients(num_tasks, dtype=dtype, presence=("1" * num_tasks,))
    weights = torch.linspace(-2, 3, num_tasks, dtype=torch.float64)
    result = combine_gradients(lists, weights, backend=backend)
    expected = reference.combine(lists, weights.tolist())
    for got, want, row in zip(result, expected, zip(*lists, strict=True), strict=True):
        assert got.dtype == dtype
        assert_rounded_once(got, want, [w * g.double() for w, g in zip(weights, row, strict=True)])


def test_weights_may_differ_between_patterns(backend):
    lists = task_gradients(presence=PRESENCE["nested followers"])
    gram = gradient_gram(lists, backend=backend)
    weights = torch.randn(len(gram.patterns), 4, dtype=torch.float64)
    result = combine_gradients(lists, weights, backend=backend)
    for entries, got in zip(zip(*lists, strict=True), result, strict=True):
        present = tuple(k for k in range(4) if entries[k] is not None)
        row = weights[gram.patterns.index(present)]
        want = sum(row[k] * entries[k] for k in present)
        torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-14)


def test_absent_in_all_tasks_stays_none(backend):
    lists = task_gradients(presence=PRESENCE["absent in all tasks"])
    result = combine_gradients(lists, torch.ones(4), backend=backend)
    assert [x is None for x in result] == [
        all(x is None for x in row) for row in zip(*lists, strict=True)
    ]


def test_nothing_present_and_nothing_at_all():
    gram = gradient_gram([[None, None], [None, None]])
    assert gram.patterns == ()
    assert gram.values.shape == (0, 2, 2)
    assert torch.equal(gram.total, torch.zeros(2, 2, dtype=torch.float64))
    assert combine_gradients([[None, None], [None, None]], torch.ones(2)) == [None, None]
    assert gradient_gram([[], []]).total.shape == (2, 2)
    assert combine_gradients([[]], torch.ones(1)) == []


def layouts(tensor):
    """The same values in other memory: transposed, strided, unaligned, expanded where possible."""
    yield tensor.mT.contiguous().mT
    wide = torch.zeros(*tensor.shape[:-1], 2 * tensor.shape[-1], dtype=tensor.dtype)
    wide[..., ::2] = tensor
    yield wide[..., ::2]
    shifted = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    shifted[1:] = tensor.reshape(-1)
    yield shifted[1:].view_as(tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_layout_does_not_matter(backend, dtype):
    lists = task_gradients(3, shapes=[(17, 33)], dtype=dtype)
    weights = torch.tensor([1.0, -0.5, 2.0])
    want_gram = reference.gram(lists)
    want = combine_gradients(lists, weights, backend="torch")[0]
    for first in layouts(lists[0][0]):
        for second in layouts(lists[1][0]):
            mixed = [[first], [second], lists[2]]
            gram = gradient_gram(mixed, backend=backend)
            torch.testing.assert_close(gram.total, want_gram, rtol=1e-5, atol=1e-5)
            got = combine_gradients(mixed, weights, backend=backend)[0]
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            out = torch.empty(33, 17, dtype=dtype).mT
            returned = combine_gradients(mixed, weights, out=[out], backend=backend)
            assert returned[0] is out
            torch.testing.assert_close(out, want, rtol=0, atol=0)


def test_expanded_gradients(backend):
    lists = [[torch.tensor(0.5).expand(3, 50)], [torch.randn(3, 50)]]
    assert gram_error(gradient_gram(lists, backend=backend), lists) < 1e-14
    result = combine_gradients(lists, torch.tensor([2.0, 1.0]), backend=backend)
    torch.testing.assert_close(result[0], 1.0 + lists[1][0])


def test_transposed_gradients_are_read_in_place(monkeypatch):
    """Linear layers hand over transposed gradients; copying them would double the memory."""
    grads = [torch.randn(40, 30).mT for _ in range(3)]

    def refuse(*_):
        raise AssertionError("copied")

    monkeypatch.setattr("drivekd.ops.gradient.Tensor.contiguous", refuse)
    assert gradient_gram([[g] for g in grads], backend="torch").total.shape == (3, 3)


def test_mixed_dtypes_between_tensors_and_tasks(backend):
    shapes = [(40,), (40,), (7, 5)]
    singles = {d: task_gradients(2, shapes=shapes, dtype=d) for d in DTYPES}
    lists = [
        [singles[torch.float32][0][0], singles[torch.bfloat16][0][1], singles[torch.float64][0][2]],
        [singles[torch.float32][1][0], singles[torch.float16][1][1], singles[torch.float16][1][2]],
    ]
    assert gram_error(gradient_gram(lists, backend=backend), lists) < 2e-7
    result = combine_gradients(lists, torch.tensor([1.0, 3.0]), backend=backend)
    assert [x.dtype for x in result] == [torch.float32, torch.float32, torch.float64]
    assert relative_error(result, reference.combine(lists, [1.0, 3.0])) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
def test_accumulates_into_out_and_rounds_once(backend, dtype):
    lists = task_gradients(dtype=dtype, presence=PRESENCE["absent in all tasks"])
    before = task_gradients(1, dtype=dtype, seed=7)[0]
    out = [None if i == 1 else x.clone() for i, x in enumerate(before)]
    kept = list(out)
    weights = torch.tensor([0.5, 1.0, -1.0, 2.0])
    result = combine_gradients(lists, weights, out=out, accumulate=True, backend=backend)
    update = reference.combine(lists, weights.tolist())
    for i, (got, added) in enumerate(zip(result, update, strict=True)):
        start = before[i].double() if i != 1 else torch.zeros_like(before[i]).double()
        if kept[i] is not None:
            assert got is kept[i]
        want = start if added is None else start + added
        row = [g for own in lists if (g := own[i]) is not None]
        assert_rounded_once(got, want, [start, *(2 * g for g in row)])


def test_out_may_be_a_gradient_of_the_same_tensor(backend):
    lists = task_gradients(3, dtype=torch.float32)
    want = combine_gradients(lists, torch.tensor([1.0, 2.0, 3.0]), backend=backend)
    out = list(lists[0])
    combine_gradients(lists, torch.tensor([1.0, 2.0, 3.0]), out=out, backend=backend)
    for got, expected in zip(out, want, strict=True):
        assert torch.equal(got, expected)


def test_without_accumulate_out_is_overwritten_even_where_it_is_nan(backend):
    lists = [[torch.ones(5)], [torch.ones(5)]]
    out = [torch.full((5,), math.nan)]
    combine_gradients(lists, torch.tensor([1.0, 1.0]), out=out, backend=backend)
    assert torch.equal(out[0], torch.full((5,), 2.0))


@pytest.mark.parametrize("value", (math.inf, math.nan))
def test_non_finite_gradients_are_not_hidden(backend, value):
    lists = task_gradients(2, dtype=torch.float32)
    lists[1][4][100] = value
    gram = gradient_gram(lists, backend=backend)
    assert not math.isfinite(gram.total[1, 1])
    assert math.isfinite(gram.total[0, 0])
    result = combine_gradients(lists, torch.tensor([1.0, 0.0]), backend=backend)
    assert not bool(result[4].isfinite().all())


def test_a_long_fp32_sum_keeps_its_small_terms(backend):
    """A running fp32 sum of ten million squares of 1e-4 beside one of 1 loses most of them."""
    grad = torch.full((10_000_000,), 1e-4)
    grad[0] = 1.0
    value = float(gradient_gram([[grad]], backend=backend).total)
    assert value == pytest.approx(1 + (len(grad) - 1) * float(grad[1]) ** 2, rel=1e-12)


def test_the_form_for_accelerators_gives_the_same():
    columns = torch.randn(5, 3 * 4096, dtype=torch.float64)
    got = torch_backend._gram_in_blocks(columns)
    torch.testing.assert_close(got, columns @ columns.mT, rtol=1e-12, atol=1e-11)


def test_float16_products_do_not_overflow_or_underflow(backend):
    grads = [torch.full((999,), 60000.0).half(), torch.full((999,), 6e-8).half()]
    gram = gradient_gram([[g] for g in grads], backend=backend).total
    want = reference.gram([[g] for g in grads])
    torch.testing.assert_close(gram, want, rtol=1e-6, atol=0)


def test_chunk_borders(backend):
    for size in (1, 31, 4095, 4097, 65535, 65536, 65537, 131073):
        lists = [[torch.randn(size), torch.randn(3)], [torch.randn(size), torch.randn(3)]]
        assert gram_error(gradient_gram(lists, backend=backend), lists) < 1e-13
        result = combine_gradients(lists, torch.tensor([2.0, -1.0]), backend=backend)
        assert relative_error(result, reference.combine(lists, [2.0, -1.0])) < 1e-7


def test_results_carry_no_graph(backend):
    grad = torch.randn(4, requires_grad=True)
    weights = torch.ones(1, requires_grad=True)
    assert not gradient_gram([[grad]], backend=backend).values.requires_grad
    assert not combine_gradients([[grad]], weights, backend=backend)[0].requires_grad


def test_autocast_changes_nothing(backend):
    lists = task_gradients(dtype=torch.float32)
    want = gradient_gram(lists, backend=backend).values
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gradient_gram(lists, backend=backend).values, want)


def test_scaled_gram_is_the_gram_of_scaled_gradients():
    lists = task_gradients(presence=PRESENCE["nested followers"])
    weights = torch.tensor([1.0, 0.5, 30.0, 0.0], dtype=torch.float64)
    scaled = [
        [None if x is None else w * x for x in own] for w, own in zip(weights, lists, strict=True)
    ]
    want = gradient_gram(scaled)
    got = gradient_gram(lists).scaled(weights)
    assert got.patterns == want.patterns
    torch.testing.assert_close(got.values, want.values, rtol=1e-13, atol=1e-13)


def ones(*shape, **kwargs):
    return torch.ones(*shape, **kwargs)


BAD_LISTS = {
    "one flat tensor": (ones(3), TypeError, "task_grads must be"),
    "a generator": ((x for x in ()), TypeError, "task_grads must be"),
    "a mapping": ({"ce": [ones(3)]}, TypeError, "task_grads must be"),
    "no task": ([], ValueError, "task_grads is empty"),
    "a task that is a tensor": ([ones(3), ones(3)], TypeError, r"task_grads\[0\] must be"),
    "ragged": ([[ones(3)], [ones(3), None]], ValueError, r"task_grads\[1\] has 2 entries"),
    "an entry that is a number": ([[ones(3)], [1.0]], TypeError, r"task_grads\[1\]\[0\]"),
    "a shape that differs": (
        [[ones(3), ones(2, 3)], [None, ones(3, 2)]],
        ValueError,
        r"task_grads\[1\]\[1\] has shape \(3, 2\)",
    ),
    "integers": ([[ones(3, dtype=torch.int64)]], TypeError, "int64"),
    "booleans": ([[ones(3, dtype=torch.bool)]], TypeError, "bool"),
    "complex": ([[ones(3, dtype=torch.complex64)]], TypeError, "complex64"),
    "float8": ([[ones(3).to(torch.float8_e5m2)]], NotImplementedError, "float8"),
    "sparse": ([[ones(3).to_sparse()]], NotImplementedError, "layout"),
    "two devices": ([[ones(3)], [ones(3, device="meta")]], ValueError, "meta"),
    "two devices across tensors": ([[ones(3), ones(3, device="meta")]], ValueError, "meta"),
}


@pytest.mark.parametrize("lists, error, message", BAD_LISTS.values(), ids=BAD_LISTS)
@pytest.mark.parametrize("call", ("gram", "combine"))
def test_refuses_lists(call, lists, error, message):
    with pytest.raises(error, match=message):
        if call == "gram":
            gradient_gram(lists)
        else:
            combine_gradients(lists, ones(1))


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_refuses_dtensors_and_says_what_to_do(process_group):
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = distribute_tensor(ones(4), mesh)
    with pytest.raises(NotImplementedError, match=r"DTensor.*to_local.*all-reduce"):
        gradient_gram([[sharded]])


BAD_COMBINATIONS = {
    "weights in a list": ({"weights": [1.0, 1.0]}, TypeError, "weights must be a tensor"),
    "integer weights": ({"weights": ones(2, dtype=torch.int64)}, TypeError, "weights"),
    "too few weights": ({"weights": ones(1)}, ValueError, r"weights has shape \(1,\)"),
    "0-d weights": ({"weights": ones(())}, ValueError, r"weights has shape \(\)"),
    "a row too few": ({"weights": ones(1, 2)}, ValueError, r"weights has shape \(1, 2\)"),
    "3-d weights": ({"weights": ones(1, 2, 2)}, ValueError, "weights has shape"),
    "NaN weights of a wrong shape": ({"weights": ones(3) * math.nan}, ValueError, "weights"),
    "weights elsewhere": ({"weights": ones(2, device="meta")}, ValueError, "weights is on meta"),
    "out is a tensor": ({"out": ones(3)}, TypeError, "out must be"),
    "out is too short": ({"out": [None]}, ValueError, "out has 1 entries"),
    "out holds a number": ({"out": [0.0, None, None]}, TypeError, r"out\[0\]"),
    "out of another shape": (
        {"out": [ones(4), None, None]},
        ValueError,
        r"out\[0\] has shape \(4,\)",
    ),
    "out of another dtype": ({"out": [ones(3).double(), None, None]}, ValueError, "dtype"),
    "integer out": ({"out": [ones(3, dtype=torch.int32), None, None]}, TypeError, r"out\[0\]"),
    "out elsewhere": ({"out": [ones(3, device="meta"), None, None]}, ValueError, "device"),
    "sparse out": ({"out": [ones(3).to_sparse(), None, None]}, NotImplementedError, "layout"),
    "out overlaps itself": ({"out": [ones(1).expand(3), None, None]}, ValueError, "overlaps"),
    "accumulate without out": ({"accumulate": True}, ValueError, "accumulate=True needs out"),
    "accumulate is no bool": ({"accumulate": 1}, TypeError, "accumulate must be a bool"),
}


@pytest.mark.parametrize(
    "arguments, error, message", BAD_COMBINATIONS.values(), ids=BAD_COMBINATIONS
)
def test_combination_refuses(arguments, error, message):
    lists = [[ones(3), ones(2), None], [ones(3), None, None]]
    with pytest.raises(error, match=message):
        combine_gradients(lists, **{"weights": ones(2), **arguments})


@pytest.mark.parametrize("call", ("gram", "combine"))
def test_refuses_backends(call):
    lists, weights = [[ones(3)]], ones(1)

    def run(backend):
        if call == "gram":
            return gradient_gram(lists, backend=backend)
        return combine_gradients(lists, weights, backend=backend)

    with pytest.raises(ValueError, match="backend"):
        run("cuda")
    with pytest.raises(TypeError, match="backend"):
        run(None)
    # Under Triton's interpreter that backend takes CPU tensors as well.
    lists, weights = [[ones(3, device="meta")]], ones(1, device="meta")
    with pytest.raises(BackendUnavailableError, match="triton"):
        run("triton")


@pytest.mark.parametrize(
    "weights, error, message",
    [
        (None, TypeError, "weights must be a floating tensor, got NoneType"),
        (2.0, TypeError, "weights must be a floating tensor, got float"),
        (torch.ones(2, dtype=torch.int64), TypeError, "got torch.int64"),
        (
            torch.ones(3),
            ValueError,
            r"weights has shape \(3,\) on cpu; wanted \(2,\), one per",
        ),
        (torch.ones(2, 2), ValueError, r"weights has shape \(2, 2\)"),
        (torch.tensor(2.0), ValueError, r"weights has shape \(\)"),
        (torch.ones(2, device="meta"), ValueError, "on meta; wanted .* on cpu"),
    ],
)
def test_scaling_a_gram_refuses(weights, error, message):
    gram = GradientGram(((0, 1),), torch.zeros(1, 2, 2, dtype=torch.float64))
    with pytest.raises(error, match=message):
        gram.scaled(weights)


def test_scaling_a_gram_rounds_nothing():
    gram = GradientGram(((0, 1),), torch.ones(1, 2, 2, dtype=torch.float64))
    weights = torch.tensor([1.1, 3.3], dtype=torch.float32)
    assert torch.equal(gram.scaled(weights).values, gram.scaled(weights.double()).values)


def test_gram_checks_its_fields():
    values = torch.zeros(1, 2, 2, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        GradientGram(((0, 1),), values.float())
    with pytest.raises(ValueError, match="S = 2"):
        GradientGram(((0, 1), (0,)), values)
    for wrong in ((1, 0), (), (0, 0), (0, 2), (-1, 0)):
        with pytest.raises(ValueError, match="patterns"):
            GradientGram((wrong,), values)


def test_ops_pass_opcheck(backend):
    grads = [torch.randn(5), torch.randn(5), torch.randn(2, 3)]
    layout = ([0, 1, 0], [0, 2, 3], [0, 1])
    torch.library.opcheck(torch.ops.drivekd.gradient_gram.default, (grads, *layout, 2, 2, backend))
    weights = torch.randn(2, 2, dtype=torch.float64)
    for accumulate in (False, True):
        out = [torch.randn(5), torch.randn(2, 3)]
        torch.library.opcheck(
            torch.ops.drivekd.combine_gradients.default,
            (out, grads, *layout, weights, accumulate, backend),
        )


def test_no_buffer_as_large_as_the_gradients(backend):
    """Both ops read gradients in place, through buffers of a bounded size."""
    lists = [[torch.randn(500_000) for _ in range(8)] for _ in range(3)]
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not result._is_view():
                largest = max(largest, result.numel() * result.element_size())
            return result

    with Watch():
        gradient_gram(lists, backend=backend)
        combine_gradients(lists, ones(3), out=[torch.empty(500_000) for _ in range(8)])
    assert largest <= 500_000 * 8
