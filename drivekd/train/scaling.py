"""How losses are scaled under gradient accumulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def micro_batch_factor(trainer: Any, num_items_in_batch: Tensor | int | None) -> int:
    """Factor from the loss of a Trainer's `compute_loss` to one of a micro-batch mean's size.

    Trainer divides a loss by the number of micro-batches, unless `num_items_in_batch` (or the
    user's `compute_loss_func`) has already made it a share of the whole optimizer step.

    Args:
        trainer: A `transformers.Trainer`.
        num_items_in_batch: What its `training_step` was given.
    """
    if trainer.compute_loss_func is None and (
        num_items_in_batch is None or not trainer.model_accepts_loss_kwargs
    ):
        return 1
    return int(trainer.current_gradient_accumulation_steps)
