"""What the demo did on a GPU (`results/<gpu>/demo/`, of `demo_gpu.py`), beside the CPU's report."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

from drivekd.study.report import load_study
from drivekd.study.schema import Study
from drivekd.study.tables import NOT_MEASURED, Row, Table, accuracy_table, to_markdown


def demo_part(folder: Path, beside: Path, *, where: str) -> list[str]:
    """Wall time and results of the demo on one machine, for a page; nothing if it was not run.

    Args:
        folder: the machine's results.
        beside: the report of the CPU.
        where: the path of `folder` on that page.

    Raises:
        ValueError: the files come from a dry run, whose numbers mean nothing.
    """
    file = folder / "demo" / "demo.json"
    if not file.exists():
        return []
    facts = json.loads(file.read_text(encoding="utf-8"))
    if facts["dry"]:
        raise ValueError(f"{file} comes from a dry run (DRIVEKD_DRY=1); measure on a GPU")
    planned, runs = facts["planned"], facts["runs"]
    here, cpu = load_study(folder / "demo"), load_study(beside)
    said = (
        f"The demo (`drivekd demo`) on this GPU: wall time {facts['wall_s']:.0f} s for {len(runs)} "
        f"of {planned} runs, {here.settings['runs at a time']} at a time, data set made "
        "before, report included"
    )
    said += "" if len(runs) == planned else "; **stopped when its time was over**"
    table = to_markdown(_table(here, cpu)).split("\n", 2)[2]  # without its heading
    return [f"{said}: [report]({where}/demo/report.md).", table.strip()]


def with_demos(page: str, results: Path, *, where: str) -> str:
    """A page of all machines, and behind it what the demo did on each.

    `where` is the path of `results` on that page.
    """
    parts = [page]
    for machine in sorted(file.parent.parent for file in results.glob("*/demo/demo.json")):
        said, table = demo_part(machine, results / "demo", where=f"{where}/{machine.name}")
        parts += [f"**{machine.name}**: {said}", table]
    return "\n\n".join(parts)


def _table(here: Study, cpu: Study) -> Table:
    """An arm a row: times and mean accuracy on the GPU, mean accuracy and time on the CPU."""
    means, on_cpu = _means(here), _means(cpu)
    rows = []
    for arm in here.arms:
        runs = here.runs_of(arm.name)
        known = [run.cpu_seconds for run in cpu.runs if run.arm == arm.name]
        cells = (
            str(len(runs)),
            f"{mean(run.wall_seconds for run in runs):.0f}",
            means[arm.label],
            on_cpu.get(arm.label, NOT_MEASURED),
            f"{mean(known):.0f}" if known else NOT_MEASURED,
        )
        rows.append(Row(arm.label, cells, "arm"))
    columns = ("", "seeds", "wall s a run", "accuracy, GPU", "accuracy, CPU", "CPU s a run")
    notes = (
        "Accuracy: mean of the capabilities on the test set, %, ± standard error over seeds; same "
        "seeds, float32 on both, no TF32. Seconds are of training, without evaluation.",
    )
    return Table("The demo", columns, tuple(rows), notes)


def _means(study: Study) -> dict[str, str]:
    """The last column of the accuracy table, by arm."""
    rows = accuracy_table(study).rows
    return {row.label: row.cells[-1] for row in rows if row.group == "arm"}
