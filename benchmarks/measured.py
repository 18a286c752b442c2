"""What was measured on GPUs, and the targets that it is held to; measured_tables.py prints.

`results/<gpu>/` holds the files of `on_gpu.sh`: `machine.json`, and the rounds of every benchmark
in pytest-benchmark's JSON, or in the lines that a stage leaves which was killed; `ceilings.json`,
where there is one, is what floors are made of. A ratio of two ways is the median over rounds of the
ratio within a round, in which both ran, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.devices import Device, device_of, pair_floor_ps
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS, GPU_STEPS

NOT_MEASURED = "not measured yet"
BASELINES = ("eager", "compiled", "chunked", "sdpa")
GRADIENTS = "gradients-494m"


@dataclass(frozen=True)
class Record:
    """One benchmark: its facts, and its rounds in milliseconds."""

    facts: dict[str, Any]

    @property
    def measured(self) -> bool:
        return self.facts["outcome"] == "measured"

    @property
    def milliseconds(self) -> float:
        return median(self.facts["rounds_ms"])

    @property
    def quartiles(self) -> tuple[float, float]:
        first, _, third = quantiles(self.facts["rounds_ms"], n=4)
        return first, third

    @property
    def times_of_beside(self) -> float:
        """Time in units of what ran in the same rounds: the fused way, or a copy."""
        pairs = zip(self.facts["rounds_ms"], self.facts["beside_ms"], strict=True)
        return median(own / beside for own, beside in pairs)

    @property
    def buffers(self) -> float:
        """Of a projection: buffers as large as one task's gradients, the update among them."""
        return (
            self.facts["tasks"] + 1 + self.facts["extra_peak_bytes"] / self.facts["gradient_bytes"]
        )

    @property
    def clock(self) -> int | None:
        """SM clock in MHz."""
        first = self.facts.get("clocks", "").split(" ")[0]
        return int(first) if first.isdigit() else None


@dataclass(frozen=True)
class Measurements:
    """All of one machine."""

    name: str
    machine: dict[str, Any]
    records: dict[tuple[str, str, str], Record]  # shape, mode, way
    device: Device  # what its floors are made of

    def get(self, shape: str, way: str, mode: str = "both") -> Record | None:
        """The record, if it was run."""
        return self.records.get((shape, mode, way))

    def measured(self, shape: str, way: str, mode: str = "both") -> Record | None:
        """The record, if it was run and fitted into memory."""
        record = self.get(shape, way, mode)
        return record if record is not None and record.measured else None


def load(folder: Path) -> Measurements:
    """The files of one machine.

    Raises:
        ValueError: A file comes from a dry run, whose numbers mean nothing.
    """
    machine = json.loads((folder / "machine.json").read_text(encoding="utf-8"))
    records = {}
    for path in sorted(folder.glob("*.json*")):
        for facts in _facts(path):
            if "shape" not in facts:  # beside the targets
                continue
            if facts["dry"]:
                raise ValueError(f"{path} comes from a dry run (DRIVEKD_DRY=1); measure on a GPU")
            records[facts["shape"], facts.get("mode", ""), facts["way"]] = Record(facts)
    return Measurements(folder.name, machine, records, device_of(folder, machine["gpu"]))


def _facts(path: Path) -> Iterator[dict[str, Any]]:
    """Of every finished measurement in one file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        *whole, _ = text.split("\n")  # the last line may have been cut off
        yield from map(json.loads, whole)
    elif path.name != "machine.json":
        for benchmark in json.loads(text).get("benchmarks", ()):  # none in those of other stages
            if "outcome" in benchmark["extra_info"]:  # not of the CPU, nor cut off by the end
                yield benchmark["extra_info"]


def machines(results: Path) -> list[Measurements]:
    """Every machine with results."""
    return [load(path.parent) for path in sorted(results.glob("*/machine.json"))]


# ---- targets


@dataclass(frozen=True)
class Target:
    """One promise: how it is measured for a pair of models, and what is wanted.

    Those of projections and training steps are of one pair and take no notice of the model.
    """

    what: str
    wanted: str
    value: Callable[[Measurements, str], float | str | None]  # str: why there is no number
    met: Callable[[float], bool]
    unit: str = "x"


def _beside(shape: str, way: str, *, inverse: bool = False) -> Callable[..., float | str | None]:
    """Time of a way in units of the fused one's; or the inverse."""

    def value(measured: Measurements, model: str) -> float | str | None:
        record = measured.get(f"{model}/{shape}", way)
        if record is None:
            return None
        if not record.measured:
            return f"{way} is out of memory"
        return 1 / record.times_of_beside if inverse else record.times_of_beside

    return value


def _slowest(way: str) -> Callable[..., float | None]:
    """The least advantage over a way at 2048 tokens and more."""

    def value(measured: Measurements, model: str) -> float | None:
        records = [
            measured.measured(shape, way)
            for shape in GPU_PAIRS
            if shape.startswith(f"{model}/full-")
        ]
        return min((each.times_of_beside for each in records if each is not None), default=None)

    return value


def _memory(shape: str) -> Callable[..., float | str | None]:
    """How many times less extra memory than the eager way."""

    def value(measured: Measurements, model: str) -> float | str | None:
        fused = measured.measured(f"{model}/{shape}", "fused")
        eager = measured.get(f"{model}/{shape}", "eager")
        if fused is None or eager is None:
            return None
        if not eager.measured:
            return "eager is out of memory"
        return eager.facts["extra_peak_bytes"] / max(fused.facts["extra_peak_bytes"], 1)

    return value


def _with_lse(shape: str) -> Callable[..., float | None]:
    """Time with the log-sum-exp given in units of sdpa's: of two ratios to the fused way."""

    def value(measured: Measurements, model: str) -> float | None:
        known = measured.measured(f"{model}/{shape}", "fused-lse")
        sdpa = measured.measured(f"{model}/{shape}", "sdpa")
        return (
            None if known is None or sdpa is None else known.times_of_beside / sdpa.times_of_beside
        )

    return value


def _floor(measured: Measurements, model: str) -> float | str | None:
    fused = measured.get(f"{model}/full-65536", "fused")
    if fused is None:
        return None
    if not fused.measured:
        return "**out of memory**"
    cells = 65536 * 65537 / 2
    return fused.milliseconds / (1e-9 * cells * pair_floor_ps(measured.device, *GPU_MODELS[model]))


def _error(measured: Measurements, model: str) -> float | None:
    fused = measured.measured(f"{model}/full-2048", "fused")
    eager = measured.measured(f"{model}/full-2048", "eager")
    if fused is None or eager is None:
        return None
    return fused.facts["gradient_error"] / eager.facts["gradient_error"]


TARGETS = (
    Target("faster than eager, N = 2048", ">= 5x", _beside("full-2048", "eager"), lambda x: x >= 5),
    Target(
        "faster than eager, N = 8192", ">= 10x", _beside("full-8192", "eager"), lambda x: x >= 10
    ),
    Target("less extra memory, N = 2048", ">= 20x", _memory("full-2048"), lambda x: x >= 20),
    Target("less extra memory, N = 8192", ">= 50x", _memory("full-8192"), lambda x: x >= 50),
    Target("faster than torch.compile, worst N", "> 1x", _slowest("compiled"), lambda x: x > 1),
    Target("faster than row-chunked torch, worst N", "> 1x", _slowest("chunked"), lambda x: x > 1),
    Target(
        "time of sdpa, N = 8192", "<= 0.8x", _beside("full-8192", "sdpa", inverse=True),
        lambda x: x <= 0.8,
    ),
    Target(
        "time of sdpa, 6 views", "<= 1x", _beside("t2v-6", "sdpa", inverse=True), lambda x: x <= 1
    ),
    Target("time of sdpa, 6 views, lse given", "<= 0.6x", _with_lse("t2v-6"), lambda x: x <= 0.6),
    Target("time of its floor, N = 65536", "<= 1.5x", _floor, lambda x: x <= 1.5),
    Target("gradient error of eager's, N = 2048", "<= 2x", _error, lambda x: x <= 2),
)  # fmt: skip


def _bandwidth(way: str) -> Callable[..., float | None]:
    """Percent of what a copy of as many bytes reaches."""

    def value(measured: Measurements, model: str) -> float | None:
        record = measured.measured(GRADIENTS, way, "")
        return None if record is None else 100 / record.times_of_beside

    return value


def _public_projection(measured: Measurements, model: str) -> float | str | None:
    record = measured.get(GRADIENTS, "public", "")
    if record is not None and not record.measured:
        return "the public procedure is out of memory"
    return None if record is None else record.times_of_beside


def _buffers(measured: Measurements, model: str) -> float | None:
    """The gradients, the update, and what else is alive at the peak, of the parameters' size."""
    record = measured.measured(GRADIENTS, "projection", "")
    return None if record is None else record.buffers


def _host_syncs(measured: Measurements, model: str) -> float | str | None:
    record = measured.measured(GRADIENTS, "projection", "")
    if record is None:
        return None
    return f"**missed**: {record.facts['host_sync']}" if record.facts["host_sync"] else 0.0


def _step(way: str) -> Callable[..., float | str | None]:
    """Time of a step in units of a way's, at the larger sample."""

    def value(measured: Measurements, model: str) -> float | str | None:
        record = measured.get(next(iter(GPU_STEPS)), way, "")
        if record is not None and not record.measured:
            return f"{way} is out of memory"
        return None if record is None else 1 / record.times_of_beside

    return value


TRAINING_TARGETS = (
    Target(
        "gram of 4 gradients, of copy bandwidth", ">= 85 %", _bandwidth("gram"),
        lambda x: x >= 85, " %",
    ),
    Target(
        "combination of 4 gradients, of copy bandwidth", ">= 85 %", _bandwidth("combination"),
        lambda x: x >= 85, " %",
    ),
    Target(
        "AGP faster than the public procedure", ">= 50x", _public_projection, lambda x: x >= 50
    ),
    # Tables of pointers and partial sums are no buffers of that size.
    Target("buffers of AGP, K = 4", "<= 5", _buffers, lambda x: x <= 5.05, ""),
    Target("host syncs of AGP", "0", _host_syncs, lambda x: x == 0, ""),
    Target("time of the plain step, four tasks", "<= 1.1x", _step("plain"), lambda x: x <= 1.1),
)  # fmt: skip
