"""What only a GPU can show of the gradient kernels: no sync, graphs, streams, sizes beyond 2^31."""

import pytest
import torch

from drivekd.functional import combine_gradients, gradient_gram
from drivekd.ops.dispatch import resolve
from drivekd.projection import agp_weights
from drivekd.reference import agp as reference
from tests.helpers.gradients import native_on_gpu, near_antiparallel, relative_error, task_gradients

pytestmark = pytest.mark.gpu

WEIGHTS = (1.0, -0.3, 2.0, 0.5)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 4096, 32_768, 32_769, 1_000_003, 3_000_000)
SHAPES = (*((size,) for size in SIZES), (896, 4864), ())


both = pytest.mark.parametrize(
    "backend",
    [
        "triton",
        pytest.param(
            "native", marks=pytest.mark.skipif(not native_on_gpu(), reason="built without CUDA")
        ),
    ],
)


def on_gpu(lists):
    return [[None if grad is None else grad.cuda() for grad in own] for own in lists]


def weights_on_gpu(values=WEIGHTS):
    return torch.tensor(values, dtype=torch.float64, device="cuda")


def step(lists, backend, out=None):
    gram = gradient_gram(lists, backend=backend)
    return gram.values, *combine_gradients(lists, agp_weights(gram), out=out, backend=backend)


def test_auto_follows_the_table():
    for op in ("gradient_gram", "combine_gradients"):
        for dtype in DTYPES:
            assert resolve(op, "auto", device=torch.device("cuda"), dtype=dtype) == "triton"


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tasks", [1, 4, 8])
def test_large_ragged_lists_match_the_twin(backend, dtype, num_tasks):
    presence = ("1" * 8, "10111111", "1" * 8, "11011011")
    lists = task_gradients(num_tasks, shapes=SHAPES, dtype=dtype, presence=presence)
    own = on_gpu(lists)
    want = reference.gram(lists)
    norms = want.diagonal().sqrt()
    got = gradient_gram(own, backend=backend).total.cpu()
    bound = 1e-7 if dtype == torch.bfloat16 else 1e-13
    assert float(((got - want).abs() / torch.outer(norms, norms)).max()) < bound
    # Simple fractions would make many exact ties, which the last bit of a float64 sum decides.
    weights = torch.randn(num_tasks, dtype=torch.float64)
    result = combine_gradients(own, weights.cuda(), backend=backend)
    plain = combine_gradients(lists, weights, backend="torch")
    for x, y in zip(result, plain, strict=True):
        differ = float((x.cpu() != y).double().mean())
        assert differ <= (1.0 if dtype == torch.float64 else 1e-5), differ
        torch.testing.assert_close(x.cpu(), y, rtol=2e-2 if x.itemsize == 2 else 1e-6, atol=1e-7)


@both
@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("epsilon", [0.1, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)])
def test_near_antiparallel_gradients_do_not_blow_up(backend, dtype, bound, scale, epsilon):
    lists = near_antiparallel(scale, epsilon, dtype, size=1_000_003)
    _, *update = step(on_gpu(lists), backend)
    assert relative_error([x.cpu() for x in update], reference.agp(lists)) < bound


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_all_16_bit_values_are_read_and_rounded_as_torch_does(backend, dtype):
    """Every value; and sums on ties, beside ties, subnormal, infinite, NaN."""
    values = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).cuda()
    got = combine_gradients(
        [[values], [torch.ones_like(values)]], weights_on_gpu((1.0, 0.0)), backend=backend
    )[0]
    assert bool(((got == values) | (got.isnan() & values.isnan())).all())
    step_size = {torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for factor in (1.0, 1 + step_size, 1 + 1.01 * step_size, 1 + 0.99 * step_size):
        wanted = (values.double() * factor).float()
        high = wanted.to(dtype)
        low = (wanted - high.float()).to(dtype)
        got = combine_gradients([[high], [low]], weights_on_gpu((1.0, 1.0)), backend=backend)[0]
        want = (high.double() + low.double()).float().to(dtype)
        assert bool(((got == want) | (got.isnan() & want.isnan())).all())


@both
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 2, 4])
def test_unaligned_tensors(backend, dtype, offset):
    """Views into one bucket, as data parallelism makes them; one of them is aligned."""
    lists = task_gradients(3, shapes=[(70_001,), (33, 65)], dtype=dtype)
    moved = []
    for own in lists:
        bucket = torch.cat([own[0][:offset], *(x.reshape(-1) for x in own)]).cuda()
        first = bucket[offset : offset + 70_001]
        moved.append([first, bucket[offset + 70_001 :].view(33, 65)])
    moved[0][0] = lists[0][0].cuda()
    want = gradient_gram(lists, backend="torch").total
    got = gradient_gram(moved, backend=backend).total.cpu()
    assert float((got - want).abs().max() / want.diagonal().max()) < 1e-7
    weights = torch.randn(3, dtype=torch.float64)
    plain = combine_gradients(lists, weights, backend="torch")
    out = [torch.zeros(70_002, dtype=dtype, device="cuda")[1:], None]
    result = combine_gradients(moved, weights.cuda(), out=out, backend=backend)
    assert result[0] is out[0]
    for x, y in zip(result, plain, strict=True):
        torch.testing.assert_close(x.cpu(), y, rtol=2e-2 if x.itemsize == 2 else 1e-6, atol=1e-7)


@both
def test_no_synchronisation_and_a_graph_replays_it(backend):
    lists = on_gpu(task_gradients(shapes=SHAPES, presence=("1111", "1011"), dtype=torch.bfloat16))
    out = [torch.empty_like(x) for x in lists[0]]
    first = [x.clone() for x in step(lists, backend, out)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(lists, backend, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    second = [x.clone() for x in step(lists, backend, out)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(lists, backend, out)
    # Whoever takes pinned memory now must not write into what the graph copies from.
    noise = [torch.full((n,), -1).pin_memory() for n in (1 << 10, 1 << 12, 1 << 14, 1 << 16)]
    for x in out:
        x.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert noise
    for a, b, c in zip(first, second, captured, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)  # bitwise repeatable, too


@both
def test_calls_in_flight_do_not_share_a_table(backend):
    """Tables of many calls are queued before the first of them has run."""
    cases = [
        task_gradients(2, shapes=[(n,), (n + 3,)], dtype=torch.float32, seed=n)
        for n in range(1000, 1040)
    ]
    wanted = [gradient_gram(case, backend="torch").values for case in cases]
    cases = [on_gpu(case) for case in cases]
    torch.cuda.synchronize()
    torch.cuda._sleep(50_000_000)
    results = [gradient_gram(case, backend=backend).values for case in cases]
    for got, want in zip(results, wanted, strict=True):
        torch.testing.assert_close(got.cpu(), want, rtol=1e-12, atol=1e-9)


@both
def test_another_stream(backend):
    lists = on_gpu(task_gradients(shapes=SHAPES[:4], dtype=torch.float32))
    want = step(lists, backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = step(lists, backend)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.several_gpus
@both
def test_another_device_than_the_current_one(backend):
    lists = on_gpu(task_gradients(shapes=SHAPES[:4], dtype=torch.float32))
    want = step(lists, backend)
    got = step([[x.to("cuda:1") for x in own] for own in lists], backend)
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want, strict=True))


@both
def test_a_tensor_of_more_than_2_31_elements(backend):
    size = 2**31 + 70_001
    if torch.cuda.mem_get_info()[0] < 4 * size * 2:
        pytest.skip("needs 20 GB of GPU memory")
    grad = torch.full((size,), 0.5, dtype=torch.bfloat16, device="cuda")
    grad[-1] = 3.0
    total = gradient_gram([[grad]], backend=backend).total
    assert float(total) == 0.25 * (size - 1) + 9.0
    (result,) = combine_gradients([[grad]], weights_on_gpu((2.0,)), out=[grad], backend=backend)
    assert float(result[0]) == 1.0 and float(result[-1]) == 6.0 and float(result[-2]) == 1.0


def test_extra_memory_is_a_table_and_partial_results():
    lists = [[torch.ones(4_000_000, device="cuda") for _ in range(8)] for _ in range(4)]
    out = [torch.empty_like(x) for x in lists[0]]
    step(lists, "triton", out)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step(lists, "triton", out)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2**20


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_backends_agree(dtype):
    if not native_on_gpu():
        pytest.skip("built without CUDA")
    lists = on_gpu(task_gradients(shapes=SHAPES, dtype=dtype, presence=("1111", "0111")))
    grams = [gradient_gram(lists, backend=name).values for name in ("triton", "native")]
    torch.testing.assert_close(*grams, rtol=1e-7, atol=1e-3)
