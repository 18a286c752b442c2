"""Puts measured results into README.md and benchmarks/README.md: `python -m benchmarks.report`.

Everything between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is made from files in
`benchmarks/results/`; `--check` only says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks import measured, measured_tables, predicted
from benchmarks.measured_demo import with_demos
from drivekd.demo.settings import FULL_ARMS
from drivekd.study.report import load_study
from drivekd.study.schema import Study
from drivekd.study.statistics import macro
from drivekd.study.tables import (
    Table,
    accuracy_table,
    by_capability,
    compute_table,
    difference_table,
    to_markdown,
)

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results")
DEMO = RESULTS / "demo"


def demo_section() -> str:
    """Tables of the committed demo report, with what to know before believing them."""
    study = load_study(ROOT / DEMO)
    seeds = sorted({run.seed for run in study.runs})
    made = f"`drivekd demo --full`, up to {len(seeds)} seeds an arm"
    run = {arm.name for arm in study.arms}
    missing = [f"{arm.label} (`{arm.name}`)" for arm in FULL_ARMS if arm.name not in run]
    if missing:
        made += f" (not run yet: {', '.join(missing)})"
    accuracy = accuracy_table(study)
    shown = replace(
        accuracy,
        rows=tuple(row for row in accuracy.rows if row.group != "blank"),
        notes=(*(note for note in accuracy.notes if not note.startswith("Blank")), _blank(study)),
    )
    parts = [
        f"Made by {made}; the whole report with curves, conflicts and attention overlays is "
        f"[{DEMO}/report.md]({DEMO}/report.md).",
        to_markdown(shown),
        f"![accuracy over training steps, by capability]({DEMO}/learning_steps.png)",
        *(_folded(table) for table in (difference_table(study), compute_table(study))),
        "What to know before believing it:",
        *(f"- {note}" for note in study.notes),
    ]
    page = "\n\n".join(parts).replace("\n\n- ", "\n- ")
    return re.sub(r"^## ", "### ", page, flags=re.MULTILINE)


def _blank(study: Study) -> str:
    """What is left of the accuracy when the picture is blanked."""
    means = [
        macro(by_capability(study, each.blank))
        for each in (*study.teachers, *study.runs)
        if each.blank
    ]
    return (
        f"With every picture blanked the same models answer {100 * min(means):.0f} to "
        f"{100 * max(means):.0f} % correctly: what is above, they read from the picture."
    )


def _folded(table: Table) -> str:
    """A table that opens at a click."""
    title, _, rest = to_markdown(table).partition("\n")
    return f"<details><summary>{title.lstrip('# ')}</summary>\n{rest}\n</details>"


def gpu_section() -> str:
    """What was measured on GPUs, or that nothing was yet."""
    return measured_tables.section(ROOT / RESULTS, where=str(RESULTS))


SECTIONS = {
    "demo": demo_section,
    "gpu": lambda: with_demos(gpu_section(), ROOT / RESULTS, where=str(RESULTS)),
}
OF_BENCHMARKS = {"kernels": predicted.section, "floors": predicted.floors}
PAGES = {"README.md": SECTIONS, "benchmarks/README.md": OF_BENCHMARKS}


def fill(page: str, sections: Mapping[str, Callable[[], str]] = SECTIONS) -> str:
    """The page with every section made anew.

    Raises:
        ValueError: the page lacks a section's markers.
    """
    for name, make in sections.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in page or end not in page:
            raise ValueError(f"the page has no {begin} ... {end}")
        section = f"{begin}\n{make()}\n{end}"
        page = re.sub(f"{begin}.*?{end}", lambda _, s=section: s, page, flags=re.DOTALL)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; 1 if `--check` finds a page out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if not options.check:
        for each in measured.machines(ROOT / RESULTS):
            measured_tables.plot(each, ROOT / RESULTS / each.name / "speed.png")
    changed = False
    for name, sections in PAGES.items():
        old = (ROOT / name).read_text(encoding="utf-8")
        new = fill(old, sections)
        changed |= new != old
        if not options.check:
            (ROOT / name).write_text(new, encoding="utf-8")
    return int(options.check and changed)


if __name__ == "__main__":
    sys.exit(main())
