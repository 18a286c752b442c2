"""`DistillMixin` before a Trainer of one's own: its losses, its scaling, its state."""

import contextlib
import copy
from pathlib import Path

import pytest
import torch
import transformers

import drivekd
from drivekd.data import Collator
from drivekd.errors import NonFiniteLossError
from drivekd.train import DistillConfig, DistillMixin, ProjectionConfig, SignalConfig
from tests.helpers import toy_data, toy_models
from tests.helpers.trainers import SETTINGS, assert_close, assert_same, weights_of

PERCEPTION = SignalConfig(
    name="perception",
    teacher="large",
    student_layers="first",
    teacher_layers="first",
    region="text_to_vision",
    weight=3.0,
)
WORDS = SignalConfig(name="words", teacher="large", kind="logits", weight=0.5)
PLAIN_SUM = {"weighting": "static", "projection": ProjectionConfig(method="none")}


class Distiller(DistillMixin, transformers.Trainer):
    pass


@pytest.fixture(scope="module")
def base():
    return {
        "student": toy_models.internvl(layers=2, hidden=32, seed=1),
        "large": toy_models.internvl(layers=3, hidden=48, seed=2),
    }


@pytest.fixture
def make(base, tmp_path):
    """A trainer over eight records with answers of one to three words."""
    records = toy_data.records(tmp_path, ("any",) * 8)
    collator = Collator(toy_data.encoder(tmp_path), base["student"].config, pad_token_id=0)

    def collate(samples):
        batch = collator(samples)
        return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}

    def make(config, *, cls=Distiller, student=None, teachers=None, **changes):
        settings = {
            **SETTINGS,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 1,
            "remove_unused_columns": False,
        }
        return cls(
            model=copy.deepcopy(base["student"]) if student is None else student,
            args=transformers.TrainingArguments(**settings | changes),
            data_collator=collate,
            train_dataset=records,
            distill=config,
            teachers={"large": copy.deepcopy(base["large"])} if teachers is None else teachers,
        )

    return make


def trained(trainer):
    trainer.train()
    return weights_of(trainer.model)


class SayNativeAmp(transformers.TrainerCallback):
    def __init__(self, accelerator):
        self.accelerator = accelerator

    def on_train_begin(self, *arguments, **state):
        self.accelerator.native_amp = True


ACCUMULATED = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


def test_one_batch_of_four_is_four_of_one_for_a_plain_sum_and_for_every_step(make, base):
    """Cross-entropy by token, signals by sample: answers have different numbers of tokens."""
    before = weights_of(base["student"])
    configs = (
        DistillConfig(signals=(PERCEPTION,), **PLAIN_SUM),
        DistillConfig(signals=(PERCEPTION,), projection=ProjectionConfig(every="step")),
    )
    for config in configs:
        whole, parts = (trained(make(config, **changes)) for changes in ({}, ACCUMULATED))
        # float32 sums in another order, and padding of other lengths.
        assert_close(parts, whole, before, relative=1e-4)


def test_projected_in_every_micro_batch_it_is_not(make, base):
    before = weights_of(base["student"])
    config = DistillConfig(signals=(PERCEPTION,), projection=ProjectionConfig(every="microbatch"))
    whole, parts = (trained(make(config, **changes)) for changes in ({}, ACCUMULATED))
    with pytest.raises(AssertionError):
        assert_close(parts, whole, before, relative=1e-2)


def test_cross_entropy_is_by_token_and_signals_by_micro_batch(make, base, tmp_path):
    """The gradients of a step by hand, from the means that the docstring promises."""
    trainer = make(DistillConfig(signals=(PERCEPTION,), **PLAIN_SUM), **ACCUMULATED)
    before = weights_of(base["student"])
    got = trained(trainer)
    student, teacher = copy.deepcopy(base["student"]), base["large"]
    batches = [trainer.data_collator([trainer.train_dataset[i]]) for i in range(4)]
    loss = drivekd.AttentionMapLoss(student_layers=[0], teacher_layers=[0], region="text_to_vision")
    tokens = sum(int((batch["labels"] != -100).sum()) for batch in batches)
    assert len({int((batch["labels"] != -100).sum()) for batch in batches}) > 1
    for batch in batches:
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        layout = drivekd.TokenLayout.from_batch(inputs, student.config)
        with torch.no_grad(), drivekd.capture_attention(teacher, [0]) as theirs:
            teacher(**inputs)
        with drivekd.capture_attention(student, [0]) as own:
            ce = student(**batch, num_items_in_batch=tokens).loss
        (ce + 3.0 * loss(own, theirs, layout) / 4).backward()
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad
    assert_close(got, weights_of(student), before, relative=1e-4)


def test_without_weight_of_the_signal_it_is_the_trainer_itself(make, base):
    """Same steps as plain Trainer's, accumulation, clipping and weight decay included."""
    before = weights_of(base["student"])
    changes = {"max_grad_norm": 0.3, "weight_decay": 0.1, "optim": "adamw_torch", "max_steps": 2}

    class Ours(DistillMixin, transformers.Trainer):
        def named_losses(self, model, inputs, num_items_in_batch=None):
            loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
            return {"ce": loss}

    class Plain(transformers.Trainer):
        def __init__(self, *, distill, teachers, **rest):
            super().__init__(**rest)

    ours, plain = (trained(make(None, cls=cls, **changes, **ACCUMULATED)) for cls in (Ours, Plain))
    # One product more (times and by the number of micro-batches), which Adam's first steps enlarge.
    assert_close(ours, plain, before, relative=1e-4)


@pytest.mark.parametrize("every", ["microbatch", "step"])
def test_fp16_scaler_and_clipping_see_unscaled_gradients(make, base, monkeypatch, every):
    """A run with a GradScaler is one without: Trainer unscales, clips and steps as ever."""
    config = DistillConfig(signals=(PERCEPTION,), projection=ProjectionConfig(every=every))
    before = weights_of(base["student"])

    def run(scaler):
        trainer = make(config, max_grad_norm=0.5, **ACCUMULATED)
        if scaler is not None:
            # Accelerate makes one on a GPU only. What it decides by is set after it has prepared
            # the model, which otherwise would compute in float16.
            trainer.accelerator.scaler = scaler
            monkeypatch.setattr(trainer.accelerator.state, "_mixed_precision", "fp16")
            monkeypatch.setattr(trainer.accelerator, "autocast", contextlib.nullcontext)
            trainer.add_callback(SayNativeAmp(trainer.accelerator))
        return trained(trainer)

    plain = run(None)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    # A power of two changes no digit; what is left is the order of one product.
    assert_close(run(scaler), plain, before, relative=1e-5)
    assert scaler._growth_tracker == 1, "its step was taken"


def test_teacher_is_frozen_and_not_saved(make, base, tmp_path):
    teacher = copy.deepcopy(base["large"])
    trainer = make(
        DistillConfig(signals=(PERCEPTION, WORDS)),
        teachers={"large": teacher},
        save_steps=1,
        save_strategy="steps",
    )
    trained(trainer)
    assert_same(weights_of(teacher), weights_of(base["large"]))
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    saved = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path / "run/checkpoint-1")
    assert_same(weights_of(saved), weights_of(trainer.model))


def test_log_has_losses_shares_and_cosines(make):
    trainer = make(DistillConfig(signals=(PERCEPTION,)), max_steps=2)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2
    keys = {"ce", "perception/loss", "perception/share", "perception/cosine_ce"}
    assert all(keys <= row.keys() for row in rows)
    assert all(row["perception/share"] == pytest.approx(0.1, rel=0.5) for row in rows)


def test_resumed_run_is_the_same_to_the_bit(make, base):
    config = DistillConfig(
        signals=(PERCEPTION, WORDS), weighting="online", projection=ProjectionConfig(seed=3)
    )
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "optim": "adamw_torch"}
    whole = make(config, **saving)
    whole.train()
    resumed = make(config, **saving)
    resumed.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-2")
    assert_same(weights_of(resumed.model), weights_of(whole.model))
    ended = make(config, **saving)
    ended.train(resume_from_checkpoint=f"{whole.args.output_dir}/checkpoint-3")
    assert ended.state.global_step == 3
    assert_same(weights_of(ended.model), weights_of(whole.model))
    checkpoint = Path(whole.args.output_dir) / "checkpoint-2"
    (checkpoint / "drivekd_mixin.pt").unlink()
    with pytest.raises(ValueError, match="not saved by a Trainer with DistillMixin"):
        make(config, **saving).train(resume_from_checkpoint=str(checkpoint))


def test_evaluation_is_the_trainers_own(make, base, tmp_path):
    trainer = make(DistillConfig(signals=(PERCEPTION,)))
    own = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    plain = transformers.Trainer(
        model=copy.deepcopy(base["student"]), args=trainer.args, data_collator=trainer.data_collator
    )
    assert own == plain.evaluate(trainer.train_dataset)["eval_loss"]


class Broken(DistillMixin, transformers.Trainer):
    def named_losses(self, model, inputs, num_items_in_batch=None):
        return {"perception": next(model.parameters()).sum() * float("nan")}


class Nan(Broken):
    def named_losses(self, *arguments):
        return {"ce": next(self.model.parameters()).sum(), **super().named_losses(*arguments)}


@pytest.mark.parametrize(
    ("config", "cls", "error", "message"),
    [
        (None, Distiller, TypeError, "give signals by distill=.*or override named_losses"),
        ({"signals": []}, Distiller, TypeError, "distill is a dict, wanted a DistillConfig"),
        (
            DistillConfig(signals=(PERCEPTION,), mixing={"any": {"perception": 1}}),
            Distiller,
            NotImplementedError,
            "mixing needs question types, which drivekd.train.DistillTrainer",
        ),
        (
            DistillConfig(
                signals=(
                    SignalConfig(
                        name="states",
                        teacher="large",
                        kind="hidden",
                        student_layers=0,
                        teacher_layers=0,
                    ),
                )
            ),
            Distiller,
            NotImplementedError,
            "'states' compares hidden states",
        ),
        (
            DistillConfig(signals=(SignalConfig(name="words", teacher="lrge", kind="logits"),)),
            Distiller,
            ValueError,
            "no teacher 'lrge'; did you mean 'large'",
        ),
        (None, Broken, ValueError, r"gave \['perception'\]; 'ce' must be among them"),
        (None, Nan, NonFiniteLossError, "step 1: losses are not finite: 'perception' is nan"),
    ],
)
def test_mistake_is_named(make, config, cls, error, message):
    with pytest.raises(error, match=message):
        make(config, cls=cls).train()
