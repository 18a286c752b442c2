"""A log-sum-exp that is given: used, accurate, and under DRIVEKD_DEBUG=1 checked on some rows."""

import math

import pytest
import torch

from drivekd.functional import attention_map_loss, layerwise_attention_map_loss
from drivekd.reference import attention_map as reference
from tests.helpers.attention import assert_close, make_case, run, run_twin

LOSSES = ["mse", "cosine", "kl"]
REGIONS = ["full", "text_to_vision"]
everything = pytest.mark.parametrize(
    ("loss", "region"), [(loss, region) for loss in LOSSES for region in REGIONS]
)


def log_sum_exp(pair, seen, scale=None):
    q, k = pair
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(dim=-1)


def seen_by(case, **settings):
    tokens = case.tokens
    return reference.visible_cells(
        tokens.num_tokens,
        **{"valid": tokens.valid, "segment_ids": tokens.segment_ids, **settings},
    )


def given(case, dtype=torch.float32):
    """Settings with both right log-sum-exps, as a flash forward leaves them: -inf for padding."""
    seen = seen_by(case)
    lse = log_sum_exp(case.student, seen).to(dtype)
    return {"lse_student": lse, "lse_teacher": [log_sum_exp(case.teachers[0], seen).to(dtype)]}


@everything
@pytest.mark.parametrize("spread", [1.0, 12.0])
def test_padding_and_scores_of_hundreds_do_not_overflow(loss, region, spread):
    """Rows of padding have no log-sum-exp; exp of their scores was inf, and 0 times that NaN."""
    case = make_case(
        loss=loss, region=region, padding="left", dtype=torch.float32, spread=spread, num_samples=3
    )
    actual = run(case.but(**given(case)))
    # Scores of several hundred are good to 3e-5, and so is every probability.
    assert_close(actual, run_twin(case), case.dtype, (2e-5, 1e-4, 5e-3) if spread > 1 else None)


@pytest.mark.parametrize("loss", LOSSES)
def test_nearly_one_hot_rows_keep_their_gradient(loss):
    """Rounded log-sum-exps leave rows of P whose sum is 1 up to 1e-5, and gradients of that size.

    Seen: gradients wrong by 7e-2 in single rows.
    """
    case = make_case(loss=loss, dtype=torch.float32, spread=9.0, num_tokens=40)
    known, found = (run(each)[1:] for each in (case.but(**given(case)), case))
    for got, other, want in zip(known, found, run_twin(case)[1:], strict=True):
        sizes = want.norm(dim=-1)
        error, usual = (
            ((each.double() - want).norm(dim=-1) / (sizes + 1e-3 * sizes.max())).max()
            for each in (got, other)
        )
        assert error <= 2 * usual + 1e-4, (error, usual)


def test_a_teachers_log_sum_exp_belongs_to_one_window():
    q, k = make_case(num_tokens=9).student
    lse = log_sum_exp((q, k), reference.visible_cells(9))
    layers = {"student_layers": [(q, k)] * 2, "teacher_layers": [(q, k)], "groups": [[0], [0]]}
    assert layerwise_attention_map_loss(**layers, lse_teacher=[lse], window=[9, None]) < 1e-20
    with pytest.raises(ValueError, match=r"lse_teacher\[0\] .* windows 4 and None"):
        layerwise_attention_map_loss(**layers, lse_teacher=[lse], window=[4, None])


# ---- under DRIVEKD_DEBUG=1


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("DRIVEKD_DEBUG", "1")


@everything
@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize(
    ("segments", "window", "causal"), [(None, None, True), (3, 7, True), (None, 5, False)]
)
@pytest.mark.usefixtures("debug")
def test_right_ones_pass(loss, region, padding, segments, window, causal):
    case = make_case(
        loss=loss, region=region, padding=padding, segments=segments, window=window, causal=causal,
        dtype=torch.float32, num_samples=3,
    )  # fmt: skip
    seen = seen_by(case, causal=causal, window=window)
    lse = log_sum_exp(case.student, seen).float()
    run(case.but(lse_student=lse, lse_teacher=[log_sum_exp(case.teachers[0], seen).float()]))


@pytest.mark.usefixtures("debug")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_those_of_low_precision_pass(dtype):
    """Of operands with 11 bits, as TF32 has; flash forwards accumulate in float32."""
    case = make_case(dtype=dtype, spread=3.0, num_tokens=64)
    rounded = tuple(each.half().double() for each in case.student)
    run(case.but(lse_student=log_sum_exp(rounded, seen_by(case)).float()))


MISTAKES = {
    "base 2": (lambda case, pair, seen: log_sum_exp(pair, seen) / math.log(2), "base 2"),
    "no scale": (lambda case, pair, seen: log_sum_exp(pair, seen, 1.0), "without the scale 0.2"),
    "region only": (
        lambda case, pair, seen: log_sum_exp(pair, seen & case.tokens.is_vision[:, None]),
        "vision keys only",
    ),
    "padding": (
        lambda case, pair, seen: log_sum_exp(pair, seen_by(case, valid=None)),
        "keys of padding",
    ),
    "not causal": (
        lambda case, pair, seen: log_sum_exp(pair, seen_by(case, causal=False)),
        "later keys",
    ),
    "not finite": (lambda case, pair, seen: log_sum_exp(pair, seen) / 0, "not finite"),
    "half": (lambda case, pair, seen: log_sum_exp(pair, seen) - 1, "none of the usual mistakes"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize("model", ["student", "teacher"])
@pytest.mark.usefixtures("debug")
def test_mistakes_are_named(mistake, model):
    case = make_case(padding="left", region="text_to_vision", vision=(0.5, 0.7))
    make, message = MISTAKES[mistake]
    pair = case.student if model == "student" else case.teachers[0]
    wrong = make(case, pair, seen_by(case))
    settings = {"lse_student": wrong} if model == "student" else {"lse_teacher": [wrong]}
    name = "lse_student is" if model == "student" else r"lse_teacher\[0\] is"
    with pytest.raises(ValueError, match=rf"{name}.*sample 0, head 0, row \d+; wanted.*{message}"):
        run(case.but(**settings))


@pytest.mark.usefixtures("debug")
def test_a_missing_window_is_named():
    case = make_case(window=5)
    with pytest.raises(ValueError, match=r"lse_student .* outside the window of 5 tokens"):
        run(case.but(lse_student=log_sum_exp(case.student, seen_by(case))))


@pytest.mark.usefixtures("debug")
def test_the_place_is_right_and_what_is_not_read_is_not_checked():
    case = make_case(num_samples=2, num_tokens=30, padding="right")
    right = log_sum_exp(case.student, seen_by(case))
    last = int(case.tokens.valid[1].sum()) - 1
    wrong = right.clone()
    wrong[1, 3, last] += 0.5
    with pytest.raises(
        ValueError, match=f"{right[1, 3, last] + 0.5:.4g}.*sample 1, head 3, row {last};"
    ):
        run(case.but(lse_student=wrong))
    padded = right.clone()
    padded[~case.tokens.valid[:, None].expand_as(padded)] = torch.nan
    for got, want in zip(run(case.but(lse_student=padded)), run(case), strict=True):
        torch.testing.assert_close(got, want)


def test_nothing_is_checked_without_debug():
    case = make_case(dtype=torch.float32)
    wrong = given(case)["lse_student"] + 1
    assert run(case.but(lse_student=wrong))[0].isfinite()


@pytest.mark.usefixtures("debug")
def test_layers_are_named_and_their_own_settings_used():
    cases = [make_case(seed=seed, num_tokens=20) for seed in range(2)]
    layers = [case.student for case in cases]
    windows, scales = [4, None], [0.3, 0.5]
    lses = [
        log_sum_exp(pair, reference.visible_cells(20, window=window), scale)
        for pair, window, scale in zip(layers, windows, scales, strict=True)
    ]
    arguments = {
        "student_layers": layers, "teacher_layers": [case.teachers[0] for case in cases],
        "groups": [[0], [1]], "window": windows, "scale_student": scales,
    }  # fmt: skip
    layerwise_attention_map_loss(**arguments, lse_student=lses)
    with pytest.raises(ValueError, match=r"lse_student\[1\] .* without the scale 0.5"):
        wrong = [lses[0], log_sum_exp(layers[1], reference.visible_cells(20), 1.0)]
        layerwise_attention_map_loss(**arguments, lse_student=wrong)


@pytest.mark.usefixtures("debug")
def test_under_autocast_the_cast_queries_count():
    case = make_case(dtype=torch.bfloat16)
    q, k = (each.float() for each in case.student)
    lse = log_sum_exp(case.student, seen_by(case)).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention_map_loss(
            q, k, *(each.float() for each in case.teachers[0]), case.tokens, lse_student=lse
        )
