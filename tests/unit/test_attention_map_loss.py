"""Values and gradients of the attention-map losses against their float64 twin."""

import pytest
import torch

from drivekd.functional import attention_map, attention_map_loss, layerwise_attention_map_loss
from drivekd.reference import attention_map as reference
from drivekd.tokens import TokenLayout
from tests.helpers.attention import Heads, assert_matches_twin, make_case, run, run_twin
from tests.helpers.host_reads import NoHostRead

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)


@everything
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 127, 129, 257])
def test_odd_lengths(loss, region, dtype, num_tokens):
    case = make_case(num_tokens=num_tokens, dtype=dtype, loss=loss, region=region)
    assert_matches_twin(case)


@everything
@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        (Heads(1, 1, 16), Heads(3, 3, 40)),
        (Heads(3, 3, 40), Heads(14, 2, 128)),
        (Heads(7, 1, 64), Heads(1, 1, 16)),
        (Heads(14, 7, 80), Heads(4, 2, 96)),
        (Heads(14, 2, 96), Heads(28, 4, 128)),
        (Heads(2, 1, 256), Heads(2, 2, 1)),
    ],
)
def test_head_counts_and_dims_may_differ(loss, region, student, teacher):
    case = make_case(
        student=student,
        teacher=teacher,
        dtype=torch.float32,
        num_samples=1,
        num_tokens=67,
        loss=loss,
        region=region,
    )
    assert_matches_twin(case)


@everything
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("segments", [None, 3])
@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("causal", [True, False])
def test_padding_packing_and_windows(loss, region, padding, segments, window, causal):
    case = make_case(
        num_samples=3,
        padding=padding,
        segments=segments,
        window=window,
        causal=causal,
        weighted=True,
        loss=loss,
        region=region,
        vision=(0.05, 0.5),
    )
    assert_matches_twin(case)


@everything
@pytest.mark.parametrize("padding", ["left", "right"])
def test_many_chunks_of_rows_agree_with_one(loss, region, padding, monkeypatch):
    from drivekd.ops.torch_backend import attention_chunks, head_mean

    case = make_case(num_samples=3, num_tokens=97, padding=padding, loss=loss, region=region)
    case = case.but(window=41)
    whole = run(case)
    monkeypatch.setitem(attention_chunks._STACK_BYTES, "cpu", 1)
    monkeypatch.setitem(head_mean._BLOCK_BYTES, "cpu", 1)
    assert_matches_twin(case)
    for a, b in zip(whole, run(case), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-15)


@everything
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(("segments", "window"), [(None, None), (3, None), (None, 5), (2, 7)])
def test_the_path_of_other_devices_agrees_and_reads_nothing_back(
    loss, region, padding, segments, window, monkeypatch
):
    """On a GPU nothing is read back; here the same path runs on the CPU, under a guard."""
    from drivekd.ops.attention_map import attention_map_loss as op
    from drivekd.ops.torch_backend import attention_chunks

    monkeypatch.setattr(attention_chunks, "READABLE", frozenset())
    case = make_case(
        padding=padding, segments=segments, window=window, loss=loss, region=region, weighted=True
    )
    assert_matches_twin(case)
    inside = case.tokens if region == "text_to_vision" else None
    (q, k), (q_t, k_t) = case.student, case.teachers[0]
    with NoHostRead():
        op._init_fn(
            [q], [k], [q_t], [k_t], [None], [None], [0], [0, 1], case.tokens.valid,
            case.tokens.segment_ids, inside and inside.is_text, inside and inside.is_vision,
            case.sample_weight, [0.3], [0.3], [window or 0], True, loss, "official", [True], [True],
            "torch",
        )  # fmt: skip


@pytest.mark.parametrize("denominator", ["official", "live"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("segments", [None, 2])
def test_mse_denominators(denominator, region, segments):
    case = make_case(
        denominator=denominator, region=region, segments=segments, padding="left", window=9
    )
    assert_matches_twin(case)


def test_official_counts_dead_cells_and_live_does_not():
    case = make_case(num_samples=1, num_tokens=20)
    official, live = (run(case.but(denominator=each))[0] for each in ("official", "live"))
    torch.testing.assert_close(official * 400, live * 210)


@everything
def test_target_is_the_mean_of_a_group_of_teachers(loss, region):
    assert_matches_twin(make_case(num_teachers=3, loss=loss, region=region, padding="right"))


@everything
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_gradients_do_not_vanish(loss, region, dtype):
    case = make_case(
        dtype=dtype, loss=loss, region=region, num_samples=1, num_tokens=300, vision=(0.1, 0.7)
    )
    # float16's smallest number is 6e-8 and these gradients are below: what a loss scaler is for.
    loss_value, *actual = run(case, upstream=2.0**16)
    twin, *expected = run_twin(case, upstream=2.0**16)
    torch.testing.assert_close(loss_value.double(), twin, rtol=5e-6, atol=0)
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - want).norm() <= 4e-3 * want.norm()


def test_student_and_teacher_may_differ_in_dtype():
    case = make_case(dtype=torch.bfloat16)
    (q, k), (q_t, k_t) = case.student, case.teachers[0]
    loss = attention_map_loss(q.float(), k.float(), q_t.bfloat16(), k_t.bfloat16())
    torch.testing.assert_close(loss.double(), run_twin(case)[0], rtol=5e-6, atol=0)


@everything
def test_given_lse_changes_nothing(loss, region):
    case = make_case(padding="left", loss=loss, region=region)
    (q, k), (q_t, k_t) = case.student, case.teachers[0]

    def lse(q, k):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ keys.transpose(-1, -2) / q.shape[-1] ** 0.5
        seen = reference.visible_cells(q.shape[2], valid=case.tokens.valid)
        return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(dim=-1)  # -inf at padding

    q, k = q.requires_grad_(), k.requires_grad_()
    value = attention_map_loss(
        q,
        k,
        q_t,
        k_t,
        case.tokens,
        lse_student=lse(q, k).detach(),
        lse_teacher=lse(q_t, k_t),
        **case.settings,
    )
    actual = (value, *torch.autograd.grad(1.7 * value, (q, k)))
    for got, want in zip(actual, run_twin(case), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-16)


def test_scales_are_used():
    case = make_case(scale_student=0.7, scale_teacher=[0.05])
    assert_matches_twin(case)
    assert run(case)[0] != run(case.but(scale_student=None))[0]


@everything
def test_strided_inputs_and_gradients_in_their_memory_order(loss, region):
    case = make_case(dtype=torch.float32, loss=loss, region=region)
    q, k = (each.float() for each in case.student)  # transposed (B, N, H, D) views
    assert not q.is_contiguous()
    wide = torch.zeros(*q.shape[:3], 2 * q.shape[3])
    wide[..., ::2] = q
    outputs = []
    for query in (q, q.contiguous(), wide[..., ::2]):
        leaf = query.detach().requires_grad_()
        value = attention_map_loss(
            leaf, k, *(each.float() for each in case.teachers[0]), case.tokens, **case.settings
        )
        outputs.append((value, *torch.autograd.grad(value, leaf)))
    for other in outputs[1:]:
        torch.testing.assert_close(outputs[0][0], other[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(outputs[0][1], other[1], rtol=1e-5, atol=1e-9)
    assert outputs[0][1].stride() == q.stride()
    assert outputs[1][1].is_contiguous()


@everything
def test_sample_weight_zero_removes_a_sample_but_still_counts_it(loss, region):
    case = make_case(loss=loss, region=region, num_samples=2)
    alone = run(case)[0]
    weight = torch.tensor([2.0, 0.0])
    (q, k), (q_t, k_t) = case.student, case.teachers[0]
    only = attention_map_loss(
        q[:1], k[:1], q_t[:1], k_t[:1], case.tokens.select([0]), **case.settings
    )
    both = attention_map_loss(q, k, q_t, k_t, case.tokens, sample_weight=weight, **case.settings)
    torch.testing.assert_close(both, only)  # 2 * loss of one sample / 2 samples
    assert both != alone


@everything
def test_a_sample_with_nothing_to_count_is_left_out(loss, region):
    case = make_case(loss=loss, region=region, num_samples=3)
    valid, vision = case.tokens.valid.clone(), case.tokens.is_vision.clone()
    valid[1], vision[1] = False, False
    tokens = TokenLayout.from_masks(vision, valid=valid)
    (q, k), (q_t, k_t) = case.student, case.teachers[0]
    rows = [0, 2]
    whole = attention_map_loss(q, k, q_t, k_t, tokens, **case.settings)
    others = attention_map_loss(
        q[rows], k[rows], q_t[rows], k_t[rows], tokens.select(rows), **case.settings
    )
    torch.testing.assert_close(whole, others)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("nothing", ["no vision", "no text", "all padding", "text before vision"])
def test_nothing_to_count_is_an_exact_zero_with_zero_gradients(loss, nothing):
    case = make_case(loss=loss, region="text_to_vision")
    shape = case.tokens.valid.shape
    valid, vision = torch.ones(shape, dtype=torch.bool), torch.zeros(shape, dtype=torch.bool)
    if nothing == "no text":
        vision[:] = True
    elif nothing == "all padding":
        valid[:] = False
    elif nothing == "text before vision":
        vision[:, 7:] = True  # cells exist for mse's denominator, but every one of them is dead
    tokens = TokenLayout.from_masks(vision, valid=valid)
    q, k = (each.clone().requires_grad_() for each in case.student)
    value = attention_map_loss(q, k, *case.teachers[0], tokens, **case.settings)
    value.backward()
    assert value.item() == 0
    assert not q.grad.any()
    assert not k.grad.any()


@everything
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30, 50.0])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_what_stands_at_padding_does_not_matter(loss, region, garbage, padding):
    case = make_case(loss=loss, region=region, padding=padding, dtype=torch.float32)
    clean = run(case)
    hidden = ~case.tokens.valid[:, None, :, None]

    def spoil(pair):
        return tuple(each.masked_fill(hidden, garbage) for each in pair)

    spoilt = make_case(loss=loss, region=region, padding=padding, dtype=torch.float32)
    object.__setattr__(spoilt, "student", spoil(case.student))
    object.__setattr__(spoilt, "teachers", [spoil(each) for each in case.teachers])
    for got, want in zip(run(spoilt), clean, strict=True):
        assert (got - want).norm() <= 1e-6 * want.norm()
    for grad in run(spoilt)[1:]:
        assert not grad.masked_select(hidden).any()


@pytest.mark.parametrize("loss", ["kl", "cosine"])
@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_exact_where_probabilities_underflow(loss, region, dtype):
    """Scores hundreds apart: most float32 probabilities are 0, their logarithms are not."""
    case = make_case(loss=loss, region=region, dtype=dtype, spread=9.0, num_tokens=40)
    actual, expected = run(case), run_twin(case)
    q, k = case.student
    seen = reference.visible_cells(40)
    p = reference.attention_map(q, k, seen)
    assert (p[seen.expand_as(p)] < 1e-38).any()
    # float32 scores of size 500 are themselves only good to 3e-5.
    bound = 1e-10 if dtype == torch.float64 else 1e-4
    for got, want in zip(actual, expected, strict=True):
        assert (got.double() - want).norm() <= bound * want.norm()


def test_cosine_survives_rows_whose_squares_underflow():
    """Vision keys that text all but ignores: P about 1e-25, P^2 is 0 in float32."""
    case = make_case(loss="cosine", region="text_to_vision", dtype=torch.float32)
    q, k = case.student
    far = case.tokens.is_vision[:, None, :, None]
    q, k = (
        torch.cat([q, q.new_full((*q.shape[:3], 1), 4.0)], -1),
        torch.cat([k, torch.where(far, -60.0, 0.0).expand(*k.shape[:3], 1)], -1),
    )
    object.__setattr__(case, "student", (q, k))
    loss, dq, _ = run(case)
    want = run_twin(case)
    torch.testing.assert_close(loss.double(), want[0], rtol=2e-5, atol=0)
    assert (dq.double() - want[1]).norm() <= 5e-5 * want[1].norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_identical_maps_give_zero(loss):
    case = make_case(loss=loss)
    (q, k) = case.student
    value = attention_map_loss(q, k, q, k, case.tokens, loss=loss)
    assert abs(value.item()) < 1e-15


@pytest.mark.parametrize("loss", ["cosine", "kl"])
def test_nearly_equal_maps_keep_their_accuracy(loss):
    """1 - cos and KL of maps 1e-3 apart are 1e-7: no cancellation may eat that in float32."""
    case = make_case(loss=loss, dtype=torch.float32, teacher=Heads(4, 2, 16))
    q, k = case.student
    near = (q + 1e-3 * torch.randn(q.shape, dtype=q.dtype)).float().double()
    object.__setattr__(case, "teachers", [(near, k)])
    value, want = run(case)[0], run_twin(case)[0]
    assert abs(value.double() - want) <= 1e-2 * want


@everything
def test_layerwise_is_the_sum_of_its_layers(loss, region):
    cases = [make_case(seed=i, loss=loss, region=region, padding="left") for i in range(3)]
    teachers = [case.teachers[0] for case in cases]
    groups = [[0, 1], [1, 2], [0]]
    tokens, settings = cases[0].tokens, cases[0].settings
    leaves = [tuple(each.requires_grad_() for each in case.student) for case in cases]
    losses = layerwise_attention_map_loss(
        leaves, teachers, groups, tokens, reduction="none", **settings
    )
    assert losses.shape == (3,)
    upstream = torch.tensor([0.5, -2.0, 3.0])
    grads = torch.autograd.grad((losses * upstream).sum(), [x for pair in leaves for x in pair])
    for i, (q, k) in enumerate(leaves):
        q_t, k_t = zip(*(teachers[t] for t in groups[i]), strict=True)
        single = attention_map_loss(q, k, q_t, k_t, tokens, **settings)
        torch.testing.assert_close(losses[i], single, rtol=1e-12, atol=0)
        want = torch.autograd.grad(upstream[i] * single, (q, k))
        torch.testing.assert_close(grads[2 * i : 2 * i + 2], want, rtol=1e-10, atol=1e-18)
    mean = layerwise_attention_map_loss(leaves, teachers, groups, tokens, **settings)
    torch.testing.assert_close(mean, losses.mean())


def test_layers_may_have_windows_of_their_own():
    cases = [make_case(seed=i) for i in range(2)]
    teachers = [cases[0].teachers[0]]
    losses = layerwise_attention_map_loss(
        [case.student for case in cases],
        teachers,
        [[0], [0]],
        window=[4, None],
        reduction="none",
    )
    for value, case, window in zip(losses, cases, (4, None), strict=True):
        single = attention_map_loss(*case.student, *teachers[0], window=window)
        torch.testing.assert_close(value, single, rtol=1e-12, atol=0)


def test_each_teacher_map_is_computed_once(monkeypatch):
    from drivekd.ops.torch_backend.head_mean import HeadMean

    computed = []
    mean = HeadMean.mean

    def counting(self, layer, *args, **settings):
        computed.append(id(layer))
        return mean(self, layer, *args, **settings)

    monkeypatch.setattr(HeadMean, "mean", counting)
    cases = [make_case(seed=i, num_samples=1, num_tokens=9) for i in range(4)]
    layerwise_attention_map_loss(
        [case.student for case in cases[:2]],
        [case.teachers[0] for case in cases],
        [[0, 1, 2], [1, 2, 3]],
    )
    assert len(computed) == len(set(computed)) == 4


def test_only_the_queries_or_only_the_keys_may_require_grad():
    case = make_case()
    _, dq, dk = run(case, upstream=1.0)
    q, k = case.student
    q_leaf, k_leaf = q.clone().requires_grad_(), k.clone().requires_grad_()
    attention_map_loss(q_leaf, k, *case.teachers[0], case.tokens).backward()
    attention_map_loss(q, k_leaf, *case.teachers[0], case.tokens).backward()
    torch.testing.assert_close(q_leaf.grad, dq)
    torch.testing.assert_close(k_leaf.grad, dk)


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("segments", [None, 2])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attention_map_matches_its_twin(padding, segments, causal, window, dtype):
    case = make_case(padding=padding, segments=segments, dtype=dtype)
    q, k = (each.to(dtype).requires_grad_() for each in case.student)
    result = attention_map(q, k, case.tokens, causal=causal, window=window)
    seen = reference.visible_cells(
        q.shape[2],
        valid=case.tokens.valid,
        segment_ids=case.tokens.segment_ids,
        causal=causal,
        window=window,
    )
    want = reference.attention_map(*case.student, seen)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert result.dtype == wide
    assert not result.requires_grad
    torch.testing.assert_close(
        result.double(), want.detach(), rtol=0, atol=1e-14 if wide == torch.float64 else 1e-6
    )
    assert not result[~seen.expand_as(result)].any()
