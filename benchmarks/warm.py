"""`python -m benchmarks.warm [PART OF A NAME ...]`: compile kernels before they are needed.

A cold GPU waits for one compilation after the other; this does all of those of the calls in
`kernel_times.CASES` (by default) on as many cores as there are. Calls are recorded on tensors
without data, and each distinct launch is compiled as Triton's launcher would for the GPU at hand;
the binaries stay in Triton's cache on disk.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from benchmarks.kernel_times import CASES, Case
from benchmarks.offline.record import Launch, architecture, recorded

WORKERS = 8


def distinct(cases: Sequence[Case], arch: int) -> list[Launch]:
    """What the cases launch, each binary once, in one order everywhere."""
    with architecture(arch), recorded() as launches:
        for case in cases:
            case.call(torch.empty, "meta")()
    return list({launch.key: launch for launch in launches}.values())


def compile_share(launches: Sequence[Launch], worker: int, workers: int) -> int:
    """Compile every so-manieth launch for the GPU at hand; returns how many failed."""
    failed = 0
    for launch in launches[worker::workers]:
        try:
            launch.kernel.run(grid=launch.grid, warmup=True, **launch.values, **launch.options)
        except Exception as error:  # it fails again, and is told, where it is launched
            print(f"{launch.name}: {type(error).__name__}: {error}", flush=True)
            failed += 1
    return failed


def main(arguments: list[str]) -> int:
    """Start the workers, or be one of them (`--worker NUMBER COUNT` before the names)."""
    if arguments[:1] == ["--worker"]:
        number, count, names = int(arguments[1]), int(arguments[2]), arguments[3:]
        major, minor = torch.cuda.get_device_capability()
        cases = [each for each in CASES if not names or any(name in each.name for name in names)]
        return min(1, compile_share(distinct(cases, 10 * major + minor), number, count))
    count = min(WORKERS, os.cpu_count() or 1)
    command = [sys.executable, "-m", "benchmarks.warm", "--worker"]
    workers = [
        subprocess.Popen([*command, str(number), str(count), *arguments]) for number in range(count)
    ]
    return max([worker.wait() for worker in workers])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
