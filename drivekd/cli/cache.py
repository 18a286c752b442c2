"""`drivekd cache`: the targets of attention signals, made once and kept."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drivekd.cli.common import OK, AddCommand, Progress

if TYPE_CHECKING:
    from drivekd.study.tables import Table
    from drivekd.train import CachePlan

_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def add_cache_command(commands: Any, add_command: AddCommand) -> None:
    """Add `drivekd cache` to the command line.

    Args:
        commands: The subparsers.
        add_command: `drivekd.cli`'s way of adding one.
    """
    command = add_command(
        commands,
        "cache",
        _run_cache,
        help="run a recipe's teachers once and keep their attention maps",
        description="Say how large the attention maps will be that a recipe's teachers give its "
        "training records,\nrun the teachers over the records that are not there yet, and keep the "
        "maps in cache.path.\nStopped at any point, it goes on where it was; under torchrun, "
        "processes share the records. With\ncache.path, `drivekd distill` then needs no teacher. "
        "Text-to-vision maps are kept whole (in float16, to\n0.05 %), of full maps the cache.top_k "
        "largest cells of each row.",
    )
    command.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    command.add_argument("--dry-run", action="store_true", help="only say how large it will be")
    command.add_argument(
        "--check", action="store_true", help="read all that is there, and make damaged parts again"
    )


def _run_cache(settings: argparse.Namespace) -> int:
    from drivekd.study.tables import to_text
    from drivekd.train import cache_targets, load_recipe, plan_cache

    recipe = load_recipe(settings.recipe, settings.overrides)
    progress = Progress()
    speaks = os.environ.get("RANK", "0") == "0"  # of several processes the first
    if settings.dry_run:
        plan = plan_cache(recipe, check=settings.check, progress=progress)
        if speaks:
            print(to_text(plan_table(plan)))
        return OK
    plan = cache_targets(
        recipe,
        check=settings.check,
        progress=progress,
        announce=lambda plan: print(to_text(plan_table(plan)), flush=True),
    )
    if speaks:
        print(f"wrote {plan.written:,} entries, {size_text(plan.written_bytes)}, to {plan.folder}")
    return OK


def plan_table(plan: CachePlan) -> Table:
    """What each signal needs, what is there, and whether the disk has room."""
    from drivekd.study.tables import Row, Table

    columns = ("", "records", "entries", "to make", "size", "to write")
    rows = [
        Row(
            each.signal,
            (
                f"{each.records:,}",
                f"{each.entries:,}",
                f"{each.missing:,}",
                size_text(each.bytes),
                size_text(each.missing_bytes),
            ),
            "signals",
        )
        for each in plan.signals
    ]
    total = (
        "",
        f"{plan.entries:,}",
        f"{plan.missing:,}",
        size_text(plan.bytes),
        size_text(plan.missing_bytes),
    )
    rows.append(Row("together", total, "total"))
    notes = [
        f"To write: {plan.missing_bytes:,} bytes, and at most {size_text(plan.overhead_bytes)} of "
        f"names and checksums; {plan.folder} has {size_text(plan.free_bytes)} free.",
        "Equal records, and signals of one teacher and the same layers, share entries.",
    ]
    if plan.other_bytes:
        notes.append(f"{size_text(plan.other_bytes)} there are of no use to this recipe.")
    notes += [f"Damaged, made again: {file}" for file in plan.damaged]
    return Table("Cache", columns, tuple(rows), tuple(notes))


def size_text(size: int) -> str:
    """A number of bytes in a unit that reads well."""
    value, unit = float(size), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{size} bytes" if unit == 0 else f"{value:.1f} {_UNITS[unit]}"
