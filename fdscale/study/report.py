"""The report of a study, drawn from its results alone: `report.md`, and `report.html` with its figures inside."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from fdscale import __version__
from fdscale.diagnostics.page import STYLE
from fdscale.study import tables
from fdscale.study.claims import BESIDE_RULE, CLAIMS, RULE
from fdscale.study.pictures import Picture, draw
from fdscale.study.results import Result
from fdscale.study.tables import Table
from fdscale.study.tasks import Design
from fdscale.training.run_directory import write_text

FIGURES, MARKDOWN, HTML = "figures", "report.md", "report.html"
TITLE = "The paper in miniature"


@dataclass(frozen=True)
class Heading:
    text: str


Block = str | Heading | Table | Picture


def write_report(design: Design, commit: str, results: Sequence[Result], output: Path) -> None:
    """Draw the figures and write both files; what a study has not done yet is left out."""
    pictures = draw(results, output / "runs", output / FIGURES)
    blocks = list(_blocks(design, commit, results, pictures))
    write_text(output / MARKDOWN, as_markdown(blocks, FIGURES + "/"))
    write_text(output / HTML, _as_html(blocks, output / FIGURES))


def _blocks(design: Design, commit: str, results: Sequence[Result], pictures: dict[str, Picture]) -> Iterator[Block]:
    def shown(name: str) -> Iterator[Picture]:
        yield from (picture for key, picture in pictures.items() if key == name)

    if design.quick:
        yield QUICK
    yield _opening(design, results)
    yield Heading("What the paper says, and what was found")
    yield RULE
    yield BESIDE_RULE
    yield tables.verdicts(results)
    yield f"{2 * len(CLAIMS)} intervals of 95 %: about one in forty would lie on the expected side by chance."
    yield from shown("differences")
    yield Heading("The main table")
    yield _about_accuracy(design)
    yield tables.main_table(results)
    yield from shown("accuracy")
    yield Heading("Without each ingredient")
    yield WITHOUT
    yield tables.ablations(results)
    yield Heading("Diagnostics, before and after")
    yield _about_diagnostics(design)
    yield tables.diagnostics(results)
    for name in ("heads", "attention", "maps", "landscape"):
        yield from shown(name)
    yield Heading("What was run")
    yield WHAT_A_SEED_VARIES
    yield tables.budgets(results)
    yield _spent(commit, results)


QUICK = (
    "*Nothing was learned here*: this is a `--quick` study, of a few steps a run, which shows that everything runs. "
    "None of its numbers, verdicts and figures says anything about the paper."
)


def _opening(design: Design, results: Sequence[Result]) -> str:
    seeds = ", ".join(map(str, design.seeds))
    return (
        f"{len(results)} runs and measurements on `{design.shards}`, {design.classes} classes, seeds {seeds}: a "
        "teacher trained with labels and one by contrast, students distilled from each with and without every "
        "ingredient, all of them fine-tuned on the same few labels. Numbers are as they fell; ± and brackets are 95 % "
        "Student-t intervals over seeds."
    )


def _about_accuracy(design: Design) -> str:
    return (
        f"Held-out images of `{design.held_out}` told right. All fine-tunings of a seed have the same labelled images, "
        "and all have the same steps, augmentation and learning rate. These equal budgets are those of fine-tuning: a "
        "student has had the steps of its distillation on top of its teacher's. The supervised teacher was trained "
        "with all labels, and as trained it stands in a column of its own: in the paper it and its student have all "
        "labels, here both are fine-tuned on few. Probe and k-NN look at frozen features before any fine-tuning, with "
        "all labels of the training shards, which the supervised teacher has seen before."
    )


WITHOUT = (
    "Each student is distilled once more with one ingredient left out, everything else the same: targets not whitened; "
    "a position bias of each block's own; no drop path in the student. What an ingredient brings is the difference "
    "between the runs with and without it, seed by seed, in points."
)


def _about_diagnostics(design: Design) -> str:
    return (
        "Teacher (before), student (after) and the student's network with the random weights that its distillation "
        f"began with, on {design.images} held-out images. Teacher and student differ in more than what they learned: "
        "the teacher has absolute positions and a CLS token, the student relative position biases and LayerScale. "
        "What random weights show as well, against the same teacher, is no sign of distillation: attention that is "
        "near uniform has alike heads and few columns without having learned anything. Attention is that of the "
        "networks before fine-tuning, its numbers are means over the last third of the blocks; sharpness is the "
        "curvature of the loss of the fine-tuned networks (random weights fine-tuned as well) along "
        f"{design.directions} random directions, nats per squared distance."
    )


WHAT_A_SEED_VARIES = (
    "A seed decides everything that is drawn: the teacher's first weights and its order of images and views, the "
    "student's first weights, crops, drop path, which images are labelled, and their order. Runs of one seed share all "
    "of that, which is why they are compared in pairs."
)


def _spent(commit: str, results: Sequence[Result]) -> str:
    minutes = (max(row.ended for row in results) - min(row.ended - row.seconds for row in results)) / 60
    work = sum(row.cpu_seconds for row in results) / 60
    held = max(row.resident_bytes for row in results) / 2**20
    return (
        f"{work:.0f} CPU minutes in all, {minutes:.0f} minutes by the clock from the first run to the last, with "
        f"whatever interrupted or disturbed them; a worker held {held:.0f} MiB at most. Begun at commit "
        f"{commit or 'unknown'}, fdscale {__version__}. `results.jsonl` has every number of this page, `runs/` what "
        "each run left."
    )


def as_markdown(blocks: Sequence[Block], figures: str) -> str:
    """The blocks as Markdown; `figures` stands before the names of pictures."""
    parts = [f"# {TITLE}", *(_markdown(block, figures) for block in blocks)]
    return "\n\n".join(parts) + "\n"


def _markdown(block: Block, figures: str) -> str:
    match block:
        case Heading(text):
            return f"## {text}"
        case Table(head, rows):
            lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
            return "\n".join([lines[0], f"|{'---|' * len(head)}", *lines[1:]])
        case Picture(name, reading, instead):
            return f"![{instead}]({figures}{name}.png)\n\n{reading}"
    return block


def _as_html(blocks: Sequence[Block], figures: Path) -> str:
    body = "\n".join(_html(block, figures) for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>fdscale: {TITLE}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{TITLE}</h1>\n{body}\n"
        "</body>\n</html>\n"
    )


def _html(block: Block, figures: Path) -> str:
    match block:
        case Heading(text):
            return f"<h2>{_marked(text)}</h2>"
        case Table(head, rows):
            top = "".join(f'<th scope="col">{_marked(cell)}</th>' for cell in head)
            body = "".join(f"<tr>{''.join(f'<td>{_marked(cell)}</td>' for cell in row)}</tr>" for row in rows)
            return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
        case Picture(name, reading, instead):
            image = b64encode((figures / f"{name}.png").read_bytes()).decode()
            shown = f'<img src="data:image/png;base64,{image}" alt="{escape(instead)}">'
            return f"<figure>{shown}<figcaption>{_marked(reading)}</figcaption></figure>"
    return f"<p>{_marked(block)}</p>"


def _marked(text: str) -> str:
    """Markdown's emphasis and code inside a sentence."""
    code = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))
    return re.sub(r"\*([^*]+)\*", r"<em>\1</em>", code)
