"""A study's tables, worked out once and rendered as plain text, Markdown or HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from drivekd.study.schema import Setting, Study, Tallies
from drivekd.study.statistics import Estimate, Tally, macro, mean_over_seeds, micro
from drivekd.study.statistics import paired_difference as difference_of

SINGLE = "†"  # marks a binomial error
NOT_MEASURED = "–"  # noqa: RUF001


@dataclass(frozen=True)
class Row:
    """A line of a table; rows of one group stand together."""

    label: str
    cells: tuple[str, ...]
    group: str


@dataclass(frozen=True)
class Table:
    """A rectangle of text with a heading and what a reader must know about it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()


def by_capability(study: Study, tallies: Tallies) -> list[Tally]:
    """Pooled (micro) tallies, in the order of the study's capabilities."""
    return [micro(tallies[capability].values()) for capability in study.capabilities]


def accuracy_table(study: Study) -> Table:
    """Accuracy of every arm on the test set, among teachers, baselines and blank-image rows."""
    rows = []
    for teacher in study.teachers:
        label = f"{teacher.name} ({_millions(teacher.parameters)} parameters)"
        rows.append(_accuracy_row(study, label, {0: teacher.accuracy}, "teacher"))
    for baseline in study.baselines:
        values = [tally.accuracy for tally in by_capability(study, baseline.accuracy)]
        cells = [_percent(value) for value in [*values, sum(values) / len(values)]]
        rows.append(Row(baseline.name, (NOT_MEASURED, *cells), "baseline"))
    for arm in study.arms:
        runs = {run.seed: run.accuracy for run in study.runs_of(arm.name)}
        rows.append(_accuracy_row(study, arm.label, runs, "arm"))
    for teacher in study.teachers:
        if teacher.blank:
            label = f"{teacher.name}, blank image"
            rows.append(_accuracy_row(study, label, {0: teacher.blank}, "blank"))
    for arm in study.arms:
        blank = {run.seed: run.blank for run in study.runs_of(arm.name) if run.blank}
        if blank:
            rows.append(_accuracy_row(study, f"{arm.label}, blank image", blank, "blank"))
    notes = [
        "Percent of questions answered correctly, mean ± standard error over seeds. "
        "The last column is the plain mean of the capabilities."
    ]
    if any(SINGLE in cell for row in rows for cell in row.cells):
        notes.append(
            f"{SINGLE} one run: binomial standard error, which knows only that the test set is "
            "finite, and is a little optimistic because questions about one picture go together."
        )
    if any(row.group == "blank" for row in rows):
        notes.append(
            "Blank image: the same model with every picture blanked. What it still gets right, "
            "it does not read from the picture."
        )
    columns = ("", "seeds", *study.capabilities, "mean")
    return Table("Accuracy on the test set", columns, tuple(rows), tuple(notes))


def difference_table(study: Study) -> Table:
    """Every arm minus the reference arm, then the study's own comparisons, seed by seed."""
    against = study.arm(study.reference)
    pairs = [(a, against, "arm") for a in study.arms if a.name != study.reference]
    pairs += [(study.arm(c.arm), study.arm(c.against), "comparison") for c in study.comparisons]
    rows, counts = [], set()
    for arm, other, group in pairs:
        runs = {r.seed: by_capability(study, r.accuracy) for r in study.runs_of(arm.name)}
        base = {r.seed: by_capability(study, r.accuracy) for r in study.runs_of(other.name)}
        common = len(runs.keys() & base.keys())
        counts.add(common)
        cells = [NOT_MEASURED] * (len(study.capabilities) + 1)
        if common:
            cells = [
                _points(difference_of(_column(runs, c), _column(base, c))) for c in _columns(study)
            ]
        seeds = f"{common} seed" if common == 1 else f"{common} seeds"
        rows.append(Row(f"{arm.label} − {other.label}", (seeds, *cells), group))  # noqa: RUF001
    notes = ["Percentage points, seed by seed: mean ± standard error of the differences."]
    if 1 in counts:
        notes.append(
            f"One seed proves nothing: the error marked {SINGLE} is the binomial standard error "
            "of the difference, and says nothing about the luck of training."
        )
    if counts & {2, 3}:
        notes.append("A standard error from two or three seeds is itself rough.")
    if 0 in counts:
        notes.append(f"{NOT_MEASURED} no seed in common.")
    columns = ("", "n", *study.capabilities, "mean")
    return Table("Differences, paired by seed", columns, tuple(rows), tuple(notes))


def compute_table(study: Study) -> Table:
    """Steps, parameters, processor time and, where it was measured, wall time of every arm."""
    rows = []
    columns = ["", "seeds", "steps", "parameters", "CPU s", "of which teacher", "CPU ms a step"]
    notes = [
        "CPU s: processor seconds of one training run, mean over seeds, evaluation left out; "
        "training the teachers is not counted."
    ]
    is_timed = any(run.wall_seconds for run in study.runs)
    if is_timed:
        columns.append("wall s")
        notes.append("Wall s: the time that one training run took, beside the others that ran.")
    for arm in study.arms:
        runs = study.runs_of(arm.name)
        seconds = [run.cpu_seconds for run in runs]
        steps = sum(run.steps for run in runs)
        cells = [
            str(len(runs)),
            _distinct(f"{run.steps:,}" for run in runs),
            _distinct(_millions(run.parameters) for run in runs),
            _seconds(sum(seconds) / len(runs)),
            _seconds(sum(run.teacher_cpu_seconds for run in runs) / len(runs)),
            f"{1000 * sum(seconds) / steps:.0f}" if steps else NOT_MEASURED,
        ]
        if is_timed:
            wall = [run.wall_seconds for run in runs if run.wall_seconds]
            cells.append(_seconds(sum(wall) / len(wall)) if wall else NOT_MEASURED)
        rows.append(Row(arm.label, tuple(cells), "arm"))
    return Table("Compute", tuple(columns), tuple(rows), tuple(notes))


def question_table(study: Study) -> Table:
    """Accuracy by kind of question, with the pooled (micro) and per-kind (macro) means."""
    results = [(b.name, [b.accuracy]) for b in study.baselines]
    results += [(t.name, [t.accuracy]) for t in study.teachers]
    results += [(a.label, [run.accuracy for run in study.runs_of(a.name)]) for a in study.arms]
    rows = []
    for capability in study.capabilities:
        sizes = {q: t.total for q, t in study.runs[0].accuracy[capability].items()}
        for question, size in sizes.items():
            cells = [
                _mean_percent(t[capability][question].accuracy for t in ts) for _, ts in results
            ]
            rows.append(Row(f"{capability}: {question}", (f"{size:,}", *cells), capability))
        pooled = [
            _mean_percent(micro(t[capability].values()).accuracy for t in ts) for _, ts in results
        ]
        kinds = [_mean_percent(macro(t[capability].values()) for t in ts) for _, ts in results]
        total = f"{sum(sizes.values()):,}"
        rows.append(Row(f"{capability}: all questions (micro)", (total, *pooled), capability))
        rows.append(Row(f"{capability}: mean of kinds (macro)", (total, *kinds), capability))
    columns = ("", "questions", *(name for name, _ in results))
    notes = ("Percent, mean over seeds. Kinds with few questions are noisy.",)
    return Table("Accuracy by kind of question", columns, tuple(rows), notes)


def settings_table(study: Study) -> Table:
    """The study's settings, one a line."""
    rows = tuple(Row(name, (_setting(value),), "setting") for name, value in study.settings.items())
    return Table("Settings", ("", "value"), rows)


def format_table(study: Study) -> str:
    """The study's main tables and notes as text of plain ASCII punctuation, for a terminal."""
    main = (accuracy_table(study), difference_table(study), compute_table(study))
    parts = [study.title, *(to_text(table) for table in main if table.rows)]
    if study.notes:
        parts.append("Notes\n\n" + "\n".join(f"- {note}" for note in study.notes))
    return "\n\n".join(parts)


def to_text(table: Table) -> str:
    """Aligned columns of plain ASCII punctuation, for a terminal or a log."""
    lines = [table.columns, *((row.label, *row.cells) for row in table.rows)]
    grid = [[_ascii(cell) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in grid) for i in range(len(table.columns))]
    text = [_ascii(table.title), ""]
    group = None
    for row, cells in zip([None, *table.rows], grid, strict=True):
        if row is not None and row.group != group:
            text.append("  ".join("-" * width for width in widths))
            group = row.group
        first, *rest = (
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        text.append("  ".join([first, *rest]).rstrip())
    return "\n".join([*text, *([""] if table.notes else []), *map(_ascii, table.notes)])


def to_markdown(table: Table) -> str:
    """A Markdown section with a pipe table."""
    lines = [table.columns, (":--", *("--:" for _ in table.columns[1:]))]
    lines += [(row.label, *row.cells) for row in table.rows]
    body = ["| " + " | ".join(_markdown(cell) for cell in line) + " |" for line in lines]
    notes = [_markdown(note) + "  " for note in table.notes]
    return "\n".join([f"## {_markdown(table.title)}", "", *body, "", *notes]).rstrip() + "\n"


def to_html(table: Table) -> str:
    """An HTML section: a table that scrolls sideways on a narrow screen, then its notes."""
    title = html.escape(table.title)
    head = "".join(f'<th scope="col">{html.escape(column)}</th>' for column in table.columns[1:])
    body, group = [], None
    for row in table.rows:
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row.cells)
        style = f"{row.group} first" if row.group != group else row.group
        label = f'<th scope="row">{html.escape(row.label)}</th>'
        body.append(f'<tr class="{html.escape(style)}">{label}{cells}</tr>')
        group = row.group
    notes = "".join(f'<p class="note">{html.escape(note)}</p>' for note in table.notes)
    return (
        f'<section><h2>{title}</h2>\n<div class="scroll" role="region" tabindex="0" '
        f'aria-label="{title}"><table>\n<thead><tr><td></td>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(body)
        + f"\n</tbody></table></div>\n{notes}</section>\n"
    )


def _columns(study: Study) -> list[slice]:
    """Which capabilities each accuracy column averages: each alone, then all."""
    return [*(slice(i, i + 1) for i in range(len(study.capabilities))), slice(None)]


def _column(runs: Mapping[int, list[Tally]], column: slice) -> dict[int, list[Tally]]:
    return {seed: tallies[column] for seed, tallies in runs.items()}


def _accuracy_row(study: Study, label: str, runs: Mapping[int, Tallies], group: str) -> Row:
    tallies = {seed: by_capability(study, accuracy) for seed, accuracy in runs.items()}
    cells = []
    for column in _columns(study):
        estimate = mean_over_seeds(_column(tallies, column))
        error = f"{100 * estimate.standard_error:.1f}{_mark(estimate)}"
        cells.append(f"{_percent(estimate.mean)} ± {error}")
    return Row(label, (str(len(runs)), *cells), group)


def _points(estimate: Estimate) -> str:
    """A signed difference in percentage points with its error."""
    error = f"{100 * estimate.standard_error:.1f}{_mark(estimate)}"
    return f"{100 * estimate.mean:+.1f} ± {error}"


def _mark(estimate: Estimate) -> str:
    return SINGLE if estimate.kind == "binomial" else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _mean_percent(values: Iterable[float]) -> str:
    values = list(values)
    return _percent(sum(values) / len(values))


def _seconds(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"


def _millions(parameters: int) -> str:
    return f"{parameters / 1e6:.3g} M"


def _distinct(values: Iterable[str]) -> str:
    """The values once each, in order of appearance."""
    return ", ".join(dict.fromkeys(values))


def _setting(value: Setting) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _ascii(text: str) -> str:
    for sign, plain in (("±", "+-"), ("−", "-"), ("–", "-"), (SINGLE, "*")):  # noqa: RUF001
        text = text.replace(sign, plain)
    return text


def _markdown(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
