"""`drivekd prestudy`: which layers and regions of a teacher to distil, in numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drivekd.cli.common import OK, AddCommand, Progress, natural, seed

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_prestudy_command(commands: Any, add_command: AddCommand) -> None:
    """Add `drivekd prestudy` to the command line.

    Args:
        commands: The subparsers.
        add_command: `drivekd.cli`'s way of adding one.
    """
    command = add_command(
        commands,
        "prestudy",
        _run_prestudy,
        help="which layers and regions of a teacher to distil, and how sure that is",
        description="Run a teacher (the teachers of a recipe) over records of each capability and "
        "measure, layer by\nlayer, what the records of a capability have in common, how far they "
        "scatter, where the text's\nattention goes, how student and teacher layers pair up, and "
        "how sure the answers are. Suggests\nsignals, with reasons and the strength of the "
        "evidence; without clear evidence, the paper's.\nNeeds room for whole models.",
    )
    command.add_argument("source", metavar="RECIPE_OR_MODEL", help="RECIPE.yaml, folder, hub name")
    command.add_argument("records", type=Path, metavar="RECORDS", help="file of records")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the recipe")
    command.add_argument(
        "--student", metavar="MODEL", help="also pair its layers; default: the recipe's, or none"
    )
    command.add_argument(
        "--general",
        type=Path,
        metavar="RECORDS",
        help="records not about driving, to compare margins with; images start from its folder",
    )
    command.add_argument(
        "--types",
        nargs="+",
        default=("perception", "reasoning", "planning"),
        metavar="TYPE",
        help="question types to study; default: perception reasoning planning",
    )
    command.add_argument(
        "--limit",
        type=natural,
        default=32,
        metavar="N",
        help="records of each type, different pictures first; 0: all; default: %(default)s",
    )
    command.add_argument(
        "--root", type=Path, metavar="DIR", help="where image paths start; default: RECORDS' folder"
    )
    command.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="default: prestudy in training.output_dir, or runs/prestudy",
    )
    command.add_argument("--device", help="where models run; default: a GPU if there is one")
    command.add_argument(
        "--dtype", choices=_DTYPES, help="of the models; default: the recipe's, or as saved"
    )
    command.add_argument("--tau", type=_temperature, default=1.0, help="of margins; default: 1")
    command.add_argument("--seed", type=seed, default=0, help="of choices and draws; default: 0")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _run_prestudy(settings: argparse.Namespace) -> int:
    from drivekd.study.prestudy.recipe import Request, run_prestudy
    from drivekd.study.prestudy.report import SIGNALS, suggestion_table, write_report
    from drivekd.study.tables import to_text

    request = Request(
        source=settings.source,
        records=settings.records,
        overrides=settings.overrides,
        student=settings.student,
        general=settings.general,
        root=settings.root,
        capabilities=tuple(dict.fromkeys(settings.types)),
        limit=settings.limit,
        device=settings.device,
        dtype=settings.dtype,
        tau=settings.tau,
        seed=settings.seed,
    )
    document, signals, folder = run_prestudy(request, progress=Progress())
    report = write_report(settings.output or folder, document, signals)
    if settings.json:
        print(document.to_json(), end="")
        return OK
    print(to_text(suggestion_table(document)))
    print(f"\nreport: {report}\nsignals: {report.with_name(SIGNALS)}")
    return OK


def _temperature(text: str) -> float:
    """A number above 0, for argparse."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"is {text}; it must be above 0 and finite")
    return value
