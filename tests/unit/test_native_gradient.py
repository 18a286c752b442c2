"""The compiled backend: every instruction set, conversions bit by bit, threads, its own checks."""

import math

import pytest
import torch

from drivekd.doctor import diagnose
from drivekd.functional.gradient import combine_gradients, gradient_gram
from drivekd.ops.dispatch import resolve, unavailable_reason
from drivekd.reference import agp as reference
from tests.helpers.gradients import PRESENCE, relative_error, task_gradients

REASON = unavailable_reason("native")
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"{REASON}")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ISAS = {"base": 0, "avx2": 1, "avx512": 2}


def limit_isa(level):
    return torch.ops.drivekd_native.limit_isa(level)


@pytest.fixture(params=ISAS)
def isa(request):
    if limit_isa(ISAS[request.param]) != ISAS[request.param]:
        limit_isa(2)
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    limit_isa(2)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_doctor_names_the_instruction_set_in_use(isa):
    name = {"base": "generic", "avx2": "AVX2", "avx512": "AVX-512"}[isa]
    assert diagnose().extension["isa"] == name


def test_auto_picks_it_on_the_cpu(monkeypatch):
    monkeypatch.delenv("DRIVEKD_BACKEND", raising=False)
    for op in ("gradient_gram", "combine_gradients"):
        for dtype in DTYPES:
            assert resolve(op, "auto", device=torch.device("cpu"), dtype=dtype) == "native"


@pytest.mark.parametrize("num_tasks", (*range(1, 9), 11))
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_matches_the_reference(isa, dtype, num_tasks):
    """Sizes around every vector width and chunk, from unaligned addresses too."""
    shapes = [(n,) for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65, 127, 16383, 16385)]
    lists = task_gradients(num_tasks, shapes=shapes, presence=("1" * 11,), dtype=dtype)
    offset = [[torch.cat([g[:1], g])[1:] for g in own] for own in lists]
    weights = torch.linspace(-1, 2, num_tasks, dtype=torch.float64)
    expected = reference.combine(lists, weights.tolist())
    gram = reference.gram(lists)
    size = torch.outer(gram.diagonal().sqrt(), gram.diagonal().sqrt())
    for own in (lists, offset):
        got = gradient_gram(own, backend="native").total
        # A lane adds up to 8192 products one by one in float64 (1e-14, seen 2e-14); bf16 starts
        # with float32 sums of at most 16 exact products.
        bound = 1e-7 if dtype == torch.bfloat16 else 1e-13
        assert float(((got - gram).abs() / size).max()) < bound
        result = combine_gradients(own, weights, backend="native")
        rounded = [x.to(dtype) for x in expected]
        bound = {torch.float64: 1e-14, torch.float32: 1e-7}.get(dtype, 1e-2)
        assert relative_error(result, rounded) < bound


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_all_16_bit_values_are_read_exactly(isa, dtype):
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    other = torch.ones_like(values)
    total = combine_gradients([[values], [other]], torch.tensor([1.0, 0.0]), backend="native")[0]
    same = (total == values) | (total.isnan() & values.isnan())
    assert bool(same.all())
    # Of one size, so that no value hides behind another; squares must fit into float32.
    for exponent in (-9.0, -3.0, 0.0, 3.0, 9.0):
        near = values[(values.float().abs() / 10**exponent - 1).abs() < 0.9]
        lists = [[near], [torch.ones_like(near)]]
        gram = gradient_gram(lists, backend="native").total
        want = reference.gram(lists)
        torch.testing.assert_close(gram[0, 0], want[0, 0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounding_is_to_nearest_even_as_in_torch(isa, dtype):
    """Ties, both neighbours of ties, subnormals, overflow and NaN, against torch's conversion."""
    bits = torch.randint(0, 2**16, (20_000,), dtype=torch.int32).to(torch.int16)
    grid = bits.view(torch.float16 if dtype == torch.float16 else torch.bfloat16).double()
    step = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    special = torch.tensor([0.0, 65519.9, 65520.0, 1e30, 2.9e-8, 3.1e-8, 6e-8, 1e-41, math.nan])
    for factor in (1.0, 1 + step, 1 + 1.01 * step, 1 + 0.99 * step):
        values = torch.cat([grid * factor, special.double(), -special.double()]).float()
        # Two terms whose exact sum is not on the grid of the dtype.
        high = values.to(dtype)
        low = (values - high.float()).to(dtype)
        got = combine_gradients([[high], [low]], torch.ones(2), backend="native")[0]
        want = (high.double() + low.double()).float().to(dtype)
        same = (got == want) | (got.isnan() & want.isnan())
        assert bool(same.all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bitwise_the_same_for_any_number_of_threads(dtype, threads):
    shapes = [(n,) for n in (200_000, 3, 50_001, 16384, 1, 99_999)]
    lists = task_gradients(shapes=shapes, presence=PRESENCE["nested followers"], dtype=dtype)
    weights = torch.tensor([1.0, -0.3, 2.0, 0.1])
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        for _ in range(2):
            gram = gradient_gram(lists, backend="native").values
            results.append([gram, *combine_gradients(lists, weights, backend="native")])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def native_gram(grads, tasks=(0, 1), offsets=(0, 2), rows=(0,), num_tasks=2, num_rows=1):
    return torch.ops.drivekd_native.gram(grads, tasks, offsets, rows, num_tasks, num_rows)


BAD_LISTS = {
    "no gradients": ([], (), (0,), ()),
    "a task too few": ([torch.ones(2), torch.ones(2)], (0,)),
    "a task out of range": ([torch.ones(2), torch.ones(2)], (0, 2)),
    "a negative task": ([torch.ones(2), torch.ones(2)], (-1, 0)),
    "offsets that start late": ([torch.ones(2), torch.ones(2)], (0, 1), (1, 2)),
    "offsets that end early": ([torch.ones(2), torch.ones(2)], (0, 1), (0, 1)),
    "offsets that go back": ([torch.ones(2), torch.ones(2)], (0, 1), (0, 3, 2), (0, 0)),
    "a row out of range": ([torch.ones(2), torch.ones(2)], (0, 1), (0, 2), (1,)),
    "sizes that differ": ([torch.ones(2), torch.ones(3)],),
    "dtypes that differ": ([torch.ones(2), torch.ones(2).double()],),
    "integers": ([torch.ones(2, dtype=torch.int32), torch.ones(2, dtype=torch.int32)],),
}


@pytest.mark.parametrize("arguments", BAD_LISTS.values(), ids=BAD_LISTS)
def test_the_extension_checks_what_it_is_given(arguments):
    with pytest.raises((RuntimeError, NotImplementedError)):
        native_gram(*arguments)


@pytest.mark.parametrize(
    "out, weights",
    [
        ([], torch.ones(1, 2).double()),
        ([torch.ones(3)], torch.ones(1, 2).double()),
        ([torch.ones(2).double()], torch.ones(1, 2).double()),
        ([torch.ones(2)], torch.ones(1, 2)),
        ([torch.ones(2)], torch.ones(2).double()),
        ([torch.ones(2)], torch.ones(1, 4).double()[:, ::2]),
    ],
    ids=["none", "size", "dtype", "float32 weights", "1-d weights", "strided weights"],
)
def test_the_extension_checks_outputs_and_weights(out, weights):
    grads = [torch.ones(2), torch.ones(2)]
    with pytest.raises(RuntimeError):
        torch.ops.drivekd_native.combine(out, grads, (0, 1), (0, 2), (0,), weights, False)
