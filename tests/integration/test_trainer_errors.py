"""What stops the trainer, and what the message says."""

import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from drivekd.errors import (
    NonFiniteLossError,
    RecipeError,
    TokenMismatchError,
    TrainingMemoryError,
)
from drivekd.train import DistillConfig, DistillTrainer, SignalConfig
from tests.helpers import toy_data
from tests.helpers.trainers import SIGNALS, TYPES, weights_of


def test_loss_that_is_not_finite_names_signal_layers_and_records(make, models):
    """Layer 1 of the teacher is in the groups of both student layers, layer 3 only in the last."""
    with torch.no_grad():
        models["b"].model.language_model.layers[3].self_attn.q_proj.weight.fill_(float("nan"))
    message = r"step 1: .*'fold' is nan, student layers 1, records fold-1\. Look"
    with pytest.raises(NonFiniteLossError, match=message) as caught:
        make(DistillConfig(signals=SIGNALS)).train()
    assert "'sort'" not in str(caught.value) and "wash" not in str(caught.value)


def test_plain_loss_that_is_not_finite_names_records(make, models):
    with torch.no_grad():
        models["student"].lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"'ce' is nan, records sort-0, fold-1, sort-2"):
        make(DistillConfig()).train()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
    ids=["device", "host", "python"],
)
def test_out_of_memory_says_which_settings_to_change(make, models, error):
    """It is never a loss of 0: the step does not happen."""

    class Full(nn.Module):
        def forward(self, *args, **kwargs):
            raise error

    start = weights_of(models["student"])
    trainer = make(DistillConfig(signals=SIGNALS))
    models["student"].model.language_model.layers[0].mlp = Full()
    with pytest.raises(TrainingMemoryError, match="out of memory") as caught:
        trainer.train()
    assert caught.value.__cause__ is error
    for change in (
        "per_device_train_batch_size=2 with training.gradient_accumulation_steps=2",
        "gradient_checkpointing=true",
        "projection.method=none",
        "fewer student_layers",
    ):
        assert change in str(caught.value)
    assert not trainer.state.log_history
    after = weights_of(models["student"])
    assert all(torch.equal(after[name], start[name]) for name in after)


def test_other_runtime_errors_go_on_as_they_are(make, models):
    class Broken(nn.Module):
        def forward(self, *args, **kwargs):
            raise RuntimeError("shapes do not fit")

    models["student"].model.language_model.layers[0].mlp = Broken()
    with pytest.raises(RuntimeError, match="shapes do not fit") as caught:
        make(DistillConfig(signals=SIGNALS)).train()
    assert type(caught.value) is RuntimeError


def test_mistakes_are_named(make, models, tmp_path):
    config = DistillConfig(signals=SIGNALS)
    with pytest.raises(ValueError, match="there is no teacher 'b'; valid are: a, c"):
        make(config, teachers={"a": models["a"], "c": models["c"]})
    with pytest.raises(TypeError, match="teachers is a list, wanted a mapping from names to"):
        make(config, teachers=[models["a"]])
    with pytest.raises(ValueError, match="shares parameters with the student"):
        make(config, teachers=dict.fromkeys("abc", models["student"]))
    with pytest.raises(TypeError, match=r"teachers\['a'\] is a int"):
        make(config, teachers=dict.fromkeys("abc", 3))
    deep = SignalConfig(**{**vars(SIGNALS[0]), "student_layers": 7})
    with pytest.raises(ValueError, match=r"signal 'sort'.*7"):
        make(DistillConfig(signals=(deep,)))
    with pytest.raises(ValueError, match="question type 'iron', which the data do not have"):
        make(DistillConfig(signals=SIGNALS, mixing={"iron": {"sort": 1}}))
    models["a"].config.image_token_id = 17
    with pytest.raises(TokenMismatchError, match="teacher 'a' has image_token_id 17"):
        make(config)
    with pytest.raises(TypeError, match="wanted DistillConfig"):
        make({"signals": []})


def test_other_collators_are_refused(models, tmp_path):
    with pytest.raises(TypeError, match=r"wanted drivekd.data.Collator"):
        DistillTrainer(
            models["student"],
            {n: models[n] for n in "abc"},
            DistillConfig(signals=SIGNALS),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=toy_data.records(tmp_path, TYPES),
        )


def test_processes_that_would_each_train_alone_are_refused(make, monkeypatch):
    """On CPUs Trainer finds the others only with use_cpu; all would write the same files."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    with pytest.raises(RecipeError, match=r"2 processes but each would train alone.*use_cpu=true"):
        make(DistillConfig(), use_cpu=False)
