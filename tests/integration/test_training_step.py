"""The training step that benchmarks time: every way does what it says, on toy models in float32."""

import collections
import time

import pytest
import torch

from benchmarks.shapes import GPU_STEPS, MODEL_GRADIENTS, TOY_STEP
from benchmarks.training_step import CAPABILITIES, TASKS, TrainingStep, internvl
from drivekd.losses import AttentionMapLoss


@pytest.fixture
def step():
    return TrainingStep(TOY_STEP, device="cpu", dtype=torch.float32)


def test_the_models_are_as_large_as_those_they_are_named_after():
    shape = GPU_STEPS["step-6-views"]
    sizes = {}
    for name, decoder in (("student", shape.student), ("teacher", shape.teacher)):
        model = internvl(
            decoder, shape.tower, image_token=9, device="meta", dtype=torch.bfloat16, seed=0
        )
        head = 0 if decoder.tied else model.lm_head.weight.numel()
        sizes[name] = head + sum(each.numel() for each in model.model.language_model.parameters())
        tower = sum(each.numel() for each in model.model.vision_tower.parameters())
        assert tower == pytest.approx(304e6, rel=0.01)  # InternViT-300M-448px
    assert sizes["student"] == MODEL_GRADIENTS.elements
    assert sizes["teacher"] == 7_615_616_512  # Qwen2.5-7B
    assert shape.num_tokens == 2048


def parameters_of(grads):
    return {place for place, grad in enumerate(grads) if grad is not None}


# At 0.3 of cross-entropy's norm only the first stage has conflicts, at 30 times both.
@pytest.mark.parametrize("share", [0.3, 30.0])
def test_losses_gradients_and_update_are_those_of_the_public_procedure(step, share):
    step.balance(share)
    found = step.agreement()
    assert set(found["loss_errors"]) == set(found["gradient_cosines"]) == set(TASKS)
    assert max(found["loss_errors"].values()) < 1e-6
    assert min(found["gradient_cosines"].values()) > 1 - 1e-7
    assert found["update_error"] < 1e-5
    assert found["update_cosine"] > 1 - 1e-7


def test_the_weights_are_such_that_projection_has_work_to_do(step):
    step.balance(30.0)
    report = step.projector.backward(step.drivekd_losses(), weights=step.weights)
    norms = dict(zip(report.names, report.norms * report.loss_weights, strict=True))
    for name in CAPABILITIES:
        assert float(norms[name] / norms["ce"]) == pytest.approx(30, rel=1e-4)
    assert report.conflicts[0].any() and report.conflicts[1:, 1:].any()


def test_a_wrong_loss_would_show(step):
    """For example the teacher's layer beside the right one."""
    step.losses["planning"] = AttentionMapLoss(
        student_layers=[-2], teacher_layers=[-3], region="text_to_vision"
    )
    step.balance(0.3)
    found = step.agreement()
    assert found["loss_errors"]["planning"] > 0.05
    assert found["gradient_cosines"]["planning"] < 0.9
    assert found["update_error"] > 0.05


def test_every_way_leaves_an_update_and_the_same_cross_entropy(step):
    losses = {}
    for name, way in step.ways.items():
        losses[name] = way()
        assert any(parameter.grad is not None for parameter in step.parameters)
        step.clear()
        assert all(parameter.grad is None for parameter in step.parameters)
    for found in losses.values():
        torch.testing.assert_close(found[0], losses["plain"][0], rtol=1e-6, atol=0)
    assert len(losses["drivekd"]) == len(losses["public"]) == len(TASKS)


def test_the_plain_step_goes_as_deep_as_the_tasks_and_no_deeper(step, monkeypatch):
    """A lower bound: all that drivekd reaches but what a last layer's q and k hang on."""
    names = [name for name, parameter in step.student.named_parameters() if parameter.requires_grad]
    ours = step.public_gradients(step.drivekd_losses())
    reached = []

    def differentiate(output, seed):
        grads = torch.autograd.grad(
            output, step.parameters, seed, retain_graph=True, allow_unused=True
        )
        reached.append(parameters_of(grads))

    monkeypatch.setattr(step, "_differentiate", differentiate)
    step.plain()
    assert len(reached) == len(CAPABILITIES)
    for name, plain in zip(CAPABILITIES, reached, strict=True):
        drivekd = parameters_of(ours[name])
        assert plain < drivekd
        last = step.losses[name].student_layers[-1]
        left = {names[place] for place in drivekd - plain}
        own = f"layers.{last}."
        assert all(
            own in each and ("q_proj" in each or "k_proj" in each or "input_layernorm" in each)
            for each in left
        )


@pytest.mark.parametrize("way", ["drivekd", "plain", "plain-ce", "public"])
def test_the_parts_of_a_step_are_all_of_it(step, way):
    step.ways[way]()
    step.clear()
    begin = time.perf_counter()
    parts = step.phases(way)
    passed = 1e3 * (time.perf_counter() - begin)
    assert {"student"} < set(parts) and all(part > 0 for part in parts.values())
    assert sum(parts.values()) == pytest.approx(passed, rel=0.3)
    before = dict(parts)
    step.ways[way]()
    assert parts == before  # nobody asks any more


def test_teachers_run_as_far_in_the_plain_step_as_in_drivekds(step):
    calls = collections.Counter()
    way = ""
    for layer in step.teacher.model.language_model.layers:
        layer.register_forward_pre_hook(lambda *_: calls.update([way]))
    for way in ("drivekd", "plain", "plain-ce", "public"):
        step.ways[way]()
        step.clear()
    depth = TOY_STEP.teacher.layers
    wanted = 1 + 2 * (depth - 1)
    assert calls == {
        "drivekd": wanted, "plain": wanted, "plain-ce": wanted, "public": 3 * depth
    }  # fmt: skip
