"""Hardware counters of single launches, read by Nsight Compute (`on_gpu.sh ncu`).

    python -m benchmarks.counters run FOLDER SHAPE LOSS PASS ...   # what ncu is put around
    python -m benchmarks.counters table FOLDER                     # of ncu.csv, a short table

`run` warms up, then opens the profiler around the last launch of each pass, which has the most keys
to look at, and writes their names to `ncu.json`; ncu must be told `--profile-from-start off`.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# Column -> patterns of ncu's names, of which the first that is there counts; where several metrics
# have one pattern, the largest or (`+`) their sum.
COLUMNS = {
    "time": (r"gpu__time_duration\.sum",),
    "SM %": (r"sm__throughput\.avg\.pct_of_peak_sustained_elapsed",),
    "tensor %": (
        r"sm__pipe_tensor\w*cycles_active\.avg\.pct_of_peak_sustained_active",
        r"sm__inst_executed_pipe_tensor\w*\.avg\.pct_of_peak_sustained_active",
        r"sm__\w*pipe_tensor\w*\.pct_of_peak_sustained_\w+",
    ),
    "MUFU %": (r"sm__inst_executed_pipe_xu\.avg\.pct_of_peak_sustained_active",),
    "FMA %": (r"sm__\w*pipe_fma\w*\.avg\.pct_of_peak_sustained_active",),
    "ALU %": (r"sm__\w*pipe_alu\w*\.avg\.pct_of_peak_sustained_active",),
    "LSU %": (r"sm__inst_executed_pipe_lsu\.avg\.pct_of_peak_sustained_active",),
    "issue %": (
        r"sm(sp)?__issue_active\.avg\.pct_of_peak_sustained_active",
        r"sm(sp)?__inst_issued\.avg\.pct_of_peak_sustained_active",
    ),
    "L1 %": (r"l1tex__throughput\.avg\.pct_of_peak_sustained_active",),
    "L1 hit %": (r"l1tex__t_sector_hit_rate\.pct",),
    "L2 %": (r"lts__throughput\.avg\.pct_of_peak_sustained_elapsed",),
    "L2 hit %": (r"lts__t_sector_hit_rate\.pct",),
    "DRAM %": (
        r"gpu__dram_throughput\.avg\.pct_of_peak_sustained_elapsed",
        r"dram__throughput\.avg\.pct_of_peak_sustained_elapsed",
    ),
    "registers": (r"launch__registers_per_thread",),
    "warps %": (r"sm__warps_active\.avg\.pct_of_peak_sustained_active",),
    "local +": (r"l1tex__t_requests_pipe_lsu_mem_local_op_(ld|st)\.sum",),
}
STALLS = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
STALLS_TOLD = 3


# ---- what is profiled


def run(folder: Path, shape: str, loss: str, passes: Sequence[str]) -> None:
    """Launch a call, the profiler open around the last launch of each of the passes.

    Raises:
        ValueError: no such shape, or the call has no such pass.
    """
    import torch

    from benchmarks.gpu import DEVICE, DRY
    from benchmarks.kernel_times import Case, wrapped
    from benchmarks.shapes import GPU_PAIRS

    if shape not in GPU_PAIRS:
        raise ValueError(f"shape {shape!r}: want one of {', '.join(GPU_PAIRS)}")
    case = Case(shape, loss)
    call = case.call(torch.empty if DRY else torch.randn, "meta" if DRY else DEVICE)
    counted: Counter[str] = Counter()

    @contextlib.contextmanager
    def count(name: str, grid: tuple[int, ...]) -> Iterator[None]:
        counted[name] += 1
        yield

    with wrapped(case.pair, count):
        call()
    unknown = [name for name in passes if not counted[name]]
    if unknown:
        raise ValueError(f"passes {unknown}: {shape} with {loss} has {', '.join(counted)}")
    number: Counter[str] = Counter()
    profiled: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def profile(name: str, grid: tuple[int, ...]) -> Iterator[None]:
        number[name] += 1
        if name not in passes or number[name] < counted[name]:
            yield
            return
        profiled.append({"pass": name, "grid": grid, "shape": shape, "loss": loss})
        if not DRY:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        yield
        if not DRY:
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()

    with wrapped(case.pair, profile):
        call()
    content = {"dry": DRY, "launches": profiled}
    (folder / "ncu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# ---- what ncu says


def read(text: str) -> list[dict[str, tuple[float, str]]]:
    """Of `ncu --page raw --csv --print-units base`: per launch, name -> value and unit.

    Raises:
        ValueError: there is no such table.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('ncu left no table: no line begins with "ID"')
    names, units, *rows = csv.reader(lines[start:])
    launches = []
    for row in rows:
        found = {}
        for name, unit, value in zip(names, units, row, strict=True):
            with contextlib.suppress(ValueError):  # names and other text are no counters
                found[name] = float(value.replace(",", "")), unit
        launches.append(found)
    return launches


def short_table(folder: Path) -> str:
    """The columns above for each launch of `ncu.csv`, and its largest stalls.

    Raises:
        ValueError: ncu saw other launches than those in `ncu.json`, or these are of a dry run.
    """
    from benchmarks.measured_tables import table

    told = json.loads((folder / "ncu.json").read_text(encoding="utf-8"))
    if told["dry"]:
        raise ValueError(f"{folder}/ncu.json comes from a dry run (DRIVEKD_DRY=1)")
    counters = read((folder / "ncu.csv").read_text(encoding="utf-8"))
    if len(counters) != len(told["launches"]):
        raise ValueError(f"ncu saw {len(counters)} launches, not {len(told['launches'])}")
    head = ["pass", "call", *(name.rstrip(" +") for name in COLUMNS), "warps stalled for"]
    body = [
        [
            each["pass"],
            f"{each['shape']} {each['loss']}",
            *(_cell(found, name) for name in COLUMNS),
            _stalls(found),
        ]
        for each, found in zip(told["launches"], counters, strict=True)
    ]
    return table(head, body)


def _cell(found: Mapping[str, tuple[float, str]], column: str) -> str:
    for pattern in COLUMNS[column]:
        fitting = [each for name, each in found.items() if re.fullmatch(pattern, name)]
        if fitting:
            values, unit = [value for value, _ in fitting], fitting[0][1]
            value = sum(values) if column.endswith("+") else max(values)
            if unit in ("ns", "nsecond"):
                return f"{value / 1e6:.3f} ms"
            return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    return "-"


def _stalls(found: Mapping[str, tuple[float, str]]) -> str:
    stalls = {
        match.group(1): value
        for name, (value, _) in found.items()
        if (match := STALLS.fullmatch(name))
    }
    largest = sorted(stalls, key=lambda name: -stalls[name])[:STALLS_TOLD]
    return ", ".join(f"{name} {stalls[name]:.2f}" for name in largest) or "-"


def main(arguments: Sequence[str]) -> int:
    """Command line of this module."""
    match arguments:
        case ["run", folder, shape, loss, *passes] if passes:
            run(Path(folder), shape, loss, passes)
        case ["table", folder]:
            print(short_table(Path(folder)))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
