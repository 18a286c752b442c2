"""One student in a mode of training, beside a plain one with eager attention."""

from __future__ import annotations

import torch

from drivekd.capture import capture_attention
from drivekd.capture.model import find_decoder
from drivekd.losses import AttentionMapLoss
from drivekd.study.eager import eager_loss
from tests.helpers.maps import assert_gradients_equal, gradients
from tests.helpers.toy_models import FAMILIES, layout_of


def fused_and_eager(family, prepare, padding="left"):
    """Loss and gradients of a prepared student the fused way, and of a plain one the eager way."""
    make = FAMILIES[family]
    inputs = make.inputs(padding=padding)
    tokens = layout_of(inputs)
    region = "text_to_vision" if bool(tokens.is_vision.any()) else "full"
    settings = AttentionMapLoss(
        student_layers=[0, 2], teacher_layers=[0, 1, 3], region=region, groups=[[0], [1, 2]]
    )
    teacher = make.model(layers=5, seed=5).requires_grad_(False)
    with torch.no_grad(), capture_attention(teacher, settings.teacher_layers) as targets:
        teacher(**inputs, use_cache=False)
    student = prepare(make.model(layers=4, seed=1))
    with capture_attention(student, settings.student_layers) as own:
        student(**inputs, use_cache=False)
    loss = settings(own, targets, tokens)
    found = gradients(student, loss)
    plain = prepare_names(prepare, make.model(layers=4, seed=1))
    for model in (plain, teacher):
        model.set_attn_implementation("eager")
    expected = eager_loss(plain, teacher, inputs, tokens, settings)
    return loss, found, expected, gradients(plain, expected)


def prepare_names(prepare, model):
    """Adapters change which parameters there are; every other mode leaves the plain model."""
    return prepare(model) if prepare is lora else model


def plainly(model):
    return model


def checkpointed(model):
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    return model


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(5)
    names = ("q_proj", "k_proj", "down_proj")
    targets = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.endswith(names) and "vis" not in name
    ]
    return get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False))


def captured_loss(student, teacher, inputs, tokens, settings):
    """The fused loss of captured records; the teacher stops after its last layer."""
    targets = capture_attention(teacher, settings.teacher_layers, stop_after_last=True)
    with torch.no_grad(), targets:
        assert teacher(**inputs, use_cache=False) is None
    with capture_attention(student, settings.student_layers) as own:
        student(**inputs, use_cache=False)
    return settings(own, targets, tokens)


def assert_like_eager(student, teacher, inputs, tokens, settings, *, more_than=20):
    """Loss and gradients against maps of eager attention; leaves both models with it."""
    loss = captured_loss(student, teacher, inputs, tokens, settings)
    found = gradients(student, loss)
    for model in (student, teacher):
        find_decoder(model).set_attn_implementation("eager")
    expected = eager_loss(student, teacher, inputs, tokens, settings)
    assert expected > 1e-5
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_gradients_equal(found, gradients(student, expected), more_than=more_than)
