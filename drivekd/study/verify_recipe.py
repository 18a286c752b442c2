"""Verifying a recipe, and the table and document that come of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor

from drivekd.data import Collator, load_records
from drivekd.errors import DataError, RecipeError
from drivekd.study.tables import Row, Table
from drivekd.study.verify import AGREES, DIFFERS, FLOOR, NOTHING, Check, verify
from drivekd.train.encoders import build_encoder
from drivekd.train.models import prepare_teachers
from drivekd.train.placement import place_teachers
from drivekd.train.recipe import Recipe
from drivekd.train.run import check_tokenizer, data_root, load_student

_CONCLUSIONS = {
    AGREES: "The fused losses are as exact here as eager attention.",
    DIFFERS: "The fused losses are NOT as exact here as eager attention.",
    NOTHING: "Nothing could be compared: take a batch with images, and a teacher that is not the "
    "student.",
}


def verify_recipe(recipe: Recipe, *, samples: int = 2, repeats: int = 3) -> list[Check]:
    """`verify` on a recipe's own student, teachers, signals and first training records.

    Runs on a GPU if there is one, in the dtypes and the autocast of the recipe.

    Args:
        recipe: What `load_recipe` gave.
        samples: Number of records in the batch.
        repeats: How often each way is timed.

    Raises:
        DataError: There are no records, or one cannot be used.
        RecipeError: The recipe has no signal of kind "attention".
        TokenMismatchError: A teacher's tokens are not the student's.
        OSError: A checkpoint or file does not exist.
    """
    signals = [signal for signal in recipe.distill.signals if signal.kind == "attention"]
    if not signals:
        raise RecipeError("the recipe has no signal of kind 'attention'; there is nothing to check")
    root = data_root(recipe)
    records = load_records(recipe.data.train)[:samples]
    if not records:
        raise DataError(f"{recipe.data.train} holds no records")
    encoder, processing = build_encoder(recipe.encoder, recipe.student, root)
    tokenizer = getattr(processing, "tokenizer", processing)
    config = dataclasses.replace(recipe.distill, signals=tuple(signals), mixing=None)
    paths = {signal.teacher: recipe.teachers[signal.teacher] for signal in signals}
    for name, path in paths.items():
        check_tokenizer(name, path, tokenizer)
    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = load_student(recipe).to(place)
    teachers = prepare_teachers(
        paths,
        config.teacher_layers(),
        student,
        place_teachers(recipe.teacher_device, recipe.teachers, place),
        dtype=recipe.teacher_dtype,
    )
    collator = Collator(
        encoder,
        student.config,
        pad_token_id=tokenizer.pad_token_id,
        padding_side=recipe.encoder.padding_side,
    )
    batch = collator(records)
    inputs = {k: v.to(place) for k, v in batch.items() if isinstance(v, Tensor)}
    autocasts = {"bf16": torch.bfloat16, "fp16": torch.float16}
    autocast = next((autocasts[name] for name in autocasts if recipe.training.get(name)), None)
    return verify(
        student,
        teachers,
        inputs,
        signals,
        tokens=batch["tokens"].to(place),
        autocast=autocast,
        repeats=repeats,
    )


def overall(checks: Sequence[Check]) -> str:
    """One verdict for all: one that differs spoils it, one that agrees outweighs nothing."""
    verdicts = {check.verdict for check in checks}
    return next(verdict for verdict in (DIFFERS, AGREES, NOTHING) if verdict in verdicts)


def verify_document(checks: Sequence[Check]) -> dict[str, Any]:
    """All that was measured, for JSON, with what it was measured on."""
    cuda = torch.cuda.is_available()
    return {
        "verdict": overall(checks),
        "checks": [dataclasses.asdict(check) for check in checks],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "device": torch.cuda.get_device_name() if cuda else "cpu",
    }


def verify_table(checks: Sequence[Check]) -> Table:
    """One row a signal, the verdict at its end."""
    columns = (
        "", "loss", "off by", "allowed", "gradient off by", "allowed", "worst tensor", "allowed",
        "time", "eager", "memory", "eager", "verdict",
    )  # fmt: skip
    rows = tuple(
        Row(
            check.signal,
            (
                f"{check.loss:.4g}",
                *(
                    f"{value:.1e}"
                    for value in (
                        check.loss_error, check.loss_allowed, check.gradient_error,
                        check.gradient_allowed, check.worst_error, check.worst_allowed,
                    )
                ),
                *(f"{1e3 * value:.0f} ms" for value in (check.seconds, check.seconds_eager)),
                f"{check.peak_bytes / 2**20:.1f} MiB",
                f"{check.peak_bytes_eager / 2**20:.1f} MiB",
                check.verdict,
            ),
            "signals",
        )
        for check in checks
    )  # fmt: skip
    loss = max(check.float32_loss_error for check in checks)
    gradient = max(check.float32_gradient_error for check in checks)
    notes = [
        "Errors are relative, against eager attention in float32. Allowed is twice the error of "
        f"eager attention in {checks[0].dtype} (of a single tensor four times), and {FLOOR:.0e}. "
        f"With both models in float32 the fused losses are off by {loss:.1e} at most, their "
        f"gradients by {gradient:.1e}; {FLOOR:.0e} is allowed."
    ]
    notes += [f"{check.signal}: {reason}." for check in checks for reason in check.reasons]
    notes.append(_CONCLUSIONS[overall(checks)])
    return Table("Fused losses against eager attention", columns, rows, tuple(notes))
