"""What only a GPU can show: bfloat16, no synchronisation, graphs, other devices, compilation."""

import pytest
import torch

from drivekd.functional import attention_map_loss
from tests.helpers.attention import Heads, make_case, run, run_twin
from tests.helpers.graphs import check_captured, loss_and_gradients
from tests.helpers.memory import EXTRA_PART, extra_bound

pytestmark = pytest.mark.gpu

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
UPSTREAM = 2.0**14  # a loss scale, for float16
# Beside twice the error of the naive way: what is left where that is exact by luck.
FLOOR = {torch.bfloat16: 1e-3, torch.float16: 2e-4}


def naive(case):
    """The eager way in the same dtype on the same device: maps of every head, autograd."""
    from drivekd.reference import attention_map as reference

    q, k = (x.to("cuda", case.dtype).requires_grad_() for x in case.student)
    (q_t, k_t), N = [x.to("cuda", case.dtype) for x in case.teachers[0]], q.shape[2]
    seen = torch.ones(N, N, dtype=torch.bool, device="cuda").tril()[None]
    gap = reference.attention_map(q, k, seen) - reference.attention_map(q_t, k_t, seen)
    loss = gap.float().square().sum() / (q.shape[0] * N * N)
    return loss, *torch.autograd.grad(UPSTREAM * loss, (q, k))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("dim", "num_tokens"),
    [(64, 127), (64, 768), (64, 2048), (80, 127), (96, 300), (128, 768), (256, 300)],
)
def test_gradients_err_at_most_twice_as_much_as_the_naive_way(dtype, dim, num_tokens):
    case = make_case(
        num_samples=1, num_tokens=num_tokens, dtype=dtype, student=Heads(14, 2, dim),
        teacher=Heads(28, 4, 128),
    )  # fmt: skip
    expected = run_twin(case, UPSTREAM)
    actual = run(case.but(backend="triton"), UPSTREAM, "cuda")
    plain = naive(case)
    assert abs(actual[0] - expected[0]) <= 1e-4 * expected[0]
    for got, other, want in zip(actual[1:], plain[1:], expected[1:], strict=True):
        error = (got.double() - want).norm() / want.norm()
        bound = (other.cpu().double() - want).norm() / want.norm()
        assert error <= 2 * bound + FLOOR[dtype], (error, bound)
        sizes = want.norm(dim=-1)
        rows = (got.double() - want).norm(dim=-1) / (sizes + 1e-2 * sizes.max())
        assert rows.max() <= 0.05, rows.max()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("padding", [None, "left"])
def test_bfloat16_matches_the_twin(loss, region, padding):
    case = make_case(
        num_samples=2, num_tokens=300, dtype=torch.bfloat16, student=Heads(14, 2, 64),
        teacher=Heads(28, 4, 128), loss=loss, region=region, padding=padding,
    )  # fmt: skip
    expected, actual = run_twin(case), run(case.but(backend="triton"), device="cuda")
    assert abs(actual[0] - expected[0]) <= 1e-3 * expected[0]
    for got, want in zip(actual[1:], expected[1:], strict=True):
        assert (got.double() - want).norm() <= 1e-2 * want.norm()


def call_of(case):
    q, k = (x.to("cuda", case.dtype).requires_grad_() for x in case.student)
    q_t, k_t = (x.to("cuda", case.dtype) for x in case.teachers[0])
    tokens = case.tokens.to("cuda")

    def call():
        loss = attention_map_loss(q, k, q_t, k_t, tokens, backend="triton", **case.settings)
        return loss_and_gradients(loss, (q, k))

    return call


@pytest.fixture
def as_in_production():
    """Without the deterministic mode of the other tests, which changes what torch launches."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_no_synchronisation_and_a_graph_replays_it(loss, region):
    case = make_case(num_tokens=200, dtype=torch.bfloat16, loss=loss, region=region, padding="left")
    check_captured(call_of(case))


@pytest.mark.several_gpus
def test_another_device_than_the_current_one():
    case = make_case(dtype=torch.float32)
    loss = run(case.but(backend="triton"), device="cuda:1")[0]
    assert abs(loss - run_twin(case)[0]) <= 5e-6 * loss


@pytest.mark.filterwarnings("ignore")  # torch's compiler warns about torch's own code
def test_under_autocast_and_compile():
    case = make_case(num_samples=1, num_tokens=100, dtype=torch.float32)
    q, k = (x.to("cuda", torch.float32).requires_grad_() for x in case.student)
    q_t, k_t = (x.to("cuda", torch.float32) for x in case.teachers[0])

    def call(q, k):
        return attention_map_loss(q, k, q_t, k_t, backend="triton")

    with torch.autocast("cuda", torch.bfloat16):
        loss = call(q, k)
    gradients = torch.autograd.grad(loss, (q, k))
    assert all(each.dtype == torch.float32 for each in gradients)
    compiled = torch.compile(call, fullgraph=True)
    torch.testing.assert_close(compiled(q, k), call(q, k), rtol=0, atol=0)


@pytest.mark.usefixtures("as_in_production")
@pytest.mark.parametrize("num_tokens", sorted(EXTRA_PART))
def test_extra_memory(num_tokens):
    """As much as test_triton_contracts.py counts without a GPU."""
    case = make_case(
        num_samples=1, num_tokens=num_tokens, dtype=torch.bfloat16, student=Heads(14, 2, 64),
        teacher=Heads(28, 4, 128),
    )  # fmt: skip
    call = call_of(case)
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    loss, dq, dk = call()
    torch.cuda.synchronize()
    results = sum(x.untyped_storage().nbytes() for x in (loss, dq, dk))
    extra = torch.cuda.max_memory_allocated() - before - results
    assert extra <= extra_bound(num_tokens), extra
