"""Reports: one JSON document, and plots, a web page, Markdown and terminal tables made from it."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path

from drivekd.study import tables
from drivekd.study.page import page, plot_section
from drivekd.study.plots import Plot, make_plots
from drivekd.study.schema import Study
from drivekd.study.tables import format_table as format_table

DOCUMENT = "report.json"


def write_report(directory: Path, study: Study, *, figures: Sequence[Plot] = ()) -> Path:
    """Write a study's report.

    The directory, made where it is missing, gets `report.json` (the whole study), `report.html`
    (self-contained: pictures inlined, no scripts, nothing from the network), `report.md` and the
    plots as PNG files. Files of those names are replaced, others left alone.

    Args:
        directory: where the report goes.
        study: what was run, and what came out.
        figures: further pictures, such as attention overlays, shown behind the study's own plots.

    Returns:
        The path of `report.html`.

    Raises:
        ValueError: two pictures of one name, or a name that is no plain file name.
        OSError: the directory cannot be made or written.
    """
    plots = [*make_plots(study), *figures]
    names = [plot.name for plot in plots]
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or names.count(name) > 1:
            raise ValueError(
                f"figures has the name {name!r}; names must be unique and hold only letters, "
                "digits and _ . + -"
            )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / DOCUMENT).write_text(study.to_json(), encoding="utf-8")
    for plot in plots:
        (directory / f"{plot.name}.png").write_bytes(plot.png)
    (directory / "report.md").write_text(_markdown(study, plots), encoding="utf-8")
    path = directory / "report.html"
    path.write_text(_html(study, plots), encoding="utf-8")
    return path


def load_study(path: Path) -> Study:
    """Read the study in a `report.json`, or in a directory that holds one; not further figures.

    Raises:
        FileNotFoundError: no such file.
        TypeError: a value of the wrong kind; the message names file and place.
        ValueError: not such a document; the message names file and place.
    """
    if path.is_dir():
        path = path / DOCUMENT
    text = path.read_text(encoding="utf-8")
    try:
        return Study.from_json(text)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{path}: {error}") from error


def _all_tables(study: Study) -> list[tables.Table]:
    """The tables that follow the plots or the first table, in order."""
    made = [
        tables.difference_table(study),
        tables.compute_table(study),
        tables.question_table(study),
        tables.settings_table(study),
    ]
    return [table for table in made if table.rows]  # one arm has no differences


def _markdown(study: Study, plots: list[Plot]) -> str:
    parts = [f"# {study.title}\n", "".join(f"> {note}\n>\n" for note in study.notes)]
    parts.append(tables.to_markdown(tables.accuracy_table(study)))
    first, *rest = (tables.to_markdown(table) for table in _all_tables(study))
    parts.append(first)
    for plot in plots:
        alt = plot.alt.replace("[", "(").replace("]", ")")
        parts.append(f"## {plot.title}\n\n![{alt}]({plot.name}.png)\n\n{plot.caption}\n")
    parts += rest
    if any(arm.description for arm in study.arms):
        arms = "".join(f"- **{arm.label}**: {arm.description}\n" for arm in study.arms)
        parts.append(f"## Arms\n\n{arms}")
    return "\n".join(part for part in parts if part)


def _html(study: Study, plots: list[Plot]) -> str:
    first, *rest = (tables.to_html(table) for table in _all_tables(study))
    arms = "".join(
        f"<dt>{html.escape(arm.label)}</dt><dd>{html.escape(arm.description)}</dd>"
        for arm in study.arms
    )
    body = (
        tables.to_html(tables.accuracy_table(study))
        + first
        + plot_section(plots)
        + "".join(rest)
        + f"<section><h2>Arms</h2>\n<dl>{arms}</dl></section>\n"
        + f'<p class="note">Every number and curve here comes from {DOCUMENT} beside it.</p>\n'
    )
    return page(study.title, body, notes=study.notes)
