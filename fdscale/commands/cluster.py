"""Commands that start the ranks of a program, here or by way of a queue."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.cluster.gpus import visible_gpus
from fdscale.cluster.ranks import USER_ERROR_EXIT_CODE
from fdscale.commands.arguments import Overrides, Recipe, Smoke, settings_of
from fdscale.commands.training import outlook_of
from fdscale.config.errors import UserError
from fdscale.config.programs import AnySettings
from fdscale.config.recipe import site_words
from fdscale.imports import importing
from fdscale.terminal import terminal

SMOKE_RANKS = 2  # --smoke's global batch of 32 is two ranks' micro batch of 16


def launch(
    context: typer.Context,
    program: Annotated[str, typer.Argument(help="distill, finetune, segment or detect")],
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
    site = site_words(os.environ)  # as words: over ssh, or into a container, no environment need come along
    arguments = [program, recipe, *(["--smoke"] if smoke else []), *site, *(overrides or []), *context.args]
    assert settings.run_dir, "settings_of names one"
    raise typer.Exit(start(arguments, Path(settings.run_dir), ranks, hostfile, at_most))


def submit(
    recipe: Recipe,
    words: Annotated[
        list[str] | None, typer.Argument(help="Settings as key=value; after `--` arguments of sbatch's own.")
    ] = None,
    smoke: Smoke = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each; default: this machine's.")] = None,
    cpus_per_gpu: Annotated[int, typer.Option(min=1, help="CPUs of a rank and its data workers.")] = 8,
    gpu: Annotated[str | None, typer.Option(help="A kind, e.g. H100-80GB, or cpu; default: this machine's.")] = None,
    time: Annotated[str | None, typer.Option(help="Limit of one life of the job, as sbatch takes it.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print script and command, submit nothing.")] = False,
) -> None:
    """Submit a recipe to SLURM: planned first, requeued by itself until complete; exit code 2 if it does not fit."""
    from fdscale.cluster.submit import Job, batch_script, completed, quoted, sbatch_command, site_file
    from fdscale.cluster.submit import submit as send

    overrides, further = _apart(words or [])
    settings = settings_of(None, recipe, overrides, smoke)
    run_dir = Path(settings.run_dir or "").resolve()
    if (step := completed(run_dir, settings)) is not None:
        terminal().print(
            f"already complete at step {step}: {escape(str(run_dir))}; nothing was submitted", soft_wrap=True
        )
        return
    ranks = _ranks_per_node(gpus_per_node, gpu)
    arguments = [settings.program, recipe, *(["--smoke"] if smoke else []), *overrides]
    on_gpus = gpu is None or gpu.lower() != "cpu"
    job = Job(Path(recipe).stem, arguments, nodes, ranks, cpus_per_gpu, on_gpus, time)
    site = site_file(os.environ)
    script, command = batch_script(job, sys.executable, site), sbatch_command(job, further, site)
    _refuse_what_does_not_fit(settings, recipe, nodes, ranks, gpu)
    if dry_run:
        print(f"{script}\n# {' '.join(map(quoted, command))}")
        return
    number = send(script, command)
    told = f"job {number}\nrun {run_dir}\nlog {run_dir}/logs/{number}_0.log, and one more for each restart"
    terminal().print(escape(told), soft_wrap=True)


def _apart(words: list[str]) -> tuple[list[str], list[str]]:
    """Settings, and what followed `--`, which the command line no longer shows: it begins with an option."""
    first = next((place for place, word in enumerate(words) if word.startswith("-")), len(words))
    return words[:first], words[first:]


def _ranks_per_node(gpus_per_node: int | None, gpu: str | None) -> int:
    here = len(visible_gpus(os.environ))
    if gpu is None and not here:
        raise UserError("this machine has no GPU to plan for: say which the nodes have, --gpu H100-80GB, or --gpu cpu")
    if gpus_per_node is None and not here:
        raise UserError("this machine has no GPUs to count: say how many ranks each node gets, --gpus-per-node 8")
    return gpus_per_node or here


def _refuse_what_does_not_fit(settings: AnySettings, recipe: str, nodes: int, ranks: int, gpu: str | None) -> None:
    """Ask the planner; what does not fit is told in full, with what would, and never reaches the queue."""
    from fdscale.planning.outlook_report import outlook_tables

    outlook = outlook_of(settings, recipe, nodes, ranks, gpu)
    if not outlook.fits:
        terminal().print(outlook_tables(outlook))
        raise UserError(f"{recipe} does not fit on {nodes} x {ranks} ranks (see above): nothing was submitted")


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
    raise typer.Exit(start(arguments, None, ranks, hostfile, SMOKE_RANKS if smoke else None))


def examine(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """What `fdscale doctor RECIPE` starts on every rank."""
    with importing():
        from fdscale.doctor import examine_ranks, leave

    sound = examine_ranks(settings_of(None, recipe, overrides, smoke))
    leave(sound)
    raise typer.Exit(0 if sound else USER_ERROR_EXIT_CODE)
