"""A benchmark's figures as tables, on the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import rich.table

from fdscale.terminal import terminal


@dataclass(frozen=True)
class Table:
    """`how`: what was measured, in what way; the first column names a line, the others are figures."""

    title: str
    how: str
    columns: Sequence[str]
    lines: Sequence[Sequence[str]]


def print_tables(tables: Iterable[Table]) -> None:
    """Each with its title; `how` is the page's."""
    for table in tables:
        shown = rich.table.Table(title=table.title)
        for place, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if place else "left")
        for line in table.lines:
            shown.add_row(*line)
        terminal().print(shown)


def markdown_of(title: str, given_by: str, tables: Iterable[Table]) -> str:
    """One page."""
    blocks = [f"# {title}", given_by]
    for table in tables:
        rows = [f"| {' | '.join(table.columns)} |", f"|{'---|' * len(table.columns)}"]
        rows += [f"| {' | '.join(line)} |" for line in table.lines]
        blocks += [f"## {table.title}", table.how, "\n".join(rows)]
    return "\n\n".join(block for block in blocks if block) + "\n"
