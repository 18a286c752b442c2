"""What the losses promise around autograd, kept by the triton backend (tests/unit has torch's)."""

import os

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from drivekd.functional import attention_map, attention_map_loss
from drivekd.tokens import TokenLayout
from tests.helpers.attention import Heads, make_case, run, run_twin

pytest.importorskip("triton")
pytest.importorskip("drivekd_kernels.launch")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
HALF = torch.float16
LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
SMALL = {"num_samples": 1, "num_tokens": 12, "student": Heads(2, 1, 16), "teacher": Heads(1, 1, 8)}

# The interpreter's own: masked cells may be inf - inf, and numpy would have it read scalars anew.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def tensors(case, dtype=torch.float32):
    """q, k of the student as leaves, q, k of the teacher, tokens."""
    student = [x.to(DEVICE, dtype, copy=True).requires_grad_() for x in case.student]
    teacher = [x.to(DEVICE, dtype) for x in case.teachers[0]]
    return *student, *teacher, case.tokens.to(DEVICE)


def test_autocast_casts_as_sdpa_does():
    """To float16 here: the interpreter has no bfloat16. Bodies run without autocast."""
    case = make_case(**SMALL, dtype=HALF)
    q, k, q_t, k_t, tokens = tensors(case)
    with torch.autocast(DEVICE, dtype=HALF):
        inside = attention_map_loss(1.001 * q, k, q_t, k_t, tokens, backend="triton")
        shown = attention_map(1.001 * q, k, tokens, backend="triton")
    outside = attention_map_loss(
        (1.001 * q).half(), k.half(), q_t.half(), k_t.half(), tokens, backend="triton"
    )
    assert inside.dtype == shown.dtype == torch.float32
    assert torch.equal(inside, outside)
    for got, want in zip(
        torch.autograd.grad(inside, (q, k)), torch.autograd.grad(outside, (q, k)), strict=True
    ):
        assert got.dtype == torch.float32
        assert torch.equal(got, want)


# torch.compile itself makes an instance of the Function, against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_compiles_without_a_graph_break(loss, region):
    case = make_case(**SMALL, dtype=torch.float32, loss=loss, region=region, padding="left")
    q, k, q_t, k_t, tokens = tensors(case)

    def step(q, k):
        settings = {**case.settings, "backend": "triton"}
        return attention_map_loss(1.0 * q, k.sin(), q_t, k_t, tokens, **settings) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (step, compiled):
        value = function(q, k)
        outputs.append((value, *torch.autograd.grad(value, (q, k))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(
    ("loss", "need", "masks", "lse"),
    [("mse", True, True, False), ("cosine", False, True, True), ("kl", True, False, False)],
)
def test_opcheck_of_the_loss(loss, need, masks, lse):
    case = make_case(**SMALL, padding="right")
    q, k, q_t, k_t, tokens = (x.detach() if torch.is_tensor(x) else x for x in tensors(case))
    layout = (tokens.valid, None, tokens.is_text, tokens.is_vision) if masks else (None,) * 4
    known = q.new_zeros(q.shape[:3]) if lse else None
    arguments = (
        [q, q], [k, k], [q_t.half()], [k_t.half()], [known, None], [None], [0, 0], [0, 1, 2],
        *layout, None, [0.5, 0.5], [0.3], [0, 3], True, loss, "official", [need, False],
        [need, True], "triton",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.drivekd.attention_map_loss.default, arguments)


def test_opcheck_of_the_map():
    q, k, *_ = (x.detach() for x in tensors(make_case(**SMALL))[:2])
    arguments = (q, k, None, None, None, True, 0, 0.5, "triton")
    torch.library.opcheck(torch.ops.drivekd.attention_map.default, arguments)


def test_second_derivatives_are_refused():
    q, k, q_t, k_t, _ = tensors(make_case(**SMALL))
    loss = attention_map_loss(q, k, q_t, k_t, backend="triton")
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_backward_may_run_twice_and_changes_nothing_saved():
    q, k, q_t, k_t, _ = tensors(make_case(**SMALL))
    loss = attention_map_loss(q, k, q_t, k_t, backend="triton")
    first = torch.autograd.grad(loss, q, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, q)[0])


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_float16_gradients_do_not_vanish(loss, region):
    """Each is below the smallest float16 before the loss scale; none is made of zeros."""
    case = make_case(
        **{**SMALL, "num_tokens": 130}, dtype=HALF, loss=loss, region=region, vision=(0.1, 0.7)
    ).but(backend="triton")
    upstream = 2.0**16
    _, *actual = run(case, upstream, DEVICE)
    _, *expected = run_twin(case, upstream)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == HALF
        assert (got.double() - want).norm() <= 4e-3 * want.norm()
        assert not (got[want.abs() > 1e-6] == 0).any()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("region", REGIONS)
def test_saved_for_backward_is_no_larger_than_queries_and_keys(loss, region):
    case = make_case(**{**SMALL, "num_tokens": 70}, loss=loss, region=region)
    q, k, q_t, k_t, tokens = tensors(case)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_map_loss(q, k, q_t, k_t, tokens, backend="triton", **case.settings)
    assert sum(saved) <= q.numel() + k.numel() + 16


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nothing", ["no vision", "no text", "all padding", "text before vision"])
def test_nothing_to_count_is_an_exact_zero_with_zero_gradients(loss, nothing):
    case = make_case(**{**SMALL, "num_samples": 2}, loss=loss, region="text_to_vision")
    shape = case.tokens.valid.shape
    valid, vision = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    if nothing == "no text":
        vision[:] = True
    elif nothing == "all padding":
        valid[:] = False
    elif nothing == "text before vision":
        vision[:, 7:] = True  # cells exist for mse's denominator, but every one of them is dead
    tokens = TokenLayout.from_masks(vision, valid=valid).to(DEVICE)
    q, k, q_t, k_t, _ = tensors(case)
    value = attention_map_loss(q, k, q_t, k_t, tokens, backend="triton", **case.settings)
    value.backward()
    assert value.item() == 0
    assert not q.grad.any()
    assert not k.grad.any()


@pytest.mark.parametrize(
    ("loss", "region", "garbage"),
    [
        *((loss, region, torch.nan) for loss in LOSSES for region in REGIONS),
        *(("mse", "full", garbage) for garbage in (torch.inf, 1e30)),
    ],
)
def test_what_stands_at_padding_does_not_matter(loss, region, garbage):
    case = make_case(
        **{**SMALL, "num_samples": 2, "num_tokens": 24}, loss=loss, region=region, padding="left",
        dtype=torch.float32,
    ).but(backend="triton")  # fmt: skip
    hidden = ~case.tokens.valid[:, None, :, None]
    spoilt = case.map_tensors(lambda x: x.masked_fill(hidden, garbage))
    for got, want in zip(run(spoilt, device=DEVICE), run(case, device=DEVICE), strict=True):
        assert torch.equal(got, want)
    for grad in run(spoilt, device=DEVICE)[1:]:
        assert not grad.masked_select(hidden).any()


ORDERS = {
    "transposed": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "contiguous": lambda x: x.contiguous(),
    "heads first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dims before tokens": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_gradients_come_back_in_the_memory_order_of_their_inputs(order, region, dtype):
    case = make_case(**{**SMALL, "num_samples": 2}, region=region)
    q, k, q_t, k_t, tokens = tensors(case, dtype)
    q, k = (ORDERS[order](x.detach()).requires_grad_() for x in (q, k))
    loss = attention_map_loss(q, k, q_t, k_t, tokens, region=region, backend="triton")
    for grad, leaf in zip(torch.autograd.grad(loss, (q, k)), (q, k), strict=True):
        assert grad.stride() == leaf.stride()


def test_debug_recomputes_some_rows_of_a_log_sum_exp(monkeypatch):
    monkeypatch.setenv("DRIVEKD_DEBUG", "1")
    q, k, q_t, k_t, tokens = tensors(make_case(**SMALL))
    seen = torch.ones(12, 12, dtype=torch.bool, device=DEVICE).tril()
    scores = q.detach() @ k.detach().mT * q.shape[-1] ** -0.5
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(dim=-1)
    attention_map_loss(q, k, q_t, k_t, tokens, lse_student=lse, backend="triton")
    with pytest.raises(ValueError, match=r"lse_student .* base 2"):
        attention_map_loss(q, k, q_t, k_t, tokens, lse_student=lse * 1.4427, backend="triton")
