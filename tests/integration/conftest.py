"""A trainer over toy models and eight records, recipes with a cache of targets, checkpoints."""

import copy
import shutil

import pytest
from transformers import TrainingArguments

from drivekd.train import DistillTrainer, cache_targets
from drivekd.train import teachers as loading
from drivekd.train.weights import Checkpoint
from tests.helpers import cached_runs, toy_data, toy_models
from tests.helpers.trainers import (
    SETTINGS,
    TYPES,
    make_collator,
)


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

    def make(
        config,
        *,
        student=None,
        teachers=None,
        records=None,
        eval_records=None,
        callbacks=None,
        **changes,
    ):
        settings = {
            **SETTINGS,
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
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
            eval_dataset=eval_records,
            callbacks=callbacks,
        )

    return make


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folders of whole models by family, five layers each, in shards of at most 100 kB."""
    folder = tmp_path_factory.mktemp("teachers")

    def save(family):
        place = folder / family
        if not place.exists():
            toy_models.FAMILIES[family].model(layers=5).save_pretrained(
                place, max_shard_size="100KB"
            )
        return place

    return save


@pytest.fixture
def read(monkeypatch):
    """The checkpoints that are opened, with the bytes that were read of each tensor."""
    opened = []

    class Noted(Checkpoint):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            opened.append(self)

    monkeypatch.setattr(loading, "Checkpoint", Noted)
    return opened


@pytest.fixture(scope="session")
def cache_checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    cached_runs.save_checkpoints(folder)
    return folder


@pytest.fixture(scope="session")
def filled_cache(cache_checkpoints, tmp_path_factory):
    """A recipe with its cache, filled; copied for tests that change something."""
    root = tmp_path_factory.mktemp("filled")
    cache_targets(
        cached_runs.write_recipe(root, cache_checkpoints)("training.dataloader_num_workers=1")
    )
    return root


@pytest.fixture
def write(cache_checkpoints, tmp_path):
    return cached_runs.write_recipe(tmp_path, cache_checkpoints)


@pytest.fixture
def ready(filled_cache, write, tmp_path):
    """The same with a full cache of its own."""
    shutil.copytree(filled_cache / "targets", tmp_path / "targets")
    return write
