"""Where the time and the memory of training steps go, phase by phase."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch

from drivekd.study.measure import MemoryTrace

OTHER = "everything else"


class PhaseClock:
    """A listener to `drivekd.phases` that times them between `start` and `stop`.

    Time belongs to the innermost phase alone, and to "everything else" outside of all, so that
    the parts add up to the whole. Each boundary waits for all devices.

    Args:
        devices: GPUs at work; none on a CPU.
        trace: Follows memory on a CPU instead of time; without, memory is that of the GPUs.

    Attributes:
        seconds: Of each step the time by phase.
        peaks: By phase the most bytes that were out at once in any step, beside those that were
            out when the step began.
    """

    def __init__(self, devices: Sequence[torch.device], trace: MemoryTrace | None = None) -> None:
        self._devices = [device for device in dict.fromkeys(devices) if device.type == "cuda"]
        self._trace = trace
        self._stack: list[str] = []
        self._regions: list[contextlib.AbstractContextManager[Any]] = []
        self._last = 0.0
        self._step: dict[str, float] = {}
        self._before: dict[torch.device, int] = {}
        self.seconds: list[dict[str, float]] = []
        self.peaks: dict[str, int] = {}

    def start(self) -> None:
        """A step begins."""
        self._stack, self._step = [OTHER], {OTHER: 0.0}
        if self._trace is not None:
            self._trace.__enter__()
        self._wait()
        for device in self._devices:
            self._before[device] = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        self._last = time.perf_counter()

    def stop(self) -> None:
        """The step ends; phases that are open end with it."""
        while len(self._stack) > 1:
            self.end()
        self._mark()
        self._stack = []
        if self._trace is not None:
            self._trace.__exit__()
            self.peaks = self._trace.peaks(OTHER)
        else:
            self.seconds.append(self._step)

    def begin(self, name: str) -> None:
        """A phase begins."""
        if not self._stack:
            return
        self._mark()
        self._stack.append(name)
        if self._trace is not None:
            self._regions.append(self._trace.region(name))
            self._regions[-1].__enter__()

    def end(self) -> None:
        """The innermost phase ends."""
        if len(self._stack) < 2:
            return
        self._mark()
        self._stack.pop()
        if self._trace is not None:
            self._regions.pop().__exit__(None, None, None)

    def _wait(self) -> None:
        for device in self._devices:
            torch.cuda.synchronize(device)

    def _mark(self) -> None:
        """Give what has passed since the last mark to the innermost phase."""
        self._wait()
        name, here = self._stack[-1], time.perf_counter()
        self._step[name] = self._step.get(name, 0.0) + here - self._last
        if self._devices:
            peak = 0
            for device in self._devices:
                peak += torch.cuda.max_memory_allocated(device) - self._before[device]
                torch.cuda.reset_peak_memory_stats(device)
            self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self._last = time.perf_counter()
        self._step[OTHER] += self._last - here  # what looking itself took
