"""Each ceiling in turn: rounds of many calls, with the clock during each round."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.ceilings import kernels
from benchmarks.ceilings.clocks import Clock, Watch, launch
from benchmarks.gpu import DEVICE, DRY, captured
from benchmarks.shapes import GPU_PAIRS

ROUNDS = 2 if DRY else 8
ROUND_MS = 1.0 if DRY else 60.0
PASS_SHAPE = "internvl3-1b-from-8b/full-8192"  # whose clock is that of a pass
LAUNCHES = 10 if DRY else 1000
COPIED = 2**12 if DRY else 4 * 2**30  # bytes, half of them read
READ = 2**22 if DRY else 4 * 2**30
L2_SETS = (16, 24, 32, 48)  # MiB
L2_READ = 2**24 if DRY else 8 * 2**30  # bytes a call
PRODUCT = 64 if DRY else 8192
EXP2_TRIPS = 4096
START_RESIDENT = 16  # programs of 4 warps: at most so many are on a multiprocessor at once
START_WAVES = 4
START_BUSY = 20_000  # clocks of a program, so that places become free one by one

Work = tuple[Callable[[], object], float, str]  # a call, what it does, in which unit


def measure_all(path: Path) -> int:
    """Measure and write one after the other: the end of the time takes none that is measured.

    Returns:
        How many failed; their errors are in the file.
    """
    content: dict[str, Any] = {"dry": DRY, "machine": machine(), "measured": {}, "failed": {}}
    clock = Clock(content["machine"]["sms"])
    with Watch() as watch:
        for name, make in CEILINGS.items():
            begin = time.monotonic()
            try:
                facts = make(clock)
            except Exception as error:  # of one ceiling: the others are measured all the same
                content["failed"][name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {content['failed'][name]}", flush=True)
            else:
                content["measured"][name] = {**facts, "smi": watch.since(begin)}
                print(f"{name}: {_show(facts)}", flush=True)
            write(path, content)
            if not DRY:
                torch.cuda.empty_cache()
    return len(content["failed"])


def write(path: Path, content: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def machine() -> dict[str, Any]:
    """What the ceilings are of."""
    if DRY:
        return {"gpu": "none (dry run)", "arch": 90, "sms": 132, "l2_bytes": 50 * 2**20}
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "arch": 10 * properties.major + properties.minor,
        "sms": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
    }


def _show(facts: dict[str, Any]) -> str:
    if "start_clocks" in facts:
        return f"{median(facts['start_clocks']):.0f} clocks"
    rate = facts["amount"] / median(facts["rounds_ms"]) * 1e3
    return f"{rate:.4g} {facts['unit']}/s at {median(facts['sm_mhz']):.0f} MHz"


# ---- rounds


def rounds(call: Callable[[], object], clock: Clock, **facts: Any) -> dict[str, Any]:
    """Time `call` back to back for `ROUND_MS` a round.

    Returns:
        The facts, `rounds_ms` of one call, `sm_mhz` during each round, and how many `calls` it had.
    """
    for _ in range(3):
        call()
    one = max(_timed(call, 3) / 3, 1e-4)
    count = max(1, math.ceil(ROUND_MS / one))
    _timed(call, count)  # until the clock is what it stays at
    times, clocks = [], []
    for _ in range(ROUNDS):
        clock.begin()
        times.append(_timed(call, count) / count)
        clock.end()
        clocks.append(clock.mhz())
    return {**facts, "calls": count, "rounds_ms": times, "sm_mhz": clocks}


def _timed(call: Callable[[], object], count: int) -> float:
    """Milliseconds of so many calls."""
    if DRY:
        begin = time.perf_counter()
        for _ in range(count):
            call()
        return 1e3 * (time.perf_counter() - begin)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# ---- memory


def _copy(clock: Clock) -> dict[str, Any]:
    source = torch.ones(COPIED // 2, dtype=torch.int8, device=DEVICE)
    target = torch.empty_like(source)
    return rounds(lambda: target.copy_(source), clock, amount=COPIED, unit="B")


def _read(total: int, working_set: int, clock: Clock) -> dict[str, Any]:
    """Read `total` bytes a call, going round a working set."""
    tile = 4 * kernels.READ_BLOCK
    programs = kernels.READ_PROGRAMS * machine()["sms"]
    trips = max(1, total // (tile * programs))
    assert DRY or working_set // tile >= programs, "programs begin at different tiles"
    data = torch.ones(working_set // 4, dtype=torch.int32, device=DEVICE)
    out = torch.empty(programs, dtype=torch.int32, device=DEVICE)

    def call() -> None:
        launch(
            kernels.read_kernel, (programs,), data, out, working_set // tile, trips,
            BLOCK=kernels.READ_BLOCK, num_warps=kernels.READ_WARPS,
        )  # fmt: skip

    return rounds(
        call, clock, amount=trips * programs * tile, unit="B", working_set_bytes=working_set
    )


# ---- arithmetic


def _product(clock: Clock) -> dict[str, Any]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    a, b = (
        torch.randn(PRODUCT, PRODUCT, generator=generator, device=DEVICE).to(torch.bfloat16)
        for _ in range(2)
    )
    out = torch.empty_like(a)
    return rounds(lambda: torch.mm(a, b, out=out), clock, amount=2 * PRODUCT**3, unit="FLOP")


def _exp2(clock: Clock) -> dict[str, Any]:
    programs = machine()["sms"]
    out = torch.empty(programs * kernels.EXP2_BLOCK, dtype=torch.float32, device=DEVICE)

    def call() -> None:
        launch(
            kernels.exp2_kernel, (programs,), out, EXP2_TRIPS, BLOCK=kernels.EXP2_BLOCK,
            STEPS=kernels.EXP2_STEPS, num_warps=kernels.EXP2_WARPS,
        )  # fmt: skip

    count = programs * kernels.EXP2_BLOCK * kernels.EXP2_STEPS * EXP2_TRIPS
    return rounds(call, clock, amount=count, unit="EX2")


# ---- launches and programs


def _launches(clock: Clock, *, many: bool = False, graph: bool = False) -> dict[str, Any]:
    """Empty kernels back to back; many: with as many arguments as a pass over maps."""
    data = torch.zeros(16, dtype=torch.int32, device=DEVICE)

    def call() -> None:
        for _ in range(LAUNCHES):
            if many:
                launch(
                    kernels.many_arguments_kernel, (1,), *[data] * 10, *range(10), BLOCK=64,
                    STAGES=2, num_warps=4,
                )  # fmt: skip
            else:
                launch(kernels.empty_kernel, (1,), data, num_warps=4)

    replay = captured(call) if graph and not DRY else call
    return rounds(replay, clock, amount=LAUNCHES, unit="launches")


def _start(clock: Clock) -> dict[str, Any]:
    """Clocks from one program's end to what the next one in its place has loaded.

    Programs note when they begin, have loaded and end. On a multiprocessor that holds r programs
    at once the k-th to begin takes the place of the (k - r)-th to end.
    """
    sms = machine()["sms"]
    programs = sms * START_RESIDENT * START_WAVES
    zeros = torch.zeros(65 * kernels.START_ITEMS, dtype=torch.int32, device=DEVICE)
    out = torch.zeros(programs, 4, dtype=torch.int64, device=DEVICE)

    def call() -> None:
        launch(
            kernels.start_kernel, (programs,), zeros, out, START_BUSY, ITEMS=kernels.START_ITEMS,
            num_warps=kernels.START_WARPS,
        )  # fmt: skip

    facts = rounds(call, clock, amount=programs, unit="programs")
    gaps, loads = [], []
    for _ in range(ROUNDS):
        call()
        gap, loaded = start_clocks(out.cpu())
        gaps.append(gap)
        loads.append(loaded)
    total = [gap + loaded for gap, loaded in zip(gaps, loads, strict=True)]
    return {**facts, "gap_clocks": gaps, "load_clocks": loads, "start_clocks": total}


def start_clocks(noted: torch.Tensor) -> tuple[float, float]:
    """Medians over programs: clocks since the program before, and until its data are there.

    Args:
        noted: (programs, 4) int64: multiprocessor, clocks at the beginning, when loaded, at the
            end.
    """
    gaps = []
    for sm in noted[:, 0].unique():
        _, begin, _, end = noted[noted[:, 0] == sm].unbind(1)
        begin, end = begin.sort().values, end.sort().values
        first = int((begin < end[0]).sum())  # those that found a free place
        gaps.append(begin[first:] - end[: begin.numel() - first])
    loaded = (noted[:, 2] - noted[:, 1]).double().median()
    every = torch.cat(gaps).double()
    return (float(every.median()) if every.numel() else 0.0), float(loaded)


# ---- a pass


def _pass(clock: Clock) -> dict[str, Any]:
    """Loss and gradients of a layer pair over and over: the clock at which passes run."""
    from benchmarks.bench_attention_map_loss_gpu import Case

    call = Case(PASS_SHAPE).call("fused", "both")
    N = GPU_PAIRS[PASS_SHAPE].num_tokens
    return rounds(call, clock, amount=N * (N + 1) / 2, unit="cells", shape=PASS_SHAPE)


def _l2_sets() -> Iterator[tuple[str, Callable[[Clock], dict[str, Any]]]]:
    for size in L2_SETS:
        yield f"l2-{size}", lambda clock, size=size: _read(L2_READ, size * 2**20, clock)


CEILINGS: dict[str, Callable[[Clock], dict[str, Any]]] = {
    "copy": _copy,
    "read": lambda clock: _read(READ, READ, clock),
    **dict(_l2_sets()),
    "product": _product,
    "exp2": _exp2,
    "launch": _launches,
    "launch-many": lambda clock: _launches(clock, many=True),
    "launch-graph": lambda clock: _launches(clock, many=True, graph=True),
    "start": _start,
    "pass": _pass,
}
