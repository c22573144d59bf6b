"""Commands that start the ranks of a program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.commands.arguments import USER_ERROR_EXIT_CODE, Overrides, Recipe, Smoke, settings_of
from fdscale.terminal import terminal

SMOKE_RANKS = 2  # --smoke's global batch of 32 is two ranks' micro batch of 16


def launch(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="distill or finetune")],
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    ranks: Annotated[int | None, typer.Option(help="Ranks; default: one per GPU, or 2; smoke: 2 at most.")] = None,
    hostfile: Annotated[str | None, typer.Option(help="Lines of `HOST slots=N`; starts over pdsh.")] = None,
) -> None:
    """Start a program's ranks: in a SLURM allocation, over a hostfile, or on this machine."""
    from fdscale.cluster.launch import launch as start
    from fdscale.cluster.launch import ranks_here
    from fdscale.planning.check import load_and_check

    at_most = SMOKE_RANKS if smoke else None
    settings = settings_of(program, recipe, overrides, smoke)
    local_ranks = ranks_here(ranks, hostfile, at_most)
    if local_ranks is not None:  # the ranks check for themselves; here it is told once, before any starts
        load_and_check(settings, local_ranks, local_ranks)
    arguments = [program, recipe, *(["--smoke"] if smoke else []), *(overrides or []), *context.args]
    raise typer.Exit(start(arguments, ranks, hostfile, at_most))


def doctor(
    target: Annotated[str, typer.Argument(help="A recipe that is to run, or the run directory of one that ended.")],
    overrides: Overrides = None,
    smoke: Smoke = False,
    ranks: Annotated[int | None, typer.Option(help="Ranks; default: as `fdscale launch`.")] = None,
    hostfile: Annotated[str | None, typer.Option(help="Lines of `HOST slots=N`; starts over pdsh.")] = None,
) -> None:
    """Before a run: find what would fail or slow it, on every rank. After it: say what ended it."""
    if any((Path(target) / mark).exists() for mark in ("recipe.toml", "attempts")):
        from fdscale.postmortem import post_mortem

        for line in post_mortem(Path(target)):
            terminal().print(escape(line), soft_wrap=True)
        return
    from fdscale.cluster.launch import launch as start

    settings_of(None, target, overrides, smoke)  # what is wrong with them is told once, before any rank starts
    arguments = ["examine", target, *(["--smoke"] if smoke else []), *(overrides or [])]
    raise typer.Exit(start(arguments, ranks, hostfile, SMOKE_RANKS if smoke else None))


def examine(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """What `fdscale doctor RECIPE` starts on every rank."""
    from fdscale.doctor import examine_ranks, leave

    sound = examine_ranks(settings_of(None, recipe, overrides, smoke))
    leave(sound)
    raise typer.Exit(0 if sound else USER_ERROR_EXIT_CODE)
