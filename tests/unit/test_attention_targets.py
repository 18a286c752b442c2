"""Losses against given target maps: as against the teacher, and within what was left out."""

import math
import sys

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from drivekd import TokenLayout, backend_info
from drivekd.errors import BackendUnavailableError
from drivekd.functional import (
    AttentionMapTarget,
    attention_map,
    attention_map_loss,
    attention_map_target_loss,
    attention_map_targets,
    layerwise_attention_map_loss,
    layerwise_attention_map_target_loss,
)
from drivekd.ops.attention_target import attention_map_target_loss as loss_op
from drivekd.ops.torch_backend import attention_chunks
from drivekd.reference import attention_map as reference
from tests.helpers.attention import Heads, make_case
from tests.helpers.host_reads import NoHostRead
from tests.helpers.memory import LiveBytes
from tests.helpers.random_attention import draw_call

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)
HALF = 2.0**-11  # largest relative error of rounding to float16


def pair_of_losses(call):
    """Losses and gradients against the teacher, and against the targets made of it; float64."""
    results = []
    window = call.windows[0]
    teacher = [layer.exact for layer in call.teacher]
    scales = {"scale_teacher": [layer.scale for layer in call.teacher]}
    shared = {
        "reduction": "none",
        "loss": call.loss,
        "denominator": call.denominator,
        "causal": call.causal,
        "sample_weight": call.sample_weight,
        "scale_student": [layer.scale for layer in call.student],
        "backend": "torch",
    }
    for is_given in (False, True):
        leaves = [tuple(x.clone().requires_grad_() for x in layer.exact) for layer in call.student]
        if is_given:
            targets = attention_map_targets(
                teacher,
                call.groups,
                call.tokens,
                region=call.region,
                window=window,
                causal=call.causal,
                **scales,
            )
            losses = layerwise_attention_map_target_loss(leaves, targets, call.tokens, **shared)
        else:
            losses = layerwise_attention_map_loss(
                leaves,
                teacher,
                call.groups,
                call.tokens,
                region=call.region,
                window=window,
                **scales,
                **shared,
            )
        grads = torch.autograd.grad(
            (losses * call.upstream).sum(), [x for pair in leaves for x in pair]
        )
        results.append((losses.detach(), *grads))
    return results


def assert_pairs_agree(seeds, **drawing):
    for seed in seeds:
        call = draw_call(seed, max_tokens=65, **drawing)
        for live, given in zip(*pair_of_losses(call), strict=True):
            # float64 throughout, a few hundred roundings; a gradient may be what is left of terms
            # of the size of its largest upstream factor.
            floor = 1e-13 * max(1.0, call.upstream.abs().max().item())
            torch.testing.assert_close(given, live, rtol=1e-9, atol=floor)


@pytest.mark.parametrize("first", range(0, 40, 20))
def test_loss_against_a_whole_target_is_the_loss_against_its_teacher(first):
    assert_pairs_agree(range(first, first + 20))


def test_and_on_the_path_of_other_devices_in_many_chunks(monkeypatch):
    """On a GPU no value of the layout is read; here the same path runs on the CPU."""
    monkeypatch.setattr(attention_chunks, "READABLE", frozenset())
    monkeypatch.setitem(attention_chunks._STACK_BYTES, "cpu", 1)
    assert_pairs_agree(range(300, 320))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("window", [None, 9])
def test_largest_cells_with_the_rest_spread_match_the_twin(loss, padding, window):
    case = make_case(num_samples=3, num_tokens=33, padding=padding, segments=2, weighted=True)
    q, k = (each.clone().requires_grad_() for each in case.student)
    (target,) = attention_map_targets(
        case.teachers, [[0]], case.tokens, top_k=5, window=window, dtype=torch.float16
    )
    assert target.values.dtype == torch.float16 and target.values.shape == (3, 33, 5)
    seen = reference.visible_cells(
        33, valid=case.tokens.valid, segment_ids=case.tokens.segment_ids, window=window
    )
    dense = reference.spread_rest(target.values, target.indices, target.rest, seen)
    rows = case.tokens.valid
    torch.testing.assert_close(dense.sum(-1)[rows], torch.ones(int(rows.sum())).double())
    settings = {"loss": loss, "sample_weight": case.sample_weight}
    got = attention_map_target_loss(q, k, target, case.tokens, **settings)
    want = reference.attention_map_target_loss(
        q,
        k,
        dense,
        valid=case.tokens.valid,
        segment_ids=case.tokens.segment_ids,
        window=window,
        **settings,
    )
    torch.testing.assert_close(got, want, rtol=1e-10, atol=0)
    for a, b in zip(
        torch.autograd.grad(1.7 * got, (q, k)), torch.autograd.grad(1.7 * want, (q, k)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-14)


def left_out(full, target, seen):
    """Of each row: the mass left out, the smallest cell kept, cells left out, norm of the kept."""
    values = torch.ldexp(target.values, target.exponents[..., None].int())
    is_kept = torch.zeros_like(seen).scatter(2, target.indices.clamp(min=0).long(), True) & seen
    smallest = values.masked_fill(target.indices < 0, torch.inf).amin(-1)
    return target.rest, smallest, (seen & ~is_kept), values.norm(dim=-1)


@pytest.mark.parametrize("top_k", [1, 4, 20])
@pytest.mark.parametrize("spread", [0.3, 1.0, 4.0])
def test_error_of_the_largest_cells_is_bounded_by_the_mass_left_out(top_k, spread):
    """The bounds of `attention_map_target_loss`, row by row: every row is a sample of its own."""
    case = make_case(num_samples=1, num_tokens=65, spread=spread, student=Heads(4, 2, 16))
    q, k = case.student
    (whole,) = attention_map_targets(case.teachers, [[0]])
    (target,) = attention_map_targets(case.teachers, [[0]], top_k=top_k)
    seen = reference.visible_cells(65)
    p_s = attention_map(q, k)
    p_t, p_g = (
        reference.spread_rest(each.values, each.indices, each.rest, seen)
        for each in (whole, target)
    )
    rest, smallest, others, kept_norm = left_out(whole, target, seen)
    assert rest.max() > 0.05 or spread == 4.0
    norm = torch.sqrt(rest * torch.minimum(rest, smallest))
    slack = 1 + 1e-9
    assert ((p_t - p_g).norm(dim=-1) <= norm * slack + 1e-12).all()
    assert ((p_t - p_g).abs().sum(-1) <= 2 * rest * slack + 1e-12).all()
    # mse, the whole map: norms of rows add up in squares.
    live, given = (
        math.sqrt(attention_map_loss(q, k, *case.teachers[0]) * 65**2),
        math.sqrt(attention_map_target_loss(q, k, target) * 65**2),
    )
    assert abs(live - given) <= norm.norm() * slack
    log_s = p_s.log()
    for loss in ("cosine", "kl"):
        live = attention_map_loss(q, k, *case.teachers[0], loss=loss) * 65
        given = attention_map_target_loss(q, k, target, loss=loss) * 65
        if loss == "cosine":
            bound = 2 * norm / kept_norm
        else:
            count = others.sum(-1)
            top = log_s.masked_fill(~others, -torch.inf).amax(-1)
            low = log_s.masked_fill(~others, torch.inf).amin(-1)
            bound = torch.where(count > 0, rest * (count.clamp(min=1).log() + top - low), 0)
        assert abs(live - given) <= bound.sum() * slack + 1e-12


def with_sink(case, size):
    """The same case with a first key that takes nearly all attention, as trained models have."""
    for q, k in (case.student, *case.teachers):
        q[..., 0] = size
        k[..., 0] = 0
        k[:, :, 0] = 0
        k[:, :, 0, 0] = size
    return case


@pytest.mark.parametrize("sink", [0.0, 9.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_rectangles_change_the_loss_within_their_rounding(loss, sink):
    """Also where vision tokens get a millionth of the attention: rows have their own unit."""
    case = with_sink(make_case(num_tokens=65, vision=(0.1, 0.7), dtype=torch.float32), sink)
    q, k = (each.float().requires_grad_() for each in case.student)
    teacher = [each.float() for each in case.teachers[0]]
    live = attention_map_loss(q, k, *teacher, case.tokens, region="text_to_vision", loss=loss)
    exact, half = (
        attention_map_targets([teacher], [[0]], case.tokens, region="text_to_vision", dtype=dtype)
        for dtype in (torch.float32, torch.float16)
    )
    if sink:
        probabilities = torch.ldexp(exact[0].values, exact[0].exponents[..., None].int())
        assert 0 < probabilities.max() < 1e-5
    gap = (half[0].values.float() - exact[0].values).abs()
    # Below 2^-14 of the row's largest, float16 counts in steps of 2^-24.
    assert (gap <= HALF * exact[0].values + 2.0**-25).all()
    given = attention_map_target_loss(q, k, half[0], case.tokens, loss=loss)
    if loss == "mse":
        nothing = attention_map_loss(q, k, *teacher, case.tokens, region="text_to_vision")
        scale = torch.ldexp(exact[0].values, exact[0].exponents[..., None].int()).norm()
        cells = (case.tokens.is_text.sum(1) * case.tokens.is_vision.sum(1))[0]
        bound = HALF * scale / math.sqrt(cells * 2)  # two samples
        assert abs(given.sqrt() - nothing.sqrt()) <= bound * 1.01
    assert abs(given - live) <= 5e-4 * live  # a rounding of the target, of relative size HALF
    for a, b in zip(
        torch.autograd.grad(given, (q, k)), torch.autograd.grad(live, (q, k)), strict=True
    ):
        assert (a - b).norm() <= 1e-3 * b.norm()


@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_is_seen_by_a_student_that_is_its_teacher_and_bounded(loss):
    """The live loss is 0; what is left is the rounding of the target, in second order."""
    case = make_case(num_tokens=65, vision=(0.1, 0.7))
    for dtype in (torch.float16, torch.float64):
        (target,) = attention_map_targets(
            [case.student], [[0]], case.tokens, region="text_to_vision", dtype=dtype
        )
        left = attention_map_target_loss(*case.student, target, case.tokens, loss=loss)
        if dtype == torch.float64:
            assert left < 1e-16  # a few roundings of float64
            continue
        p_t = torch.ldexp(target.values.double(), target.exponents[..., None].int())
        # Rows of P_t and P_t (1 + d), |d| <= 2^-11: their difference, that of the unit vectors,
        # and KL <= chi^2 of the renormalised rows.
        bounds = {"mse": HALF**2 * p_t.square().mean(), "cosine": HALF**2 * 2, "kl": HALF**2 * 4}
        assert 0 < left <= bounds[loss] * 1.01


@everything
def test_nothing_is_read_back_on_other_devices(loss, region, monkeypatch):
    monkeypatch.setattr(attention_chunks, "READABLE", frozenset())
    case = make_case(padding="left", segments=2, weighted=True)
    tokens, sparse = case.tokens, region == "full"
    options = {"top_k": 3} if sparse else {}
    (target,) = attention_map_targets(case.teachers, [[0]], tokens, region=region, **options)
    masks = (None, None) if sparse else (tokens.is_text, tokens.is_vision)
    with NoHostRead():
        loss_op._init_fn(
            *([each] for each in case.student), [target.values], [target.exponents],
            [target.indices] if sparse else [], [target.rest] if sparse else [], [None],
            tokens.valid, tokens.segment_ids, *masks, case.sample_weight, [0.3], [7], True, loss,
            "official", [True], [True], "torch",
        )  # fmt: skip


@everything
def test_gradcheck(loss, region):
    case = make_case(num_tokens=7, student=Heads(2, 1, 3), padding="left")
    q, k = (each.contiguous().requires_grad_() for each in case.student)
    options = {"top_k": 3} if region == "full" else {}
    targets = attention_map_targets(case.teachers, [[0]], case.tokens, region=region, **options)

    def loss_of(q, k):
        return attention_map_target_loss(q, k, targets[0], case.tokens, loss=loss)

    assert torch.autograd.gradcheck(loss_of, (q, k))


@everything
def test_opcheck(loss, region):
    case = make_case(num_tokens=9, padding="right")
    q, k = (each.float() for each in case.student)
    (target,) = attention_map_targets(
        case.teachers, [[0]], case.tokens, region=region, dtype=torch.float16
    )
    tokens, sparse = case.tokens, region == "full"
    masks = (None, None) if sparse else (tokens.is_text, tokens.is_vision)
    arguments = (
        [q, q], [k, k], [target.values] * 2, [target.exponents] * 2,
        [target.indices] * 2 if sparse else [], [target.rest] * 2 if sparse else [],
        [None, None], tokens.valid, None, *masks, None, [0.5, 0.5], [0, 3], True, loss, "official",
        [True, False], [True, True], "torch",
    )  # fmt: skip
    torch.library.opcheck(torch.ops.drivekd.attention_map_target_loss.default, arguments)


# torch.compile itself makes an instance of the Function, against torch's own advice.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("region", REGIONS)
def test_compiles_without_a_graph_break(region):
    case = make_case(dtype=torch.float32, padding="left")
    q, k = (each.float().contiguous().requires_grad_() for each in case.student)
    (target,) = attention_map_targets(case.teachers, [[0]], case.tokens, region=region)

    def step(q, k):
        return attention_map_target_loss(1.0 * q, k.sin(), target, case.tokens) * 3

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    outputs = []
    for function in (step, compiled):
        value = function(q, k)
        outputs.append((value, *torch.autograd.grad(value, (q, k))))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-6, atol=1e-12)


@everything
def test_no_tensor_is_as_large_as_one_map_and_little_is_saved(loss, region):
    num_tokens = 900
    case = make_case(num_samples=1, num_tokens=num_tokens, student=Heads(8, 2, 8), num_teachers=2)
    q, k = (each.float().requires_grad_() for each in case.student)
    layers = [tuple(each.float() for each in pair) for pair in case.teachers]
    options = {"top_k": 16} if region == "full" else {}
    with LiveBytes() as making:
        targets = attention_map_targets(layers, [[0, 1]], case.tokens, region=region, **options)
    saved = []

    def pack(tensor):
        saved.append(tensor.numel())
        return tensor

    bodies = {torch.ops.drivekd.attention_map_target_loss.default: loss_op._init_fn}
    with LiveBytes(bodies) as memory, saved_tensors_hooks(pack, lambda tensor: tensor):
        attention_map_target_loss(q, k, targets[0], case.tokens, loss=loss)
    assert making.largest < 4 * num_tokens**2 and memory.largest < 4 * num_tokens**2
    assert sum(saved) <= q.numel() + k.numel() + 16


def one_by_one(case, region, **options):
    """Targets of every sample by itself, its padding cut off."""
    singles = []
    for b, valid in enumerate(case.tokens.valid):
        layers = [tuple(each[b : b + 1, :, valid] for each in pair) for pair in case.teachers]
        vision = case.tokens.is_vision[b : b + 1, valid]
        own = TokenLayout.from_masks(vision)
        singles += attention_map_targets(layers, [[0]], own, region=region, **options)
    return singles


@pytest.mark.parametrize("padding", ["left", "right"])
@everything
def test_targets_of_single_samples_stack_to_a_padded_batch(loss, region, padding):
    case = make_case(num_samples=3, num_tokens=21, padding=padding)
    options = {"top_k": 4} if region == "full" else {}
    singles = one_by_one(case, region, **options)
    starts = [int(valid.to(torch.int8).argmax()) for valid in case.tokens.valid]
    stacked = AttentionMapTarget.stack(singles, num_tokens=21, starts=starts)
    (whole,) = attention_map_targets(case.teachers, [[0]], case.tokens, region=region, **options)
    got, want = (
        attention_map_target_loss(*case.student, target, case.tokens, loss=loss)
        for target in (stacked, whole)
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_samples_without_vision_or_text_count_as_against_a_teacher():
    case = make_case(num_samples=3, num_tokens=17)
    vision = case.tokens.is_vision.clone()
    vision[0], vision[1] = False, True
    tokens = TokenLayout.from_masks(vision)
    for loss in LOSSES:
        q = case.student[0].clone().requires_grad_()
        (target,) = attention_map_targets(case.teachers, [[0]], tokens, region="text_to_vision")
        got = attention_map_target_loss(q, case.student[1], target, tokens, loss=loss)
        want = attention_map_loss(
            q, case.student[1], *case.teachers[0], tokens, region="text_to_vision", loss=loss
        )
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        none = TokenLayout.from_masks(torch.zeros_like(vision))
        (target,) = attention_map_targets(case.teachers, [[0]], none, region="text_to_vision")
        nothing = attention_map_target_loss(q, case.student[1], target, none, loss=loss)
        assert nothing == 0 and not torch.autograd.grad(nothing, q)[0].any()


@pytest.mark.parametrize("window", [2**31, sys.maxsize, 10**20])
def test_a_window_wider_than_all_numbers_is_none(window):
    case = make_case(num_tokens=9)
    ((query, key),) = case.teachers[:1]
    for loss, denominator in (("mse", "live"), ("mse", "official"), ("kl", "official")):
        settings = {"loss": loss, "denominator": denominator}
        assert torch.equal(
            attention_map_loss(*case.student, query, key, window=window, **settings),
            attention_map_loss(*case.student, query, key, **settings),
        )
    assert torch.equal(attention_map(query, key, window=window), attention_map(query, key))
    for target in attention_map_targets([(query, key)], [[0]], window=window):
        attention_map_target_loss(*case.student, target)


def test_native_has_it_not_and_auto_knows(monkeypatch):
    """tests/kernels has what triton refuses."""
    case = make_case(num_tokens=9)
    (target,) = attention_map_targets(case.teachers, [[0]])
    info = backend_info()["attention_map_target_loss"]
    assert info["auto on cpu"] == "torch" and info["torch"] == "available"
    with pytest.raises(BackendUnavailableError, match="use backend='auto' or 'torch'"):
        attention_map_target_loss(*case.student, target, backend="native")
    monkeypatch.setenv("DRIVEKD_BACKEND", "native")
    attention_map_target_loss(*case.student, target)
