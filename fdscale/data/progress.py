"""How far something long is: a bar on a terminal, a line now and then elsewhere; no torch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Column
from rich.text import Text

from fdscale.terminal import terminal

LINE_SECONDS = 30.0

LOG = logging.getLogger(__name__)


@contextmanager
def progress(total: int, done: int, unit: str) -> Iterator[Callable[[int], None]]:
    """Gives a function that takes how many more `unit` (as `images`) are done, after `done` of `total`."""
    console = terminal()
    if not console.is_terminal:
        yield _Lines(total, done, unit).advance
        return
    line = BarColumn(bar_width=None, table_column=Column(ratio=1))  # a narrow terminal loses this first
    columns = (
        _Count(Column(no_wrap=True)),
        line,
        _Rate(Column(no_wrap=True)),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task(unit, total=total, completed=done)
        yield lambda more: bar.advance(task, more)


class _Count(ProgressColumn):
    """`12,000 of 1,281,167 images`."""

    def render(self, task: Task) -> Text:
        return Text(f"{int(task.completed):,} of {int(task.total or 0):,} {task.description}")


class _Rate(ProgressColumn):
    """`2,400 images/s`, or `2.5 tasks/min`, once it is known."""

    def render(self, task: Task) -> Text:
        return Text(rate_told(task.speed, task.description) if task.speed else "", style="bold cyan")


class _Lines:
    """A log line at most every half minute."""

    def __init__(self, total: int, done: int, unit: str) -> None:
        self._unit = unit
        self._total, self._done, self._already = total, done, done
        self._began = self._told = time.monotonic()

    def advance(self, more: int) -> None:
        self._done += more
        now = time.monotonic()
        if now - self._told < LINE_SECONDS:
            return
        self._told = now
        rate = (self._done - self._already) / (now - self._began)
        minutes = (self._total - self._done) / rate / 60 if rate else float("inf")
        of = f"{self._done:,} of {self._total:,} {self._unit}"
        LOG.info("%s, %s, %.0f min left", of, rate_told(rate, self._unit), minutes)


def rate_told(rate: float, unit: str) -> str:
    """A rate per second, told per minute where that is less than one."""
    return f"{rate:,.0f} {unit}/s" if rate >= 1 else f"{60 * rate:,.1f} {unit}/min"
