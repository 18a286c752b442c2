"""Reports: one JSON document, and plots, a web page, Markdown and terminal tables made from it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from drivekd.study import tables
from drivekd.study.plots import Plot, make_plots
from drivekd.study.schema import Study
from drivekd.study.tables import format_table as format_table

DOCUMENT = "report.json"

_CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 4rem; max-width: 62rem; background: #fff; color: #222;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .4rem 0 1rem; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
.notes { border-left: .25rem solid #d55e00; padding: .1rem 0 .1rem 1rem; margin: 1rem 0; }
.notes p { margin: .4rem 0; }
.note, figcaption { color: #555; font-size: .875rem; margin: .4rem 0; max-width: 44rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .28rem .7rem .28rem 0; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid #888; vertical-align: bottom; }
tbody th { text-align: left; font-weight: 500; white-space: normal; min-width: 9rem; }
tr.first > * { border-top: 1px solid #ccc; }
tr.baseline, tr.blank, tr.teacher { color: #555; }
tr.setting td { text-align: left; white-space: normal; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr));
  gap: 2rem 1.5rem; align-items: start; }
figure { margin: 0; }
img { width: 100%; height: auto; display: block; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
"""


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
    page = directory / "report.html"
    page.write_text(_html(study, plots), encoding="utf-8")
    return page


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
    return [
        tables.difference_table(study),
        tables.compute_table(study),
        tables.question_table(study),
        tables.settings_table(study),
    ]


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
    title = html.escape(study.title)
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in study.notes)
    first, *rest = (tables.to_html(table) for table in _all_tables(study))
    arms = "".join(
        f"<dt>{html.escape(arm.label)}</dt><dd>{html.escape(arm.description)}</dd>"
        for arm in study.arms
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n"
        + (f'<div class="notes" role="note">{notes}</div>\n' if notes else "")
        + tables.to_html(tables.accuracy_table(study))
        + first
        + f'<section><h2>Plots</h2>\n<div class="plots">\n{_figures(plots)}</div></section>\n'
        + "".join(rest)
        + f"<section><h2>Arms</h2>\n<dl>{arms}</dl></section>\n"
        + f'<p class="note">Every number and curve here comes from {DOCUMENT} beside it.</p>\n'
        + "</main>\n</body>\n</html>\n"
    )


def _figures(plots: list[Plot]) -> str:
    figures = []
    for plot in plots:
        data = base64.b64encode(plot.png).decode("ascii")
        figures.append(
            f"<figure><h3>{html.escape(plot.title)}</h3>\n"
            f'<img alt="{html.escape(plot.alt)}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>\n"
        )
    return "".join(figures)
