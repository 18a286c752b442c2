"""A pre-study as files: JSON, a page, Markdown, and signals for a recipe."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from drivekd.study.page import page, plot_section
from drivekd.study.plots import Plot
from drivekd.study.prestudy.plots import make_plots
from drivekd.study.prestudy.result import Curve, Document, Prestudy
from drivekd.study.prestudy.suggest import UNTRAINED
from drivekd.study.tables import NOT_MEASURED, Row, Table, to_html, to_markdown

DOCUMENT, SIGNALS = "prestudy.json", "signals.yaml"
TITLE = "Pre-study: what to distil from where"
NOTES = (
    "These numbers describe a teacher. That a student learns more from one layer than from another "
    "they do not show, nor that it learns nothing where there is no contrast: only training does.",
    "The paper names these measures and gives no public formulas; definitions and the rule behind "
    "the suggestions are this project's own.",
    "Questions of a capability are worded alike, and so their maps are. Wording is taken out as "
    "far as a straight line can; what is left may still be wording. Untrained models show "
    f"contrasts up to about {UNTRAINED:g}: below that, nothing is called clear.",
    "Each capability is tested by itself: where there is no pattern at all, about one in twenty "
    "still shows weak evidence by chance, one in a hundred clear evidence.",
)


def write_report(folder: Path, document: Document, signals: str) -> Path:
    """Write `prestudy.json`, `report.html`, `report.md`, the plots as PNG, and `signals.yaml`.

    Args:
        folder: Made where it is missing; files of those names are replaced.
        document: The pre-studies.
        signals: What `signals_yaml` gave.

    Returns:
        The path of `report.html`.

    Raises:
        OSError: The folder cannot be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / DOCUMENT).write_text(document.to_json(), encoding="utf-8")
    (folder / SIGNALS).write_text(signals, encoding="utf-8")
    body = to_html(suggestion_table(document))
    text = [f"# {TITLE}\n", *(f"> {note}\n>\n" for note in NOTES)]
    text.append(to_markdown(suggestion_table(document)))
    for number, study in enumerate(document.studies):
        several = len(document.studies) > 1
        plots = make_plots(study, prefix=f"prestudy{number + 1}" if several else "prestudy")
        heading = f"Teacher {study.teacher}"
        for plot in plots:
            (folder / f"{plot.name}.png").write_bytes(plot.png)
        body += to_html(_capability_table(study))
        body += plot_section(plots, heading=heading, notes=_said(study))
        text += [to_markdown(_capability_table(study)), _markdown_plots(heading, plots)]
    (folder / "report.md").write_text("\n".join(text), encoding="utf-8")
    path = folder / "report.html"
    path.write_text(page(TITLE, body, notes=NOTES), encoding="utf-8")
    return path


def suggestion_table(document: Document) -> Table:
    """One row a capability, its reasons below."""
    columns = ("", "region", "teacher layers", "student layers", "paper's", "evidence", "p")
    rows, notes = [], []
    for study in document.studies:
        for each in study.suggestions:
            p = NOT_MEASURED if each.p != each.p else f"{each.p:.2g}"
            cells = (
                each.region,
                str(each.teacher_layers),
                str(each.student_layers),
                "yes" if each.is_default else "no",
                each.evidence,
                p,
            )
            rows.append(Row(each.capability, cells, study.teacher))
            notes.append(f"{each.capability}: " + " ".join(each.reasons))
    return Table("Suggested signals", columns, tuple(rows), tuple(notes))


def signals_yaml(document: Document, teachers: Mapping[str, tuple[str, str]]) -> str:
    """The suggestions as part of a recipe, each with its reasons.

    Args:
        document: The pre-studies.
        teachers: For each capability the name of its teacher, and its path.

    Returns:
        YAML with `teachers` and `distill.signals`, which a recipe takes by `base`.
    """
    suggestions = [each for study in document.studies for each in study.suggestions]
    lines = _comment(
        "Signals that `drivekd prestudy` suggests. A recipe takes them by "
        "`base: [RECIPE.yaml, signals.yaml]`; lists take the place of the recipe's own."
    )
    lines += [*(line for note in NOTES for line in _comment(note))]
    paths = dict(teachers.values())
    lines += [_yaml({"teachers": paths}), "distill:"]
    lines += ["  signals:"] if suggestions else ["  signals: []"]
    for each in suggestions:
        lines += ["    " + line for line in _comment(" ".join(each.reasons), width=92)]
        signal = {
            "name": each.capability,
            "teacher": teachers[each.capability][0],
            "student_layers": each.student_layers,
            "teacher_layers": each.teacher_layers,
            "region": each.region,
        }
        lines.append(textwrap.indent(_yaml([signal]), "    "))
    return "\n".join(lines) + "\n"


def _capability_table(study: Prestudy) -> Table:
    """Counts, margins, and the layer where each measure is highest."""
    columns = (
        "", "records", "pictures", "tokens", "answer", "margin", "vision share", "sink share",
        "contrast, text to vision", "contrast, full",
    )  # fmt: skip
    rows = []
    for each in study.capabilities:
        cells = (
            f"{each.records:,}",
            f"{each.pictures:,}",
            f"{each.tokens:g}",
            f"{each.margins.answer_tokens:g}",
            _interval(each.margins.mean),
            *(_top(c) for c in (each.vision_mass, each.sink_share)),
            *(_top(each.similarity[kind].beyond_words) for kind in ("text_to_vision", "full")),
        )
        rows.append(Row(each.name, cells, "capability"))
    for name, margins in study.general.items():
        cells = (f"{margins.records:,}", NOT_MEASURED, NOT_MEASURED, f"{margins.answer_tokens:g}")
        rest = (NOT_MEASURED,) * 4
        rows.append(Row(name, (*cells, _interval(margins.mean), *rest), "general"))
    notes = (
        "Tokens and answer: median numbers of tokens. Margin: mean over answers, with the central "
        "95 % of draws. The others: the largest value of a layer, and which layer.",
    )
    return Table(f"Measured of {study.teacher}", columns, tuple(rows), notes)


def _said(study: Prestudy) -> list[str]:
    """How it was made, in a line."""
    settings = ", ".join(f"{name} {value}" for name, value in study.settings.items())
    student = f" Student: {study.student}, {study.num_student_layers} layers." * bool(study.student)
    return [f"{study.num_layers} layers.{student} {settings}."]


def _markdown_plots(heading: str, plots: Sequence[Plot]) -> str:
    parts = [f"## {heading}\n"]
    for plot in plots:
        alt = plot.alt.replace("[", "(").replace("]", ")")
        parts.append(f"### {plot.title}\n\n![{alt}]({plot.name}.png)\n\n{plot.caption}\n")
    return "\n".join(parts)


def _interval(curve: Curve) -> str:
    (value,), (low,), (high,) = curve.value, curve.low, curve.high
    return f"{value:.2f}" if low != low else f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _top(curve: Curve) -> str:
    """The largest value and its layer."""
    known = [(value, layer) for layer, value in enumerate(curve.value) if value == value]
    if not known:
        return NOT_MEASURED
    value, layer = max(known)
    return f"{value:.2f} ({layer})"


def _comment(text: str, width: int = 98) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="# ", subsequent_indent="# ")


def _yaml(tree: Any) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)).rstrip("\n")
