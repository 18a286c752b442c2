"""The triton backend against the float64 twin: values, gradients, every row of them."""

import os

import pytest
import torch

from drivekd.functional import attention_map, attention_map_loss, layerwise_attention_map_loss
from drivekd.reference import attention_map as reference
from tests.helpers.attention import Heads, assert_close, make_case, run, run_twin

triton = pytest.importorskip("triton")
specialize = pytest.importorskip("drivekd_kernels.specialize")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1", allow_module_level=True)
HALF = torch.float16
LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)

# The interpreter's own: masked cells may be inf - inf, and numpy would have it read scalars anew.
pytestmark = [
    pytest.mark.usefixtures("few_programs"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]


def assert_triton_matches(case, bounds=None):
    """A float16 gradient needs a loss scale as in training: its smallest number is 6e-8."""
    upstream = 1.7 * 2**14 if case.dtype == HALF else 1.7
    actual = run(case.but(backend="triton"), upstream, DEVICE)
    assert_close(actual, run_twin(case, upstream), case.dtype, bounds)


@everything
@pytest.mark.parametrize("num_tokens", [1, 63, 129])
def test_odd_lengths(loss, region, num_tokens):
    case = make_case(
        num_samples=1, num_tokens=num_tokens, dtype=HALF, student=Heads(3, 1, 16),
        teacher=Heads(2, 1, 24), loss=loss, region=region,
    )  # fmt: skip
    assert_triton_matches(case)


@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize("region", REGIONS)
def test_more_rows_and_keys_than_a_tile_holds(dtype, region):
    case = make_case(
        num_samples=1, num_tokens=257, dtype=dtype, student=Heads(2, 1, 16),
        teacher=Heads(1, 1, 16), region=region,
    )  # fmt: skip
    assert_triton_matches(case)


@pytest.mark.parametrize(
    ("student", "teacher", "loss"),
    [
        (Heads(1, 1, 16), Heads(3, 3, 40), "cosine"),
        (Heads(7, 1, 64), Heads(1, 1, 16), "mse"),
        (Heads(14, 2, 80), Heads(4, 2, 96), "kl"),
        (Heads(3, 3, 96), Heads(2, 1, 128), "mse"),
        (Heads(2, 2, 128), Heads(2, 2, 1), "kl"),
        (Heads(2, 1, 256), Heads(1, 1, 8), "mse"),
    ],
)
def test_head_counts_and_dims_may_differ(student, teacher, loss):
    case = make_case(
        num_samples=1, num_tokens=67, dtype=HALF, student=student, teacher=teacher, loss=loss,
    )  # fmt: skip
    assert_triton_matches(case)


@everything
@pytest.mark.parametrize(
    ("padding", "segments", "window", "causal"),
    [("left", None, None, True), ("right", 3, None, True), ("left", 2, 5, False),
     (None, 3, 9, True), (None, None, 7, False)],
)  # fmt: skip
def test_padding_packing_and_windows(loss, region, padding, segments, window, causal):
    case = make_case(
        num_samples=2, num_tokens=45, dtype=torch.float32, student=Heads(2, 1, 16),
        teacher=Heads(1, 1, 16), padding=padding, segments=segments, window=window, causal=causal,
        weighted=True, loss=loss, region=region, vision=(0.05, 0.5),
    )  # fmt: skip
    assert_triton_matches(case)


def test_segments_and_padding_with_gaps():
    """Tokens of one segment need not stand together; tiles inside their range have foreign keys."""
    from drivekd.tokens import TokenLayout

    case = make_case(
        num_samples=1, num_tokens=150, dtype=HALF, student=Heads(2, 1, 16), teacher=Heads(1, 1, 16)
    )
    valid = torch.ones(1, 150, dtype=torch.bool)
    valid[:, 5:9] = valid[:, 70:100] = False
    segment_ids = torch.arange(150)[None] // 11 % 2
    is_vision = torch.zeros_like(valid)
    tokens = TokenLayout.from_masks(is_vision, valid=valid, segment_ids=segment_ids)
    assert_triton_matches(case.with_tokens(tokens))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_row_of_the_region(loss):
    case = make_case(
        num_tokens=20, dtype=HALF, loss=loss, region="text_to_vision", vision=(0.5, 0.5)
    )
    loss_value, dq, dk = run(case.but(backend="triton"), device=DEVICE)
    assert loss_value == 0 and not dq.any() and not dk.any()


@everything
def test_many_chunks_agree_with_one(loss, region, monkeypatch):
    from drivekd.ops.triton_backend import chunks

    case = make_case(
        num_samples=2, num_tokens=150, dtype=HALF, student=Heads(2, 1, 16), teacher=Heads(1, 1, 16),
        padding="left", loss=loss, region=region,
    )  # fmt: skip
    for name, value in (("MIN_ROWS", 64), ("CHUNK_BYTES", 1)):
        monkeypatch.setattr(chunks, name, value)
    assert_triton_matches(case)


@pytest.mark.parametrize(("pack", "group"), [(2, 2), (2, 3), (4, 7)])
def test_packed_query_heads(pack, group, monkeypatch):
    retile(monkeypatch, pack=pack)
    case = make_case(
        num_samples=1, num_tokens=70, dtype=HALF, student=Heads(2 * group, 2, 16),
        teacher=Heads(1, 1, 16),
    )  # fmt: skip
    assert_triton_matches(case)


@pytest.mark.interpreter  # test_triton_gpu.py has bfloat16 itself
@pytest.mark.parametrize(("head_dim", "padding"), [(64, "left"), (80, None), (128, "right")])
def test_tiles_and_w_of_bfloat16_models(head_dim, padding, monkeypatch):
    """The interpreter multiplies no bfloat16; float32 models take all else of such models here.

    W is rounded, by up to 2^-9 of each cell; gradients are sums of W - delta, which is smaller.
    """
    from drivekd.ops.triton_backend import attention_map as backend

    case = make_case(
        num_samples=1, num_tokens=150, dtype=torch.float32, student=Heads(3, 1, head_dim),
        teacher=Heads(2, 1, head_dim), padding=padding,
    ).but(backend="triton")  # fmt: skip
    exact = run(case, 1.7, DEVICE)
    tiles, w = specialize.tiles, backend._Workspace.w
    monkeypatch.setattr(
        specialize, "tiles", lambda kernel, arch, dtype, *dims, **variant: tiles(
            kernel, arch, "bfloat16", *dims, **variant
        ),
    )  # fmt: skip
    like = torch.empty(0, dtype=torch.bfloat16)
    monkeypatch.setattr(backend._Workspace, "w", lambda self, chunk, _: w(self, chunk, like))
    rounded = run(case, 1.7, DEVICE)
    assert torch.allclose(exact[0], rounded[0], rtol=1e-5, atol=0)
    for got, want in zip(rounded[1:], exact[1:], strict=True):
        error = (got - want).norm() / want.norm()
        assert 1e-5 < error < 2**-7, error


@pytest.mark.parametrize("single", [True, False])
@everything
def test_dq_in_one_pass_and_in_two(loss, region, single, monkeypatch):
    monkeypatch.setattr(specialize, "one_pass", lambda query: single)
    case = make_case(
        num_samples=1, num_tokens=70, dtype=torch.float32, student=Heads(2, 1, 16),
        teacher=Heads(1, 1, 16), padding="left", loss=loss, region=region,
    )  # fmt: skip
    assert_triton_matches(case)


@pytest.mark.parametrize("loss", LOSSES)
def test_groups_of_teachers(loss):
    """Two student layers, overlapping groups, one of them with a repeated member."""
    torch.manual_seed(1)
    student = [tuple(torch.randn(1, 2, 40, 16) for _ in range(2)) for _ in range(3)]
    teacher = [tuple(torch.randn(1, 3, 40, 8) for _ in range(2)) for _ in range(4)]
    groups = [[0, 1, 2], [1, 2, 3], [3, 3, 0]]
    lists = {}
    for backend, dtype in (("torch", torch.float64), ("triton", torch.float32)):
        q_k = [tuple(x.to(DEVICE, dtype).requires_grad_() for x in pair) for pair in student]
        losses = layerwise_attention_map_loss(
            q_k,
            [tuple(x.to(DEVICE, dtype) for x in pair) for pair in teacher],
            groups,
            loss=loss,
            reduction="none",
            window=[None, 7, None],
            backend=backend,
        )
        losses.sum().backward()
        lists[backend] = [losses.detach(), *(x.grad for pair in q_k for x in pair)]
    for got, want in zip(lists["triton"], lists["torch"], strict=True):
        assert (got.double() - want).norm() <= 2e-5 * want.norm()


@pytest.mark.parametrize("given", ["student", "teacher"])
def test_a_given_log_sum_exp_is_used(given):
    case = make_case(num_samples=1, num_tokens=40, dtype=torch.float32)
    q, k = case.student if given == "student" else case.teachers[0]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~torch.ones(40, 40).tril().bool(), -1e9)
    lse = scores.logsumexp(dim=-1).float().to(DEVICE)
    lse = {"lse_student": lse} if given == "student" else {"lse_teacher": [lse]}
    actual = run(case.but(backend="triton", **lse), device=DEVICE)
    assert_close(actual, run_twin(case), case.dtype)
    wrong = {name: [v[0] + 1] if isinstance(v, list) else v + 1 for name, v in lse.items()}
    assert abs(run(case.but(backend="triton", **wrong), device=DEVICE)[0] - actual[0]) > 0


@pytest.mark.parametrize("needed", ["q", "k", "none"])
def test_only_the_gradients_that_are_needed(needed):
    case = make_case(num_samples=1, num_tokens=40, dtype=torch.float32)
    expected = run_twin(case)
    q, k = (x.to(DEVICE, torch.float32) for x in case.student)
    q.requires_grad_(needed == "q")
    k.requires_grad_(needed == "k")
    q_t, k_t = (x.to(DEVICE, torch.float32) for x in case.teachers[0])
    loss = attention_map_loss(q, k, q_t, k_t, case.tokens.to(DEVICE), backend="triton")
    assert abs(loss.item() - expected[0].item()) <= 5e-6 * expected[0].item()
    if needed != "none":
        (grad,) = torch.autograd.grad(1.7 * loss, q if needed == "q" else k)
        want = expected[1 if needed == "q" else 2]
        assert (grad.cpu().double() - want).norm() <= 2e-5 * want.norm()


def test_any_memory_order():
    case = make_case(num_samples=2, num_tokens=33, dtype=torch.float32, num_teachers=1)
    expected = run(case.but(backend="triton"), device=DEVICE)

    def odd(x):  # heads, samples, dims, tokens: no dimension where it was
        return x.permute(1, 0, 3, 2).contiguous().permute(1, 0, 3, 2)

    moved = case.map_tensors(odd)
    assert moved.student[0].stride(-1) != 1
    for got, want in zip(run(moved.but(backend="triton"), device=DEVICE), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("padding", "segments", "window"), [("left", 2, None), (None, None, 5)])
def test_the_whole_map(padding, segments, window):
    case = make_case(num_tokens=70, dtype=HALF, padding=padding, segments=segments)
    q, k = case.student
    seen = reference.visible_cells(
        70, valid=case.tokens.valid, segment_ids=case.tokens.segment_ids, window=window
    )
    got = attention_map(
        q.to(DEVICE, HALF), k.to(DEVICE, HALF), case.tokens.to(DEVICE), window=window,
        backend="triton",
    )  # fmt: skip
    want = reference.attention_map(q, k, seen)
    assert (got.cpu().double() - want).abs().max() <= 1e-6


def test_probabilities_that_underflow_reach_the_kl_gradient():
    """Exponents of several hundred carry 2e-5 of rounding, more where a row's terms cancel."""
    case = make_case(num_samples=1, num_tokens=40, dtype=torch.float32, spread=9.0, loss="kl")
    assert_triton_matches(case, bounds=(5e-6, 1e-4, 5e-4))


def test_repeated_calls_are_bitwise_equal():
    case = make_case(num_samples=2, num_tokens=70, dtype=HALF).but(backend="triton")
    first, second = run(case, device=DEVICE), run(case, device=DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.interpreter
def test_the_interpreter_refuses_bfloat16():
    q = torch.randn(1, 1, 4, 16, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match="bfloat16"):
        attention_map(q, q, backend="triton")


def retile(monkeypatch, **sizes):
    """Other tile sizes for every pass."""
    from dataclasses import replace

    original = specialize.tiles
    monkeypatch.setattr(
        specialize, "tiles", lambda *key, **variant: replace(original(*key, **variant), **sizes)
    )
