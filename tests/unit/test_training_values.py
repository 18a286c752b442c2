"""Settings that transformers takes and then fails at late, or reads as something else."""

import pytest

from drivekd.errors import RecipeError
from drivekd.train import DistillConfig, load_recipe
from tests.helpers.runs import write_recipe

TREE = {"student": "s", "data": {"train": "t"}, "training": {"output_dir": "out"}}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_steps=0", "max_steps is 0, wanted 1 or more, or -1"),
        ("max_steps=-3", "max_steps is -3"),
        ("num_train_epochs=0", "num_train_epochs is 0, wanted more than 0"),
        ("per_device_train_batch_size=0", "per_device_train_batch_size is 0, wanted 1 or more"),
        ("gradient_accumulation_steps=0", "gradient_accumulation_steps is 0, wanted 1 or more"),
        ("learning_rate=-1", "learning_rate is -1, wanted 0 or more"),
        ("learning_rate=.nan", "learning_rate is nan, wanted a finite number"),
        ("seed=-1", "seed is -1, wanted 0 or more"),
        ("data_seed=4294967296", "data_seed is 4294967296, wanted at most"),
        ("lr_scheduler_type=lineer", "lr_scheduler_type is 'lineer'; did you mean 'linear'"),
        ("optim=adamw_torsh", "optim is 'adamw_torsh'; did you mean 'adamw_torch'"),
        ("save_strategy=sometimes", "valid are: best, epoch, no, steps"),
        ("output_dir=null", "training needs output_dir"),
    ],
)
def test_value_is_refused_when_the_recipe_is_read(tmp_path, setting, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write_recipe(TREE, tmp_path), [f"training.{setting}"])


@pytest.mark.parametrize(
    "setting", ["max_steps=-1", "eval_steps=0.5", "seed=0", "optim=sgd", "lr_scheduler_type=cosine"]
)
def test_legal_values_stay_legal(tmp_path, setting):
    load_recipe(write_recipe(TREE, tmp_path), [f"training.{setting}"])


def test_unknown_option_of_the_weighting_is_refused():
    with pytest.raises(ValueError, match=r"names 'emma', which weighting 'balance'.*mean 'ema'"):
        DistillConfig(weighting_options={"emma": 0.5})
