"""Captures of a student and its teacher meet in the loss."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.errors import TokenMismatchError
from drivekd.functional import attention_map_targets
from drivekd.losses import AttentionMapLoss, _may_read
from drivekd.tokens import TokenLayout
from tests.helpers.host_reads import NoHostRead
from tests.helpers.toy_models import IMAGE, image_inputs, internvl


def captured_pair(student_inputs, teacher_inputs):
    student = internvl(seed=1)
    teacher = internvl(layers=5, hidden=96, heads=6, kv_heads=3, seed=2).requires_grad_(False)
    with torch.no_grad(), capture_attention(teacher, [0], stop_after_last=True) as teacher_capture:
        teacher(**teacher_inputs)
    with capture_attention(student, [0]) as student_capture:
        student(**student_inputs)
    return student, student_capture, teacher_capture


def layout(inputs):
    return TokenLayout.from_masks(
        inputs["input_ids"] == IMAGE, valid=inputs["attention_mask"].bool()
    )


def test_student_and_stopped_teacher_give_a_loss_that_trains_the_student():
    inputs = image_inputs(padding="left")
    student, s, t = captured_pair(inputs, inputs)
    loss = AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="text_to_vision")
    value = loss(s, t, layout(inputs))
    weight = student.model.language_model.layers[0].self_attn.q_proj.weight
    (grad,) = torch.autograd.grad(value * 2.0, weight)
    assert value > 0
    assert grad.abs().max() > 0
    rows = [1]
    assert loss(s.select(rows), t.select(rows), layout(inputs).select(rows)) > 0


def test_other_tokens_in_student_and_teacher_are_refused():
    inputs = image_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][1, 20] += 1
    _, s, t = captured_pair(inputs, other)
    loss = AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="full")
    with pytest.raises(TokenMismatchError):
        loss(s, t, layout(inputs))


def test_another_number_of_tokens_is_refused():
    inputs = image_inputs()
    shorter = {**inputs, **{k: inputs[k][:, :20] for k in ("input_ids", "attention_mask")}}
    _, s, t = captured_pair(inputs, shorter)
    loss = AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="full")
    with pytest.raises(TokenMismatchError):
        loss(s, t, layout(inputs))


# --- padding ------------------------------------------------------------------------------------

FULL = AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="full", loss="kl")


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_tokens_is_refused(side):
    """Padding was counted without a word: 0.53 instead of 0.31, though the captures know it."""
    inputs = image_inputs(padding=side)
    _, s, t = captured_pair(inputs, inputs)
    place = "sample 1, position 0" if side == "left" else "sample 1, position 19"
    with pytest.raises(ValueError, match=rf"tokens is None, but the student's .*{place}"):
        FULL(s, t, None)
    with pytest.raises(ValueError, match="tokens is None"):
        FULL(s.select([1]), t.select([1]), None)
    (target,) = attention_map_targets([(t[0].query, t[0].key)], [[0]], layout(inputs))
    with pytest.raises(ValueError, match="tokens is None"):
        FULL.with_targets(s, [target], None)
    assert FULL(s, t, layout(inputs)) > 0
    assert FULL.with_targets(s, [target], layout(inputs)) > 0


def test_without_padding_tokens_may_be_left_out():
    inputs = image_inputs(padding="left")
    _, s, t = captured_pair(inputs, inputs)
    whole = FULL(s.select([0]), t.select([0]), None)
    torch.testing.assert_close(
        whole, FULL(s.select([0]), t.select([0]), layout(inputs).select([0]))
    )


def test_tokens_that_count_padding_as_valid_are_refused():
    inputs = image_inputs(padding="left")
    _, s, t = captured_pair(inputs, inputs)
    tokens = TokenLayout.from_masks(inputs["input_ids"] == IMAGE)
    with pytest.raises(ValueError, match="tokens counts it as valid, but the student's attention"):
        FULL(s, t, tokens)


@pytest.mark.parametrize("padded", ["student", "teacher"])
@pytest.mark.parametrize("how", ["no mask", "a whole mask", "another mask"])
def test_other_padding_in_student_and_teacher_is_refused(padded, how):
    inputs = image_inputs(padding="left")
    other = {n: t for n, t in inputs.items() if how != "no mask" or n != "attention_mask"}
    if how == "a whole mask":
        other["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    elif how == "another mask":
        other["attention_mask"] = inputs["attention_mask"].clone()
        other["attention_mask"][1, 2:5] = 1
    pair = (inputs, other) if padded == "student" else (other, inputs)
    _, s, t = captured_pair(*pair)
    with pytest.raises(TokenMismatchError, match=r"different padding .* sample 1, position"):
        FULL(s, t, layout(inputs))
    first = "student" if how == "another mask" else padded
    with pytest.raises(ValueError, match=f"tokens is None, but the {first}'s"):
        FULL(s, t, None)


def test_padding_behind_the_last_token_need_not_be_masked_for_both():
    """Causal attention does not look there; the loss is the same to rounding."""
    inputs = image_inputs(padding="right")
    other = {name: each for name, each in inputs.items() if name != "attention_mask"}
    _, s, t = captured_pair(inputs, inputs)
    _, _, unmasked = captured_pair(inputs, other)
    torch.testing.assert_close(FULL(s, unmasked, layout(inputs)), FULL(s, t, layout(inputs)))


def test_padding_that_one_capture_does_not_tell_is_not_compared():
    """A 4D mask, and a capture of another maker."""
    inputs = image_inputs(padding="left")
    valid = inputs["attention_mask"].bool()
    whole = torch.ones(24, 24, dtype=torch.bool).tril() & valid[:, None, None]
    _, s, t = captured_pair({**inputs, "attention_mask": whole}, inputs)
    assert s.attention_mask is whole
    assert FULL(s, t, layout(inputs)) > 0
    assert FULL(s.select([1]), t.select([1]), layout(inputs).select([1])) > 0

    class Other:
        input_ids = None

        def __getitem__(self, layer):
            return s[layer]

    assert FULL(Other(), t, layout(inputs)) > 0


def test_padding_on_an_accelerator_is_compared_when_debugging_only(monkeypatch):
    """As ids are: nothing is read back in the hot path."""
    inputs = image_inputs(padding="left")
    _, s, t = captured_pair(inputs, inputs)
    monkeypatch.setattr("drivekd.losses._may_read", lambda *tensors: False)
    with NoHostRead():
        value = FULL(s, t, None)
    assert value > 0
    assert not _may_read(torch.empty(1, device="meta"), torch.empty(1))
    monkeypatch.setenv("DRIVEKD_DEBUG", "1")
    assert _may_read(torch.empty(1, device="meta"), torch.empty(1))
