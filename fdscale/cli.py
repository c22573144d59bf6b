"""The command line: `fdscale <command> <recipe> key=value …`; one function per command, no torch until one trains."""

from __future__ import annotations

import logging
import os
import sys
import time
from json import dumps
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.cluster.gpus import visible_gpus
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe
from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.config.shipped import shipped_files
from fdscale.planning.cost import EFFICIENCY
from fdscale.terminal import TerminalHandler, terminal

USER_ERROR_EXIT_CODE = 2
SMOKE_RANKS = 2  # --smoke's global batch of 32 is two ranks' micro batch of 16
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}

app = typer.Typer(
    help="Feature distillation of giant vision models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
shards = typer.Typer(help="Make and inspect the shards that training reads.", no_args_is_help=True)
app.add_typer(shards, name="shards")
checkpoint = typer.Typer(help="List, verify and prune the checkpoints of a run.", no_args_is_help=True)
app.add_typer(checkpoint, name="checkpoint")

Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name, or a path to one.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings as key=value, e.g. optim.lr=1e-3.")]
RunDirectory = Annotated[Path, typer.Argument(help="A run directory.")]
Smoke = Annotated[bool, typer.Option("--smoke", help="The same path, shrunk to fit a laptop.")]


def settings_of(
    program: str | None, recipe: str, overrides: list[str] | None, smoke: bool
) -> DistillSettings | FinetuneSettings:
    """The settings of a recipe, for the program that wants it, with a run directory named."""
    from fdscale.planning.smoke import smoke_patch

    settings = load_recipe(recipe, overrides or [], smoke_patch if smoke else None)
    if program not in (None, settings.program):
        raise UserError(
            f"{recipe} is a recipe of `fdscale {settings.program}`, not of `fdscale {program}`; run it with that"
        )
    if settings.run_dir:
        return settings
    return settings.model_copy(update={"run_dir": f"runs/{Path(recipe).stem}{'-smoke' if smoke else ''}"})


@app.command()
def check(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    ranks: Annotated[int, typer.Option(help="Ranks the run would have, over all nodes.")] = 1,
) -> None:
    """Validate a recipe, its DeepSpeed JSON and the batch arithmetic; nothing is started."""
    from fdscale.planning.check import load_and_check
    from fdscale.planning.report import plan_table

    settings = settings_of(None, recipe, overrides, smoke)
    plan, _ = load_and_check(settings, ranks)
    terminal().print(plan_table(settings, plan))


@app.command()
def plan(
    recipe: Recipe,
    overrides: Overrides = None,
    smoke: Smoke = False,
    nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="Ranks on each; default: this machine's.")] = None,
    gpu: Annotated[str | None, typer.Option(help="A kind, e.g. H100-80GB, or cpu; default: this machine's.")] = None,
    efficiency: Annotated[
        float, typer.Option(min=0.01, max=1.0, help="Share of the GPUs' peak that is assumed to be reached.")
    ] = EFFICIENCY,
    json: Annotated[bool, typer.Option("--json", help="One JSON object in place of tables.")] = False,
) -> None:
    """Foresee memory, time and what would fit, for a cluster that need not be at hand; exit code 2 if it does not."""
    from fdscale.plan import plan as foresee
    from fdscale.planning.outlook import as_json
    from fdscale.planning.outlook_report import outlook_tables

    settings = settings_of(None, recipe, overrides, smoke)
    if isinstance(settings, DistillSettings):
        from fdscale.train import outline
    else:
        from fdscale.downstream.classify import outline  # type: ignore[assignment]
    outlook = foresee(settings, outline, Path(recipe).stem, nodes, gpus_per_node, gpu, efficiency)
    if json:
        print(dumps(as_json(outlook), indent=2))
    else:
        terminal().print(outlook_tables(outlook))
    raise typer.Exit(0 if outlook.fits else USER_ERROR_EXIT_CODE)


@app.command()
def models(
    kind: Annotated[str, typer.Argument(help="teachers, students or all")] = "all",
) -> None:
    """List the teachers and students by name: parameters, width, tokens, FLOPs, licence."""
    from fdscale.models import models_tables

    for table in models_tables(kind):
        terminal().print(table)


@app.command()
def fetch(recipe: Recipe, overrides: Overrides = None) -> None:
    """Download a recipe's teachers' weights once, on a node with network; training itself never downloads."""
    from fdscale.fetch import fetch as run

    for found in run(settings_of(None, recipe, overrides, smoke=False)):
        told = f"{escape(str(found.path))}\n{found.repository} at {found.revision}, sha256 {found.sha256}"
        terminal().print(told, soft_wrap=True)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint of the official code, SimMIM, Microsoft's Swin or BEiT.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="What the file does not tell, e.g. window_size=8.")
    ] = None,
) -> None:
    """Turn a published checkpoint into a student file, which can be trained on, and can teach."""
    from fdscale.importing.importer import import_checkpoint

    terminal().print(escape(str(import_checkpoint(file, output, overrides or []))), soft_wrap=True)


@app.command()
def distill(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Distil a teacher into a student on this rank (a launcher starts the ranks)."""
    settings = settings_of("distill", recipe, overrides, smoke)
    assert isinstance(settings, DistillSettings)
    from fdscale.train import distill as run

    _leave(run(settings))


@app.command()
def finetune(recipe: Recipe, overrides: Overrides = None, smoke: Smoke = False) -> None:
    """Fine-tune a student with labels on this rank (a launcher starts the ranks)."""
    settings = settings_of("finetune", recipe, overrides, smoke)
    assert isinstance(settings, FinetuneSettings)
    from fdscale.downstream.classify import finetune as run

    _leave(run(settings))


@app.command(context_settings=PASS_ON)
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


@app.command()
def where(name: Annotated[str, typer.Argument(help="A recipe's, DeepSpeed JSON's or launcher's name.")]) -> None:
    """Print the paths of what is shipped under a name, e.g. for `sbatch $(fdscale where fd_swinv2g)`."""
    for path in shipped_files(name):
        print(path)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run directory; for timm completed, or a student's folder or file.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    format: Annotated[str, typer.Option(help="timm: loads without fdscale. weights: a checkpoint's student file.")] = (
        "timm"
    ),
    dtype: Annotated[str, typer.Option(help="Of weights: fp32 or bf16.")] = "fp32",
    ema: Annotated[bool, typer.Option("--ema", help="Of weights: their moving average.")] = False,
    step: Annotated[int | None, typer.Option(help="Of weights: a checkpoint's step; the newest whole one.")] = None,
) -> None:
    """Write a student as a folder that timm loads, or as a student file straight from a checkpoint of any ranks."""
    if format not in ("timm", "weights"):
        raise UserError(f"--format {format}: allowed: timm, weights")
    if dtype not in ("fp32", "bf16"):
        raise UserError(f"--dtype {dtype}: allowed: fp32, bf16")
    if format == "weights":
        from fdscale.export.weights_format import export_weights

        written = export_weights(run, output, step, "bf16" if dtype == "bf16" else "fp32", ema)
    elif ema or step is not None or dtype != "fp32":
        raise UserError("--dtype, --ema and --step belong to --format weights; timm takes RUN/student_ema.safetensors")
    else:
        from fdscale.export.timm_format import export_timm

        written = export_timm(run, output)
    terminal().print(f"exported to {escape(str(written))}", soft_wrap=True)


@app.command()
def summary(runs: Annotated[list[Path], typer.Argument(help="Run directories.")]) -> None:
    """Print one table of runs: losses, held-out figures, where the students lie."""
    from fdscale.summary import summarise

    terminal().print(summarise(runs))


@shards.command()
def pack(
    source: Annotated[str, typer.Argument(help="An image folder (class sub-folders give labels), or `digits`.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the shards and their index.")],
    samples_per_shard: int = 1000,
    split: Annotated[str, typer.Option(help="Of `digits`: train or test.")] = "train",
) -> None:
    """Turn an image folder, or the digits that scikit-learn carries, into shards with an index."""
    from fdscale.data.pack import pack_digits, pack_folder

    if split not in ("train", "test"):
        raise UserError(f"--split {split}: allowed: train, test")
    digits = source == "digits" and not Path(source).exists()
    index = (
        pack_digits(output, "train" if split == "train" else "test")
        if digits
        else pack_folder(source, output, samples_per_shard)
    )
    terminal().print(f"{len(index)} samples in {len(index.shards)} shards: {escape(str(output))}")


@shards.command()
def index(folder: Annotated[Path, typer.Argument(help="A folder of WebDataset tars.")]) -> None:
    """Index a folder of WebDataset tars, so that training can read them."""
    from fdscale.data.index import build_index

    built = build_index(folder)
    terminal().print(f"{len(built)} samples in {len(built.shards)} shards: {escape(str(folder))}")


@checkpoint.command()
def ls(run: RunDirectory) -> None:
    """List a run's checkpoints: step, date, size, ranks; whole by their sizes, damaged, or never committed."""
    from fdscale.checkpoints import checkpoint_table

    terminal().print(checkpoint_table(run))


@checkpoint.command()
def verify(run: RunDirectory) -> None:
    """Read every byte of a run's checkpoints and compare the SHA-256s; fails when one is damaged."""
    from fdscale.checkpoints import verify_checkpoints

    for line in verify_checkpoints(run):
        terminal().print(escape(line), soft_wrap=True)


@checkpoint.command()
def prune(
    run: RunDirectory,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest whole ones stay.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, remove nothing.")] = False,
) -> None:
    """Remove all but the newest whole checkpoints of a run that nobody is running."""
    from fdscale.checkpoints import prune_checkpoints

    for line in prune_checkpoints(run, keep, dry_run):
        terminal().print(escape(line), soft_wrap=True)


def _leave(complete: bool) -> None:
    """Exit 0 when the run is complete, 85 ("requeue me") when a signal stopped it."""
    raise typer.Exit(0 if complete else REQUEUE_EXIT_CODE)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 85 to be requeued."""
    given = sys.argv[1:] if arguments is None else arguments
    own = [text for text in given if not text.startswith("--local_rank=")]  # put there by DeepSpeed's launcher
    _set_up_logging()
    try:
        app(own, prog_name="fdscale")
    except UserError as error:
        _tell(error)
        return USER_ERROR_EXIT_CODE
    except SystemExit as exit_:  # how typer ends a command
        return int(exit_.code or 0)
    return 0


def _set_up_logging() -> None:
    """The main rank tells events; the others tell warnings, with their rank."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    handler = TerminalHandler()
    handler.setFormatter(logging.Formatter("%(message)s" if rank == "0" else f"[rank {rank}] %(message)s"))
    logger = logging.getLogger("fdscale")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO if rank == "0" else logging.WARNING)
    logger.propagate = False
    _quiet_profiler()


def _quiet_profiler() -> None:
    """On CPUs torch's profiler measures a step's memory, and its C++ side tells so; read when torch is imported."""
    if os.environ.get("DS_ACCELERATOR") == "cpu" or not visible_gpus(os.environ):
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def _tell(error: UserError) -> None:
    """Print a user's mistake: once when every rank has found it, with the rank when it may be one rank's alone."""
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID"))
    if _joined_others():
        print(f"error: [rank {rank}] {error}", file=sys.stderr)
    elif rank in (None, "0"):
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(5)  # rank 0 tells the same; launchers end every rank as soon as one has left


def _joined_others() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
