"""Tables and documents of what `drivekd profile` measured."""

from __future__ import annotations

import dataclasses
import platform
import statistics
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import torch
import transformers

from drivekd.study.costs import quantity
from drivekd.study.measure import percentile
from drivekd.study.profile.deployment import Deployment
from drivekd.study.profile.training import PLAIN, Steps, TrainingProfile
from drivekd.study.tables import NOT_MEASURED, Row, Table

_PERCENTILES = (50, 90)


def ratios(result: Deployment, first: Deployment) -> dict[str, float | None]:
    """How much less the first model takes than another one, at one batch size.

    Returns:
        `memory` and `first_token`: the other's over the first's; `speed`: the first's tokens a
        second over the other's. All are above 1 where the first is better, None where something
        was not measured. `memory_at_least`: as `memory`, of the other's weights alone.
    """
    memory, own = (each.run.peak_bytes if each.run else None for each in (result, first))
    return {
        "memory": _over(memory, own),
        "memory_at_least": _over(result.weight_bytes, own),
        "speed": _over(first.tokens_per_second, result.tokens_per_second),
        "first_token": _over(result.first_token_seconds, first.first_token_seconds),
    }


def deployment_table(results: Sequence[Deployment]) -> Table:
    """One row a model, grouped by batch size: memory, speed, time to the first token, ratios."""
    columns = (
        "", "batch", "weights", "memory", "tokens/s", "first token", "p90", "a token", "p90",
        "x memory", "x speed", "x first token",
    )  # fmt: skip
    rows = []
    for size in dict.fromkeys(result.batch_size for result in results):
        group = [result for result in results if result.batch_size == size]
        for result in group:
            compared = ratios(result, group[0]) if result is not group[0] else {}
            memory = _times(compared.get("memory"))
            if memory == NOT_MEASURED and compared.get("memory_at_least") is not None:
                memory = f"> {_times(compared['memory_at_least'])}"
            rows.append(
                Row(
                    result.model,
                    (
                        f"{size}",
                        f"{quantity(result.weight_bytes)}B",
                        *_cells(result),
                        memory,
                        *(_times(compared.get(name)) for name in ("speed", "first_token")),
                    ),
                    f"batch {size}",
                )
            )
    return Table("What an answer costs", columns, tuple(rows), tuple(_notes(results)))


def _cells(result: Deployment) -> tuple[str, ...]:
    """Memory, speed and times, or why there are none."""
    run = result.run
    if run is None:
        reason = (result.problem or "").split(":")[0]
        return (reason, *[NOT_MEASURED] * 5)
    speed = result.tokens_per_second
    return (
        f"{quantity(run.peak_bytes)}B",
        NOT_MEASURED if speed is None else f"{speed:.1f}",
        *(_seconds(percentile(run.first_token_seconds, share)) for share in _PERCENTILES),
        *(
            _seconds(percentile(run.token_seconds, share)) if run.token_seconds else NOT_MEASURED
            for share in _PERCENTILES
        ),
    )


def _notes(results: Sequence[Deployment]) -> list[str]:
    notes = []
    for model in dict.fromkeys(result.model for result in results):
        own = next(result for result in results if result.model == model)
        kv = own.kv_bytes_per_token
        cache = "" if kv is None else f"; keys and values take {quantity(kv)}B a token"
        attention = "" if own.attention is None else f", {own.attention} attention"
        images = "an image" if own.images == 1 else f"{own.images} images"
        notes.append(
            f"{model}: {quantity(own.parameters).strip()} parameters in {own.dtype} ({own.weights} "
            f"weights){attention}, {own.device}; prompt of {own.prompt_tokens:,} tokens, "
            f"{own.image_tokens:,} of them for {images}; "
            f"{own.new_tokens} new tokens{cache}."
        )
    for result in results:
        if result.problem is not None:
            notes.append(f"{result.model}, batch {result.batch_size}: {result.problem}.")
    runs = [result.run for result in results if result.run is not None]
    on_cpu = any(result.device.startswith("cpu") for result in results)
    memory = (
        "weights and the most that torch's allocator gave out beside them (CPU)"
        if on_cpu
        else "the most that torch's allocator gave out, weights among it, without the CUDA context"
    )
    rounds = len(runs[0].first_token_seconds) if runs else 0
    notes.append(
        f"Memory: {memory}. First token: from inputs on the device to the first token on the host, "
        "vision tower and prefill among it. Tokens/s: of the whole batch, after the first token. "
        f"Medians of {rounds} rounds; greedy, end tokens are never taken."
    )
    growths = [run.resident_growth_bytes for run in runs if run.resident_growth_bytes is not None]
    if growths:
        each = ", ".join(f"{quantity(growth)}B" for growth in growths)
        notes.append(f"Resident memory of the process grew by {each}, row by row.")
    if len({result.model for result in results}) > 1:
        notes.append(
            f"x: how many times less memory {results[0].model} takes, how many times faster it is "
            "and how many times sooner its first token comes, at the same batch size; > by the "
            "other's weights alone."
        )
    return notes


def deployment_document(results: Sequence[Deployment]) -> dict[str, Any]:
    """All that was measured, for JSON; times in seconds, memory in bytes."""
    rows = []
    for result in results:
        first = next(each for each in results if each.batch_size == result.batch_size)
        row = dataclasses.asdict(result) | {"tokens_per_second": result.tokens_per_second}
        if result.run is not None:
            for name in ("first_token_seconds", "decode_seconds", "token_seconds"):
                values = getattr(result.run, name)
                shares = _PERCENTILES if values else ()
                row[name] = {f"p{share}": percentile(values, share) for share in shares}
        if result is not first:
            row["first_model_is_better_by"] = ratios(result, first)
        rows.append(row)
    return {"models": rows, **environment()}


def training_tables(profile: TrainingProfile) -> list[Table]:
    """Where a step's time goes, and what the recipe costs beside the same with less."""
    whole = statistics.mean(profile.split_seconds)
    rows = [
        Row(
            each.name,
            (_seconds(each.seconds), f"{100 * each.seconds / whole:.1f} %", _size(each.peak_bytes)),
            "phases",
        )
        for each in profile.phases
    ]
    total = (_seconds(whole), "100 %", _size(profile.steps.peak_bytes))
    rows.append(Row("a step, split", total, "total"))
    held = ", ".join(f"{name} {quantity(size)}B" for name, size in profile.steps.held_bytes.items())
    split = (
        f"Mean of {len(profile.split_seconds)} steps of {profile.records} records, with a wait at "
        "each phase's ends. Losses of attention maps make their gradients at once, so that a part "
        "of their backward counts to the loss. Memory: the most in any moment of a phase, beside "
        f"what is there when a step begins ({held}).",
    )
    return [
        Table("Where a training step goes", ("", "time", "share", "memory"), tuple(rows), split),
        _cost_table(profile),
    ]


def _cost_table(profile: TrainingProfile) -> Table:
    columns = ("", "a step", "p90", "tokens/s", "time beside plain", "memory")
    plain = next((each for each in profile.what_if if each.name == PLAIN), None)
    notes = [
        f"Median of {len(profile.steps.seconds)} steps as they run, data and logging among it, on "
        f"the same records; {profile.dtype}, {profile.attention} attention, {profile.device}. "
        "Memory: the most in a step, with weights and optimizer."
    ]
    rows = []
    for each in (profile.steps, *profile.what_if):
        if each.problem is not None:
            notes.append(f"{each.name}: {each.problem}.")
        more = extra_time(each, plain)
        memory = None
        if each.peak_bytes is not None:
            memory = each.peak_bytes + sum(each.held_bytes.values())
        rows.append(
            Row(
                each.name,
                (
                    *(
                        _seconds(percentile(each.seconds, share)) if each.seconds else NOT_MEASURED
                        for share in _PERCENTILES
                    ),
                    NOT_MEASURED
                    if each.tokens_per_second is None
                    else f"{each.tokens_per_second:,.0f}",
                    NOT_MEASURED if more is None or each is plain else f"{100 * more:+.0f} %",
                    _size(memory),
                ),
                "recipe" if each is profile.steps else "what if",
            )
        )
    return Table("What the recipe costs", columns, tuple(rows), tuple(notes))


def extra_time(steps: Steps, plain: Steps | None) -> float | None:
    """By which share of plain fine-tuning's step a step is longer; None if one is not measured."""
    ratio = _over(steps.step_seconds, plain.step_seconds if plain else None)
    return None if ratio is None else ratio - 1.0


def training_document(profile: TrainingProfile) -> dict[str, Any]:
    """All that was measured, for JSON; times in seconds, memory in bytes."""
    plain = next((each for each in profile.what_if if each.name == PLAIN), None)
    document = dataclasses.asdict(profile)
    for each, row in zip(
        (profile.steps, *profile.what_if), (document["steps"], *document["what_if"]), strict=True
    ):
        row["tokens_per_second"] = each.tokens_per_second
        row["extra_time"] = extra_time(each, plain)
        if each.seconds:
            row["percentiles"] = {f"p{s}": percentile(each.seconds, s) for s in _PERCENTILES}
    return {**document, **environment()}


def environment() -> dict[str, Any]:
    """Versions and device of this process."""
    cuda = torch.cuda.is_available()
    try:
        own = metadata.version("drivekd")
    except metadata.PackageNotFoundError:
        own = None  # run from its source tree
    return {
        "versions": {
            "drivekd": own,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
        },
        "gpu": torch.cuda.get_device_name() if cuda else None,
    }


def _over(value: float | None, by: float | None) -> float | None:
    return value / by if value is not None and by else None


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"


def _size(value: int | None) -> str:
    return NOT_MEASURED if value is None else f"{quantity(value)}B"


def _times(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3g}"
