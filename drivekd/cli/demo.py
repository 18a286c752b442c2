"""The command `drivekd demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drivekd.cli.common import OK, AddCommand, positive, seed


def add_demo_command(commands: Any, add_command: AddCommand) -> None:
    """Add `demo` to the parser."""
    command = add_command(
        commands,
        "demo",
        _run_demo,
        help="distil on a simulated highway and write a report",
        description="Simulate highway scenes with questions about them, train small students with "
        "and without\nteachers, and write a report with every baseline. The same command goes on "
        "where it was stopped.\nNeeds highway-env (pip install 'drivekd[demo]'), or --data.",
    )
    command.add_argument(
        "--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="default: %(default)s"
    )
    arms = command.add_mutually_exclusive_group()
    arms.add_argument("--full", action="store_true", help="every arm and control, three seeds")
    arms.add_argument("--arms", nargs="+", metavar="ARM", help="these arms; default: ce multi+agp")
    command.add_argument(
        "--seeds",
        type=seed,
        nargs="+",
        metavar="SEED",
        help="student seeds; default 0, with --full 0 1 2",
    )
    command.add_argument(
        "--workers",
        type=positive,
        metavar="N",
        help="runs side by side, a process of one thread each; default: the machine's cores, on "
        "a GPU also no more than one for each 2 GiB of its memory",
    )
    command.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where models run, in float32; default: a GPU if torch sees one",
    )
    length = command.add_mutually_exclusive_group()
    length.add_argument("--steps", type=positive, metavar="N", help="steps of each student")
    length.add_argument(
        "--fast",
        action="store_true",
        help="a small world and a few steps: shows that it works, learns nothing",
    )
    world = command.add_mutually_exclusive_group()
    world.add_argument(
        "--prepare",
        type=Path,
        metavar="DIR",
        help="only make the data set, into DIR, for --data here or on another machine",
    )
    world.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="a data set made by --prepare; checked; default: data/ in --output, made if need be",
    )
    command.add_argument(
        "--report-only", action="store_true", help="train nothing; report what has finished"
    )


def _run_demo(settings: argparse.Namespace) -> int:
    from drivekd import demo

    if settings.prepare:
        folder = demo.prepare(settings.prepare, workers=settings.workers, fast=settings.fast)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        print(f"data set: {folder} ({size / 1e6:.1f} MB); use it with --data {folder}")
        return OK
    report = demo.run(
        settings.output,
        arms=settings.arms,
        full=settings.full,
        seeds=settings.seeds,
        workers=settings.workers,
        steps=settings.steps,
        fast=settings.fast,
        data=settings.data,
        device=settings.device,
        report_only=settings.report_only,
    )
    print(f"report: {report}")
    return OK
