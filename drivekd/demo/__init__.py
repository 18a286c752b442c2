"""The main job: multi-teacher distillation on simulated driving scenes, from frames to a report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

__all__ = ["prepare", "run"]


def prepare(folder: Path, *, workers: int | None = None, fast: bool = False) -> Path:
    """Make the demo's data set, for a machine without highway-env or to share between outputs.

    Args:
        folder: where it goes; a data set that was interrupted is finished, a complete one checked.
        workers: processes; default: one for each core.
        fast: the small world of `run(fast=True)`.

    Returns:
        `folder`, for `run(data=folder)`.

    Raises:
        ImportError: highway-env is not installed.
        DataError: `folder` holds a data set made with other settings, or damaged files.
    """
    from drivekd.demo import main

    return main.prepare(folder, workers=workers, fast=fast)


def run(
    output: Path,
    *,
    arms: Sequence[str] | None = None,
    full: bool = False,
    seeds: Sequence[int] | None = None,
    workers: int | None = None,
    steps: int | None = None,
    fast: bool = False,
    data: Path | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    report_only: bool = False,
) -> Path:
    """Distil students on the simulated world, print a table and write the report.

    Where runs fail, the others go on; where the demo is interrupted (KeyboardInterrupt), it stops.
    In both cases the report of what has finished is written before the exception leaves.

    Args:
        output: folder for data, students, plots, `report.json` and `report.html`. A run that was
            interrupted goes on: finished students are read back.
        arms: names of arms (`drivekd.demo.settings.FULL_ARMS`); default "ce" and "multi+agp".
        full: all arms and controls.
        seeds: student seeds; default 0, with `full` 0, 1 and 2.
        workers: runs side by side, each a process of one thread; default: one for each core, on a
            GPU also no more than one for each 2 GiB of its memory.
        steps: optimiser steps of each student; default 600.
        fast: a small world and 20 steps: shows that everything works, learns nothing.
        data: a data set that `prepare` made; default: `output`/data, made if need be.
        device: where students and teachers run; "auto" is a GPU where torch sees one. Everything
            is float32, without TF32.
        report_only: train nothing; report what has finished.

    Returns:
        The path of `report.html`.

    Raises:
        BackendUnavailableError: `device` is "cuda" and torch sees no GPU.
        DataError: `data` or `output` holds a data set or students made with other settings, `data`
            is not complete or was changed, `arms` has an unknown name, or nothing has finished.
        ImportError: the data set is to be made and highway-env is not installed.
        RunFailedError: runs failed; it names them.
    """
    from drivekd.demo.main import run_demo  # here, so that a worker process loads its own part only

    return run_demo(
        output,
        arms=arms,
        full=full,
        seeds=seeds,
        workers=workers,
        steps=steps,
        fast=fast,
        data=data,
        device=device,
        report_only=report_only,
    )
