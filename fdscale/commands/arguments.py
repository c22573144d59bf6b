"""Arguments that several commands share, and the settings that they make. No torch in here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings
from fdscale.config.recipe import load_recipe, site_words

if TYPE_CHECKING:
    from fdscale.data.remote.cache import Cache

Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name, or a path to one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. optim.lr=1e-3.")]
RunDirectory = Annotated[Path, typer.Argument(help="A run directory.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="The same path, shrunk to fit a laptop.")]

CacheFolder = Annotated[Path | None, typer.Option("--cache", help="Of a URL: a folder that its shards are fetched to.")]
CacheGib = Annotated[
    float, typer.Option(min=0, help="What that folder may hold; the shards used longest ago are removed.")
]
AllowPipe = Annotated[bool, typer.Option("--allow-pipe", help="Of a `pipe:` URL: let it run a shell.")]


def settings_of(program: str | None, recipe: str, overrides: list[str] | None, smoke: bool) -> AnySettings:
    """The settings of a recipe, for the program that wants it, with a run directory named.

    However a run is started, its command line ends here: what a site sets for all of them is read here alone.
    """
    from fdscale.planning.smoke import smoke_patch

    settings = load_recipe(recipe, overrides or [], smoke_patch if smoke else None, site_words(os.environ))
    if program not in (None, settings.program):
        raise UserError(
            f"{recipe} is a recipe of `fdscale {settings.program}`, not of `fdscale {program}`; run it with that"
        )
    if settings.run_dir:
        return settings
    return settings.model_copy(update={"run_dir": f"runs/{Path(recipe).stem}{'-smoke' if smoke else ''}"})


def cache_for(where: str, folder: Path | None, gib: float, allow_pipe: bool) -> Cache | None:
    """Where the shards of a URL are fetched to; None of a folder. UserError for an option that a URL wants."""
    from fdscale.data.remote.cache import GIB, Cache
    from fdscale.data.remote.urls import PIPE, is_remote

    if not is_remote(where):
        return None
    if folder is None:
        raise UserError(f"{where} is a URL, whose shards are fetched: name a folder on a disk of your own: --cache DIR")
    if where.startswith(PIPE) and not allow_pipe:
        raise UserError(f"{where!r} runs a command in a shell; allowed where you trust it: --allow-pipe")
    return Cache(folder, round(gib * GIB), allow_pipe)
