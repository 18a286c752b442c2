"""The command `drivekd verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drivekd.cli.common import FOUND_PROBLEMS, OK, AddCommand, positive


def add_verify_command(commands: Any, add_command: AddCommand) -> None:
    """Add `verify` to the parser."""
    command = add_command(
        commands,
        "verify",
        _run_verify,
        help="check the fused losses on your own models and records",
        description="Compare each loss of a recipe and its gradients with those of eager "
        "attention, on the recipe's\nstudent, teachers and first records: errors against what the "
        "dtype allows, time and memory. Needs\nroom for a second copy of the models. Exit code 1 "
        "if anything differs.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument(
        "--samples", type=positive, default=2, metavar="N", help="records in the batch; default: 2"
    )
    command.add_argument(
        "--repeats", type=positive, default=3, metavar="N", help="timed steps; default: 3"
    )
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="default: verify.json in training.output_dir"
    )


def _run_verify(settings: argparse.Namespace) -> int:
    from drivekd.study.tables import to_text
    from drivekd.study.verify import DIFFERS
    from drivekd.study.verify_recipe import verify_document, verify_recipe, verify_table
    from drivekd.train import load_recipe

    recipe = load_recipe(settings.recipe, settings.overrides)
    checks = verify_recipe(recipe, samples=settings.samples, repeats=settings.repeats)
    print(to_text(verify_table(checks)))
    document = verify_document(checks)
    file = settings.json or Path(recipe.training["output_dir"]) / "verify.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"\nall numbers: {file}")
    return FOUND_PROBLEMS if document["verdict"] == DIFFERS else OK
