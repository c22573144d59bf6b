"""The one console: progress, log lines and tables must share it, or they overwrite each other."""

from __future__ import annotations

import logging
import sys
from functools import cache

from rich.console import Console
from rich.text import Text

LOG_FILE_WIDTH = 110  # of tables in a log file, which has no width of its own


@cache
def terminal() -> Console:
    """The console of this process, on standard output."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else LOG_FILE_WIDTH)


class TerminalHandler(logging.Handler):
    """Log records as lines of the one console, never wrapped: paths in them are searched for and copied."""

    def emit(self, record: logging.LogRecord) -> None:
        terminal().print(Text(self.format(record)), soft_wrap=True)
