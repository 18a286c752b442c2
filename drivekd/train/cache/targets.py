"""Cached targets for training: which teacher they belong to, and where a batch finds its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import transformers
from torch import Tensor, nn

from drivekd.errors import CacheError, RecipeError
from drivekd.functional import AttentionMapTarget
from drivekd.losses import AttentionMapLoss
from drivekd.train.cache.keys import MapSpec, TeacherRecord, sample_digest, teacher_identity
from drivekd.train.cache.store import TargetStore
from drivekd.train.config import DistillConfig, nearest
from drivekd.train.recipe import CacheConfig
from drivekd.train.signals import CachedSignal, Signal, attention_loss, depth
from drivekd.train.teachers import num_layers, read_config

if TYPE_CHECKING:
    from drivekd.data import Record

TEACHERS = "teachers.json"
_LOG = logging.getLogger(__name__)


class CachedSource:
    """Finds the targets of one signal; a `drivekd.data.collate.Source`.

    Args:
        store: The cache's entries.
        spec: Which maps.
        signal: The signal's name, for messages.
    """

    def __init__(self, store: TargetStore, spec: MapSpec, signal: str) -> None:
        self._store = store
        self._spec = spec
        self._signal = signal

    def __call__(
        self,
        records: Sequence[Record],
        features: Sequence[Mapping[str, Tensor]],
        *,
        length: int,
        padding_side: Literal["left", "right"],
    ) -> tuple[AttentionMapTarget, ...]:
        """One target for each student layer, of all the records.

        Raises:
            CacheError: A record has no entry, or its shard is damaged.
        """
        entries = []
        for record, feature in zip(records, features, strict=True):
            key = self._spec.key(sample_digest(feature))
            if key not in self._store:
                raise CacheError(
                    f"signal {self._signal!r}, record {record.id!r}: {self._store.folder} has no "
                    "target of it. The record, its image, the encoder or the teacher changed, or "
                    "it was never cached: run `drivekd cache` with this recipe and the same "
                    "settings, it makes what is missing (cache=null trains with teachers instead)"
                )
            try:
                entries.append(self._store.read(key))
            except CacheError as error:
                where = f"signal {self._signal!r}, record {record.id!r}"
                raise CacheError(f"{where}: {error}") from error
        counts = [len(feature["input_ids"]) for feature in features]
        starts = [length - count if padding_side == "left" else 0 for count in counts]
        return tuple(
            AttentionMapTarget.stack(targets, num_tokens=length, starts=starts)
            for targets in zip(*entries, strict=True)
        )


def bind(
    settings: CacheConfig,
    config: DistillConfig,
    student: nn.Module,
    teachers: Mapping[str, Any],
    *,
    precision: str,
) -> dict[str, CachedSignal]:
    """The attention signals of a distillation with what finds their targets.

    Args:
        settings: The cache.
        config: The distillation.
        student: The student, for the depth of its decoder.
        teachers: Paths by name. A teacher that is there is hashed, so that one that changed is
            told from the one that was cached; of one that is not there the cache knows.
        precision: As `teacher_precision` gives it.

    Raises:
        CacheError: There is no cache, nothing of a signal is in it, or a shard is damaged.
        RecipeError: A layer does not exist.
        TypeError: A teacher is no path.
        ValueError: A teacher is missing.
    """
    store = TargetStore(Path(settings.path))
    bound: dict[str, CachedSignal] = {}
    records: dict[str, TeacherRecord] = {}
    for signal in config.active:
        if signal.kind != "attention":
            continue
        if signal.teacher not in teachers:
            raise ValueError(
                f"there is no teacher {signal.teacher!r}; {nearest(signal.teacher, teachers)}"
            )
        path = teachers[signal.teacher]
        if not isinstance(path, str | Path):
            raise TypeError(
                f"teachers[{signal.teacher!r}] is a {type(path).__name__}, wanted a path: with a "
                "cache no teacher of signals of kind 'attention' is loaded"
            )
        if str(path) not in records:
            records[str(path)] = _teacher(settings, path)
        teacher = records[str(path)]
        loss = attention_loss(signal, depth(student), teacher.depth)
        spec = map_spec(settings, loss, teacher, precision=precision)
        entries = store.count(spec.digest)
        if entries == 0:
            raise CacheError(
                f"signal {signal.name!r}: {settings.path} has no targets of teacher "
                f"{signal.teacher!r} ({path}) with these layers and settings ({precision}, "
                f"cache.dtype={settings.dtype}"
                + (f", cache.top_k={settings.top_k}" if spec.top_k else "")
                + "); run `drivekd cache` with this recipe and the same settings"
            )
        source = CachedSource(store, spec, signal.name)
        bound[signal.name] = CachedSignal(loss, source, entries)
    return bound


def warn_of_missing(
    cached: Mapping[str, CachedSignal], signals: Sequence[Signal], records: Any
) -> None:
    """Say before training, not hours later, that a cache is probably not complete.

    Only encoding all records would tell for sure: equal ones share an entry.
    """
    try:
        types = [records[i].question_type for i in range(len(records))]
    except (TypeError, AttributeError):
        return
    for signal in signals:
        name = signal.config.name
        wanted = sum(each in signal.sample_weights for each in types)
        if name in cached and cached[name].entries < wanted:
            _LOG.warning(
                "the cache has %d targets of signal %r, which works on %d records: unless some of "
                "these are equal, training will stop at those that are missing; `drivekd cache "
                "RECIPE --dry-run` counts them",
                cached[name].entries,
                name,
                wanted,
            )


def map_spec(
    settings: CacheConfig, loss: AttentionMapLoss, teacher: TeacherRecord, *, precision: str
) -> MapSpec:
    """What a loss reads of a cache; losses that differ in anything else share it."""
    return MapSpec(
        teacher=teacher.identity,
        groups=tuple(tuple(loss.teacher_layers[i] for i in group) for group in loss.groups),
        region=loss.region,
        top_k=settings.top_k if loss.region == "full" else None,
        dtype=settings.dtype,
        precision=precision,
    )


def teacher_precision(teacher_dtype: str, args: transformers.TrainingArguments) -> str:
    """Dtype of a teacher's weights and autocast of a training run, in one word."""
    autocast = "bf16" if args.bf16 else "fp16" if args.fp16 else "none"
    return f"{teacher_dtype} weights, autocast {autocast}"


def read_teacher(path: str | Path, *, local_files_only: bool = False) -> TeacherRecord:
    """Look at a teacher's checkpoint.

    Raises:
        RecipeError: It is of a kind that has no safetensors weights, or of remote code.
        OSError: There is no such checkpoint.
    """
    try:
        config = read_config(path, local_files_only=local_files_only)
        identity = teacher_identity(path, local_files_only=local_files_only)
    except FileNotFoundError as error:
        if not Path(path).is_dir():
            raise
        raise RecipeError(
            f"teacher {path}: {error}; a cache needs safetensors weights to tell teachers apart"
        ) from error
    except ValueError as error:
        raise RecipeError(f"teacher {path}: {error}") from error
    return TeacherRecord(identity, num_layers(config))


def known_teachers(folder: Path) -> dict[str, TeacherRecord]:
    """The teachers that a cache was last filled from, by path as the recipe has it."""
    file = folder / TEACHERS
    if not file.is_file():
        return {}
    try:
        table = json.loads(file.read_text(encoding="utf-8"))
        return {path: TeacherRecord(**entry) for path, entry in table.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{file} is damaged ({error}); delete it and run `drivekd cache` again"
        ) from error


def as_table(teachers: Mapping[str, TeacherRecord]) -> dict[str, dict[str, Any]]:
    """The contents of the file of known teachers."""
    return {path: asdict(teachers[path]) for path in sorted(teachers)}


def _teacher(settings: CacheConfig, path: str | Path) -> TeacherRecord:
    """The teacher as it is, or if it is not there as the cache knows it."""
    try:
        return read_teacher(path, local_files_only=True)
    except (OSError, RecipeError) as error:
        known = known_teachers(Path(settings.path))
        if str(path) not in known:
            reason = str(error).splitlines()[0]
            raise CacheError(
                f"teacher {path} is not there ({reason}), and {settings.path} was not filled from "
                f"it but from: {', '.join(known) or 'none'}; name it as the cache does, or run "
                "`drivekd cache` with this recipe where the teacher is"
            ) from error
        return known[str(path)]
