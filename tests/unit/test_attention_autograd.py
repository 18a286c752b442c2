"""What the losses promise around autograd: exact gradients, memory, repeatability, compile."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from drivekd.functional import attention_map, attention_map_loss, layerwise_attention_map_loss
from drivekd.ops.attention_map import attention_map as map_op
from drivekd.ops.attention_map import attention_map_loss as loss_op
from tests.helpers.attention import Heads, make_case, run, run_twin
from tests.helpers.memory import LiveBytes

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)
BODIES = {torch.ops.drivekd.attention_map_loss.default: loss_op._init_fn}


@everything
def test_gradcheck(loss, region):
    case = make_case(
        num_tokens=7,
        student=Heads(2, 1, 3),
        teacher=Heads(2, 2, 2),
        padding="left",
        loss=loss,
        region=region,
    )
    q, k = (each.contiguous().requires_grad_() for each in case.student)

    def loss_of(q, k):
        return attention_map_loss(q, k, *case.teachers[0], case.tokens, **case.settings)

    assert torch.autograd.gradcheck(loss_of, (q, k))


@pytest.mark.parametrize(
    ("loss", "need", "masks"),
    [("mse", True, True), ("cosine", False, True), ("kl", True, False)],
)
def test_opcheck_of_the_loss(loss, need, masks):
    case = make_case(num_tokens=9, dtype=torch.float32, padding="right")
    q, k = (each.float() for each in case.student)
    q_t, k_t = (each.bfloat16() for each in case.teachers[0])
    tokens = case.tokens
    layout = (tokens.valid, None, tokens.is_text, tokens.is_vision) if masks else (None,) * 4
    arguments = (
        [q, q], [k, k], [q_t], [k_t], [None, None], [None], [0, 0], [0, 1, 2], *layout, None,
        [0.5, 0.5], [0.3], [0, 3], True, loss, "official", [need, False], [need, True], "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.drivekd.attention_map_loss.default, arguments)


def test_opcheck_of_the_map():
    q, k = (each.float() for each in make_case(num_tokens=9).student)
    arguments = (q, k, None, None, None, True, 0, 0.5, "torch")
    torch.library.opcheck(torch.ops.drivekd.attention_map.default, arguments)
    assert map_op(*arguments).shape == (2, 9, 9)


# torch.compile itself makes an instance of the Function, against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@everything
def test_compiles_without_a_graph_break(loss, region):
    case = make_case(dtype=torch.float32, loss=loss, region=region, padding="left")
    q, k = (each.float().contiguous().requires_grad_() for each in case.student)
    q_t, k_t = (each.float() for each in case.teachers[0])

    def step(q, k):
        return attention_map_loss(1.0 * q, k.sin(), q_t, k_t, case.tokens, **case.settings) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (step, compiled):
        value = function(q, k)
        outputs.append((value, *torch.autograd.grad(value, (q, k))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-12)


def test_second_derivatives_are_refused():
    case = make_case(num_tokens=5)
    q = case.student[0].clone().requires_grad_()
    loss = attention_map_loss(q, case.student[1], *case.teachers[0])
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(loss, q, create_graph=True)


def test_backward_may_run_twice_and_changes_nothing_saved():
    case = make_case()
    q = case.student[0].clone().requires_grad_()
    loss = attention_map_loss(q, case.student[1], *case.teachers[0])
    first = torch.autograd.grad(loss, q, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, q)[0]
    assert torch.equal(first, second)


@everything
@pytest.mark.parametrize("threads", [1, 2])
def test_bitwise_repeatable(loss, region, threads):
    case = make_case(dtype=torch.float32, loss=loss, region=region, num_tokens=130)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first, second = run(case), run(case)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("grad_mode", ["no_grad", "detached"])
def test_no_gradient_is_computed_when_nobody_asks(grad_mode, monkeypatch):
    from drivekd.ops.torch_backend import attention_map as backend

    def fail(*_, **__):
        raise AssertionError("gradient computed")

    monkeypatch.setattr(backend, "_student_gradient", fail)
    case = make_case()
    q, k = (each.clone().requires_grad_() for each in case.student)
    if grad_mode == "no_grad":
        with torch.no_grad():
            loss = attention_map_loss(q, k, *case.teachers[0])
    else:
        loss = attention_map_loss(q.detach(), k.detach(), *case.teachers[0])
    assert not loss.requires_grad


@everything
def test_saved_for_backward_is_no_larger_than_queries_and_keys(loss, region):
    case = make_case(num_samples=1, num_tokens=300, dtype=torch.float32, loss=loss, region=region)
    q, k = (each.float().requires_grad_() for each in case.student)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_map_loss(
            q, k, *(each.float() for each in case.teachers[0]), case.tokens, **case.settings
        )
    assert sum(saved) <= q.numel() + k.numel() + 16


@everything
@pytest.mark.parametrize("num_tokens", [600, 1500])
def test_no_tensor_is_as_large_as_one_map(loss, region, num_tokens):
    case = make_case(
        num_samples=1,
        num_tokens=num_tokens,
        dtype=torch.float32,
        student=Heads(14, 2, 16),
        teacher=Heads(12, 12, 24),
        num_teachers=2,
        loss=loss,
        region=region,
    )
    q, k = (each.float().requires_grad_() for each in case.student)
    q_t, k_t = ([each[i].float() for each in case.teachers] for i in range(2))
    with LiveBytes(BODIES) as memory:
        attention_map_loss(q, k, q_t, k_t, case.tokens, **case.settings)
    assert memory.largest < 4 * num_tokens**2


@pytest.mark.parametrize(("loss", "dtype"), [("mse", torch.float32), ("kl", torch.bfloat16)])
def test_extra_memory_at_4096_tokens_is_under_5_percent_of_one_stack(loss, dtype):
    """Beyond dq and dk (float32), with a group of two teachers; a stack is (H, N, N) float32."""
    num_tokens, heads = 4096, 14
    q, k = torch.randn(1, heads, num_tokens, 8), torch.randn(1, 2, num_tokens, 8)
    q_t, k_t = torch.randn(1, 12, num_tokens, 16), torch.randn(1, 12, num_tokens, 16)
    q, k = (each.to(dtype).requires_grad_() for each in (q, k))
    q_t, k_t = ([each.to(dtype)] * 2 for each in (q_t, k_t))
    with LiveBytes(BODIES) as memory:
        attention_map_loss(q, k, q_t, k_t, loss=loss)
    own = 4 * (q.numel() + k.numel())
    assert memory.peak - own < 0.05 * 4 * heads * num_tokens**2


def test_teacher_maps_of_a_sliding_group_are_freed():
    """24 teacher layers, groups of two: no more than two maps of a chunk are alive at once."""
    num_tokens = 1024
    layers = [(torch.randn(1, 2, num_tokens, 4), torch.randn(1, 1, num_tokens, 4))] * 25
    groups = [[i, i + 1] for i in range(24)]

    def peak(count):
        with LiveBytes(BODIES) as memory, torch.no_grad():
            layerwise_attention_map_loss(layers[:count], layers, groups[:count])
        return memory.peak

    assert peak(24) <= peak(2) + 4 * 24 * num_tokens * 2


def test_autocast_casts_as_sdpa_does():
    case = make_case(dtype=torch.bfloat16)
    q, k = (each.float().requires_grad_() for each in case.student)
    q_t, k_t = (each.float() for each in case.teachers[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_map_loss(1.001 * q, k, q_t, k_t, case.tokens)
        shown = attention_map(1.001 * q, k, case.tokens)
    outside = attention_map_loss(
        (1.001 * q).bfloat16(), k.bfloat16(), q_t.bfloat16(), k_t.bfloat16(), case.tokens
    )
    assert inside.dtype == shown.dtype == torch.float32  # the body itself runs without autocast
    assert torch.equal(inside, outside)
    for a, b in zip(
        torch.autograd.grad(inside, (q, k)), torch.autograd.grad(outside, (q, k)), strict=True
    ):
        assert a.dtype == torch.float32
        assert torch.equal(a, b)


def test_autocast_leaves_float64_alone():
    case = make_case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(case)
    for got, want in zip(actual, run_twin(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-16)


def test_large_upstream_gradients_do_not_overflow_before_the_cast():
    """A loss scaler multiplies by 65536 before float16 gradients are cast, not after."""
    case = make_case(dtype=torch.float16, num_samples=1, num_tokens=200)
    _, dq, _ = run(case, upstream=1.0)
    _, scaled, _ = run(case, upstream=2.0**16)
    assert (dq == 0).float().mean() > 0.1  # below float16's range without the scaler
    assert (scaled == 0).float().mean() < 0.05
