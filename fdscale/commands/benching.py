"""The command that measures speed and memory; its options are the bench's own."""

from __future__ import annotations

import typer


def bench(context: typer.Context) -> None:
    """Measure steps, loader, scaling, checkpoints, start-up or a GPU, beside this machine's ceilings."""
    from fdscale.bench.__main__ import main

    raise typer.Exit(main(context.args))
