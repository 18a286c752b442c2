"""What a run's folder remembers: its recipe and its data, and that somebody is at work in it."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import transformers
import yaml

from drivekd.data import Record
from drivekd.errors import CheckpointError, RecipeError
from drivekd.train import checkpoints
from drivekd.train.recipe import Recipe, load_recipe

RECIPE = "recipe.yaml"
FACTS = "run.json"
LOCK = ".lock"

_LOG = logging.getLogger(__name__)
# Settings without which a checkpoint's state, or its place in the data, means something else.
_FIXED = (
    "distill.weighting",
    "distill.weighting_options",
    "distill.projection",
    "distill.signals.*.name",
    "distill.signals.*.kind",
    "distill.signals.*.student_layers",
    "distill.signals.*.teacher_layers",
    "encoder",
    "freeze",
    "lora",
    "training.seed",
    "training.data_seed",
    "training.full_determinism",
    "training.optim",
    "training.train_sampling_strategy",
    "training.lr_scheduler_type",
    "training.dataloader_drop_last",
)
# Settings that say how to go on, or where things lie; nothing to tell.
_FREE = ("training.resume_from_checkpoint", "training.output_dir")
_TOLD = 8
_ABSENT = object()


def recipe_tree(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain values that YAML holds; folders and files that exist become absolute."""
    tree: dict[str, Any] = _plain(recipe)
    tree["student"] = _absolute(recipe.student)
    tree["teachers"] = {name: _absolute(path) for name, path in recipe.teachers.items()}
    tree["data"] |= {
        key: value if value is None else _absolute(value)
        for key, value in dataclasses.asdict(recipe.data).items()
    }
    if recipe.cache is not None:
        tree["cache"]["path"] = _absolute(recipe.cache.path)
    tree["training"]["output_dir"] = os.path.abspath(recipe.training["output_dir"])
    return tree


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _absolute(path: str) -> str:
    return os.path.abspath(path) if Path(path).exists() else path


@contextlib.contextmanager
def alone_in(run: Path) -> Iterator[None]:
    """Keep other runs out of a folder, for as long as this process lives.

    Raises:
        RecipeError: Another process trains in it, or it is a file.
        OSError: It cannot be made or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise RecipeError(
            f"training.output_dir is {run}, which is or lies under a file; name a folder"
        ) from error
    lock = filelock.FileLock(run / LOCK)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout as error:
        raise RecipeError(
            f"another process trains in {run}; wait for it, or give another training.output_dir"
        ) from error
    except NotImplementedError as error:  # some cluster file systems have no locks
        _LOG.warning(
            "%s cannot be locked (%s): see to it that one run at a time uses it", run, error
        )
        yield
        return
    try:
        yield
    finally:
        lock.release()


def data_facts(records: Sequence[Record], total_batch: int) -> dict[str, Any]:
    """What decides which records a step sees: the records, in order, and how many a step takes."""
    return {"records": len(records), "digest": _digest(records), "batch": total_batch}


def has_checked(recipe: Recipe, splits: Mapping[str, Sequence[Record]]) -> bool:
    """Whether the run has decoded the images of just these records before, and goes on."""
    run = Path(recipe.training["output_dir"])
    goes_on = recipe.training.get("resume_from_checkpoint") is not None
    if not goes_on or checkpoints.newest_complete(run) is None or not (run / FACTS).is_file():
        return False
    return _facts(run / FACTS).get("checked") == _checked(recipe, splits)


def _checked(recipe: Recipe, splits: Mapping[str, Sequence[Record]]) -> list[str]:
    root = recipe.data.root or os.path.dirname(recipe.data.train)
    return [os.path.abspath(root), *(_digest(records) for records in splits.values())]


def _digest(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        row = [[m.role, m.content] for m in record.messages], record.images, record.question_type
        digest.update(json.dumps(row).encode())
    return digest.hexdigest()


def prepare(
    recipe: Recipe,
    args: transformers.TrainingArguments,
    splits: Mapping[str, Sequence[Record]],
) -> str | None:
    """Find the checkpoint to go on from, and remember recipe and data in the run's folder.

    Every process calls it; the first one writes.

    Args:
        recipe: The recipe.
        args: Its training arguments.
        splits: Training and evaluation records by file, in order.

    Returns:
        The checkpoint; None for a fresh run.

    Raises:
        CheckpointError: The newest checkpoint is damaged, or the one asked for does not exist.
        RecipeError: A fresh run would mix with an older one's checkpoints, or recipe or data
            changed in a way that the checkpoint does not survive.
        ValueError: There is no checkpoint to resume from.
    """
    run = Path(args.output_dir)
    is_first = args.process_index == 0
    if is_first:
        checkpoints.finish_interrupted(run)
    _wait(args)
    resume = recipe.training.get("resume_from_checkpoint")
    found = checkpoints.find(resume, run)
    if found is not None and not Path(found).is_dir():
        raise CheckpointError(f"training.resume_from_checkpoint is {found}, which is no folder")
    facts = data_facts(
        splits[recipe.data.train],
        args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
    )
    if found is not None:
        for change in check_resumed(recipe, facts, Path(found).parent):
            if is_first:
                _LOG.warning("resuming with a changed recipe: %s", change)
        if is_first:
            _LOG.warning("resuming from %s", found)
    elif (older := checkpoints.newest_complete(run)) is not None:
        raise RecipeError(
            f"{older} is of an earlier run; to go on with it give training.resume_from_checkpoint"
            "=auto, to start afresh delete the checkpoints or give another training.output_dir"
        )
    if recipe.data.check == "full":
        facts["checked"] = _checked(recipe, splits)
    _wait(args)  # all have read before the first one writes
    if is_first:
        _write(run / RECIPE, yaml.safe_dump(recipe_tree(recipe), sort_keys=False))
        _write(run / FACTS, json.dumps(facts, indent=1) + "\n")
    return found


def check_resumed(recipe: Recipe, facts: Mapping[str, Any], run: Path) -> list[str]:
    """What has changed since a run that left a recipe and facts; nothing if it left none.

    Returns:
        Changes that a resumed run may have, in words.

    Raises:
        RecipeError: A change that makes the checkpoint's state or place in the data wrong.
    """
    changes: list[str] = []
    refused: list[str] = []
    if (run / FACTS).is_file():
        before = _facts(run / FACTS)
        if before.get("digest") != facts["digest"]:
            refused.append(
                f"the training records are others ({before.get('records')} then, "
                f"{facts['records']} now), so that their order is too"
            )
        if before.get("batch") != facts["batch"]:
            refused.append(
                f"a step takes {facts['batch']} records (processes x per_device_train_batch_size "
                f"x gradient_accumulation_steps), it took {before.get('batch')}"
            )
    if (run / RECIPE).is_file():
        old = _flat(recipe_tree(load_recipe(run / RECIPE)))
        new = _flat(recipe_tree(recipe))
        for key in dict.fromkeys([*old, *new]):
            then, now = old.get(key, _ABSENT), new.get(key, _ABSENT)
            if then == now or _matches(key, _FREE):
                continue
            told = refused if _matches(key, _FIXED) else changes
            told.append(f"{key} is {_said(now)}, was {_said(then)}")
    if refused:
        more = f" and {len(refused) - _TOLD} more" if len(refused) > _TOLD else ""
        raise RecipeError(
            f"the run in {run} cannot go on like this: {'; '.join(refused[:_TOLD])}{more}. Undo "
            "this, or start a new run from the checkpoint's weights: give it as the student, with "
            "another training.output_dir"
        )
    return changes


def _said(value: Any) -> str:
    return "absent" if value is _ABSENT else repr(value)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted path; list entries by their name or place."""
    if isinstance(tree, Mapping):
        pairs = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(entry, Mapping) for entry in tree):
        pairs = [(entry.get("name", i), entry) for i, entry in enumerate(tree)]
    else:
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _matches(key: str, patterns: Sequence[str]) -> bool:
    parts = key.split(".")
    return any(
        len(wanted) <= len(parts)
        and all(w in ("*", p) for w, p in zip(wanted, parts, strict=False))
        for wanted in (pattern.split(".") for pattern in patterns)
    )


def _facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{file} cannot be read ({error}); delete it to go on without comparing the data"
        ) from error
    return dict(facts)


def _write(file: Path, text: str) -> None:
    draft = file.with_name(file.name + ".draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, file)


def _wait(args: transformers.TrainingArguments) -> None:
    if args.distributed_state is not None:
        args.distributed_state.wait_for_everyone()
