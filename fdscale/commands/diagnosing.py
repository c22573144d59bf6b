"""Commands that look into networks: what they attend to, what their features are like, how flat their losses lie."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.commands.arguments import AllowPipe, CacheFolder, CacheGib, cache_for
from fdscale.imports import importing
from fdscale.terminal import terminal

DEFAULT_BATCH, DEFAULT_WORKERS = 16, 2


def diagnose(
    models: Annotated[
        list[str],
        typer.Argument(help="Runs' folders, student files, timm:NAME=FILE, TEACHER=FILE; FILE may be random."),
    ],
    data: Annotated[str, typer.Option(help="A shard folder, or its URL; the loss landscape needs labels.")],
    output: Annotated[Path, typer.Option(help="A new folder: measurements.jsonl, maps.npz, figures, index.html.")],
    preset: Annotated[str, typer.Option(help="quick (a ViT-B in about a minute on 2 cores) or thorough.")] = "quick",
    images: Annotated[int | None, typer.Option(min=1, help="Images that pass; default: the preset's.")] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="What a model is called, once for each in their order.")
    ] = None,
    only: Annotated[
        str | None, typer.Option(help="Some of attention,features,alignment,landscape; default: all.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time; fewer take less memory.")] = DEFAULT_BATCH,
    workers: Annotated[int, typer.Option(min=0, help="Processes that decode.")] = DEFAULT_WORKERS,
    cache: CacheFolder = None,
    cache_gib: CacheGib = 100.0,
    allow_pipe: AllowPipe = False,
) -> None:
    """Show what networks attend to, what their features are like and how flat their losses lie, side by side."""
    from fdscale.data.large_pages import put_tensors_in_large_pages

    put_tensors_in_large_pages()
    with importing():
        from fdscale.diagnostics.diagnose import PAGE
        from fdscale.diagnostics.diagnose import diagnose as run
        from fdscale.diagnostics.report import missing_sentences, summary_table

    parts = [part.strip() for part in only.split(",")] if only else []
    kept = cache_for(data, cache, cache_gib, allow_pipe)
    found = run(models, data, output, preset, images, name or [], parts, batch, workers, kept)
    terminal().print(summary_table(found.rows))
    for sentence in missing_sentences(found.rows):
        terminal().print(escape(sentence), soft_wrap=True)
    terminal().print(escape(str(output / PAGE)), soft_wrap=True)
