"""`drivekd report`: a training run as one page."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drivekd.cli.common import OK, AddCommand, natural


def add_report_command(commands: Any, add_command: AddCommand) -> None:
    """Add `drivekd report` to the parser's commands.

    Args:
        commands: What `add_subparsers` gave.
        add_command: Adds one, as `drivekd.cli` adds its own.
    """
    command = add_command(
        commands,
        "report",
        _run_report,
        help="draw the log of a training run",
        description="Draw losses, gradients, conflicts and speed of a training run from its "
        "log.jsonl, and where\nteachers and student look on its own records, into one "
        "self-contained RUN/report.html. Works\nwhile the run goes on: overlays are of the newest "
        "checkpoint, and models run on the CPU unless\n--device says otherwise. Whatever is "
        "missing for them is said in the page.",
    )
    command.add_argument("folder", type=Path, metavar="RUN", help="training.output_dir of a run")
    command.add_argument(
        "--overlays",
        type=natural,
        default=2,
        metavar="N",
        help="records a signal with attention overlays, which load student and teachers; 0 loads "
        "nothing; default: %(default)s",
    )
    command.add_argument(
        "--device", default="cpu", help="where models run for overlays; default: %(default)s"
    )
    command.add_argument(
        "--recipe", type=Path, metavar="FILE", help="default: RUN/recipe.yaml, which a run writes"
    )
    command.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="changes to it, such as moved teachers"
    )


def _run_report(settings: argparse.Namespace) -> int:
    from drivekd.study.run_overlays import overlays_of_run
    from drivekd.study.training import read_log, write_training_report

    read_log(settings.folder)  # before models are loaded
    overlays = None
    if settings.overlays:
        overlays = overlays_of_run(
            settings.folder,
            recipe_file=settings.recipe,
            overrides=settings.overrides,
            count=settings.overlays,
            device=settings.device,
        )
    print(f"report: {write_training_report(settings.folder, overlays=overlays)}")
    return OK
