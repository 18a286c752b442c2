"""What a run's folder remembers: one run at a time, and the same run after resuming."""

import dataclasses
import errno
import json
import logging
from pathlib import Path

import filelock
import pytest
import transformers

from drivekd.cli import main
from drivekd.data import Message, check, save_records
from drivekd.errors import CheckpointError, DataError, RecipeError
from drivekd.train import distill, load_recipe, run_folder
from tests.helpers import toy_data
from tests.helpers.runs import recipe_of, save_checkpoints, write_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_checkpoints(tmp_path_factory.mktemp("models"))


@pytest.fixture
def recipe(models, tmp_path):
    """Loads the recipe of a small run, with overrides."""
    file = write_recipe(recipe_of(models, tmp_path, max_steps=1), tmp_path)
    return lambda *overrides: load_recipe(file, overrides)


AUTO = "training.resume_from_checkpoint=auto"


def test_saved_recipe_is_whole_and_knows_its_files_from_anywhere(models, tmp_path, monkeypatch):
    tree = recipe_of(models, tmp_path)
    tree["student"] = "models/student"
    tree["distill"]["mixing"] = {"sort": {"sort": 1, "fold": 0.5}, "fold": {"fold": 1}}
    tree["encoder"] = {"image_size": [56, 56]}
    (tmp_path / "models").symlink_to(models)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(write_recipe(tree, tmp_path))
    saved = load_recipe(write_recipe(run_folder.recipe_tree(recipe), models))
    assert saved.student == str(tmp_path / "models" / "student")
    assert saved.distill == recipe.distill and saved.encoder == recipe.encoder
    assert saved.training == recipe.training


def test_two_runs_in_one_folder_are_refused(recipe, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with (
        filelock.FileLock(run / run_folder.LOCK),
        pytest.raises(
            RecipeError, match=rf"another process trains in {run}.*another training.output_dir"
        ),
    ):
        distill(recipe())
    assert not (run / "log.jsonl").exists() and not (run / "recipe.yaml").exists()
    distill(recipe())  # the lock is free again


def test_file_system_without_locks_is_said_and_no_hindrance(recipe, monkeypatch, caplog):
    def acquire(self, **_):
        raise NotImplementedError("no flock here")

    monkeypatch.setattr(filelock.FileLock, "acquire", acquire)
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        assert distill(recipe()).is_dir()
    assert "cannot be locked (no flock here)" in caplog.text


def test_output_folder_that_is_a_file_is_named(recipe, tmp_path, capsys):
    (tmp_path / "run").write_text("")
    for name in ("run", "run/below"):
        output = f"training.output_dir={tmp_path / name}"
        with pytest.raises(RecipeError, match=r"output_dir is .*run.* lies under a file"):
            distill(recipe(output))


def test_fresh_run_does_not_mix_with_the_checkpoints_of_an_older_one(recipe):
    distill(recipe())
    with pytest.raises(RecipeError, match=r"checkpoint-1 is of an earlier run.*=auto"):
        distill(recipe())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.seed=7", "training.seed is 7, was absent"),
        ("training.per_device_train_batch_size=1", "a step takes 1 records .* it took 2"),
        ("distill.weighting=static", "distill.weighting is 'static', was 'balance'"),
        ("distill.projection.method=none", "distill.projection.method is 'none', was 'agp'"),
        ("distill.signals.fold.student_layers=last", "signals.fold.student_layers is 'last', was"),
        ("distill.signals.fold.name=wash", "distill.signals.fold.name is absent, was 'fold'"),
        ("training.optim=sgd", "training.optim is 'sgd'"),
    ],
)
def test_resuming_with_what_the_checkpoint_does_not_survive_is_refused(
    recipe, change, message, tmp_path, caplog
):
    facts = run_folder.data_facts(toy_data.records(tmp_path, ("sort",)), 2)
    run = tmp_path / "run"
    run.mkdir()
    write_recipe(run_folder.recipe_tree(recipe()), run)
    (run / "run.json").write_text(json.dumps(facts))
    now = facts | {"batch": 1 if "batch_size" in change else 2}
    with pytest.raises(RecipeError, match=message) as refused:
        run_folder.check_resumed(recipe(change), now, run)
    assert "give it as the student" in str(refused.value)


def test_resuming_with_other_records_is_refused(recipe, tmp_path):
    distill(recipe())
    save_records(
        toy_data.records(tmp_path, ("fold", "sort", "sort", "fold")), tmp_path / "train.json"
    )
    with pytest.raises(RecipeError, match=r"training records are others \(4 then, 4 now\)"):
        distill(recipe(AUTO, "training.max_steps=2"))


def test_resuming_may_change_the_rest_and_says_what(recipe, tmp_path, caplog):
    distill(recipe())
    changes = ["training.max_steps=2", "distill.signals.fold.share=0.2"]
    # Half the micro-batch and twice the accumulation, as the advice on memory has it.
    halved = ["per_device_train_batch_size=1", "gradient_accumulation_steps=2"]
    changes += [f"training.{each}" for each in halved]
    with caplog.at_level(logging.WARNING, logger="drivekd"):
        distill(recipe(AUTO, *changes))
    said = [r.getMessage() for r in caplog.records if "changed recipe" in r.getMessage()]
    assert len(said) == 4
    assert any("fold.share is 0.2, was 0.1" in text for text in said)
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-1'}" in caplog.messages
    assert load_recipe(tmp_path / "run" / "recipe.yaml").distill.signals[1].share == 0.2
    steps = [
        json.loads(line)["step"] for line in (tmp_path / "run/log.jsonl").read_text().splitlines()
    ]
    assert 1 in steps and 2 in steps


def test_runs_without_memory_are_resumed_as_before(recipe, tmp_path):
    distill(recipe())
    for name in ("recipe.yaml", "run.json"):
        (tmp_path / "run" / name).unlink()
    distill(recipe(AUTO, "training.max_steps=2", "training.seed=3"))


def test_refusals_are_one_line_for_the_command_line(recipe, tmp_path, capsys):
    distill(recipe())
    capsys.readouterr()
    assert main(["distill", str(tmp_path / "recipe.yaml")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distill.mixing={sot: {sort: 1}}", "recipe: mixing names the question type 'sot'"),
        ("training.eval_strategy=steps", "recipe: .*eval_dataset"),
        ("training.load_best_model_at_end=true", "training: .*requires the save and eval strat"),
        ("encoder.image_std=[0, 1, 1]", "encoder: image_mean is .*above 0"),
        ("student=/nowhere/else", "student: /nowhere/else is not a folder of a saved model"),
        ("teachers.deep=./gone", r"teacher 'deep': \./gone is not a folder of a saved model"),
    ],
)
def test_setting_that_does_not_fit_is_an_error_of_the_recipe(recipe, change, message):
    with pytest.raises(RecipeError, match=message):
        distill(recipe(change))


def test_checkpoint_that_does_not_exist_is_named(recipe, tmp_path):
    gone = tmp_path / "gone"
    with pytest.raises(CheckpointError, match=f"{gone}, which is no folder"):
        distill(recipe(f"training.resume_from_checkpoint={gone}"))


def test_full_disk_at_the_very_end_keeps_the_checkpoint_and_is_made_good(
    recipe, tmp_path, monkeypatch
):
    def full(self, folder, _internal_call=False):
        if Path(folder).name == "student":
            (Path(folder) / "half").parent.mkdir(parents=True)
            (Path(folder) / "half").write_text("")
            raise OSError(errno.ENOSPC, "No space left on device", folder)
        real(self, folder, _internal_call)

    real = transformers.Trainer.save_model
    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "save_model", full)
        with pytest.raises(CheckpointError, match=r"student could not be written .*No space.*auto"):
            distill(recipe())
    run = tmp_path / "run"
    assert (run / "checkpoint-1").is_dir() and not (run / "student").exists()
    assert not list((run / "incomplete").iterdir())
    assert (distill(recipe(AUTO)) / "model.safetensors").is_file()


def opened(monkeypatch):
    """Paths of the pictures that are opened to check them."""
    paths = []
    real = check.inspect_image
    monkeypatch.setattr(check, "inspect_image", lambda path: paths.append(path) or real(path))
    return paths


def test_pictures_are_decoded_once_for_a_run_and_all_its_resumes(recipe, tmp_path, monkeypatch):
    paths = opened(monkeypatch)
    distill(recipe())
    assert len(paths) == 4
    distill(recipe(AUTO, "training.max_steps=2"))
    assert len(paths) == 4
    (tmp_path / "0-2.png").unlink()
    with pytest.raises(DataError, match=r"0-2\.png does not exist"):
        distill(recipe(AUTO, "training.max_steps=3"))
    distill(recipe("data.root=" + str(moved(tmp_path)), f"training.output_dir={tmp_path / 'b'}"))
    assert len(paths) == 8


def moved(folder):
    other = folder / "pictures"
    other.mkdir()
    toy_data.records(other, ("sort", "fold", "sort", "fold"))
    return other


def test_quick_check_looks_for_files_only(recipe, tmp_path, monkeypatch):
    paths = opened(monkeypatch)
    distill(recipe("data.check=quick"))
    assert not paths and "checked" not in json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "0-1.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"0-1\.png is empty"):
        distill(recipe("data.check=quick", f"training.output_dir={tmp_path / 'b'}"))


def test_token_that_the_encoder_refuses_is_found_before_training(recipe, tmp_path):
    records = toy_data.records(tmp_path, ("sort", "fold"))
    question = Message("user", f"<image> w7 {toy_data.IMAGE_TOKEN}")
    broken = dataclasses.replace(records[1], messages=(question, Message("assistant", "w8")))
    save_records([records[0], broken], tmp_path / "train.json")
    with pytest.raises(DataError, match=r"1 unusable records(.|\n)*'fold-1'.*reserved token"):
        distill(recipe())
    assert not (tmp_path / "run").exists()
