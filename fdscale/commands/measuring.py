"""Commands that measure what is trained already, on any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from fdscale.commands.arguments import Overrides, RunDirectory
from fdscale.imports import importing
from fdscale.terminal import terminal

Shards = Annotated[Path, typer.Option(help="A shard folder with labels.")]


def probe(
    student: Annotated[Path, typer.Argument(help="A student file, or a run's folder.")],
    train: Shards,
    held_out: Shards,
    neighbours: Annotated[int, typer.Option(min=1, help="Of the k-NN.")] = 20,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time on a rank.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Processes of a rank that decode.")] = 2,
    output: Annotated[Path | None, typer.Option(help="A JSON file for the result.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks; default: as `fdscale launch`.")] = None,
) -> None:
    """Measure a frozen student's features: a linear classifier and a k-NN among labelled images."""
    from fdscale.cluster.launch import launch as start

    given = {"--train": train, "--held-out": held_out, "--neighbours": neighbours, "--batch": batch}
    given |= {"--workers": workers, **({} if output is None else {"--output": output})}
    arguments = ["probe-rank", str(student), *(str(word) for pair in given.items() for word in pair)]
    raise typer.Exit(start(arguments, None, ranks))


def probe_rank(
    student: Path,
    train: Shards,
    held_out: Shards,
    neighbours: int = 20,
    batch: int = 64,
    workers: int = 2,
    output: Path | None = None,
) -> None:
    """What `fdscale probe` starts on every rank."""
    with importing():
        from fdscale.downstream.probe import probe as run
        from fdscale.downstream.probe import table_of
        from fdscale.training.engine import part

    found = run(student, train, held_out, neighbours, batch, workers, output)
    if os.environ.get("RANK", "0") == "0":
        terminal().print(table_of(found))
    part()


Ranks = Annotated[int | None, typer.Option(help="Ranks; default: as `fdscale launch`.")]
Average = Annotated[bool, typer.Option("--average", help="The weights' moving average.")]
Output = Annotated[Path | None, typer.Option(help="A JSON file for the result.")]


def evaluate(
    run: RunDirectory,
    overrides: Overrides = None,
    average: Average = False,
    output: Output = None,
    ranks: Ranks = None,
) -> None:
    """Measure a finished segmenter or detector again: other scales, flips, windows or images (eval.key=value)."""
    from fdscale.cluster.launch import launch as start
    from fdscale.downstream.finished_run import dense_settings

    dense_settings(run, overrides or [], average)  # what is wrong is told once, before any rank starts
    options = [*(["--average"] if average else []), *([] if output is None else ["--output", str(output)])]
    raise typer.Exit(start(["evaluate-rank", str(run), *(overrides or []), *options], None, ranks))


def evaluate_rank(
    run: RunDirectory, overrides: Overrides = None, average: Average = False, output: Output = None
) -> None:
    """What `fdscale evaluate` starts on every rank."""
    with importing():
        from fdscale.downstream.evaluate import evaluate as measure
        from fdscale.downstream.evaluate import table_of
        from fdscale.training.engine import part

    found = measure(run, overrides or [], "_ema" if average else "", output)
    if os.environ.get("RANK", "0") == "0":
        terminal().print(table_of(run, found))
    part()
