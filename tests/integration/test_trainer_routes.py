"""Which teacher runs on which samples, and how far."""

import copy
import dataclasses
import logging

import pytest

from drivekd.errors import TokenMismatchError
from drivekd.train import DistillConfig, SignalConfig
from drivekd.train import signals as signals_module
from tests.helpers import toy_data
from tests.helpers.trainers import LOGITS, SIGNALS, Forwards, assert_same, weights_of


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


def test_unused_teacher_is_not_loaded(make, models, caplog):
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        make(DistillConfig(signals=SIGNALS[:1]), teachers={"a": models["a"], "z": "nowhere"})
    assert "no signal uses the teachers z" in caplog.text


def test_other_vocabulary_is_refused_for_logits(make, models):
    models["a"].resize_token_embeddings(330)
    with pytest.raises(TokenMismatchError, match="320 entries and the teacher's 330"):
        make(DistillConfig(signals=(LOGITS,))).train()


def off(signal):
    return dataclasses.replace(signal, weight=0.0)


def test_a_signal_with_the_static_weight_0_costs_nothing(make, models, monkeypatch):
    """No teacher forward, no capture of its layers, no loss, and the update is as without it."""
    asked, capture = [], signals_module.capture_attention

    def capturing(model, layers, **settings):
        if not settings:  # the student's; teachers stop early
            asked.append(tuple(layers))
        return capture(model, layers, **settings)

    monkeypatch.setattr(signals_module, "capture_attention", capturing)
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
