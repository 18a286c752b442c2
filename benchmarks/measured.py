"""What was measured on GPUs, as tables, verdicts on the targets and plots.

`results/<gpu>/` holds the files of `on_gpu.sh`: `machine.json`, and the rounds of every benchmark
in pytest-benchmark's JSON. A ratio of two ways is the median over rounds of the ratio within a
round, in which both ran, one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from benchmarks.shapes import GPU_MODELS, GPU_PAIRS

NOT_MEASURED = "not measured yet"
BASELINES = ("eager", "compiled", "chunked", "sdpa")

# Picoseconds of each visible cell at least, an H200's floors: log-sum-exp, map, dq, dk of 14 heads
# of 64; log-sum-exp and map of 28 heads of 128.
FLOORS_PS = {"internvl3-1b-from-8b": 14 * (0.24 + 0.24 + 0.33 + 0.33) + 28 * (0.33 + 0.33)}


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
    for path in sorted(folder.glob("*.json")):
        if path.name == "machine.json":
            continue
        for benchmark in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            facts = benchmark["extra_info"]
            if "outcome" not in facts:  # of the CPU, or cut off by the end of the stage
                continue
            if facts["dry"]:
                raise ValueError(f"{path} comes from a dry run (DRIVEKD_DRY=1); measure on a GPU")
            records[facts["shape"], facts.get("mode", ""), facts["way"]] = Record(facts)
    return Measurements(folder.name, machine, records)


def machines(results: Path) -> list[Measurements]:
    """Every machine with results."""
    return [load(path.parent) for path in sorted(results.glob("*/machine.json"))]


def section(results: Path, *, where: str) -> str:
    """Tables of all machines for a page; `where` is the path of `results` on that page."""
    found = machines(results)
    if not found:
        return (
            f"GPU speed and memory: **{NOT_MEASURED}**. `benchmarks/on_gpu.sh` measures, "
            "`python -m benchmarks.report` puts the numbers here."
        )
    return "\n\n".join(_machine_section(each, where) for each in found)


def _machine_section(measured: Measurements, where: str) -> str:
    machine = measured.machine
    clocks = sorted(each.clock for each in measured.records.values() if each.clock)
    about = [
        f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']} (CUDA "
        f"{machine['cuda']}), triton {machine['triton']}, commit {machine['commit'][:10]}"
        + (f" with {machine['changed_files']} changed files" if machine["changed_files"] else "")
        + f", {machine['date']}."
    ]
    if clocks:
        about.append(f"SM clock under load {clocks[0]}-{clocks[-1]} MHz.")
    parts = [f"**{measured.name}**: " + " ".join(about), _targets_table(measured)]
    for kind, title in (("full", "Full map"), ("t2v", "Text to vision, CUDA graphs")):
        parts.append(f"{title}:\n\n{_speed_table(measured, kind)}")
    parts.append(
        "Medians of rounds with a cold L2 cache (quartiles in brackets); bfloat16, mse. "
        "`gradient` is both less forward. Memory is the peak beyond the inputs and the results. "
        "A ratio is the median over rounds of the ratio within a round, in which both ways ran: "
        "eager, compiled and chunked are so many times slower than the fused way, which takes so "
        "many times as long as sdpa (flash forward and backward of the student, forward of the "
        "teacher). † timed without a CUDA graph."
    )
    if (Path(__file__).parent / "results" / measured.name / "speed.png").exists():
        parts.append(f"![time and memory by number of tokens]({where}/{measured.name}/speed.png)")
    return "\n\n".join(parts)


# ---- speed


def _speed_table(measured: Measurements, kind: str) -> str:
    shapes = [name for name in GPU_PAIRS if name.split("/")[1].startswith(kind)]
    head = ["shape", "forward ms", "gradient ms", "both ms", "extra MiB", *BASELINES]
    if kind == "t2v":
        head.append("lse given")
    return _table(head, [_speed_row(measured, shape, kind) for shape in shapes])


def _speed_row(measured: Measurements, shape: str, kind: str) -> list[str]:
    fused, forward = measured.get(shape, "fused"), measured.get(shape, "fused", "forward")
    if fused is None:
        return [shape, *[NOT_MEASURED] * (8 if kind == "full" else 9)]
    row = [shape]
    if not fused.measured:
        row += ["out of memory"] * 4
    else:
        known = forward is not None and forward.measured
        row += [
            _milliseconds(forward) if known else "-",
            _number(fused.milliseconds - forward.milliseconds) if known else "-",
            _milliseconds(fused),
            _number(fused.facts["extra_peak_bytes"] / 2**20),
        ]
    row += [_ratio(measured.get(shape, way)) for way in BASELINES]
    if kind == "t2v":
        row.append(_ratio(measured.get(shape, "fused-lse")))
    return row


def _milliseconds(record: Record) -> str:
    first, third = record.quartiles
    mark = " †" if str(record.facts.get("graph", "")).startswith("not captured") else ""
    return f"{_number(record.milliseconds)} ({_number(first)}-{_number(third)}){mark}"


def _ratio(record: Record | None) -> str:
    if record is None:
        return "-"
    if not record.measured:
        return "out of memory"
    ratio = record.times_of_beside
    if record.facts["way"] == "sdpa":
        ratio = 1 / ratio
    mark = " †" if str(record.facts.get("graph", "")).startswith("not captured") else ""
    return f"{_number(ratio)}x{mark}"


def _number(value: float) -> str:
    """Three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, [":--", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---- targets


@dataclass(frozen=True)
class Target:
    """One promise: how it is measured for a pair of models, and what is wanted."""

    what: str
    wanted: str
    value: Callable[[Measurements, str], float | str | None]  # str: why there is no number
    met: Callable[[float], bool]
    unit: str = "x"

    def cell(self, measured: Measurements, model: str) -> str:
        """The value and whether it is what is wanted."""
        value = self.value(measured, model)
        if value is None:
            return NOT_MEASURED
        if isinstance(value, str):
            return value
        return f"{_number(value)}{self.unit} {'met' if self.met(value) else '**missed**'}"


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
    if model not in FLOORS_PS:
        return "no floor known"
    fused = measured.get(f"{model}/full-65536", "fused")
    if fused is None:
        return None
    if not fused.measured:
        return "**out of memory**"
    return fused.milliseconds / (FLOORS_PS[model] * 65536 * 65537 / 2 * 1e-9)


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


def _targets_table(measured: Measurements) -> str:
    rows = [
        [each.what, each.wanted, *(each.cell(measured, model) for model in GPU_MODELS)]
        for each in TARGETS
    ]
    for way in ("gram", "combination"):
        record = measured.records.get(("gradients-494m", "", way))
        cell = NOT_MEASURED
        if record is not None:
            share = 1 / record.times_of_beside
            cell = f"{_number(100 * share)} % {'met' if share >= 0.85 else '**missed**'}"
        rows.append([f"{way} of 4 gradients, of copy bandwidth", ">= 85 %", cell, "", ""])
    return _table(["target", "wanted", *GPU_MODELS], rows)


# ---- plots


def plot(measured: Measurements, path: Path) -> None:
    """Time and extra memory of full maps against the number of tokens, a column for each pair."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(GPU_MODELS), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(GPU_MODELS), sharex=True, sharey="row", squeeze=False)
    for column, model in enumerate(GPU_MODELS):
        for way in ("fused", *BASELINES):
            found = [
                (GPU_PAIRS[shape].num_tokens, record)
                for shape in GPU_PAIRS
                if shape.startswith(f"{model}/full-")
                and (record := measured.measured(shape, way)) is not None
            ]
            tokens = [number for number, _ in found]
            style = {"marker": "o", "linewidth": 2.5 if way == "fused" else 1, "label": way}
            axes[0][column].plot(tokens, [record.milliseconds for _, record in found], **style)
            if way != "sdpa":
                memory = [record.facts["extra_peak_bytes"] / 2**20 for _, record in found]
                axes[1][column].plot(tokens, memory, **style)
        axes[0][column].set_title(model, fontsize=10)
        axes[1][column].set_xlabel("tokens")
        for row in axes:
            row[column].set_xscale("log", base=2)
            row[column].set_yscale("log")
            row[column].grid(alpha=0.3)
    axes[0][0].set_ylabel("loss and gradients, ms")
    axes[1][0].set_ylabel("extra memory, MiB")
    axes[0][0].legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
