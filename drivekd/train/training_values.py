"""Values of training settings that transformers takes but cannot train with, or takes late."""

from __future__ import annotations

import enum
import math
from typing import Any, get_args

from drivekd.errors import RecipeError
from drivekd.reweighting.checks import is_finite
from drivekd.train.config import nearest

# From these on, a setting is legal; transformers fails at them late, or trains something else.
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "logging_steps": 0,
    "save_steps": 0,
    "eval_steps": 0,
    "save_total_limit": 1,
    "dataloader_num_workers": 0,
    "seed": 0,
    "data_seed": 0,
}
_POSITIVE = ("num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_SEEDS = ("seed", "data_seed")
_MOST_SEED = 2**32 - 1


def check_training_value(key: str, value: Any, hint: Any) -> None:
    """Check one setting of `training`, whose type is known to be right.

    Args:
        key: Its name.
        value: Its value.
        hint: Its type in `transformers.TrainingArguments`.

    Raises:
        RecipeError: The value is not legal.
    """
    if isinstance(value, str):
        _check_choice(key, value, hint)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if not is_finite(value):
        raise RecipeError(f"training.{key} is {value}, wanted a finite number")
    if value < _LEAST.get(key, -math.inf):
        raise RecipeError(f"training.{key} is {value}, wanted {_LEAST[key]} or more")
    if key in _POSITIVE and value <= 0:
        raise RecipeError(f"training.{key} is {value}, wanted more than 0")
    if key in _SEEDS and value > _MOST_SEED:
        raise RecipeError(f"training.{key} is {value}, wanted at most {_MOST_SEED}")
    if key == "max_steps" and value != -1 and value < 1:
        # Transformers reads any of these as "not given" and trains for num_train_epochs.
        raise RecipeError(
            f"training.max_steps is {value}, wanted 1 or more, or -1 to train for num_train_epochs"
        )


def _check_choice(key: str, value: str, hint: Any) -> None:
    """Names of schedules, optimizers, strategies, ..."""
    kinds = [each for each in (hint, *get_args(hint)) if isinstance(each, enum.EnumMeta)]
    if not kinds:
        return
    names = [str(member.value) for member in kinds[0]]  # type: ignore[var-annotated]
    if value not in names:
        raise RecipeError(f"training.{key} is {value!r}; {nearest(value, names)}")
