"""Kills, full disks and damaged files."""

import copy
import errno
import itertools
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch

from drivekd.errors import CheckpointError
from drivekd.train import DistillConfig, checkpoints
from tests.helpers import toy_data
from tests.helpers.trainers import SIGNALS, assert_same, weights_of

SAVING = {"save_strategy": "steps", "save_steps": 1, "optim": "adamw_torch"}


@pytest.mark.slow
def test_killed_runs_end_as_the_one_that_was_left_alone(run_python, tmp_path):
    """SIGKILL at any write, in the middle of one, and at any time; weights and log to the bit."""
    code = "import os, pathlib; from tests.helpers.killed_runs import main; "
    code += "print(main(pathlib.Path(os.environ['RUNS'])))"
    kills = int(run_python(code, OMP_NUM_THREADS="1", RUNS=str(tmp_path)))
    assert kills >= 7


def disk_full(monkeypatch, *, after):
    """torch.save writes half of its file and fails from the `after`-th call on."""
    save, numbers = torch.save, itertools.count(1)

    def full(thing, file, *args, **kwargs):
        save(thing, file, *args, **kwargs)
        if next(numbers) >= after:
            os.truncate(file, Path(file).stat().st_size // 2)
            raise OSError(errno.ENOSPC, "No space left on device", str(file))

    monkeypatch.setattr(torch, "save", full)


@pytest.mark.parametrize("file", [1, 3, 5])
def test_full_disk_leaves_the_last_checkpoint(make, models, tmp_path, monkeypatch, file):
    start = copy.deepcopy(models["student"])
    whole = copy.deepcopy(start)
    config = DistillConfig(signals=SIGNALS)
    make(config, student=whole, output_dir=str(tmp_path / "whole"), **SAVING).train()
    with monkeypatch.context() as patch:
        disk_full(patch, after=5 + file)  # every checkpoint has five files of torch.save
        with pytest.raises(
            CheckpointError, match=r"No space left.*complete one is .*checkpoint-1"
        ) as e:
            make(config, **SAVING).train()
    assert "resume_from_checkpoint=auto" in str(e.value) and "save_total_limit" in str(e.value)
    run = tmp_path / "run"
    assert [folder.name for folder in run.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not list((run / checkpoints.STAGING).iterdir())
    resumed = copy.deepcopy(start)
    make(config, student=resumed, **SAVING).train(resume_from_checkpoint="auto")
    assert_same(weights_of(resumed), weights_of(whole))


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_file_that_the_system_cuts_short_is_no_checkpoint(make, tmp_path, share):
    """The limit of a file's size fails inside the compiled writers, as a full disk does."""
    config = DistillConfig(signals=SIGNALS)
    make(config, max_steps=1, **SAVING).train()
    files = (tmp_path / "run" / "checkpoint-1").iterdir()
    largest = max(file.stat().st_size for file in files)
    shutil.rmtree(tmp_path / "run")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(largest * share), before[1]))
    try:
        with pytest.raises(CheckpointError, match="no earlier checkpoint is there"):
            make(config, **SAVING).train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "run").glob("checkpoint-*"))


@pytest.fixture
def two_checkpoints(make, tmp_path):
    make(DistillConfig(signals=SIGNALS), **SAVING).train()
    return tmp_path / "run"


def truncate(file):
    os.truncate(file, file.stat().st_size - 3)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "name", "message"),
    [
        (truncate, "optimizer.pt", r"optimizer\.pt has [\d,]+ bytes, wanted"),
        (flip, "model.safetensors", r"contents of model\.safetensors have changed"),
        (Path.unlink, "scheduler.pt", r"scheduler\.pt is missing"),
        (truncate, checkpoints.MANIFEST, "cannot be read"),
        (Path.unlink, checkpoints.MANIFEST, "its copy is incomplete"),
    ],
)
def test_damaged_checkpoint_is_named_and_not_replaced_by_an_older_one(
    make, two_checkpoints, damage, name, message
):
    config = DistillConfig(signals=SIGNALS)
    newest, older = (two_checkpoints / f"checkpoint-{step}" for step in (2, 1))
    damage(newest / name)
    remedy = rf"{newest}.*{message}.*give resume_from_checkpoint={older}"
    for resume in ("auto", "last", True):
        with pytest.raises(CheckpointError, match=remedy):
            make(config, **SAVING).train(resume_from_checkpoint=resume)
    if (newest / checkpoints.MANIFEST).exists():
        with pytest.raises(CheckpointError, match=message):
            make(config, **SAVING).train(resume_from_checkpoint=str(newest))
    make(config, **SAVING).train(resume_from_checkpoint=str(older))


def test_rotation_keeps_the_newest_and_the_best(make, tmp_path):
    trainer = make(
        DistillConfig(signals=SIGNALS),
        max_steps=5,
        save_total_limit=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        eval_records=toy_data.records(tmp_path, ("sort",), seed=9),
        **SAVING | {"learning_rate": 0.0},
    )
    trainer.train()
    # Nothing is learnt, so that the first evaluation stays the best.
    run = tmp_path / "run"
    assert sorted(own.name for own in run.iterdir()) == ["checkpoint-1", "checkpoint-5"]
    assert trainer.state.best_model_checkpoint == str(run / "checkpoint-1")
    saved = json.loads((run / "checkpoint-5" / "trainer_state.json").read_text())
    assert saved["best_model_checkpoint"] == str(run / "checkpoint-1")


def test_staged_folders_are_finished_or_thrown_away(two_checkpoints):
    run, staging = two_checkpoints, two_checkpoints / checkpoints.STAGING
    staging.mkdir()
    (run / "checkpoint-2").rename(staging / "checkpoint-2")  # killed before its last rename
    shutil.copytree(run / "checkpoint-1", staging / "checkpoint-3")
    truncate(staging / "checkpoint-3" / "optimizer.pt")
    (run / "checkpoint-1").rename(staging / "replaced-checkpoint-1")  # killed between its two
    (staging / "deleted-checkpoint-0").mkdir()
    checkpoints.finish_interrupted(run)
    assert sorted(own.name for own in run.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    assert checkpoints.find("auto", run) == str(run / "checkpoint-2")


def test_publishing_replaces_an_older_folder(tmp_path):
    staged, final = tmp_path / checkpoints.STAGING / "student", tmp_path / "student"
    for text in ("old", "new"):
        staged.mkdir(parents=True)
        (staged / "file").write_text(text)
        checkpoints.publish(staged, final)
    assert (final / "file").read_text() == "new"
    assert [own.name for own in tmp_path.iterdir()] == ["student"]
