"""What the trainer saves, and going on from it."""

import copy
from pathlib import Path

import pytest
import torch
import transformers

from drivekd.train import DistillConfig, ProjectionConfig
from tests.helpers.trainers import (
    SIGNALS,
    assert_same,
    weights_of,
)


@pytest.mark.parametrize("weighting", ["balance", "online", "static"])
def test_interrupted_run_equals_uninterrupted(make, base, tmp_path, weighting):
    """Bitwise, dropout, shuffling, accumulation and a second epoch included."""
    config = DistillConfig(
        signals=SIGNALS, weighting=weighting, projection=ProjectionConfig(every="microbatch")
    )
    student = copy.deepcopy(base["student"])
    for module in student.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
    changes = {
        "max_steps": 5,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
        "save_strategy": "steps",
        "save_steps": 3,
    }
    whole = copy.deepcopy(student)
    make(config, student=whole, output_dir=str(tmp_path / "whole"), **changes).train()
    resumed = copy.deepcopy(student)
    trainer = make(config, student=resumed, output_dir=str(tmp_path / "resumed"), **changes)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_same(weights_of(resumed), weights_of(whole))
    assert any((weights_of(whole)[n] != weights_of(student)[n]).any() for n in weights_of(whole))


def test_resume_needs_the_saved_state(make, models, tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make(DistillConfig(), **changes).train()
    with pytest.raises(ValueError, match="has no state of projection and weighting"):
        make(DistillConfig(signals=SIGNALS)).train(
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1")
        )


def test_teachers_are_frozen_and_never_saved(make, models, tmp_path):
    models["a"].train()
    before = {name: weights_of(models[name]) for name in "abc"}
    trainer = make(DistillConfig(signals=SIGNALS), save_strategy="steps", save_steps=2)
    trainer.train()
    for name in "abc":
        assert_same(weights_of(models[name]), before[name])
        assert not models[name].training
        assert not any(p.requires_grad or p.grad is not None for p in models[name].parameters())
    saved = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "run" / "checkpoint-2"
    )
    assert_same(weights_of(saved), weights_of(models["student"]))
    state = torch.load(tmp_path / "run" / "checkpoint-2" / "drivekd_state.pt", weights_only=True)
    assert set(state) == {"projector", "reweighting", "helpers", "total_loss"}
    size = (tmp_path / "run" / "checkpoint-2" / "drivekd_state.pt").stat().st_size
    assert size < 50_000


@pytest.mark.parametrize("steps", [3, 2])
def test_run_whose_last_checkpoint_has_all_steps_is_not_trained_further(make, models, steps):
    """Killed behind its last checkpoint, in the middle of an epoch; Trainer would do one more."""
    config = DistillConfig(signals=SIGNALS)
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = make(config, **settings)
    whole.train()
    wanted = weights_of(models["student"])
    again = copy.deepcopy(models["student"])
    resumed = make(config, student=again, **settings | {"max_steps": steps})
    resumed.train(resume_from_checkpoint="auto")
    assert resumed.state.global_step == 3
    assert_same(weights_of(again), wanted)
    folders = sorted(each.name for each in Path(whole.args.output_dir).glob("checkpoint-*"))
    assert folders == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
