"""The hidden-state baseline."""

import copy

import pytest
import torch
import transformers

from drivekd.errors import CaptureError
from drivekd.train import DistillConfig, ProjectionConfig, SignalConfig
from drivekd.train.hidden import HiddenStateLoss, capture_hidden_states
from tests.helpers import toy_models
from tests.helpers.trainers import assert_same, weights_of

HIDDEN = SignalConfig(
    name="fold", teacher="b", kind="hidden", student_layers="0..-2", teacher_layers="0..-2"
)


def test_value_equals_the_definition():
    generator = torch.Generator().manual_seed(0)

    def states(layers, width):
        return {n: torch.randn(3, 5, width, generator=generator) for n in layers}

    loss = HiddenStateLoss(
        student_layers=[0, 1], teacher_layers=[0, 1, 2], student_width=4, teacher_width=6
    )
    student, teacher = states([0, 1], 4), states([0, 1, 2], 6)
    valid = torch.arange(5) < torch.tensor([[5], [3], [1]])
    weight = torch.tensor([1.0, 0.5, 2.0])
    got = loss(student, teacher, valid, weight)
    for layer, group in enumerate([[0, 1], [1, 2]]):
        target = sum(teacher[n] for n in group) / 2
        wanted = 0.0
        for b in range(3):
            rows = [
                (loss.maps[layer](student[layer][b, i]) - target[b, i]).square().mean()
                for i in range(5)
                if valid[b, i]
            ]
            wanted = wanted + weight[b] * sum(rows) / len(rows) / 3
        torch.testing.assert_close(got[layer], wanted, rtol=1e-5, atol=0)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_captures_what_the_layers_return(checkpointing):
    model = toy_models.qwen2(layers=3).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = toy_models.text_inputs()
    with capture_hidden_states(model, [0, 1]) as states:
        output = model(**inputs, output_hidden_states=True, use_cache=False)
    for layer in (0, 1):
        assert torch.equal(states[layer], output.hidden_states[layer + 1])
    states[1].square().mean().backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    assert model.model.layers[2].mlp.up_proj.weight.grad is None


def test_capture_without_a_forward_is_refused():
    model = toy_models.qwen2(layers=2)
    with (
        pytest.raises(CaptureError, match=r"layers \[1\] did not run"),
        capture_hidden_states(model, [1]),
    ):
        pass
    assert not model.model.layers[1]._forward_hooks


def test_maps_are_trained_and_resumed_but_not_saved_with_the_student(make, base, tmp_path):
    config = DistillConfig(
        signals=(HIDDEN,), weighting="static", projection=ProjectionConfig(method="none")
    )
    changes = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = copy.deepcopy(base["student"])
    trainer = make(config, student=whole, **changes)
    before = weights_of(trainer.plan.helpers)
    trainer.train()
    after = weights_of(trainer.plan.helpers)
    assert all((after[name] != before[name]).any() for name in after)
    folder = tmp_path / "run" / "checkpoint-4"
    saved = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert_same(weights_of(saved), weights_of(whole))

    resumed = copy.deepcopy(base["student"])
    again = make(config, student=resumed, **changes | {"output_dir": str(tmp_path / "again")})
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same(weights_of(resumed), weights_of(whole))
    assert_same(weights_of(again.plan.helpers), after)
    assert {"fold/layer_0", "fold/layer_1"} <= set(again.state.log_history[-2])


def test_gradients_of_the_maps_are_cleared_after_each_update(make):
    config = DistillConfig(signals=(HIDDEN,), projection=ProjectionConfig(method="agp"))
    trainer = make(config, max_steps=3, per_device_train_batch_size=2)
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    norms = []
    for _ in range(2):
        trainer.training_step(trainer.model, batch)
        norms.append([own.grad.norm() for own in trainer.plan.helpers.parameters()])
    for first, second in zip(*norms, strict=True):
        # The weights move a little between the two; a sum would be twice as large.
        assert 0 < second < 1.5 * first
