"""What the trainer logs."""

import json
import logging

import pytest

from drivekd.train import DistillConfig, JsonlLogger, ProjectionConfig, SignalConfig
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


@pytest.mark.parametrize("every", ["microbatch", "step"])
@pytest.mark.parametrize("multiplicity", ["once", "official"])
@pytest.mark.parametrize("method", ["none", "stage1", "stage2", "agp", "pcgrad"])
def test_projected_says_whether_a_projection_changed_the_update(make, method, multiplicity, every):
    projection = ProjectionConfig(method=method, ce_multiplicity=multiplicity, every=every)
    trainer = make(
        DistillConfig(signals=SIGNALS, projection=projection),
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1 if every == "microbatch" else 2,
    )
    trainer.train()
    for row in trainer.state.log_history[:-1]:
        against_ce = any(row.get(f"{n}/conflict_ce") for n in ("sort", "fold", "wash"))
        others = any(value for key, value in row.items() if key.startswith("conflict/"))
        assert row["projected"] in (0.0, 1.0)
        if method == "none":
            assert row["projected"] == 0
        elif method == "stage1":
            assert row["projected"] == against_ce
        elif method == "pcgrad":
            assert row["projected"] == (against_ce or others)
        elif method == "agp":
            assert row["projected"] >= against_ce


def test_accumulation_is_no_projection(make):
    projection = ProjectionConfig(method="none")
    changes = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    trainer = make(DistillConfig(signals=SIGNALS, projection=projection), **changes)
    trainer.train()
    assert [row["projected"] for row in trainer.state.log_history[:-1]] == [0.0, 0.0]
