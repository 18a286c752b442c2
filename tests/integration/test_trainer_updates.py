"""The trainer's updates against plain loops."""

import copy

import pytest
import torch
import transformers

from drivekd.data import Collator
from drivekd.projection import GradientProjector
from drivekd.reweighting import BalancedWeights
from drivekd.train import DistillConfig, ProjectionConfig, SignalConfig
from drivekd.train.hidden import HiddenStateLoss
from drivekd.train.signals import ForwardOutput, Signal, SignalPlan, StudentCapture
from tests.helpers import toy_data, toy_models
from tests.helpers.trainers import (
    LOGITS,
    NO_PROJECTION,
    SIGNALS,
    TYPES,
    Forwards,
    assert_close,
    assert_same,
    batches,
    model_inputs,
    plain_losses,
    weights_of,
)


@pytest.mark.parametrize("method", ["agp", "pcgrad"])
def test_update_equals_a_plain_loop(make, models, tmp_path, method):
    projection = ProjectionConfig(method=method, seed=5)
    config = DistillConfig(signals=SIGNALS, projection=projection)
    before = copy.deepcopy(models["student"])
    trainer = make(config)
    trainer.train()
    got = weights_of(models["student"])

    models = {**models, "student": before.train()}
    start = weights_of(before)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.05)
    projector = GradientProjector(
        before.parameters(), method=method, seed=5, ce_multiplicity="once"
    )
    balance = BalancedWeights(0.1)
    for batch in batches(tmp_path, before.config, 4):
        losses, _ = plain_losses(models, batch)
        projector.backward(losses, weights=balance)
        optimizer.step()
        optimizer.zero_grad()
    # Not bitwise: Trainer divides the summed cross-entropy by its own count of tokens.
    assert_close(got, weights_of(before), start, relative=1e-4)


def test_static_sum_equals_a_plain_loop(make, models, tmp_path):
    signals = tuple(
        SignalConfig(**{**vars(signal), "weight": 30.0 * (i + 1)})
        for i, signal in enumerate(SIGNALS)
    )
    config = DistillConfig(
        signals=signals,
        weighting="static",
        projection=NO_PROJECTION,
        mixing={"sort": {"sort": 0.5}, "fold": {"fold": 2.0}, "wash": {"wash": 1.0}},
    )
    before = copy.deepcopy(models["student"])
    make(config, logging_steps=100).train()
    got = weights_of(models["student"])

    models = {**models, "student": before.train()}
    start = weights_of(before)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.05)
    for batch in batches(tmp_path, before.config, 4):
        losses, _ = plain_losses(models, batch, {"sort": 0.5, "fold": 2.0, "wash": 1.0})
        total = losses["ce"]
        for index, name in enumerate(("sort", "fold", "wash")):
            total = total + 30.0 * (index + 1) * losses.get(name, 0.0)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_close(got, weights_of(before), start, relative=1e-4)


def test_logging_steps_of_a_static_sum_compare_gradients_without_changing_them(make, models):
    config = DistillConfig(signals=SIGNALS, weighting="static", projection=NO_PROJECTION)
    start = weights_of(models["student"])
    other = copy.deepcopy(models["student"])
    trainer = make(config, logging_steps=1)
    trainer.train()
    make(config, student=other, logging_steps=100).train()
    assert_close(weights_of(models["student"]), weights_of(other), start, relative=1e-4)
    assert trainer.state.log_history[0]["sort/share"] > 0


def test_without_signals_it_is_transformers_trainer(make, models, tmp_path):
    other = copy.deepcopy(models["student"])
    trainer = make(DistillConfig(), gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer.train()
    assert trainer.plan is None and trainer.projector is None

    class Stripped(Collator):
        def __call__(self, records):
            batch = super().__call__(records)
            return {key: batch[key] for key in batch if isinstance(batch[key], torch.Tensor)}

    plain = transformers.Trainer(
        model=other,
        args=trainer.args,
        data_collator=Stripped(toy_data.encoder(tmp_path), other.config, pad_token_id=toy_data.PAD),
        train_dataset=toy_data.records(tmp_path, TYPES),
    )
    plain.train()
    assert_same(weights_of(models["student"]), weights_of(other))
    assert trainer.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]


def test_accumulation_weighs_tokens_alike_and_signals_by_micro_batch(make, models, tmp_path):
    """Two micro-batches in one step: cross-entropy per token of the step, signals averaged."""
    signals = (SignalConfig(**{**vars(SIGNALS[1]), "weight": 50.0}),)
    config = DistillConfig(
        signals=signals, weighting="static", projection=NO_PROJECTION, mixing={"fold": {"fold": 1}}
    )
    before = copy.deepcopy(models["student"])
    make(config, per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=1).train()
    got = weights_of(models["student"])

    models = {**models, "student": before.train()}
    start = weights_of(before)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.05)
    parts = batches(tmp_path, before.config, 4)
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in parts]
    assert counts[0] != counts[1]
    for batch, count in zip(parts, counts, strict=True):
        losses, _ = plain_losses(models, batch)
        (losses["ce"] * count / sum(counts) + 50.0 * losses["fold"] / 2).backward()
    optimizer.step()
    assert_close(got, weights_of(before), start, relative=1e-4)


@pytest.mark.parametrize("every", ["microbatch", "step"])
def test_projection_under_accumulation_equals_a_plain_loop(make, models, tmp_path, every):
    projection = ProjectionConfig(every=every, seed=2)
    config = DistillConfig(
        signals=SIGNALS,
        projection=projection,
        weighting_options={"ema": 0.5},
    )
    before = copy.deepcopy(models["student"])
    make(config, gradient_accumulation_steps=2, max_steps=1).train()
    got = weights_of(models["student"])

    models = {**models, "student": before.train()}
    start = weights_of(before)
    optimizer = torch.optim.SGD(before.parameters(), lr=0.05)
    projector = GradientProjector(before.parameters(), seed=2, ce_multiplicity="once", every=every)
    balance = BalancedWeights(0.1, ema=0.5)
    parts = batches(tmp_path, before.config, 4)
    counts = [(batch["labels"][:, 1:] != -100).sum() for batch in parts]
    for batch, count in zip(parts, counts, strict=True):
        losses, _ = plain_losses(models, batch)
        losses["ce"] = losses["ce"] * count * 2 / sum(counts)
        projector.backward(losses, weights=balance, scale=0.5)
    if every == "step":
        projector.step()
    optimizer.step()
    assert_close(got, weights_of(before), start, relative=1e-4)


def test_logit_signal_runs_the_whole_teacher_and_takes_part(make, models, tmp_path):
    count = Forwards(models["a"])
    config = DistillConfig(
        signals=(LOGITS, SIGNALS[0]),
        mixing={"sort": {"words": 1, "sort": 1}},
        weighting="static",
        projection=NO_PROJECTION,
    )
    before = copy.deepcopy(models["student"])
    make(config, logging_steps=100, max_steps=1).train()
    assert count.samples == [2] and count.layers == 3
    got = weights_of(models["student"])

    models = {**models, "student": before.train()}
    start = weights_of(before)
    batch = batches(tmp_path, before.config, 4)[0]
    losses, output = plain_losses({**models}, batch)
    rows = [0, 2]
    with torch.no_grad():
        theirs = models["a"](**model_inputs(batch, rows)).logits
    kl = []
    for own, other, labels in zip(output.logits[rows], theirs, batch["labels"][rows], strict=True):
        kept = [i for i in range(len(labels) - 1) if labels[i + 1] != -100]
        p = (other[kept] / 2).softmax(-1)
        kl.append(4 * (p * (p.log() - (own[kept] / 2).log_softmax(-1))).sum(-1).mean())
    (losses["ce"] + losses["sort"] + 2.0 * sum(kl) / 2).backward()
    torch.optim.SGD(before.parameters(), lr=0.05).step()
    assert_close(got, weights_of(before), start, relative=1e-4)


def test_evaluation_is_cross_entropy(make, tmp_path):
    trainer = make(DistillConfig(signals=SIGNALS), per_device_eval_batch_size=3)
    metrics = trainer.evaluate(toy_data.records(tmp_path, ("sort", "mend"), seed=9))
    assert metrics["eval_loss"] > 0


def test_bfloat16_autocast_trains(make, models):
    before = weights_of(models["student"])
    trainer = make(DistillConfig(signals=SIGNALS), bf16=True)
    trainer.train()
    after = weights_of(models["student"])
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert any((after[name] != before[name]).any() for name in after)
    assert trainer.state.log_history[0]["fold/share"] == pytest.approx(0.1, rel=1e-3)


def test_gradient_checkpointing_gives_the_same_update(make, models):
    start = weights_of(models["student"])
    other = copy.deepcopy(models["student"])
    make(DistillConfig(signals=SIGNALS)).train()
    make(
        DistillConfig(signals=SIGNALS),
        student=other,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    ).train()
    assert_close(weights_of(other), weights_of(models["student"]), start, relative=1e-4)


@pytest.mark.parametrize("method", ["agp", "none"])
def test_loss_scaling_leaves_the_update_alone(make, models, method):
    """fp16's GradScaler, which runs on the CPU too, around float32 models."""
    weighting = "balance" if method == "agp" else "static"
    config = DistillConfig(
        signals=SIGNALS, weighting=weighting, projection=ProjectionConfig(method=method)
    )
    start = weights_of(models["student"])
    other = copy.deepcopy(models["student"])
    make(config, logging_steps=100).train()
    scaled = make(config, student=other, logging_steps=100)
    scaled.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled.train()
    assert scaled.accelerator.scaler.get_scale() == 2.0**12
    assert_close(weights_of(other), weights_of(models["student"]), start, relative=1e-4)


def test_zero_of_an_absent_signal_reaches_what_its_loss_would(base):
    """An exact 0 whatever the values, with a gradient of zeros for the same parameters."""
    student, hidden = copy.deepcopy(base["student"]), torch.tensor([[float("nan")]])
    plan = SignalPlan(
        DistillConfig(signals=[*SIGNALS, LOGITS]), student, {n: base[n] for n in "abc"}, TYPES
    )
    with StudentCapture(student, plan.signals) as capture:
        logits = student(**toy_models.image_inputs(), use_cache=False).logits
    output = capture.output(logits)
    reached = {}
    for signal in plan.signals:
        zero = output.zero(signal)
        grads = torch.autograd.grad(
            zero, list(student.parameters()), retain_graph=True, allow_unused=True
        )
        assert zero.dtype == torch.float32 and zero.item() == 0.0
        assert all(grad is None or not grad.count_nonzero() for grad in grads)
        names = [name for name, _ in student.named_parameters()]
        reached[signal.config.name] = {
            name for name, grad in zip(names, grads, strict=True) if grad is not None
        }
    layer = "model.language_model.layers.{}.self_attn.{}_proj.weight"
    assert layer.format(0, "q") in reached["sort"] and layer.format(0, "k") in reached["sort"]
    assert layer.format(0, "v") not in reached["sort"]
    assert layer.format(1, "k") in reached["wash"] and layer.format(2, "k") not in reached["wash"]
    assert layer.format(2, "v") in reached["words"]
    output = ForwardOutput(None, {0: hidden.requires_grad_()}, None)
    loss = HiddenStateLoss(student_layers=[0], teacher_layers=[0], student_width=1, teacher_width=1)
    signal = Signal(SIGNALS[0], "route", {}, loss)
    assert output.zero(signal).item() == 0.0
