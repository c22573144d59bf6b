"""Commands that look into run directories."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.commands.arguments import RunDirectory
from fdscale.terminal import terminal


def summary(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Print one table of runs: losses, held-out figures, where the students lie."""
    from fdscale.summary import summarise

    terminal().print(summarise(runs))


def ls(run: RunDirectory) -> None:
    """List a run's checkpoints: step, date, size, ranks; whole by their sizes, damaged, or never committed."""
    from fdscale.checkpoints import checkpoint_table

    terminal().print(checkpoint_table(run))


def verify(run: RunDirectory) -> None:
    """Read every byte of a run's checkpoints and compare the SHA-256s; fails when one is damaged."""
    from fdscale.checkpoints import verify_checkpoints

    for line in verify_checkpoints(run):
        terminal().print(escape(line), soft_wrap=True)


def prune(
    run: RunDirectory,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest whole ones stay.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove all but the newest whole checkpoints of a run that nobody is running."""
    from fdscale.checkpoints import prune_checkpoints

    for line in prune_checkpoints(run, keep, dry_run):
        terminal().print(escape(line), soft_wrap=True)
