"""Timing on a GPU: events around each round, the L2 cache flushed in between, every round kept.

With `DRIVEKD_DRY=1` everything runs on the CPU at toy shapes: it finds what would fail before a
GPU is at hand. Its numbers mean nothing and are marked so.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

DRY = os.environ.get("DRIVEKD_DRY") == "1"
DEVICE = "cpu" if DRY else "cuda"
WARMUP = 3
_WARM_SECONDS = 1.0  # after which two calls are warm-up enough
ROUNDS = (3, 3) if DRY else (5, 20)  # at least, at most
SECONDS = 1.5  # for all rounds of one measurement, before it is cut to the least number
_FLUSH_BYTES = 256 * 2**20
_AHEAD_CYCLES = 20_000_000  # about 10 ms in which the host queues what is timed
_CLOCKS = "clocks.sm,clocks.mem,power.draw,temperature.gpu"

Call = Callable[[], object]


def measure(
    benchmark: Any,
    call: Call,
    *,
    beside: Call | None = None,
    graph: bool = False,
    queued: bool = False,
    seconds: float = SECONDS,
    then: Callable[[], dict[str, Any]] | None = None,
    **facts: Any,
) -> None:
    """Time a call and note it in `benchmark.extra_info`, also if the GPU's memory is too small.

    Args:
        benchmark: the fixture of pytest-benchmark, which writes the JSON; its timer must be
            `PLAYBACK`, so that it counts the rounds timed here. Ratios are to be made from
            `rounds_ms` and `beside_ms`.
        call: what is timed; returns the tensors that it makes.
        beside: something to compare with, timed in the same rounds, in alternating order.
        graph: whether to time replays of CUDA graphs; memory is that of the call without one.
        queued: whether to leave out the host's part, as when other work keeps the GPU busy;
            `host_ms` is that part.
        seconds: for all rounds, as far as the least number of rounds allows.
        then: called after the rounds; gives more facts.
        facts: noted as they are.
    """
    info: dict[str, Any] = {"dry": DRY, **facts}
    try:
        for each in (call, beside) if beside else (call,):
            _warm_up(each)
        info |= _memory(call)
        if graph and not DRY:
            call, info["graph"] = _graph_or_reason(call)
            if beside is not None:
                beside, _ = _graph_or_reason(beside)
        info |= _rounds(call, beside, queued=queued, seconds=seconds)
        info |= then() if then else {}
    except torch.OutOfMemoryError as error:
        note_out_of_memory(benchmark, str(error).split(". ")[0], **facts)
    else:
        benchmark.extra_info.update(info, outcome="measured")
        PLAYBACK.play(info["rounds_ms"])
        benchmark.pedantic(_nothing, rounds=len(info["rounds_ms"]))
        _keep(benchmark.extra_info)
    _release()


def note_out_of_memory(benchmark: Any, reason: str, **facts: Any) -> None:
    """Note that something cannot be run, so that it is not missing from the results."""
    benchmark.extra_info.update(dry=DRY, outcome="out of memory", reason=reason, **facts)
    benchmark.name += " (out of memory)"
    benchmark.pedantic(_nothing, rounds=1)
    _keep(benchmark.extra_info)


def _keep(info: dict[str, Any]) -> None:
    """Write a measurement down at once: pytest-benchmark does so only when all is done."""
    if path := os.environ.get("DRIVEKD_ROUNDS"):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(info) + "\n")


class Playback:
    """A timer for pytest-benchmark that tells of rounds timed before; else it is a plain clock."""

    def __init__(self) -> None:
        self._ticks: list[float] = []

    def play(self, milliseconds: list[float]) -> None:
        """The next rounds took so long."""
        self._ticks = [tick for each in milliseconds for tick in (0.0, each / 1e3)]

    def __call__(self) -> float:
        """Seconds."""
        return self._ticks.pop(0) if self._ticks else time.perf_counter()


PLAYBACK = Playback()


def memory_bytes() -> int:
    """All memory of the device."""
    return 2**40 if DRY else torch.cuda.get_device_properties(0).total_memory


def _nothing() -> None:
    """pytest-benchmark writes down only what it has called."""


def _warm_up(call: Call) -> None:
    begin = time.perf_counter()
    for number in range(1 if DRY else WARMUP):
        if number >= 2 and time.perf_counter() - begin > _WARM_SECONDS:
            break
        call()
        _wait()


def _memory(call: Call) -> dict[str, int]:
    """Peak of one call beyond what was there before and what it returns."""
    if DRY:
        call()
        return {"extra_peak_bytes": 0}
    _release()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(results)}
    return {"extra_peak_bytes": extra - sum(own.values())}


def _tensors(results: object) -> list[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        return [results]
    if isinstance(results, list | tuple):
        return [tensor for each in results for tensor in _tensors(each)]
    return []


def _rounds(call: Call, beside: Call | None, *, queued: bool, seconds: float) -> dict[str, Any]:
    flush = torch.empty(1 if DRY else _FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    calls = [call] if beside is None else [call, beside]
    first = sum(_time(each, flush)[0] for each in calls)  # also: the least that the clock can tell
    least, most = ROUNDS
    count = max(least, min(most, int(seconds * 1e3 / max(first, 1e-3))))
    times: list[list[float]] = [[] for _ in calls]
    host: list[float] = []
    for number in range(count):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for which in order:
            passed, by_host = _time(calls[which], flush, queued=queued)
            times[which].append(passed)
            if which == 0:
                host.append(by_host)
    result: dict[str, Any] = {"rounds_ms": times[0], "host_ms": sorted(host)[len(host) // 2]}
    if beside is None:
        result["clocks"] = _clocks_under(call, first)
    else:  # what runs beside has been asked for its clocks
        result["beside_ms"] = times[1]
    return result


def _time(call: Call, flush: torch.Tensor, *, queued: bool = False) -> tuple[float, float]:
    """Milliseconds of one call, and of these until the host was done; the L2 cache is cold."""
    flush.zero_()
    if DRY:
        passed = _host_time(call)
        return passed, passed
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    if queued:
        torch.cuda._sleep(_AHEAD_CYCLES)
    begin.record()
    by_host = _host_time(call)
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end), by_host


def _host_time(call: Call) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3


def _graph_or_reason(call: Call) -> tuple[Call, str]:
    """A CUDA graph of the call, whose launches cost next to nothing, or the call and why not."""
    try:
        return captured(call), "replayed"
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.synchronize()
        return call, f"not captured: {str(error).splitlines()[0]}"


def captured(call: Call) -> Call:
    """A CUDA graph of the call, as something to call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    _wait()

    def replay() -> object:
        graph.replay()
        return results

    return replay


def _clocks_under(call: Call, milliseconds: float) -> str:
    """Clocks, power and temperature, as the driver tells them, while the call runs over and over.

    An idle GPU lowers its clocks within milliseconds.
    """
    if not DRY:
        for _ in range(min(500, max(1, math.ceil(300 / max(milliseconds, 1e-3))))):
            call()
    told = _nvidia_smi(_CLOCKS)
    _wait()
    return told


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    told = _output(command)
    return told.splitlines()[0] if told else ""


def _output(command: list[str]) -> str:
    """What a program prints; nothing where there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()


def _wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def _release() -> None:
    """Hand memory that nobody holds back to the device."""
    import gc

    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def write_machine(path: Path) -> None:
    """What the numbers were measured on."""
    import triton

    facts: dict[str, Any] = {
        "gpu": "none (dry run)",
        "driver": _nvidia_smi("driver_version"),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": _output(["git", "rev-parse", "HEAD"]) or os.environ.get("DRIVEKD_COMMIT", ""),
        "changed_files": len(_output(["git", "status", "--porcelain", "-uno"]).splitlines()),
        "date": time.strftime("%Y-%m-%d"),
    }
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "clocks_max": _nvidia_smi("clocks.max.sm,clocks.max.mem,power.limit"),
        }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
