"""Which teacher runs on which samples, and how far."""

import logging

import pytest

from drivekd.errors import TokenMismatchError
from drivekd.train import DistillConfig, SignalConfig
from tests.helpers import toy_data
from tests.helpers.trainers import LOGITS, SIGNALS, Forwards


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
