"""What a cache will hold for a recipe, and how large that is; the teachers are not loaded."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import DataLoader, Dataset

from drivekd.data import Collator, Record
from drivekd.errors import CacheError, RecipeError
from drivekd.train.cache.keys import MapSpec, TeacherRecord, sample_digest
from drivekd.train.cache.ranks import Ranks
from drivekd.train.cache.store import ENTRY_OVERHEAD, SHARD_OVERHEAD, TargetStore
from drivekd.train.cache.targets import map_spec, read_teacher, teacher_precision
from drivekd.train.encoders import build_encoder
from drivekd.train.recipe import CacheConfig, Recipe
from drivekd.train.run import check_tokenizer, load_splits
from drivekd.train.signals import attention_loss
from drivekd.train.teachers import num_layers, read_config

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class SignalSize:
    """What one signal needs of a cache.

    Attributes:
        signal: Its name.
        records: Training records that it works on.
        entries: Different targets of them; equal records share one.
        missing: Of these the ones that are not there yet.
        bytes: Size of all entries: exact, but for what files hold beside tensors.
        missing_bytes: Size of the missing ones.
    """

    signal: str
    records: int
    entries: int
    missing: int
    bytes: int
    missing_bytes: int


@dataclass(frozen=True)
class CachePlan:
    """What a recipe needs of a cache, beforehand.

    Attributes:
        folder: The cache.
        signals: One by one; signals of one teacher and the same layers share entries.
        entries: Different entries of all signals.
        missing: Of these the ones that are not there yet.
        bytes: Size of all entries.
        missing_bytes: Size of the missing ones.
        overhead_bytes: At most so much do the files of the missing ones hold beside tensors.
        free_bytes: Room on the disk.
        other_bytes: Size of shards of which this recipe needs nothing; they are kept.
        damaged: Shards that are damaged, whose entries count as missing.
        written: Entries that were written; 0 in a plan.
        written_bytes: Size of their files.
    """

    folder: str
    signals: tuple[SignalSize, ...]
    entries: int
    missing: int
    bytes: int
    missing_bytes: int
    overhead_bytes: int
    free_bytes: int
    other_bytes: int
    damaged: tuple[str, ...]
    written: int = 0
    written_bytes: int = 0


@dataclass(frozen=True)
class Sample:
    """What an entry's size and name follow from."""

    digest: str
    num_tokens: int
    num_text: int
    num_vision: int


@dataclass(frozen=True)
class Wanted:
    """One signal's maps, and the records that it wants them of."""

    signal: str
    teacher: str
    path: str
    spec: MapSpec
    records: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """A recipe, read and checked, without any weights."""

    recipe: Recipe
    settings: CacheConfig
    args: transformers.TrainingArguments
    records: list[Record]
    collator: Collator
    student_config: Any
    teachers: Mapping[str, TeacherRecord]
    wanted: tuple[Wanted, ...]
    ranks: Ranks


class MeasuredRecords(Dataset[tuple[int, Sample]]):
    """What the entries of single records are named after and sized by; run by loader workers."""

    def __init__(self, job: Job) -> None:
        self._records = job.records
        self._collator = job.collator

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        record = self._records[index]
        features = self._collator.encoder(record)
        tokens = self._collator.collate([record], [features])["tokens"]
        return index, Sample(
            sample_digest(features),
            tokens.num_tokens,
            int(tokens.is_text.sum()),
            int(tokens.is_vision.sum()),
        )


def prepare(recipe: Recipe) -> Job:
    """Read and check what a cache is made from; raises what `plan_cache` raises."""
    if recipe.cache is None:
        raise RecipeError("cache.path is missing; add cache: {path: FOLDER}, or cache.path=FOLDER")
    signals = [signal for signal in recipe.distill.active if signal.kind == "attention"]
    if not signals:
        raise RecipeError("the recipe has no active signal of kind 'attention'; nothing to cache")
    root = Path(recipe.data.train).parent if recipe.data.root is None else Path(recipe.data.root)
    records = load_splits(recipe, root)[recipe.data.train]
    encoder, processing = build_encoder(recipe.encoder, recipe.student, root)
    tokenizer = getattr(processing, "tokenizer", processing)
    try:
        student_config = read_config(recipe.student)
    except ValueError as error:
        raise RecipeError(f"student: {error}") from error
    collator = Collator(
        encoder,
        student_config,
        pad_token_id=tokenizer.pad_token_id,
        padding_side=recipe.encoder.padding_side,
    )
    settings = {**recipe.training, "report_to": "none"}
    settings.pop("resume_from_checkpoint", None)
    args = transformers.TrainingArguments(**settings)
    precision = teacher_precision(recipe.teacher_dtype, args)
    mixing = recipe.distill.resolve_mixing({record.question_type for record in records})
    teachers: dict[str, TeacherRecord] = {}
    wanted = []
    for signal in signals:
        path = recipe.teachers[signal.teacher]
        if path not in teachers:
            teachers[path] = read_teacher(path)
            check_tokenizer(signal.teacher, path, tokenizer)
        loss = attention_loss(signal, num_layers(student_config), teachers[path].depth)
        types = mixing[signal.name]
        spec = map_spec(recipe.cache, loss, teachers[path], precision=precision)
        chosen = tuple(i for i, record in enumerate(records) if record.question_type in types)
        wanted.append(Wanted(signal.name, signal.teacher, path, spec, chosen))
    return Job(
        recipe,
        recipe.cache,
        args,
        records,
        collator,
        student_config,
        teachers,
        tuple(wanted),
        Ranks(args),
    )


def measure(job: Job, progress: Progress | None) -> dict[int, Sample]:
    """Encode every record that is wanted, once, and keep what its entries' sizes follow from."""
    indices = job.ranks.share(sorted({i for each in job.wanted for i in each.records}))
    samples: dict[int, Sample] = {}
    for index, sample in DataLoader(
        MeasuredRecords(job),
        sampler=indices,
        batch_size=None,
        num_workers=job.args.dataloader_num_workers,
    ):
        samples[index] = sample
        if progress is not None:
            progress("encoded", len(samples), len(indices))
    return {index: each for part in job.ranks.gather(samples) for index, each in part.items()}


def open_store(job: Job, samples: Mapping[int, Sample], *, check: bool) -> TargetStore:
    """The cache as it is, without damaged shards.

    Args:
        job: What it is for.
        samples: What `measure` gave.
        check: Read every entry that is wanted and compare it with its checksum.
    """
    store = TargetStore(Path(job.settings.path), skip_damaged=True)
    if check:
        for key in {key for key, _ in _entries(job.wanted, samples)}:
            if key in store:
                try:
                    store.read(key)
                except CacheError:
                    store.drop_shard_of(key)
    return store


def make_plan(job: Job, samples: Mapping[int, Sample], store: TargetStore) -> CachePlan:
    """Add up sizes."""
    sizes = []
    for each in job.wanted:
        entries = dict(_entries([each], samples))
        missing = {key: size for key, size in entries.items() if key not in store}
        sizes.append(
            SignalSize(
                each.signal,
                len(each.records),
                len(entries),
                len(missing),
                sum(entries.values()),
                sum(missing.values()),
            )
        )
    entries = dict(_entries(job.wanted, samples))
    missing = {key: size for key, size in entries.items() if key not in store}
    others = [file for file, keys in store.files().items() if not keys & entries.keys()]
    shard_bytes = job.settings.shard_mib * 2**20
    shards = len(missing) and 1 + int(sum(missing.values()) // shard_bytes)
    return CachePlan(
        folder=job.settings.path,
        signals=tuple(sizes),
        entries=len(entries),
        missing=len(missing),
        bytes=sum(entries.values()),
        missing_bytes=sum(missing.values()),
        overhead_bytes=len(missing) * ENTRY_OVERHEAD + shards * SHARD_OVERHEAD,
        free_bytes=_free(Path(job.settings.path)),
        other_bytes=sum(file.stat().st_size for file in others),
        damaged=tuple(str(file) for file in store.damaged),
    )


def _entries(wanted: Iterable[Wanted], samples: Mapping[int, Sample]) -> Iterator[tuple[str, int]]:
    """Keys and sizes, equal ones as often as they are wanted."""
    for each in wanted:
        for index in each.records:
            sample = samples[index]
            yield (
                each.spec.key(sample.digest),
                each.spec.entry_bytes(
                    num_tokens=sample.num_tokens,
                    num_text=sample.num_text,
                    num_vision=sample.num_vision,
                ),
            )


def _free(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
