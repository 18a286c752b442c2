"""From a recipe to a trained student on disk."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import transformers
from transformers.integrations import is_tensorboard_available

from drivekd.data import Collator, Record, check_records, load_records
from drivekd.data.check import UNUSABLE_KINDS
from drivekd.errors import DataError, RecipeError, TokenMismatchError
from drivekd.train import checkpoints, ranks
from drivekd.train.board import use_run_board
from drivekd.train.callbacks import JsonlLogger
from drivekd.train.encoders import build_encoder
from drivekd.train.models import load_model
from drivekd.train.recipe import Recipe
from drivekd.train.trainer import DistillTrainer

_LOG = logging.getLogger(__name__)
_PROBLEMS_SHOWN = 10


def distill(recipe: Recipe) -> Path:
    """Run a recipe: load, check, train, save.

    Rows of the log go to `<output_dir>/log.jsonl` (and, unless `training.report_to` says otherwise,
    to `<output_dir>/tensorboard` where TensorBoard is installed; `drivekd report` draws them),
    checkpoints to
    `<output_dir>/checkpoint-*`, the student to `<output_dir>/student`, from where plain
    `from_pretrained` loads model and tokenizer. Teachers are never saved.
    `training.resume_from_checkpoint` is a checkpoint, "last" (the newest, which must exist) or
    "auto" (the newest, if there is one). Checkpoints and the student appear whole or not at all.

    Args:
        recipe: What `load_recipe` gave.

    Returns:
        The student's folder.

    Raises:
        CheckpointError: A checkpoint is damaged, or could not be written.
        DataError: A record is not usable; merely doubtful ones (`drivekd data check` lists
            them) are warnings.
        TokenMismatchError: A teacher's tokenizer is not the student's.
        RecipeError: A setting, checkpoint or layer does not fit.
        NonFiniteLossError: A loss is not finite.
        TrainingMemoryError: Memory ran out; the message says which settings to change.
        ValueError: A question type does not fit.
        OSError: A checkpoint or file does not exist.
    """
    root = Path(recipe.data.train).parent if recipe.data.root is None else Path(recipe.data.root)
    splits = _load_splits(recipe, root)
    records = splits[recipe.data.train]
    encoder, processing = build_encoder(recipe.encoder, recipe.student, root)
    tokenizer = getattr(processing, "tokenizer", processing)
    used = {signal.teacher for signal in recipe.distill.active}
    teachers = {name: path for name, path in recipe.teachers.items() if name in used}
    for name, path in teachers.items():
        check_tokenizer(name, path, tokenizer)
    settings = {"report_to": _report_to(), **recipe.training, "remove_unused_columns": False}
    if ranks.share_a_cpu():
        settings.setdefault("use_cpu", True)
    resume = settings.pop("resume_from_checkpoint", None)
    args = transformers.TrainingArguments(**settings)
    # Before the student is made, so that nothing random depends on what was loaded before it.
    transformers.set_seed(args.seed)
    student = load_student(recipe)
    trainer = DistillTrainer(
        student,
        teachers,
        recipe.distill,
        question_types={record.question_type for record in records},
        teacher_dtype=recipe.teacher_dtype,
        teacher_device=recipe.teacher_device,
        args=args,
        data_collator=Collator(
            encoder,
            student.config,
            pad_token_id=tokenizer.pad_token_id,
            padding_side=recipe.encoder.padding_side,
        ),
        train_dataset=records,
        eval_dataset=None if recipe.data.eval is None else splits[recipe.data.eval],
        processing_class=processing,
        callbacks=[JsonlLogger()],
    )
    use_run_board(trainer)
    trainer.train(resume_from_checkpoint=resume)
    folder = Path(args.output_dir) / "student"
    staged = Path(args.output_dir) / checkpoints.STAGING / folder.name
    trainer.save_model(str(staged))
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        _copy_image_settings(Path(recipe.student), staged)
        checkpoints.publish(staged, folder)
    trainer.accelerator.end_training()  # closes the process group under torchrun
    return folder


def load_student(recipe: Recipe) -> Any:
    """The student of a recipe, on the CPU.

    Raises:
        RecipeError: The checkpoint lacks weights or is of another kind of model.
        OSError: There is no such checkpoint.
    """
    try:
        return load_model(
            recipe.student, dtype=recipe.dtype, attn_implementation=recipe.attn_implementation
        )
    except ValueError as error:
        raise RecipeError(f"student: {error}") from error


def check_tokenizer(name: str, path: str | Path, tokenizer: Any) -> None:
    """Raise unless a teacher's tokenizer gives the student's ids.

    Args:
        name: The teacher's name, for the message.
        path: Its checkpoint; without a tokenizer of its own it is taken to use the student's.
        tokenizer: The student's tokenizer.

    Raises:
        TokenMismatchError: A token has different ids, or the teacher lacks it.
    """
    local = Path(path)
    if local.is_dir() and not any(local.glob("tokenizer*")) and not (local / "vocab.json").exists():
        return
    theirs = transformers.AutoTokenizer.from_pretrained(path).get_vocab()
    for token, index in tokenizer.get_vocab().items():
        if theirs.get(token) != index:
            raise TokenMismatchError(
                f"teacher {name!r} ({path}) gives the token {token!r} the id {theirs.get(token)}, "
                f"the student {index}; both must see the same tokens, take models of one family"
            )


def _load_splits(recipe: Recipe, root: Path) -> dict[str, list[Record]]:
    """Training and evaluation records, checked; faults that training survives are warnings."""
    files = [file for file in (recipe.data.train, recipe.data.eval) if file is not None]
    splits = {file: load_records(file) for file in files}
    for file, records in splits.items():
        if not records:
            raise DataError(f"{file} holds no records")
    problems = check_records(splits, root, question_types=recipe.distill.mixing or None)
    for which, is_fatal in (("unusable", True), ("doubtful", False)):
        found = [problem for problem in problems if (problem.kind in UNUSABLE_KINDS) == is_fatal]
        if not found:
            continue
        shown = "\n".join(f"  {problem}" for problem in found[:_PROBLEMS_SHOWN])
        count = len({(problem.split, problem.index) for problem in found})
        text = f"{count} {which} records, of which the first are:\n{shown}"
        if is_fatal:
            raise DataError(text)
        _LOG.warning("%s", text)
    return splits


def _report_to() -> str:
    """TensorBoard where it is installed; log.jsonl is always written."""
    return "tensorboard" if is_tensorboard_available() else "none"


def _copy_image_settings(student: Path, folder: Path) -> None:
    """Keep the image settings beside the student, so that it can be a student again."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (student / name).is_file() and not (folder / name).exists():
            shutil.copyfile(student / name, folder / name)
