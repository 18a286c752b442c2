"""Stopping with what to change: out of memory, and losses that are not finite."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from drivekd.errors import NonFiniteLossError, TrainingMemoryError
from drivekd.train import ranks
from drivekd.train.config import DistillConfig

# How torch's CPU allocator words it; it raises a plain RuntimeError.
_HOST_MEMORY = ("can't allocate memory", "not enough memory")


@dataclass(frozen=True)
class TaskLoss:
    """A task's loss in a micro-batch.

    Attributes:
        layers: (L,) losses, one per student layer; their mean is the task's loss.
        names: The student layers; empty for a task without any.
        records: Ids of the records that the task saw.
    """

    layers: Tensor
    names: tuple[int, ...]
    records: Sequence[str]


@contextlib.contextmanager
def advise_on_memory(args: transformers.TrainingArguments, config: DistillConfig) -> Iterator[None]:
    """Turn running out of memory into an error that says which settings to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise TrainingMemoryError(_advice(error, args, config)) from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the host has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _HOST_MEMORY)


def check_finite(losses: Mapping[str, TaskLoss], step: int) -> None:
    """Stop if a loss is not finite; reads all of them back from the device, once.

    Raises:
        NonFiniteLossError: It names the step and, for each loss that is not finite, the task, its
            value, its layers and the records that it saw.
    """
    values = torch.cat([loss.layers.detach().float() for loss in losses.values()]).tolist()
    if all(map(math.isfinite, values)):
        return
    broken, start = [], 0
    for task, loss in losses.items():
        own, start = values[start : start + len(loss.layers)], start + len(loss.layers)
        bad = [i for i, value in enumerate(own) if not math.isfinite(value)]
        if not bad:
            continue
        where = (
            f", student layers {', '.join(str(loss.names[i]) for i in bad)}" if loss.names else ""
        )
        records = ", ".join(loss.records) or "unknown"
        broken.append(f"{task!r} is {own[bad[0]]}{where}, records {records}")
    raise NonFiniteLossError(
        f"step {step}: losses are not finite: {'; '.join(broken)}. Look at these records, lower "
        "learning_rate, raise warmup_steps, or use bf16 instead of fp16"
    )


def check_finite_together(losses: Mapping[str, TaskLoss], step: int, device: torch.device) -> None:
    """As `check_finite`, in every process if any of them finds such a loss."""
    error = None
    try:
        check_finite(losses, step)
    except NonFiniteLossError as own:
        error = own
    ranks.raise_together(error, NonFiniteLossError, device)


def _advice(
    error: BaseException, args: transformers.TrainingArguments, config: DistillConfig
) -> str:
    """The first line of the error, and what these settings leave to change."""
    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    changes = []
    if batch > 1:
        changes.append(
            f"training.per_device_train_batch_size={batch // 2} with "
            f"training.gradient_accumulation_steps={accumulation * 2} (same batch)"
        )
    if not args.gradient_checkpointing:
        changes.append("training.gradient_checkpointing=true")
    if config.signals:
        if config.projection.method != "none" or config.weighting != "static":
            changes.append(
                "distill.projection.method=none with distill.weighting=static (one backward and "
                "no gradient per signal)"
            )
        changes.append("teacher_dtype=bfloat16")
        changes.append("fewer student_layers in the signals")
    changes.append("smaller or fewer images per record")
    if args.eval_strategy != "no":
        changes.append(
            f"training.per_device_eval_batch_size below {args.per_device_eval_batch_size}"
        )
    first = (str(error).splitlines() or [type(error).__name__])[0] or type(error).__name__
    return f"out of memory: {first} Change one of: {'; '.join(changes)}"
