"""The log of a training run, and the page that `drivekd report` draws from it."""

import json
import re

import numpy as np
import pytest
import torch

from drivekd.cli import main
from drivekd.study.training import conflict_matrix, read_log, write_training_report
from drivekd.train import DistillConfig, JsonlLogger
from drivekd.train.speed import Speed
from tests.helpers.trainers import SIGNALS


@pytest.fixture
def run(make, tmp_path):
    trainer = make(DistillConfig(signals=SIGNALS), callbacks=[JsonlLogger()], max_steps=4)
    trainer.train()
    return tmp_path / "run"


def test_log_holds_every_layer_pair_and_coefficient(run):
    first, *_, last = (row for row in read_log(run) if "loss" in row)
    # The range 0..-2 of three layers; signals of one layer have no rows of their own for it.
    layers = [first["fold/layer_0"], first["fold/layer_1"]]
    assert first["fold/loss"] == pytest.approx(np.mean(layers), rel=1e-6)
    assert "sort/layer_0" not in first
    pairs = {("sort", "fold"), ("sort", "wash"), ("fold", "wash")}
    for a, b in pairs:
        assert -1 <= first[f"cosine/{a}/{b}"] <= 1 and first[f"conflict/{a}/{b}"] in (0.0, 1.0)
    assert first["ce/coefficient"] > 0 and first["sort/coefficient"] > 0
    assert first["tokens_per_second"] > 0 and first["memory_gib"] > 0
    assert first["seconds_left"] > 0 and last["seconds_left"] == 0


def test_speed_counts_tokens_of_all_processes_without_padding(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("drivekd.train.speed.time.monotonic", lambda: now[0])
    speed = Speed()
    assert speed.flush(0, 10) == {}
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    speed.add(mask, 4)  # resumed at step 4
    speed.add(mask, 4)
    now[0] = 102.0
    with monkeypatch.context() as patch:
        patch.setattr("drivekd.train.speed.gather", lambda own: [own, (6, 1e6)])
        row = speed.flush(5, 10)
    assert (row["tokens_per_second"], row["seconds_left"]) == ((10 + 6) / 2, 5 * 2)
    assert row["memory_gib"] == 1e6
    speed.add(None, 5)
    now[0] = 106.0
    row = speed.flush(7, 10)
    assert (row["tokens_per_second"], row["seconds_left"]) == (0, 3 * 2)


def test_report_is_one_self_contained_page(run, capsys):
    assert main(["report", str(run)]) == 0
    assert f"report: {run / 'report.html'}" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert [*re.findall(r"<figure><h3>(.*?)</h3>", text)] == [
        "Losses",
        "Losses by student layer",
        "Gradients",
        "Conflicts",
        "Optimiser and speed",
    ]
    assert not re.search(r"https?:|<script|(src|href)=\"(?!data:)", text)
    assert re.search(r"ce and sort [+-]\d\.\d{3}, \d+ %", text)
    assert "fold/loss" in text and "4 steps" in text


def test_conflict_matrix_takes_means_over_rows():
    rows = [
        {"a/cosine_ce": 0.5, "a/conflict_ce": 0.0, "cosine/a/b": -0.2, "conflict/a/b": 1.0},
        {"a/cosine_ce": -0.1, "a/conflict_ce": 1.0, "b/cosine_ce": None},
    ]
    cosines, often = conflict_matrix(rows, ["ce", "a", "b"])
    nan = float("nan")
    np.testing.assert_allclose(cosines, [[nan, 0.2, nan], [0.2, nan, -0.2], [nan, -0.2, nan]])
    np.testing.assert_allclose(often, [[nan, 0.5, nan], [0.5, nan, 1.0], [nan, 1.0, nan]])


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 2.0}],
        [{"step": 1, "loss": None, "ce": None, "a/loss": None, "eval_loss": 3.0}],
        [{"step": s, "loss": 1.0, "ce": 1.0, "a/loss": 0.0, "a/share": 0.0} for s in (1, 2)],
        [{"step": 1, "loss": float("nan"), "grad_norm": float("inf")}, {"step": 2, "loss": 1e30}],
        [{"step": s, "loss": 1.0, "a/loss": 1.0, f"a/layer_{s}": 1.0} for s in (1, 2)],
        [{"step": 1, "loss": 1.0, "note": "mine", "their/own": [1], "done": True}],
    ],
    ids=["plain", "nothing finite", "zeros", "NaN", "layers come and go", "others' values"],
)
def test_any_log_can_be_drawn(tmp_path, rows):
    lines = [json.dumps(row) for row in rows]
    (tmp_path / "log.jsonl").write_text("\n".join([*lines, '{"step": 9, "lo']))
    assert write_training_report(tmp_path).read_text().startswith("<!DOCTYPE html>")


def test_folder_without_a_log_is_named(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} has no log.jsonl" in capsys.readouterr().err


ROW = '{"step": 1, "loss": 2.0}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "log.jsonl has no row of training yet"),
        ('{"step": 0, "eval_loss": 1.0}\n', "log.jsonl has no row of training yet"),
        ('{"step": 0}\n', "log.jsonl has no row of training yet"),
        ('{"step": 0, "lo', "log.jsonl has no row of training yet"),
        (ROW + "5\n", "log.jsonl, line 2 is 5, wanted an object"),
        (ROW + '\n{"step": 2, "lo\n' + ROW, "log.jsonl, line 3 is not JSON"),
        ("[" * 100_000 + "\n", "log.jsonl, line 1 is not JSON"),
        ("9" * 5000 + "\n", "log.jsonl, line 1 is not JSON"),
        ('{"loss": 1.0}\n', "log.jsonl, line 1 has no step, wanted a finite number"),
        ('{"step": null, "loss": 1.0}\n', "line 1 has step null"),
        ('{"step": true, "loss": 1.0}\n', "line 1 has step true"),
        ('{"step": 1e999, "loss": 1.0}\n', "line 1 has step Infinity"),
        ('{"step": 1, "loss": "nan"}\n', 'line 1 has loss "nan", wanted a number or null'),
        ('{"step": 1, "loss": {}}\n', "line 1 has loss {}, wanted a number or null"),
        (f'{{"step": 1, "loss": {"9" * 400}}}\n', f"line 1 has loss {'9' * 40}..., wanted"),
        ('{"step": 1, "loss": 1, "a/layer_0": []}\n', "line 1 has a/layer_0 []"),
        ('{"step": 1, "loss": 1, "cosine/a/b": "x"}\n', 'line 1 has cosine/a/b "x"'),
    ],
)
def test_a_log_that_cannot_be_drawn_is_named_with_its_line(tmp_path, capsys, text, says):
    (tmp_path / "log.jsonl").write_text(text)
    assert main(["report", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"drivekd report: error: {tmp_path / 'log.jsonl'}") and says in line


def test_a_log_that_is_no_text_is_named(tmp_path, capsys):
    (tmp_path / "log.jsonl").write_bytes(b"\xff\xfe")
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path / 'log.jsonl'} is not UTF-8 text" in capsys.readouterr().err
