"""The command `drivekd doctor`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from drivekd.cli.common import FOUND_PROBLEMS, OK, AddCommand
from drivekd.errors import RecipeError


def add_doctor_command(commands: Any, add_command: AddCommand) -> None:
    """Add `doctor` to the parser."""
    command = add_command(
        commands,
        "doctor",
        _run_doctor,
        help="what is installed, what was built, what runs where",
        description="Show versions, devices, the compiled extension, and which backend each op "
        "would use, and why\nnot another. Exit code 1 if drivekd is not usable here.\n\n"
        "With MODEL or --recipe: what a model, or each part that its signals need, will load and "
        "compute;\nreads its config and the headers of its files, no weights.",
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help="folder, or cached hub name")
    command.add_argument(
        "--layers",
        nargs="+",
        type=_layers,
        metavar="LAYERS",
        help="layers of MODEL whose maps are wanted, such as first, penultimate, 0..-2 or 3; "
        "default: those of perception, reasoning and planning",
    )
    command.add_argument(
        "--recipe", type=Path, metavar="FILE", help="student and teachers of this recipe"
    )
    command.add_argument("--dtype", default="auto", help="of MODEL in memory; default: as saved")
    what = command.add_mutually_exclusive_group()
    what.add_argument("--json", action="store_true", help="print everything as JSON")
    what.add_argument("--build", action="store_true", help="only what the installation built")


def _run_doctor(settings: argparse.Namespace) -> int:
    if settings.model or settings.recipe:
        return _run_doctor_model(settings)
    if settings.layers:
        raise RecipeError("--layers needs a MODEL")
    from drivekd.doctor import diagnose, format_build, format_diagnosis

    diagnosis = diagnose()
    if settings.json:
        print(json.dumps(dataclasses.asdict(diagnosis), indent=1))
    else:
        print(format_build(diagnosis) if settings.build else format_diagnosis(diagnosis))
    return FOUND_PROBLEMS if diagnosis.problems else OK


def _run_doctor_model(settings: argparse.Namespace) -> int:
    from drivekd.study.costs import cost_table
    from drivekd.study.tables import to_text
    from drivekd.train.cost import ROLES, loading_cost, recipe_costs
    from drivekd.train.recipe import load_recipe

    try:
        costs = recipe_costs(load_recipe(settings.recipe)) if settings.recipe else []
        if settings.model:
            roles = {"these layers": settings.layers} if settings.layers else ROLES
            costs += [
                loading_cost(settings.model, layers, role=role, dtype=settings.dtype)
                for role, layers in roles.items()
            ]
    except ValueError as error:
        raise RecipeError(str(error)) from error
    if settings.json:
        print(json.dumps([dataclasses.asdict(cost) for cost in costs], indent=1))
    else:
        print(to_text(cost_table(costs)))
    return OK


def _layers(text: str) -> int | str:
    """A layer's number, or the name of layers, for argparse."""
    return int(text) if text.lstrip("-").isdigit() else text
