"""One page of what was measured: a table, figures with a sentence on how to read each; whole in one file."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from fdscale.diagnostics.figures import Picture
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import few, models_in, reasons
from fdscale.diagnostics.summary import summary

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; color: #1a1a1a; background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .3rem; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.aside { color: #555; font-size: .9rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .93rem; min-width: 30rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; border-bottom: 1px solid #e2e2e2; vertical-align: top; }
thead th { border-bottom: 2px solid #1a1a1a; overflow-wrap: anywhere; }
tbody th { font-weight: normal; }
td { font-variant-numeric: tabular-nums; }
td.unit { color: #666; }
figure { margin: 0; }
figure img { width: 100%; height: auto; display: block; }
figcaption { max-width: 46rem; margin-top: .5rem; }
li { margin: .3rem 0; }
"""
FULL_WIDTH = 2160  # pixels of a figure that is as wide as the page
LAST_THIRD = (
    "Numbers of attention are means over the last third of the blocks, where the paper looks for what distillation "
    "changes. Each figure below says how to read it."
)


def write_page(rows: Sequence[Measurement], pictures: Sequence[Picture], figures: Path, told: str, file: Path) -> None:
    """Write the page, the PNGs of `figures` inside it; `told` says on what was measured."""
    models = models_in(rows)
    title = " and ".join(models) if len(models) < 3 else f"{', '.join(models[:-1])} and {models[-1]}"
    parts = [
        f"<h1>{escape(title)} under diagnosis</h1>",
        f'<p class="aside">{escape(told)}</p>',
        *_table(rows, models),
        *_missing(rows),
        *(_section(picture, figures) for picture in pictures),
        "<h2>The numbers</h2><p>Every value is a row of <code>measurements.jsonl</code> beside this page; the averaged "
        "maps are in <code>maps.npz</code>, the figures, also as SVG, in <code>figures/</code>.</p>",
    ]
    file.write_text(_whole(f"fdscale: {title}", "\n".join(parts)))


def _whole(title: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _table(rows: Sequence[Measurement], models: Sequence[str]) -> Iterator[str]:
    head = "".join(f'<th scope="col">{escape(model)}</th>' for model in models)
    yield '<div class="wide"><table>'
    yield f'<thead><tr><th scope="col"></th>{head}<th scope="col">unit</th></tr></thead><tbody>'
    for line in summary(rows):
        cells = "".join(f"<td>{escape(line.told[model]) or '-'}</td>" for model in models)
        yield f'<tr><th scope="row">{escape(line.title)}</th>{cells}<td class="unit">{escape(line.unit)}</td></tr>'
    yield f'</tbody></table></div><p class="aside">{LAST_THIRD}</p>'


def _missing(rows: Sequence[Measurement]) -> Iterator[str]:
    """What could not be measured, and why."""
    found = list(reasons(rows))
    if not found:
        return
    yield "<h2>Not measured</h2><ul>"
    for model, reason, measures in found:
        yield f"<li>{escape(model)}, {escape(few(measures))}: {escape(reason)}</li>"
    yield "</ul>"


def _section(picture: Picture, figures: Path) -> str:
    png = (figures / f"{picture.name}.png").read_bytes()
    width = int.from_bytes(png[16:20])  # in the header
    image = b64encode(png).decode()
    return (
        f'<h2 id="{picture.name}">{escape(picture.title)}</h2>\n<figure>'
        f'<img src="data:image/png;base64,{image}" alt="{escape(picture.instead)}" '
        f'style="max-width: {60 * width / FULL_WIDTH:.0f}rem">'
        f"<figcaption>{escape(picture.reading)}</figcaption></figure>"
    )
