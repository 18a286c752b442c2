"""The frame of every report: one self-contained HTML page, without scripts or network."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

from drivekd.study.plots import Plot

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
.plots.wide { grid-template-columns: 1fr; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; }
@media (prefers-color-scheme: dark) {
  :root { color-scheme: dark; }
  body { background: #1b1b1b; color: #e4e4e4; }
  .note, figcaption, tr.baseline, tr.blank, tr.teacher { color: #b4b4b4; }
  tr.first > * { border-color: #555; }
  img { border-radius: .3rem; } /* pictures keep their white paper */
}
"""


def page(title: str, body: str, *, notes: Sequence[str] = ()) -> str:
    """The page.

    Args:
        title: heading, as text.
        body: what follows, as HTML.
        notes: what a reader must know first, as text.
    """
    title = html.escape(title)
    said = "".join(f"<p>{html.escape(note)}</p>" for note in notes)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{title}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{title}</h1>\n"
        + (f'<div class="notes" role="note">{said}</div>\n' if said else "")
        + body
        + "</main>\n</body>\n</html>\n"
    )


def plot_section(
    plots: Sequence[Plot],
    *,
    heading: str = "Plots",
    notes: Sequence[str] = (),
    wide: bool = False,
) -> str:
    """The plots with captions, pictures inlined.

    Args:
        plots: what is shown; nothing but heading and notes if empty.
        heading: of the section, as text.
        notes: what is said before the plots, as text.
        wide: one plot a line.
    """
    figures = []
    for plot in plots:
        data = base64.b64encode(plot.png).decode("ascii")
        figures.append(
            f"<figure><h3>{html.escape(plot.title)}</h3>\n"
            f'<img alt="{html.escape(plot.alt)}" src="data:image/png;base64,{data}">\n'
            f"<figcaption>{html.escape(plot.caption)}</figcaption></figure>\n"
        )
    said = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in notes)
    shown = f'<div class="plots{" wide" * wide}">\n{"".join(figures)}</div>' if figures else ""
    return f"<section><h2>{html.escape(heading)}</h2>\n{said}{shown}</section>\n"
