"""Captures of a student and its teacher meet in the loss."""

import pytest
import torch

from drivekd.capture import capture_attention
from drivekd.errors import TokenMismatchError
from drivekd.losses import AttentionMapLoss
from drivekd.tokens import TokenLayout
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
