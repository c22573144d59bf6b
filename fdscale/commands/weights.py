"""Commands around weights: what there is by name, fetched, imported, exported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.commands.arguments import Overrides, Recipe, settings_of
from fdscale.config.errors import UserError
from fdscale.config.shipped import shipped_files
from fdscale.imports import importing
from fdscale.terminal import terminal


def models(
    kind: Annotated[str, typer.Argument(help="teachers, students or all")] = "all",
) -> None:
    """List the teachers and students by name: parameters, width, tokens, FLOPs, licence."""
    from fdscale.models import models_tables

    for table in models_tables(kind):
        terminal().print(table)


def fetch(recipe: Recipe, overrides: Overrides = None) -> None:
    """Download a recipe's teachers' weights once, on a node with network; training itself never downloads."""
    from fdscale.fetch import fetch as run

    for found in run(settings_of(None, recipe, overrides, smoke=False)):
        told = f"{escape(str(found.path))}\n{found.repository} at {found.revision}, sha256 {found.sha256}"
        terminal().print(told, soft_wrap=True)


def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the official code, SimMIM, Microsoft's Swin or BEiT.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="What the file does not tell, e.g. window_size=8.")
    ] = None,
) -> None:
    """Turn a published checkpoint into a student file, which can be trained on, and can teach."""
    with importing():
        from fdscale.importing.importer import import_checkpoint

    terminal().print(escape(str(import_checkpoint(file, output, overrides or []))), soft_wrap=True)


def where(name: Annotated[str, typer.Argument(help="A recipe's, DeepSpeed JSON's or launcher's name.")]) -> None:
    """Print the paths of what is shipped under a name, e.g. for `sbatch $(fdscale where fd_swinv2g)`."""
    for path in shipped_files(name):
        print(path)


def export(
    run: Annotated[
        Path, typer.Argument(help="A run directory, completed but for weights; or a student's folder or file.")
    ],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[
        str, typer.Option(help="timm, transformers: load without fdscale. weights: a checkpoint's student file.")
    ] = ("timm"),
    dtype: Annotated[str, typer.Option(help="Of weights: fp32 or bf16.")] = "fp32",
    ema: Annotated[bool, typer.Option("--ema", help="Of weights: their moving average.")] = False,
    step: Annotated[int | None, typer.Option(help="Of weights: a checkpoint's step; the newest whole one.")] = None,
) -> None:
    """Write a student as a folder that others load, or as a student file straight from a checkpoint of any ranks.

    timm and transformers take a classifier beside the student along, and are read back where fdscale is not.
    """
    if format not in ("timm", "transformers", "weights"):
        raise UserError(f"--format {format}: allowed: timm, transformers, weights")
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype {dtype}: allowed: fp32, bf16")
    from fdscale.export.finished import refuse_dense

    refuse_dense(run)
    if format == "weights":
        with importing():
            from fdscale.export.weights_format import export_weights

        written = export_weights(run, output, step, "bf16" if dtype == "bf16" else "fp32", ema)
    elif ema or step is not None or dtype != "fp32":
        raise UserError(
            f"--dtype, --ema and --step belong to --format weights; {format} takes RUN/student_ema.safetensors"
        )
    elif format == "transformers":
        with importing():
            from fdscale.export.transformers_format import export_transformers

        written = export_transformers(run, output)
    else:
        with importing():
            from fdscale.export.timm_format import export_timm

        written = export_timm(run, output)
    terminal().print(f"exported to {escape(str(written))}", soft_wrap=True)
