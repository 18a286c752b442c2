"""`python -m benchmarks.kernel_times FILE`: every launch of a call timed by itself.

Events are put around each kernel and each operation of torch; the host runs ahead of the GPU, so
that what lies between two events is the GPU's time and not the host's. That of an empty kernel is
measured the same way and kept beside (`empty_ms`); nothing is subtracted. The L2 cache is cold when
a call begins, and what its passes leave there is theirs.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.jit import JITFunction

from benchmarks.ceilings import kernels
from benchmarks.ceilings.clocks import Clock, Watch
from benchmarks.ceilings.measure import machine, write
from benchmarks.gpu import DEVICE, DRY
from benchmarks.offline.gradients import step
from benchmarks.offline.record import launch_of, loss_inputs, runs_something
from benchmarks.offline.report import role
from benchmarks.shapes import GPU_MODELS, GPU_PAIRS, MODEL_GRADIENTS, Pair
from drivekd.ops.triton_backend import attention_map as backend

GRADIENTS = "gradients-494m"
SHAPES = ("full-8192", "t2v-6", "full-2048", "full-20480")
LOSSES = ("cosine", "kl")  # beside mse, at 8192 tokens of the first pair
ROUNDS = 2 if DRY else 10
CLOCK_MS = 100.0
_FLUSH_BYTES = 1 if DRY else 256 * 2**20
_AHEAD_CYCLES = 20_000_000  # about 10 ms; doubled until the host is done before they are over


@dataclass(frozen=True)
class Case:
    """A call that is timed."""

    shape: str
    loss: str  # "" for gradients

    @property
    def name(self) -> str:
        """Shape and loss."""
        return f"{self.shape} {self.loss}".strip()

    @property
    def pair(self) -> Pair | None:
        """None for gradients."""
        return GPU_PAIRS.get(self.shape)

    def call(self, make: Callable[..., torch.Tensor], device: str) -> Callable[[], object]:
        """The call, on tensors that `make(*shape, dtype=, device=)` gives."""
        if self.pair is None:

            def grad(size: int) -> torch.Tensor:
                return make(size, dtype=torch.bfloat16, device=device)

            return step(MODEL_GRADIENTS.sizes, MODEL_GRADIENTS.tasks, grad, device)
        inputs = loss_inputs(self.pair, self.loss, torch.bfloat16, make, device)
        return lambda: backend.attention_map_loss(inputs)


# What matters most first, in case the time is over before the end.
CASES = (
    *(Case(f"{model}/{shape}", "mse") for shape in SHAPES for model in GPU_MODELS),
    *(Case(f"{next(iter(GPU_MODELS))}/full-8192", loss) for loss in LOSSES),
    Case(GRADIENTS, ""),
)


@dataclass
class Timed:
    """One launch, or one operation of torch."""

    name: str
    grid: tuple[int, ...] | None
    begin: Any
    end: Any

    @property
    def milliseconds(self) -> float:
        if DRY:
            return float(1e3 * (self.end - self.begin))
        return float(self.begin.elapsed_time(self.end))


def _tick() -> Any:
    if DRY:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass
class Timeline:
    """What ran, in order."""

    timed: list[Timed] = field(default_factory=list)

    @contextlib.contextmanager
    def around(self, name: str, grid: tuple[int, ...] | None = None) -> Iterator[None]:
        begin = _tick()
        yield
        self.timed.append(Timed(name, grid, begin, _tick()))


class _TorchOps(TorchDispatchMode):
    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not runs_something(func):
            return func(*args, **(kwargs or {}))
        with self._timeline.around(func._schema.name):
            return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def wrapped(
    pair: Pair | None,
    around: Callable[[str, tuple[int, ...]], contextlib.AbstractContextManager[None]],
) -> Iterator[None]:
    """Enter `around(pass, grid)` for each launch. A dry run leaves the launch out: no data."""
    original = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        seen = launch_of(self, args, grid, options)
        with around(seen.name if pair is None else role(seen, pair), seen.grid):
            return None if DRY else original(self, *args, grid=grid, warmup=warmup, **options)

    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = original


@contextlib.contextmanager
def timed(pair: Pair | None) -> Iterator[Timeline]:
    """Time the launches and torch's operations inside."""
    timeline = Timeline()
    with wrapped(pair, timeline.around), _TorchOps(timeline):
        yield timeline


def time_launches(call: Callable[[], object], pair: Pair | None) -> list[dict[str, Any]]:
    """Each launch of a call with its milliseconds in every round.

    Raises:
        RuntimeError: rounds launched different things.
    """
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=DEVICE)
    ahead, number = _AHEAD_CYCLES, 0
    rows: list[dict[str, Any]] = []
    while number < ROUNDS:
        flush.zero_()
        if not DRY:
            torch.cuda._sleep(ahead)
            awake = torch.cuda.Event()
            awake.record()
        with timed(pair) as timeline:
            call()
        if not DRY:
            late = awake.query()
            torch.cuda.synchronize()
            if late and ahead < 64 * _AHEAD_CYCLES:
                ahead *= 2
                continue
        found = [(each.name, each.grid) for each in timeline.timed]
        if number == 0:
            rows = [{"name": name, "grid": grid, "rounds_ms": []} for name, grid in found]
        number += 1
        if [(row["name"], row["grid"]) for row in rows] != found:
            raise RuntimeError(f"a round launched {found}, the first one {rows}")
        for row, each in zip(rows, timeline.timed, strict=True):
            row["rounds_ms"].append(each.milliseconds)
    return rows


def _clock_during(call: Callable[[], object], clock: Clock) -> float:
    """SM clock while the call runs over and over."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    count = max(1, int(CLOCK_MS / max(begin.elapsed_time(end), 0.05)))
    for _ in range(2):  # the clock falls under load: the second time counts
        clock.begin()
        for _ in range(count):
            call()
        clock.end()
    return clock.mhz()


def _time_case(case: Case, clock: Clock) -> dict[str, Any]:
    facts = {"shape": case.shape, "loss": case.loss, "dtype": "bfloat16"}
    call = case.call(torch.empty if DRY else torch.randn, "meta" if DRY else DEVICE)
    if not DRY:
        for _ in range(3):
            call()
        torch.cuda.synchronize()
    return {
        **facts,
        "launches": time_launches(call, case.pair),
        "sm_mhz": 0.0 if DRY else _clock_during(call, clock),
    }


def measure_all(path: Path) -> int:
    """Time every case and write; returns how many failed, with their errors in the file."""
    content: dict[str, Any] = {"dry": DRY, "machine": machine(), "cases": [], "failed": {}}
    clock = Clock(content["machine"]["sms"])
    data = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    with Watch() as watch:
        (empty,) = time_launches(lambda: kernels.empty_kernel[(1,)](data, num_warps=4), None)
        content["empty_ms"] = empty["rounds_ms"]
        for case in CASES:
            name, begin = case.name, time.monotonic()
            try:
                facts = _time_case(case, clock)
            except Exception as error:  # of one case: the others are timed all the same
                content["failed"][name] = f"{type(error).__name__}: {error}"
                print(f"{name}: {content['failed'][name]}", flush=True)
            else:
                content["cases"].append({**facts, "smi": watch.since(begin)})
                total = sum(sorted(each["rounds_ms"])[ROUNDS // 2] for each in facts["launches"])
                print(f"{name}: {len(facts['launches'])} launches, {total:.3f} ms", flush=True)
            write(path, content)
            if not DRY:
                torch.cuda.empty_cache()
    return len(content["failed"])


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(min(1, measure_all(Path(sys.argv[1]))))
