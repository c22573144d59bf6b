"""The paper in miniature, as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError, nearest
from fdscale.terminal import terminal


def study(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings as KIND.key=value, e.g. distill.steps=2000.")
    ] = None,
    shards: Annotated[Path | None, typer.Option(help="Labelled training shards; default: the digits.")] = None,
    held_out: Annotated[Path | None, typer.Option(help="Labelled shards to measure on, beside --shards.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Paired seeds; fewer than three judge nothing.")] = 5,
    first_seed: Annotated[int, typer.Option(min=0, help="The lowest of them.")] = 0,
    output: Annotated[Path, typer.Option(help="Results, runs and report; the same command goes on in it.")] = Path(
        "runs/study"
    ),
    workers: Annotated[int, typer.Option(min=1, help="Runs at a time, each on one core.")] = 2,
    quick: Annotated[bool, typer.Option("--quick", help="Everything is run, nothing is learned: two minutes.")] = False,
) -> None:
    """Train teachers, distil them with and without each ingredient, fine-tune all, and report what the paper claims."""
    from fdscale.study.conduct import conduct, design_of
    from fdscale.study.report import HTML

    if (shards is None) != (held_out is None):
        raise UserError("--shards and --held-out: give both, or neither for the digits")
    given = None if shards is None or held_out is None else (shards, held_out)
    design = design_of(given, range(first_seed, first_seed + seeds), _by_kind(overrides or []), quick, output)
    try:
        conduct(design, output, workers)
    except KeyboardInterrupt:
        terminal().print("stopped; the same command goes on from there")
        raise typer.Exit(REQUEUE_EXIT_CODE) from None
    terminal().print(escape(str(output / HTML)), soft_wrap=True)


def _by_kind(overrides: list[str]) -> dict[str, tuple[str, ...]]:
    """Overrides without their first word, by it; raises UserError for a kind of run that there is not."""
    from fdscale.study.tasks import TRAINED

    own: dict[str, tuple[str, ...]] = {}
    for text in overrides:
        kind, dot, rest = text.partition(".")
        if not dot or kind not in TRAINED:
            raise UserError(
                f"{text}: allowed: KIND.key=value, KIND one of {', '.join(TRAINED)}{nearest(kind, TRAINED)}"
            )
        own[kind] = (*own.get(kind, ()), rest)
    return own
