"""What the trainer logs."""

import json
import logging

import pytest

from drivekd.train import DistillConfig, JsonlLogger, SignalConfig
from tests.helpers.trainers import (
    SIGNALS,
    TYPES,
)


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
