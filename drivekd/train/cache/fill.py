"""Filling a cache: each teacher once over the records that have no entry yet."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from drivekd.capture import CapturedAttention, capture_attention
from drivekd.errors import CacheError, NonFiniteLossError, RecipeError, TrainingMemoryError
from drivekd.functional import AttentionMapTarget, attention_map_targets
from drivekd.tokens import TokenLayout
from drivekd.train.cache.keys import MapSpec, sample_digest
from drivekd.train.cache.plan import (
    CachePlan,
    Job,
    Progress,
    Sample,
    Wanted,
    make_plan,
    measure,
    open_store,
    prepare,
)
from drivekd.train.cache.store import TargetStore, TargetWriter, write_json, writing
from drivekd.train.cache.targets import TEACHERS, as_table, known_teachers
from drivekd.train.guards import is_out_of_memory
from drivekd.train.models import check_same_vision
from drivekd.train.placement import place_teachers
from drivekd.train.recipe import Recipe
from drivekd.train.teachers import load_teacher

_DTYPES = {"float16": torch.float16, "float32": torch.float32}


def plan_cache(
    recipe: Recipe, *, check: bool = False, progress: Progress | None = None
) -> CachePlan:
    """Say what a recipe needs of its cache, what of it is there, and how large the rest will be.

    Encodes the training records and hashes the teachers' files; loads no model, writes nothing.

    Args:
        recipe: What `load_recipe` gave, with `cache.path`.
        check: Also read every entry that is there and compare it with its checksum.
        progress: Told what was done, how much of it, and how much there is.

    Returns:
        The plan; sizes are exact but for what files hold beside tensors.

    Raises:
        DataError: A record is not usable.
        RecipeError: The recipe names no cache or has no attention signal, or a setting, layer or
            checkpoint does not fit.
        TokenMismatchError: A teacher's tokenizer is not the student's.
        ValueError: A question type does not fit.
        OSError: A checkpoint or file does not exist.
    """
    job = prepare(recipe)
    samples = measure(job, progress if job.ranks.is_first else None)
    plan = make_plan(job, samples, open_store(job, samples, check=check))
    job.ranks.close()
    return plan


def cache_targets(
    recipe: Recipe,
    *,
    check: bool = False,
    progress: Progress | None = None,
    announce: Callable[[CachePlan], None] | None = None,
) -> CachePlan:
    """Run a recipe's teachers once and keep the targets of its attention signals.

    Makes only what is not there: a fill that was stopped, by a kill or a full disk, goes on where
    its last shard ended, and a record or teacher that changed is made again. Teachers run in the
    dtype and autocast of the training run, one after the other, no deeper than needed. Started by
    torchrun or accelerate, every process takes its share of the records.

    Args:
        recipe: What `load_recipe` gave, with `cache.path`.
        check: Also read every entry that is there, and make damaged ones again.
        progress: Told what was done, how much of it, and how much there is.
        announce: Told the plan before the first teacher runs, also if there is no room for it.

    Returns:
        The plan as it was before, with what was written.

    Raises:
        CacheError: The disk has no room for all of it (nothing was written), a shard could not be
            written (those before it are kept), or another process is filling the cache.
        NonFiniteLossError: A teacher's maps are not finite.
        TrainingMemoryError: Memory ran out.
        DataError: As `plan_cache`, like the rest.
        RecipeError: Likewise.
        TokenMismatchError: Likewise, or a teacher makes other tokens of an image.
        ValueError: Likewise.
        OSError: Likewise.

    Example:
        >>> from drivekd.train import cache_targets, load_recipe
        >>> cache_targets(load_recipe("recipes/multi.yaml",
        ...     ["cache.path=runs/targets"]))  # doctest: +SKIP
    """
    job = prepare(recipe)
    ranks = job.ranks
    progress = progress if ranks.is_first else None
    samples = measure(job, progress)
    folder = Path(job.settings.path)
    with writing(folder) if ranks.is_first else contextlib.nullcontext():
        ranks.wait()
        store = open_store(job, samples, check=check)
        plan = make_plan(job, samples, store)
        if announce is not None and ranks.is_first:
            announce(plan)
        needed = plan.missing_bytes + plan.overhead_bytes
        if needed > plan.free_bytes:
            raise CacheError(
                f"{folder} needs up to {needed:,} bytes more but its disk has "
                f"{plan.free_bytes:,} free; nothing was written. Make room, take another "
                "cache.path, or a smaller cache.top_k"
            )
        ranks.wait()  # nobody writes before all have looked
        if ranks.is_first:
            for file in store.damaged:
                file.unlink()
            write_json(folder / TEACHERS, as_table({**known_teachers(folder), **job.teachers}))
        writer = TargetWriter(folder, shard_bytes=int(job.settings.shard_mib * 2**20))
        try:
            for part in _by_teacher(job.wanted):
                _run_teacher(job, part, samples, store, writer, plan, progress)
        except BaseException:
            with contextlib.suppress(CacheError):
                writer.flush()
            raise
        writer.flush()
        written = ranks.gather((writer.entries, writer.bytes))
    ranks.close()
    return replace(
        plan,
        written=sum(entries for entries, _ in written),
        written_bytes=sum(size for _, size in written),
    )


class _EncodedRecords(Dataset[tuple[int, dict[str, Tensor]]]):
    """Records as model inputs, with their index; run by loader workers."""

    def __init__(self, job: Job) -> None:
        self._records = job.records
        self._encoder = job.collator.encoder

    def __getitem__(self, index: int) -> tuple[int, dict[str, Tensor]]:
        return index, self._encoder(self._records[index])


def _by_teacher(wanted: Sequence[Wanted]) -> list[list[Wanted]]:
    parts: dict[str, list[Wanted]] = {}
    for each in wanted:
        parts.setdefault(each.spec.teacher, []).append(each)
    return list(parts.values())


def _run_teacher(
    job: Job,
    wanted: Sequence[Wanted],
    samples: Mapping[int, Sample],
    store: TargetStore,
    writer: TargetWriter,
    plan: CachePlan,
    progress: Progress | None,
) -> None:
    """Make what is missing of one teacher's maps; records that need the same go together."""
    needs: dict[tuple[MapSpec, ...], list[int]] = {}
    planned: set[str] = set()
    by_record: dict[int, dict[str, MapSpec]] = {}
    for each in wanted:
        for index in each.records:
            by_record.setdefault(index, {})[each.spec.digest] = each.spec
    for index, specs in sorted(by_record.items()):
        keys = {spec.key(samples[index].digest): spec for spec in specs.values()}
        missing = {key: keys[key] for key in sorted(keys) if key not in store}
        together = tuple(spec for key, spec in missing.items() if key not in planned)
        planned |= missing.keys()
        if together:
            needs.setdefault(together, []).append(index)
    own = {together: job.ranks.share(indices) for together, indices in needs.items()}
    if not any(own.values()):
        return
    first = wanted[0]
    layers = sorted({layer for each in wanted for group in each.spec.groups for layer in group})
    places = place_teachers(job.recipe.teacher_device, job.recipe.teachers, job.ranks.device)
    device = places[first.teacher]
    with _advice(job):
        try:
            teacher = load_teacher(
                first.path, tuple(layers), dtype=job.recipe.teacher_dtype, device=device
            )
        except ValueError as error:
            raise RecipeError(f"teacher {first.teacher!r}: {error}") from error
        student: Any = SimpleNamespace(config=job.student_config)
        check_same_vision(first.teacher, teacher, student)
        size = job.settings.batch_size
        for together, indices in own.items():
            batches = [list(indices[i : i + size]) for i in range(0, len(indices), size)]
            for batch in DataLoader(
                _EncodedRecords(job),
                batch_sampler=batches,
                num_workers=job.args.dataloader_num_workers,
                collate_fn=list,
            ):
                _cache_batch(job, teacher, device, together, batch, writer, first.teacher)
                if progress is not None:
                    progress("cached", writer.taken * job.ranks.count, plan.missing)


def _cache_batch(
    job: Job,
    teacher: Any,
    device: torch.device,
    specs: tuple[MapSpec, ...],
    encoded: Sequence[tuple[int, dict[str, Tensor]]],
    writer: TargetWriter,
    name: str,
) -> None:
    """One forward of the teacher, and every record's targets without its padding."""
    records = [job.records[index] for index, _ in encoded]
    features = [each for _, each in encoded]
    batch = job.collator.collate(records, features)
    tokens: TokenLayout = batch["tokens"]
    inputs = {
        key: value.to(device)
        for key, value in batch.items()
        if isinstance(value, Tensor) and key != "labels"
    }
    layers = sorted({layer for spec in specs for group in spec.groups for layer in group})
    made: list[tuple[str, str, list[AttentionMapTarget]]] = []
    with torch.no_grad(), _autocast(job, device):
        with capture_attention(teacher, layers, stop_after_last=True) as capture:
            teacher(**inputs, use_cache=False)
        for row, (record, feature) in enumerate(zip(records, features, strict=True)):
            valid = tokens.valid[row].nonzero()[:, 0]
            place = slice(int(valid[0]), int(valid[-1]) + 1)
            own = TokenLayout.from_masks(tokens.is_vision[row : row + 1, place].to(device))
            sample = sample_digest(feature)
            made += [
                (record.id, spec.key(sample), _targets(capture, row, place, own, spec))
                for spec in specs
            ]
    for record_id, key, targets in made:
        if not all(bool(torch.isfinite(each.values).all()) for each in targets):
            raise NonFiniteLossError(
                f"teacher {name!r}, record {record_id!r}: attention maps are not finite; take "
                "another teacher_dtype"
            )
        writer.add(key, targets)


def _targets(
    capture: CapturedAttention, row: int, place: slice, tokens: TokenLayout, spec: MapSpec
) -> list[AttentionMapTarget]:
    """The targets of one sample; groups of one window are made together."""
    count = tokens.num_tokens
    windows: dict[int | None, list[int]] = {}
    for i, group in enumerate(spec.groups):
        own = {capture[layer].window for layer in group}
        own = {None if window is None or window >= count else window for window in own}
        if len(own) > 1:
            raise NotImplementedError(
                f"teacher layers {list(group)} attend within different windows ({own}); a group "
                "needs one"
            )
        windows.setdefault(own.pop(), []).append(i)
    targets: dict[int, AttentionMapTarget] = {}
    for window, members in windows.items():
        layers = sorted({layer for i in members for layer in spec.groups[i]})
        chosen = [capture[layer] for layer in layers]
        made = attention_map_targets(
            [
                (each.query[row : row + 1, :, place], each.key[row : row + 1, :, place])
                for each in chosen
            ],
            [[layers.index(layer) for layer in spec.groups[i]] for i in members],
            tokens,
            region="full" if spec.region == "full" else "text_to_vision",
            top_k=spec.top_k,
            dtype=_DTYPES[spec.dtype],
            window=window,
            scale_teacher=[each.scale for each in chosen],
            lse_teacher=[
                None if each.lse is None else each.lse[row : row + 1, :, place] for each in chosen
            ],
        )
        targets.update(zip(members, made, strict=True))
    raw = {layer: capture[layer].window for group in spec.groups for layer in group}
    # The teacher's own window, also where it covers all of this sample: a batch may be longer.
    return [replace(targets[i], window=raw[group[0]]) for i, group in enumerate(spec.groups)]


def _autocast(job: Job, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """What the trainer runs teachers and losses under."""
    if job.args.bf16 or job.args.fp16:
        dtype = torch.bfloat16 if job.args.bf16 else torch.float16
        return torch.autocast(device.type, dtype=dtype)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _advice(job: Job) -> Iterator[None]:
    """Say what to change where memory runs out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise TrainingMemoryError(
            f"out of memory: {error} Change one of: cache.batch_size below "
            f"{job.settings.batch_size}, teacher_dtype=bfloat16, smaller or fewer images per record"
        ) from error
