"""The command `drivekd distill`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from drivekd.cli.common import OK, AddCommand


def add_distill_command(commands: Any, add_command: AddCommand) -> None:
    """Add `distill` to the parser."""
    command = add_command(
        commands,
        "distill",
        _run_distill,
        help="train a student as a recipe says",
        description="Train the student of a recipe (a YAML file; recipes/ holds examples). "
        "Settings given behind it\nreplace the recipe's, such as training.learning_rate=1e-5.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")


def _run_distill(settings: argparse.Namespace) -> int:
    from drivekd import train

    student = train.distill(train.load_recipe(settings.recipe, settings.overrides))
    if os.environ.get("RANK", "0") == "0":  # of several processes the first
        print(f"student: {student}")
    return OK
