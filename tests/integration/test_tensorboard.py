"""What TensorBoard shows of a run, read back from its files."""

import json
import shutil

import pytest

from drivekd.train import distill, load_recipe
from tests.helpers.recipes import write_recipe

pytest.importorskip("tensorboard", reason="needs tensorboard, of the extra 'test'")


@pytest.fixture
def run(tmp_path):
    """Three steps, a checkpoint and a row at each; overrides are those of the command line."""
    settings = {"max_steps": 3, "per_device_train_batch_size": 2, "save_steps": 1}
    file = write_recipe(tmp_path, ("sort", "fold") * 3, layers=([0, 1], [0, 2]), **settings)

    def run(*overrides):
        distill(load_recipe(file, overrides))
        return tmp_path / "run"

    return run


def curves_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_curves_are_the_rows_of_the_log(run):
    """Losses per layer and teacher, cosines, projections, weights, speed, memory and time left."""
    folder = run()
    curves = curves_of(folder / "tensorboard")
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    assert len(rows) == 3
    for key in {key for row in rows for key in row} - {"step", "epoch"}:
        wanted = [(row["step"], pytest.approx(row[key], rel=1e-6)) for row in rows if key in row]
        assert curves[f"train/{key}"] == wanted
    tags = {"ce", "projected", "tokens_per_second", "memory_gib", "seconds_left", "grad_norm"}
    for name in ("sort", "fold"):
        kinds = ("loss", "layer_0", "layer_1", "weight", "share", "cosine_ce", "conflict_ce")
        tags |= {f"{name}/{kind}" for kind in kinds}
    tags |= {"cosine/sort/fold", "conflict/sort/fold", "sort/coefficient"}
    assert {f"train/{tag}" for tag in tags} <= curves.keys()


def test_resumed_run_goes_on_in_its_curves(run):
    """Steps after the checkpoint are taken back; a fresh run keeps the older one's beside it."""
    folder = run()
    before = curves_of(folder / "tensorboard")["train/loss"]
    for step in (2, 3):
        shutil.rmtree(folder / f"checkpoint-{step}")
    run("training.resume_from_checkpoint=auto")
    after = curves_of(folder / "tensorboard")["train/loss"]
    assert [step for step, _ in after] == [1, 2, 3] and after == before
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)  # else a fresh run is refused
    run("training.max_steps=1")
    assert len(curves_of(folder / "tensorboard")["train/loss"]) == 1
    assert curves_of(folder / "tensorboard.1")["train/loss"] == before
