"""From a recipe to a trained student on disk."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers.integrations import is_tensorboard_available

from drivekd.data import Collator, Record, check_records, load_records
from drivekd.data.check import UNUSABLE_KINDS
from drivekd.data.conversation import check_reserved
from drivekd.data.encode import Encoder
from drivekd.errors import CheckpointError, DataError, RecipeError, TokenMismatchError
from drivekd.train import checkpoints, ranks, run_folder, sharding
from drivekd.train.board import use_run_board
from drivekd.train.callbacks import JsonlLogger
from drivekd.train.encoders import build_encoder
from drivekd.train.models import load_model
from drivekd.train.recipe import Recipe
from drivekd.train.saving import what_to_do
from drivekd.train.teachers import read_config
from drivekd.train.trainer import DistillTrainer
from drivekd.train.tuning import (
    add_adapters,
    freeze,
    has_adapters,
    merge_adapters,
    merge_saved_adapters,
)

_LOG = logging.getLogger(__name__)
_PROBLEMS_SHOWN = 10


def distill(recipe: Recipe) -> Path:
    """Run a recipe: load, check, train, save.

    Rows of the log go to `<output_dir>/log.jsonl` (and, unless `training.report_to` says otherwise,
    to `<output_dir>/tensorboard` where TensorBoard is installed; `drivekd report` draws them),
    checkpoints to
    `<output_dir>/checkpoint-*`, the student to `<output_dir>/student`, from where plain
    `from_pretrained` loads model and tokenizer. Teachers are never saved. With `recipe.cache` the
    teachers of attention signals are not needed: `cache_targets` has run them before.
    `training.resume_from_checkpoint` is a checkpoint, "last" (the newest, which must exist) or
    "auto" (the newest, if there is one). Checkpoints and the student appear whole or not at all.

    Args:
        recipe: What `load_recipe` gave.

    Returns:
        The student's folder.

    Raises:
        CacheError: With a cache, a target is missing or damaged.
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
    ready = make_ready(recipe)
    args = ready.args
    with run_folder.alone_in(Path(args.output_dir)) if args.process_index == 0 else nullcontext():
        checkpoint = run_folder.prepare(recipe, args, ready.splits)
        trainer = make_trainer(recipe, ready, callbacks=[JsonlLogger()])
        use_run_board(trainer)
        trainer.train(resume_from_checkpoint=checkpoint)
        folder = _save_student(trainer, recipe)
        trainer.accelerator.end_training()  # closes the process group under torchrun
        return folder


@dataclass(frozen=True)
class Ready:
    """What a recipe's trainer is made of, checked; no weights are loaded yet.

    Attributes:
        args: Training arguments.
        teachers: Paths by name, of the teachers that signals use.
        splits: Training and evaluation records by file.
        encoder: Makes model inputs of records.
        processing: The student's tokenizer or processor.
    """

    args: transformers.TrainingArguments
    teachers: Mapping[str, str]
    splits: Mapping[str, list[Record]]
    encoder: Encoder
    processing: Any

    @property
    def tokenizer(self) -> Any:
        """The student's tokenizer."""
        return getattr(self.processing, "tokenizer", self.processing)


def make_ready(recipe: Recipe, *, decode: bool | None = None) -> Ready:
    """Check a recipe's places, records and tokenizers; see `distill` for what it raises.

    Args:
        recipe: What `load_recipe` gave.
        decode: Whether every image is decoded; None is as `recipe.data.check` says.
    """
    args = _training_arguments(recipe)
    used = {signal.teacher for signal in recipe.distill.active}
    teachers = {name: path for name, path in recipe.teachers.items() if name in used}
    # Of teachers whose targets are in a cache nothing needs to be there any more.
    needed = recipe.distill.teacher_layers(cached=recipe.cache is not None)
    live = {name: path for name, path in teachers.items() if name in needed}
    for role, path in {"student": recipe.student, **_named(live)}.items():
        check_place(role, path)
    root = data_root(recipe)
    splits = _load_splits(recipe)
    if decode is None:
        decode = recipe.data.check == "full" and not run_folder.has_checked(recipe, splits)
    _check_splits(recipe, splits, root, decode=decode)
    with _as_recipe_errors("encoder"):
        encoder, processing = build_encoder(recipe.encoder, recipe.student, root)
    _check_tokens(splits, encoder)
    ready = Ready(args, teachers, splits, encoder, processing)
    for name, path in live.items():
        check_tokenizer(name, path, ready.tokenizer)
    return ready


def make_trainer(
    recipe: Recipe,
    ready: Ready,
    *,
    callbacks: Sequence[transformers.TrainerCallback],
    trainer_class: type[DistillTrainer] = DistillTrainer,
) -> DistillTrainer:
    """Load student and teachers of a recipe, and make the trainer of them.

    Args:
        recipe: The recipe.
        ready: What `make_ready` gave.
        callbacks: Of the trainer.
        trainer_class: Its class.

    Raises:
        RecipeError: A setting, checkpoint or layer does not fit.
        OSError: A checkpoint does not exist.
    """
    args, splits = ready.args, ready.splits
    records = splits[recipe.data.train]
    # Before the student is made, so that nothing random depends on what was loaded before it.
    transformers.set_seed(args.seed)
    student = load_student(recipe)
    freeze(student, recipe.freeze)
    if recipe.lora is not None:
        student = add_adapters(student, recipe.lora)
    with _as_recipe_errors("recipe"):
        return trainer_class(
            student,
            ready.teachers,
            recipe.distill,
            question_types={record.question_type for record in records},
            teacher_dtype=recipe.teacher_dtype,
            teacher_device=recipe.teacher_device,
            cache=recipe.cache,
            args=args,
            data_collator=Collator(
                ready.encoder,
                student.config,
                pad_token_id=ready.tokenizer.pad_token_id,
                padding_side=recipe.encoder.padding_side,
            ),
            train_dataset=records,
            eval_dataset=None if recipe.data.eval is None else splits[recipe.data.eval],
            processing_class=ready.processing,
            callbacks=list(callbacks),
        )


def _save_student(trainer: DistillTrainer, recipe: Recipe) -> Path:
    """Write the student aside and move it to its place once it is complete."""
    run = Path(trainer.args.output_dir)
    folder, staged = run / "student", run / checkpoints.STAGING / "student"
    try:
        if has_adapters(trainer.model):
            _save_merged(trainer, recipe, staged)
        else:
            trainer.save_model(str(staged))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            _keep_image_settings(recipe, staged)
            checkpoints.publish(staged, folder)
        trainer.accelerator.wait_for_everyone()  # a launcher ends all when the first one fails
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(staged, ignore_errors=True)
        raise CheckpointError(what_to_do(error, run, folder)) from error
    return folder


def _save_merged(trainer: DistillTrainer, recipe: Recipe, folder: Path) -> None:
    """The student with its adapters merged, which loads without PEFT; and its tokenizer."""
    if trainer.accelerator.is_fsdp2:  # its weights are in pieces; the adapters are written whole
        adapters = folder.with_name(folder.name + "-adapters")
        trainer.save_model(str(adapters))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            with sharding.whole_models():
                merge_saved_adapters(load_student(recipe), adapters).save_pretrained(folder)
            shutil.rmtree(adapters)
    elif trainer.args.should_save:
        merge_adapters(trainer.accelerator.unwrap_model(trainer.model)).save_pretrained(folder)
    if trainer.args.should_save:
        trainer.processing_class.save_pretrained(folder)


def _training_arguments(recipe: Recipe) -> transformers.TrainingArguments:
    settings = {"report_to": _report_to(), **recipe.training, "remove_unused_columns": False}
    settings.pop("resume_from_checkpoint", None)
    if ranks.share_a_cpu():
        settings.setdefault("use_cpu", True)
    if (
        settings.get("bf16")
        and not settings.get("use_cpu")
        and not torch.accelerator.is_available()
    ):
        raise RecipeError(
            "training.bf16 is true, which takes a GPU, and there is none here; give "
            "training.bf16=false, or training.use_cpu=true for bfloat16 on the CPU"
        )
    with _as_recipe_errors("training"):
        return transformers.TrainingArguments(**settings)


@contextmanager
def _as_recipe_errors(what: str) -> Iterator[None]:
    """What transformers and trainer say of settings that do not fit, as errors of the recipe."""
    try:
        yield
    except (RecipeError, DataError, TokenMismatchError):
        raise
    except (ValueError, NotImplementedError) as error:
        raise RecipeError(f"{what}: {error}") from error


def _named(teachers: Mapping[str, str]) -> dict[str, str]:
    return {f"teacher {name!r}": path for name, path in teachers.items()}


def check_place(role: str, path: str) -> None:
    """Raise unless a path that can only be a folder is one; hub names are looked up later.

    Args:
        role: Whose checkpoint it is, for the message.
        path: Folder or hub name.

    Raises:
        RecipeError: There is no such folder.
    """
    is_path = Path(path).is_absolute() or path.startswith((".", "~")) or path.count("/") > 1
    if is_path and not Path(path).is_dir():
        raise RecipeError(f"{role}: {path} is not a folder of a saved model")


def data_root(recipe: Recipe) -> Path:
    """Folder that the image paths of a recipe's records start from."""
    return Path(recipe.data.train).parent if recipe.data.root is None else Path(recipe.data.root)


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
        RecipeError: The checkpoint is remote code.
    """
    local = Path(path)
    if local.is_dir() and not any(local.glob("tokenizer*")) and not (local / "vocab.json").exists():
        return
    try:
        read_config(path)  # before transformers asks on the terminal whether to run remote code
    except ValueError as error:
        raise RecipeError(f"teacher {name!r}: {error}") from error
    theirs = transformers.AutoTokenizer.from_pretrained(path).get_vocab()
    for token, index in sorted(tokenizer.get_vocab().items(), key=lambda entry: entry[1]):
        if theirs.get(token) != index:
            raise TokenMismatchError(
                f"teacher {name!r} ({path}) gives the token {token!r} the id {theirs.get(token)}, "
                f"the student {index}; both must see the same tokens, take models of one family"
            )


def load_splits(recipe: Recipe, root: Path) -> dict[str, list[Record]]:
    """Training and evaluation records, checked; faults that training survives are warnings.

    Raises:
        DataError: A record is not usable, or a file holds none.
    """
    splits = _load_splits(recipe)
    _check_splits(recipe, splits, root, decode=recipe.data.check == "full")
    return splits


def _load_splits(recipe: Recipe) -> dict[str, list[Record]]:
    """Training and evaluation records by file."""
    files = [file for file in (recipe.data.train, recipe.data.eval) if file is not None]
    splits = {file: load_records(file) for file in files}
    for file, records in splits.items():
        if not records:
            raise DataError(f"{file} holds no records")
    return splits


def _check_splits(
    recipe: Recipe, splits: Mapping[str, list[Record]], root: Path, *, decode: bool
) -> None:
    """Refuse records that cannot be used; faults that training survives are warnings."""
    types = recipe.distill.mixing or None
    problems = check_records(splits, root, question_types=types, decode=decode)
    for which, is_fatal in (("unusable", True), ("doubtful", False)):
        found = [problem for problem in problems if (problem.kind in UNUSABLE_KINDS) == is_fatal]
        if not found:
            continue
        count = len({(problem.split, problem.index) for problem in found})
        text = _listed(count, which, found)
        if is_fatal:
            raise DataError(text)
        _LOG.warning("%s", text)


def _check_tokens(splits: Mapping[str, list[Record]], encoder: Encoder) -> None:
    """Refuse what the encoder would refuse of a record's text, hours later."""
    reserved = getattr(encoder, "reserved_tokens", ())
    faults = []
    for record in (record for records in splits.values() for record in records):
        try:
            check_reserved(record, reserved)
        except DataError as error:
            faults.append(error)
    if faults:
        raise DataError(_listed(len(faults), "unusable", faults))


def _listed(count: int, which: str, found: Sequence[object]) -> str:
    shown = "\n".join(f"  {each}" for each in found[:_PROBLEMS_SHOWN])
    return f"{count} {which} records, of which the first are:\n{shown}"


def _report_to() -> str:
    """TensorBoard where it is installed; log.jsonl is always written."""
    return "tensorboard" if is_tensorboard_available() else "none"


def _keep_image_settings(recipe: Recipe, folder: Path) -> None:
    """Keep the image settings beside the student, so that it can be evaluated, or be a student."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        start = Path(recipe.student) / name
        if start.is_file() and not (folder / name).exists():
            shutil.copyfile(start, folder / name)
    own = {"image_mean": recipe.encoder.image_mean, "image_std": recipe.encoder.image_std}
    given = {name: value for name, value in own.items() if value is not None}
    if given:
        file = folder / "preprocessor_config.json"
        saved = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        file.write_text(json.dumps(saved | given, indent=1) + "\n", encoding="utf-8")
