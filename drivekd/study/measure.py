"""Time and memory of a piece of work, on a GPU or a CPU, and leaving everything as it was."""

from __future__ import annotations

import contextlib
import gc
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

_REGION = "drivekd: "
_EVERY_SECONDS = 0.002


def now(place: torch.device) -> float:
    """Seconds of a clock, after all that a device has been given to do."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def peak_bytes(work: Callable[[], Any], place: torch.device) -> int:
    """Most bytes that the allocator gives out at once while `work` runs, beside what it had."""
    if place.type == "cuda":
        before = torch.cuda.memory_allocated(place)
        torch.cuda.reset_peak_memory_stats(place)
        work()
        return int(torch.cuda.max_memory_allocated(place) - before)
    trace = MemoryTrace()
    with trace:
        work()
    return max(trace.peaks().values())


class MemoryTrace:
    """What torch's CPU allocator gives out and takes back inside a `with`, by region."""

    def __init__(self) -> None:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would trace its own calls on stderr
        self._profile = torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU],
            profile_memory=True,
            acc_events=True,  # or torch 2.11 warns that it does not
        )

    def __enter__(self) -> MemoryTrace:
        self._profile.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.stop()

    @staticmethod
    def region(name: str) -> torch.profiler.record_function:
        """A stretch with a name, to be entered inside the `with`; they nest."""
        return torch.profiler.record_function(_REGION + name)

    def peaks(self, rest: str = "") -> dict[str, int]:
        """Most bytes that were out at once in each region, beside what was out before the `with`.

        Args:
            rest: The name of what lies in no region.
        """
        moments: list[tuple[int, int, str | int]] = []
        results: Any = self._profile.profiler
        for event in results.kineto_results.events():
            start, name = event.start_ns(), event.name()
            if name == "[memory]":
                moments.append((start, 1, event.nbytes()))
            elif name.startswith(_REGION):
                moments.append((start, 0, name.removeprefix(_REGION)))
                moments.append((start + event.duration_ns(), 2, ""))
        live, inside, peaks = 0, [rest], {rest: 0}
        for _, kind, what in sorted(moments, key=lambda moment: moment[:2]):
            if isinstance(what, int):
                live += what
            elif kind == 0:
                inside.append(what)
            else:
                inside.pop()
            peaks[inside[-1]] = max(peaks.get(inside[-1], 0), live)
        return peaks


class ResidentPeak:
    """The most resident memory that the process has had inside a `with`, looked at every 2 ms.

    Attributes:
        bytes: The most so far; None where the system does not tell (no /proc).
    """

    def __init__(self) -> None:
        self.bytes = resident_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._done.wait(_EVERY_SECONDS):
            self._look()

    def _look(self) -> None:
        if (found := resident_bytes()) is not None:
            self.bytes = max(found, self.bytes or 0)

    def __enter__(self) -> ResidentPeak:
        if self.bytes is not None:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        if self.bytes is not None:
            self._thread.join()
            self._look()


def resident_bytes() -> int | None:
    """Resident memory of this process now; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_bytes(place: torch.device) -> int | None:
    """Bytes that a device, or for the CPU this process, can still have; None if it cannot tell."""
    if place.type == "cuda":
        idle = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + idle
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit is the word "max"
        limit, used = (
            int((group / name).read_text(encoding="ascii"))
            for name in ("memory.max", "memory.current")
        )
        values.append(max(limit - used, 0))
    return min(values, default=None)


def release(place: torch.device) -> None:
    """Give back what is no longer referred to."""
    gc.collect()
    if place.type == "cuda":
        torch.cuda.synchronize(place)
        torch.cuda.empty_cache()


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Models in evaluation mode inside; afterwards every module is in its former mode."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def untouched_random() -> Iterator[None]:
    """Afterwards Python's, numpy's and torch's random generators are where they were."""
    python, array, host = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
        torch.set_rng_state(host)
        if devices is not None:
            torch.cuda.set_rng_state_all(devices)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that so many percent of the values do not exceed, between two of them linearly."""
    return float(np.percentile(values, share))


def device_name(place: torch.device) -> str:
    """A GPU's name, or "cpu" with the number of threads."""
    if place.type == "cuda":
        return torch.cuda.get_device_name(place)
    return f"{place.type}, {torch.get_num_threads()} threads"
