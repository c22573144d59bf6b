"""What was measured, for a terminal: a table of each model's dozen numbers, and what there is no number of."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import few, models_in, reasons
from fdscale.diagnostics.summary import summary


def summary_table(rows: Sequence[Measurement]) -> Table:
    """One line a number, one column a model."""
    table = Table(title="attention: means over the last third of the blocks", title_justify="left")
    table.add_column("")
    for model in models_in(rows):
        table.add_column(Text(model), justify="right", overflow="fold")
    table.add_column("unit")
    for line in summary(rows):
        table.add_row(line.title, *line.told.values(), line.unit)
    return table


def missing_sentences(rows: Sequence[Measurement]) -> list[str]:
    """`MODEL: MEASURES not measured: REASON`, one a model and reason."""
    return [f"{model}: {few(measures)} not measured: {reason}" for model, reason, measures in reasons(rows)]
