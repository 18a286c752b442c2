"""The main job: multi-teacher distillation on simulated driving scenes, from frames to a report."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["run"]


def run(
    output: Path,
    *,
    full: bool = False,
    seeds: Sequence[int] | None = None,
    workers: int = 2,
    steps: int | None = None,
    fast: bool = False,
) -> Path:
    """Distil students on the simulated world, print a table and write the report.

    Args:
        output: folder for data, students, plots, `report.json` and `report.html`. A run that was
            interrupted goes on: finished students are read back.
        full: all arms and controls instead of "ce" and "multi+agp".
        seeds: student seeds; default 0, with `full` 0, 1 and 2.
        workers: processes, one thread each.
        steps: optimiser steps of each student; default 600.
        fast: a small world and 20 steps: shows that everything works, learns nothing.

    Returns:
        The path of `report.html`.

    Raises:
        ImportError: highway-env is not installed.
        DataError: `output` holds a world or students made with other settings.
    """
    from drivekd.demo.main import run_demo  # here, so that a worker process loads its own part only

    return run_demo(output, full=full, seeds=seeds, workers=workers, steps=steps, fast=fast)
