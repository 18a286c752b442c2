"""Timing on a GPU: events around each round, the L2 cache flushed in between, every round kept."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

WARMUP, ROUNDS = 5, 20
_FLUSH_BYTES = 256 * 2**20
_AHEAD_CYCLES = 20_000_000  # about 10 ms in which the host queues what is timed


def timed(benchmark, call: Callable[[], object], *, queued: bool = False) -> None:
    """Rounds of `call` in milliseconds and its extra peak memory, into `benchmark.extra_info`.

    pytest-benchmark's own clock stands on the host; it times the same call with a synchronisation
    behind it, for its table. Ratios are to be made from `rounds_ms`. With `queued` these leave out
    the host's part, as when other work keeps the GPU busy; `host_ms` is that part.
    """
    for _ in range(WARMUP):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    rounds, host = [], []
    for _ in range(ROUNDS):
        flush.zero_()
        if queued:
            torch.cuda._sleep(_AHEAD_CYCLES)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        started = time.perf_counter()
        call()
        host.append(1e3 * (time.perf_counter() - started))
        end.record()
        torch.cuda.synchronize()
        rounds.append(begin.elapsed_time(end))
    benchmark.extra_info.update(
        rounds_ms=rounds,
        median_ms=sorted(rounds)[len(rounds) // 2],
        host_ms=sorted(host)[len(host) // 2],
        extra_peak_bytes=extra,
        clocks=_clocks(),
    )

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    benchmark.pedantic(finished, setup=flush.zero_, rounds=ROUNDS, warmup_rounds=1)


def captured(call: Callable[[], object]) -> Callable[[], None]:
    """A CUDA graph of the call, as something to call: launches cost next to nothing in a replay."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _clocks() -> str:
    """Current SM and memory clock, power and temperature, as the driver tells."""
    wanted = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={wanted}", "--format=csv,noheader"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write_machine(path: Path) -> None:
    """What the numbers were measured on."""
    import triton

    properties = torch.cuda.get_device_properties(0)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    driver = subprocess.run(
        ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    facts = {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "commit": commit or os.environ.get("DRIVEKD_COMMIT", ""),
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
