"""Puts measured results into README.md: `python -m benchmarks.report`.

Everything between `<!-- NAME:begin -->` and `<!-- NAME:end -->` is made from files in
`benchmarks/results/`; `--check` only says whether the page is up to date.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measured
from benchmarks.measured_demo import with_demos
from drivekd.demo.settings import FULL_ARMS
from drivekd.study.report import load_study
from drivekd.study.tables import accuracy_table, compute_table, difference_table, to_markdown

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
    parts = [
        f"Made by {made}; the whole report with curves, conflicts and attention overlays is "
        f"[{DEMO}/report.md]({DEMO}/report.md).",
        *(f"- {note}" for note in study.notes),
        *(
            to_markdown(table)
            for table in (accuracy_table(study), difference_table(study), compute_table(study))
        ),
    ]
    page = "\n\n".join(parts).replace("\n\n- ", "\n- ")
    return re.sub(r"^## ", "### ", page, flags=re.MULTILINE)


def gpu_section() -> str:
    """What was measured on GPUs, or that nothing was yet."""
    return measured.section(ROOT / RESULTS, where=str(RESULTS))


SECTIONS = {
    "demo": demo_section,
    "gpu": lambda: with_demos(gpu_section(), ROOT / RESULTS, where=str(RESULTS)),
}


def fill(page: str) -> str:
    """The page with every section made anew.

    Raises:
        ValueError: the page lacks a section's markers.
    """
    for name, make in SECTIONS.items():
        begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
        if begin not in page or end not in page:
            raise ValueError(f"README.md has no {begin} ... {end}")
        section = f"{begin}\n{make()}\n{end}"
        page = re.sub(f"{begin}.*?{end}", lambda _, s=section: s, page, flags=re.DOTALL)
    return page


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; 1 if `--check` finds the page out of date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args(arguments)
    if not options.check:
        for each in measured.machines(ROOT / RESULTS):
            measured.plot(each, ROOT / RESULTS / each.name / "speed.png")
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = fill(old)
    if options.check:
        return int(new != old)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
