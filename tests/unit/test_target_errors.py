"""What targets and their losses refuse: what no teacher gives, other shapes, other kinds."""

from dataclasses import replace

import pytest
import torch

from drivekd import TokenLayout
from drivekd.functional import (
    AttentionMapTarget,
    attention_map_loss,
    attention_map_target_loss,
    attention_map_targets,
    layerwise_attention_map_target_loss,
)
from tests.helpers.attention import make_case

SPOILED = {
    "no such key": (lambda t: {"indices": t.indices + 100}, "indices names keys behind its token"),
    "a later key": (lambda t: {"indices": torch.full_like(t.indices, 8)}, "behind its token"),
    "a key twice": (lambda t: {"indices": torch.zeros_like(t.indices)}, "names a key twice"),
    "below 0": (lambda t: {"values": -t.values}, "values holds negative numbers or NaN"),
    "no number": (lambda t: {"rest": t.rest * float("nan")}, "rest holds negative numbers or NaN"),
    "rows of other order": (lambda t: {"causal": False}, "causal is True but targets"),
}


@pytest.mark.parametrize("change, message", SPOILED.values(), ids=SPOILED)
def test_what_no_teacher_gives_is_refused(change, message):
    case = make_case(num_tokens=9)
    (target,) = attention_map_targets(case.teachers, [[0]], top_k=3)
    spoiled = replace(target, **change(target))
    with pytest.raises(ValueError, match=message):
        attention_map_target_loss(*case.student, spoiled)


def test_a_rectangle_of_what_are_no_probabilities_is_refused():
    case = make_case(num_tokens=9)
    (target,) = attention_map_targets(case.teachers, [[0]], case.tokens, region="text_to_vision")
    spoiled = replace(target, values=target.values - 1)
    with pytest.raises(ValueError, match="values holds negative numbers"):
        attention_map_target_loss(*case.student, spoiled, case.tokens)


def test_both_ways_a_key_may_stand_behind_but_must_exist():
    case = make_case(num_tokens=9)
    (target,) = attention_map_targets(case.teachers, [[0]], top_k=9, causal=False)
    assert (target.indices > torch.arange(9)[:, None]).any()
    own = attention_map_target_loss(*case.student, target, causal=False)
    ((query, key),) = case.teachers[:1]
    torch.testing.assert_close(own, attention_map_loss(*case.student, query, key, causal=False))
    with pytest.raises(ValueError, match="causal is True but targets"):
        attention_map_target_loss(*case.student, target)
    beyond = replace(target, indices=target.indices + 1)
    with pytest.raises(ValueError, match="names keys that do not exist"):
        attention_map_target_loss(*case.student, beyond, causal=False)


def test_mistakes_are_named():
    case = make_case(num_tokens=9)
    q, k = case.student
    (full,) = attention_map_targets(case.teachers, [[0]], top_k=2)
    (part,) = attention_map_targets(case.teachers, [[0]], case.tokens, region="text_to_vision")
    other = TokenLayout.from_masks(torch.arange(9).expand(2, 9) < 7)
    with pytest.raises(ValueError, match="7 vision tokens but the target has room for 3"):
        attention_map_target_loss(q, k, part, other)
    with pytest.raises(ValueError, match="tokens is None"):
        attention_map_target_loss(q, k, part)
    with pytest.raises(ValueError, match="target has 2 samples of 9 rows but q_student has 2"):
        attention_map_target_loss(q[:, :, :8], k[:, :, :8], full)
    with pytest.raises(TypeError, match=r"wanted a drivekd\.functional\.AttentionMapTarget"):
        attention_map_target_loss(q, k, full.values)
    with pytest.raises(ValueError, match=r"targets\[1\] is of region 'text_to_vision'"):
        layerwise_attention_map_target_loss([(q, k)] * 2, [full, part], case.tokens)
    with pytest.raises(ValueError, match="2 student_layers but 1 targets"):
        layerwise_attention_map_target_loss([(q, k)] * 2, [full])
    with pytest.raises(ValueError, match="top_k is 3; wanted None or an int >= 1, for region"):
        attention_map_targets(case.teachers, [[0]], case.tokens, region="text_to_vision", top_k=3)
    with pytest.raises(ValueError, match="indices and rest belong together"):
        AttentionMapTarget(full.values, full.exponents, full.indices)
    with pytest.raises(ValueError, match=r"exponents has shape \(2, 8\)"):
        AttentionMapTarget(full.values, full.exponents[:, :8])
    with pytest.raises(TypeError, match=r"values has dtype torch\.int64"):
        AttentionMapTarget(full.values.long(), full.exponents)
    with pytest.raises(ValueError, match="wanted B = 1"):
        AttentionMapTarget.stack([full], num_tokens=9)
    with pytest.raises(ValueError, match="all of one region"):
        AttentionMapTarget.stack([])
    with pytest.raises(TypeError, match="groups is a NoneType; wanted a list of lists"):
        attention_map_targets(case.teachers, None)
    with pytest.raises(ValueError, match="groups is empty"):
        attention_map_targets(case.teachers, [])


def _sample(dtype=torch.float32, exponents=torch.int16):
    (target,) = attention_map_targets(
        [(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))], [[0]], top_k=2, dtype=dtype
    )
    return replace(target, exponents=target.exponents.to(exponents))


@pytest.mark.parametrize(
    ("samples", "changes", "error", "message"),
    [
        (None, {}, TypeError, "samples is a NoneType; wanted a list of targets"),
        (
            [1],
            {},
            TypeError,
            r"samples\[0\] is a int; wanted a drivekd.functional.Att",
        ),
        (2, {"num_tokens": None}, ValueError, "num_tokens is None; full maps need the N"),
        (2, {"num_tokens": "8"}, TypeError, "num_tokens is a str; wanted an int"),
        (2, {"num_tokens": True}, TypeError, "num_tokens is a bool; wanted an int"),
        (2, {"num_tokens": 0}, ValueError, "num_tokens is 0; wanted an int >= 1"),
        (2, {"num_tokens": 3}, ValueError, "num_tokens is 3, but a sample ends at 4"),
        (2, {"starts": [0]}, ValueError, "starts has 1 entries but there are 2 samples"),
        (2, {"starts": [0, -1]}, ValueError, r"starts\[1\] is -1; wanted an int >= 0"),
        (2, {"starts": [0, 1.0]}, TypeError, r"starts\[1\] is a float; wanted an int"),
        (2, {"starts": 0}, TypeError, "starts is a int; wanted None or a list of int"),
        (2, {"starts": [0, 5]}, ValueError, "num_tokens is 8, but a sample ends at 9"),
    ],
)
def test_what_cannot_be_stacked_is_named(samples, changes, error, message):
    samples = [_sample()] * samples if isinstance(samples, int) else samples
    with pytest.raises(error, match=message):
        AttentionMapTarget.stack(samples, **{"num_tokens": 8, **changes})


@pytest.mark.parametrize(
    "other",
    [{"dtype": torch.float16}, {"exponents": torch.int32}],
    ids=["values", "exponents"],
)
def test_targets_of_two_dtypes_are_not_rounded_to_one(other):
    with pytest.raises(ValueError, match=r"samples\[1\] has .* but samples\[0\] has values "):
        AttentionMapTarget.stack([_sample(), _sample(**other)], num_tokens=8)
