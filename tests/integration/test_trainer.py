import copy
import dataclasses
import json
import logging

import pytest
import torch
import transformers
from torch import nn
from transformers import TrainingArguments

from drivekd.capture import capture_attention
from drivekd.data import Collator
from drivekd.errors import TokenMismatchError
from drivekd.losses import AttentionMapLoss
from drivekd.projection import GradientProjector
from drivekd.reweighting import BalancedWeights
from drivekd.train import DistillConfig, DistillTrainer, JsonlLogger, ProjectionConfig, SignalConfig
from drivekd.train import trainer as trainer_module
from tests.helpers import toy_data, toy_models

# Not about driving on purpose: capabilities are whatever the data say.
TYPES = ("sort", "fold", "sort", "wash", "fold", "sort", "wash", "fold")
SIGNALS = (
    SignalConfig(
        name="sort",
        teacher="a",
        student_layers="first",
        teacher_layers="first",
        region="text_to_vision",
    ),
    SignalConfig(
        name="fold", teacher="b", student_layers="0..-2", teacher_layers="0..-2", region="full"
    ),
    SignalConfig(
        name="wash",
        teacher="c",
        student_layers="penultimate",
        teacher_layers="penultimate",
        region="text_to_vision",
    ),
)
LOGITS = SignalConfig(name="words", teacher="a", kind="logits", weight=2.0)
NO_PROJECTION = ProjectionConfig(method="none")


@pytest.fixture(scope="module")
def base():
    """Student with 3 layers; teachers with 3, 5 and 4 layers and other head counts."""
    return {
        "student": toy_models.internvl(layers=3, hidden=32, heads=4, kv_heads=2, seed=1),
        "a": toy_models.internvl(layers=3, hidden=64, heads=4, kv_heads=4, seed=2),
        "b": toy_models.internvl(layers=5, hidden=48, heads=6, kv_heads=2, seed=3),
        "c": toy_models.internvl(layers=4, hidden=32, heads=2, kv_heads=1, seed=4),
    }


@pytest.fixture
def models(base):
    return {name: copy.deepcopy(model) for name, model in base.items()}


@pytest.fixture
def make(models, tmp_path):
    """Make a trainer over eight records in order; changes are TrainingArguments."""

    def make(config, *, student=None, teachers=None, records=None, callbacks=None, **changes):
        settings = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 0.05,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "report_to": "none",
            "save_strategy": "no",
            "logging_steps": 1,
            "use_cpu": True,
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": False,
        }
        settings |= changes
        student = models["student"] if student is None else student
        records = toy_data.records(tmp_path, TYPES) if records is None else records
        return DistillTrainer(
            student,
            {n: models[n] for n in "abc"} if teachers is None else teachers,
            config,
            args=TrainingArguments(**settings),
            data_collator=make_collator(tmp_path, student.config),
            train_dataset=records,
            callbacks=callbacks,
        )

    return make


def make_collator(root, config):
    return Collator(toy_data.encoder(root), config, pad_token_id=toy_data.PAD)


def weights_of(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    different = [name for name in got if not torch.equal(got[name], wanted[name])]
    assert not different, different[:5]


def assert_close(got, wanted, before, *, relative):
    """Largest difference of two updates against the largest update."""
    moved = max((wanted[name] - before[name]).abs().max().item() for name in wanted)
    assert moved > 0
    error = max((got[name] - wanted[name]).abs().max().item() for name in wanted)
    assert error <= relative * moved, (error, moved)


def model_inputs(batch, rows):
    return {
        "input_ids": batch["input_ids"][rows],
        "attention_mask": batch["attention_mask"][rows],
        "pixel_values": batch["pixel_values"][rows],
    }


def plain_losses(models, batch, weights=None):
    """The three signals of SIGNALS by hand: every teacher whole, on its rows."""
    losses = {}
    specs = {
        "sort": ("a", [0], [0], "text_to_vision"),
        "fold": ("b", [0, 1], [0, 1, 2, 3], "full"),
        "wash": ("c", [1], [2], "text_to_vision"),
    }
    with capture_attention(models["student"], [0, 1]) as student:
        inputs = model_inputs(batch, slice(None))
        output = models["student"](**inputs, labels=batch["labels"], use_cache=False)
    for name, (teacher, own, theirs, region) in specs.items():
        rows = [i for i, kind in enumerate(batch["question_types"]) if kind == name]
        if not rows:
            continue
        with torch.no_grad(), capture_attention(models[teacher], theirs) as captured:
            models[teacher](**model_inputs(batch, rows), use_cache=False)
        loss = AttentionMapLoss(student_layers=own, teacher_layers=theirs, region=region)
        weight = None if weights is None else torch.full((len(rows),), weights[name])
        losses[name] = loss(student.select(rows), captured, batch["tokens"].select(rows), weight)
    return {"ce": output.loss, **losses}, output


def batches(root, config, size):
    records = toy_data.records(root, TYPES)
    collator = make_collator(root, config)
    return [collator(records[i : i + size]) for i in range(0, len(records), size)]


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


class Forwards:
    """Counts a model's calls and the samples in them."""

    def __init__(self, model):
        self.samples = []
        self.layers = 0
        model.register_forward_pre_hook(self._call, with_kwargs=True)
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(self._layer)

    def _call(self, module, args, kwargs):
        self.samples.append(len(kwargs["input_ids"]))

    def _layer(self, module, args):
        self.layers += 1


def test_teachers_see_their_samples_only_and_stop_early(make, models):
    counts = {name: Forwards(models[name]) for name in "abc"}
    make(DistillConfig(signals=SIGNALS)).train()
    # TYPES in batches of four: sort 2 + 1, fold 1 + 2, wash 1 + 1.
    assert {name: count.samples for name, count in counts.items()} == {
        "a": [2, 1],
        "b": [1, 2],
        "c": [1, 1],
    }
    assert (counts["a"].layers, counts["b"].layers, counts["c"].layers) == (2, 8, 6)


def off(signal):
    return dataclasses.replace(signal, weight=0.0)


def test_a_signal_with_the_static_weight_0_costs_nothing(make, models, monkeypatch):
    """No teacher forward, no capture of its layers, no loss, and the update is as without it."""
    asked, capture = [], trainer_module.capture_attention

    def capturing(model, layers, **settings):
        asked.append(tuple(layers))
        return capture(model, layers, **settings)

    monkeypatch.setattr(trainer_module, "capture_attention", capturing)
    counts = {name: Forwards(models[name]) for name in "abc"}
    start = copy.deepcopy(models["student"])
    some = make(
        DistillConfig(signals=(SIGNALS[0], off(SIGNALS[1]), off(SIGNALS[2])), weighting="static")
    )
    some.train()
    assert {name: count.samples for name, count in counts.items()} == {
        "a": [2, 1],
        "b": [],
        "c": [],
    }
    assert asked == [(0,), (0,)]
    assert {signal.config.name for signal in some.plan.signals} == {"sort"}
    got = weights_of(models["student"])
    alone = make(DistillConfig(signals=SIGNALS[:1], weighting="static"), student=start)
    alone.train()
    assert_same(got, weights_of(start))


def test_with_all_signals_off_it_is_plain_training(make, models):
    counts = {name: Forwards(models[name]) for name in "abc"}
    trainer = make(DistillConfig(signals=[off(each) for each in SIGNALS], weighting="static"))
    trainer.train()
    assert trainer.plan is None
    assert not any(count.samples for count in counts.values())


def test_a_teacher_of_two_signals_stops_after_the_layer_of_the_one_that_is_on(make, models):
    count = Forwards(models["a"])
    early, late = (
        SignalConfig(
            name=name, teacher="a", student_layers=layer, teacher_layers=layer, region="full",
        )
        for name, layer in (("early", 0), ("late", 2))
    )  # fmt: skip
    make(DistillConfig(signals=(early, off(late)), weighting="static")).train()
    assert count.layers == 2  # the first layer in each of two steps


def test_the_weight_0_is_no_switch_under_other_weightings():
    signal = off(SIGNALS[0])
    assert DistillConfig(signals=[signal], weighting="balance").active == (signal,)
    assert DistillConfig(signals=[signal], weighting="online").active == (signal,)
    assert DistillConfig(signals=[signal], weighting="static").active == ()


def test_signals_with_one_teacher_and_the_same_samples_share_a_forward(make, models):
    count = Forwards(models["a"])
    first, second = (
        SignalConfig(
            name=name,
            teacher=teacher,
            student_layers=layer,
            teacher_layers=layer,
            region="full",
        )
        for name, teacher, layer in (("early", "a", 0), ("late", "again", 1))
    )
    trainer = make(
        DistillConfig(signals=(first, second)), teachers=dict.fromkeys(("a", "again"), models["a"])
    )
    assert len(trainer.plan.routes) == 1
    trainer.train()
    assert count.samples == [4, 4]
    assert count.layers == 4


def test_batch_without_samples_of_a_signal_trains_on_the_rest(make, models, tmp_path):
    count = Forwards(models["c"])
    records = toy_data.records(tmp_path, ("sort", "sort", "wash", "sort"))
    config = DistillConfig(signals=(SIGNALS[0], SIGNALS[2]))
    trainer = make(config, records=records, per_device_train_batch_size=2)
    trainer.train()
    assert count.samples == [1]
    assert "wash/loss" not in trainer.state.log_history[0]
    assert "wash/loss" in trainer.state.log_history[1]


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
    with pytest.raises(ValueError, match=r"has no drivekd_state\.pt"):
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
    assert set(state) == {"projector", "reweighting"}
    size = (tmp_path / "run" / "checkpoint-2" / "drivekd_state.pt").stat().st_size
    assert size < 50_000


def test_logs_losses_weights_shares_and_conflicts(make, tmp_path):
    trainer = make(DistillConfig(signals=SIGNALS), callbacks=[JsonlLogger()], logging_steps=2)
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    row = rows[0]
    columns = ["loss", "weight", "share_raw", "share", "cosine_ce"]
    columns += ["conflict_ce", "conflict_others"]
    assert row["step"] == 2 and row["ce"] == pytest.approx(row["loss"], rel=1e-5)
    for name in ("sort", "fold", "wash"):
        assert {f"{name}/{column}" for column in columns} <= set(row)
        assert row[f"{name}/share_raw"] > 0 and -1 <= row[f"{name}/cosine_ce"] <= 1
        assert row[f"{name}/conflict_ce"] in (0.0, 0.5, 1.0)
    assert len(rows) == 2 and "train_runtime" in rows[1]


def test_balance_starts_at_its_share(make):
    trainer = make(DistillConfig(signals=SIGNALS), max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["sort/share"] == pytest.approx(0.1, rel=1e-4)
    assert row["sort/weight"] == pytest.approx(0.1 / row["sort/share_raw"], rel=1e-4)


def test_small_signal_is_reported_once(make, caplog):
    signals = tuple(SignalConfig(**{**vars(s), "weight": 1e-6}) for s in SIGNALS[:1])
    config = DistillConfig(
        signals=signals, weighting="static", mixing={kind: {"sort": 1} for kind in set(TYPES)}
    )
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        make(config, max_steps=12, per_device_train_batch_size=1, logging_steps=2).train()
    messages = [r.getMessage() for r in caplog.records if "next to nothing" in r.getMessage()]
    assert len(messages) == 1 and "'sort'" in messages[0]


def test_loss_that_is_not_finite_names_signal_and_records(make, models):
    with torch.no_grad():
        models["b"].model.language_model.layers[0].self_attn.q_proj.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"step 1: .*'fold': nan.*fold-1.*wash-3") as caught:
        make(DistillConfig(signals=SIGNALS)).train()
    assert "'sort'" not in str(caught.value).split("records of")[0]


def test_plain_loss_that_is_not_finite_names_records(make, models):
    with torch.no_grad():
        models["student"].lm_head.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"'ce': nan.*sort-0"):
        make(DistillConfig()).train()


def test_out_of_memory_goes_on_with_advice(make, models):
    class Full(nn.Module):
        def forward(self, *args, **kwargs):
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make(DistillConfig(signals=SIGNALS))
    models["a"].model.language_model.layers[0].mlp = Full()
    models["student"].model.language_model.layers[0].mlp = Full()
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory") as caught:
        trainer.train()
    assert any("per_device_train_batch_size" in note for note in caught.value.__notes__)


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


def test_mistakes_are_named(make, models, tmp_path):
    config = DistillConfig(signals=SIGNALS)
    with pytest.raises(ValueError, match="there is no teacher 'b'; valid are: a, c"):
        make(config, teachers={"a": models["a"], "c": models["c"]})
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


def test_other_vocabulary_is_refused_for_logits(make, models):
    models["a"].resize_token_embeddings(330)
    with pytest.raises(TokenMismatchError, match="320 entries and the teacher's 330"):
        make(DistillConfig(signals=(LOGITS,))).train()


def test_other_collators_are_refused(models, tmp_path):
    with pytest.raises(TypeError, match=r"wanted drivekd.data.Collator"):
        DistillTrainer(
            models["student"],
            {n: models[n] for n in "abc"},
            DistillConfig(signals=SIGNALS),
            args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
            train_dataset=toy_data.records(tmp_path, TYPES),
        )


def test_unused_teacher_is_not_loaded(make, models, caplog):
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        make(DistillConfig(signals=SIGNALS[:1]), teachers={"a": models["a"], "z": "nowhere"})
    assert "no signal uses the teachers z" in caplog.text


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
