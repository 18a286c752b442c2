"""The SM clock while something runs: counted inside a kernel, and as the driver tells it."""

from __future__ import annotations

import subprocess
import threading
import time
from statistics import median
from types import TracebackType

import torch

from benchmarks.ceilings import kernels
from benchmarks.gpu import DEVICE, DRY
from benchmarks.offline.record import recorded

CLOCK_WARPS = 32  # two such programs fill a multiprocessor: they are spread over all of them
_TOLD = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
_EVERY_MS = 100


def launch(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch a kernel; a dry run only looks whether it takes these arguments."""
    if not DRY:
        kernel[grid](*args, **options)
        return
    with recorded() as launches:
        kernel[grid](*args, **options)
    assert len(launches) == 1, "dry runs need TRITON_INTERPRET unset"


class Clock:
    """Clocks and nanoseconds of every multiprocessor, noted before and after some work.

    The counters go on between kernels. A kernel beside the work would take the place of one of its
    programs; these stand before and behind it in the stream.
    """

    def __init__(self, multiprocessors: int) -> None:
        self._noted = torch.zeros(2, multiprocessors, 3, dtype=torch.int64, device=DEVICE)

    def begin(self) -> None:
        """What comes next in the stream is the work; no synchronisation."""
        self._note(0)

    def end(self) -> None:
        """The work is behind."""
        self._note(1)

    def mhz(self) -> float:
        """Median over multiprocessors; waits for the end of the work."""
        return clock_between(*self._noted.cpu().unbind())

    def _note(self, which: int) -> None:
        out = self._noted[which]
        launch(kernels.clock_kernel, (len(out),), out, num_warps=CLOCK_WARPS)


def clock_between(before: torch.Tensor, after: torch.Tensor) -> float:
    """Median MHz of the multiprocessors that are in both: (programs, 3) int64, see `clock_kernel`.

    0 where none is, or no time passed (in dry runs).
    """
    begun = {sm: (clocks, ns) for sm, clocks, ns in before.tolist()}
    found = [
        1e3 * (clocks - begun[sm][0]) / (ns - begun[sm][1])
        for sm, clocks, ns in after.tolist()
        if sm in begun and ns > begun[sm][1]
    ]
    return median(found) if found else 0.0


class Watch:
    """nvidia-smi, asked ten times a second while this is open."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str]] = []
        command = [
            "nvidia-smi", "--id=0", f"--query-gpu={_TOLD}", "--format=csv,noheader",
            f"--loop-ms={_EVERY_MS}",
        ]  # fmt: skip
        try:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            self._process = None
            return
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join()
            self._process.stdout.close()

    def since(self, begin: float) -> list[str]:
        """What it told from a `time.monotonic()` on; without nvidia-smi, nothing."""
        return [line for when, line in self._lines if when >= begin]

    def _read(self) -> None:
        for line in self._process.stdout:
            self._lines.append((time.monotonic(), line.strip()))
