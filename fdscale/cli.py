"""The command line: `fdscale <command> <recipe> key=value …`; no torch until a command trains."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable

import typer

from fdscale.cluster.gpus import visible_gpus
from fdscale.cluster.orphans import note_launchers
from fdscale.cluster.ranks import REQUEUE_EXIT_CODE, USER_ERROR_EXIT_CODE
from fdscale.commands import benching, cluster, diagnosing, measuring, runs, shards, studying, training, weights
from fdscale.config.errors import StartAgain, UserError
from fdscale.terminal import TerminalHandler
from fdscale.training.startup import note_command

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def _group(help: str, *commands: Callable[..., None]) -> typer.Typer:
    group = typer.Typer(help=help, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
    for command in commands:
        group.command()(command)
    return group


app = _group(
    "Feature distillation of giant vision models.",
    training.check,
    training.plan,
    training.distill,
    training.finetune,
    training.segment,
    training.detect,
    measuring.probe,
    measuring.evaluate,
    diagnosing.diagnose,
    studying.study,
    weights.models,
    weights.fetch,
    weights.where,
    weights.export,
    runs.summary,
)
app.command("import")(weights.import_)
app.command(context_settings=PASS_ON)(cluster.launch)
app.command(context_settings={**PASS_ON, "help_option_names": []})(benching.bench)
app.command()(cluster.submit)
app.command()(cluster.doctor)
app.command(hidden=True)(cluster.examine)
app.command(hidden=True)(measuring.probe_rank)
app.command(hidden=True)(measuring.evaluate_rank)
app.add_typer(
    _group("Make and inspect the shards of training.", shards.pack, shards.index, shards.info, shards.verify),
    name="shards",
)
app.add_typer(
    _group("List, verify and prune the checkpoints of a run.", runs.ls, runs.verify, runs.prune), name="checkpoint"
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for a user's mistake, 85 to be started again."""
    given = sys.argv[1:] if arguments is None else arguments
    own = [text for text in given if not text.startswith("--local_rank=")]  # put there by DeepSpeed's launcher
    note_launchers(os.environ)
    note_command(os.environ)
    _set_up_logging()
    try:
        app(own, prog_name="fdscale")
    except UserError as error:
        _keep(error)
        _tell(error)
        return USER_ERROR_EXIT_CODE
    except StartAgain as error:
        _keep(error)
        print(f"error: [rank {_rank()}] {error}", file=sys.stderr)
        return REQUEUE_EXIT_CODE
    except SystemExit as exit_:  # how typer ends a command
        return int(exit_.code or 0)
    except Exception as error:
        _keep(error)
        raise
    return 0


def _keep(error: Exception) -> None:
    """Beside the attempt that this process was a rank of, if it was one, where `fdscale doctor` finds it."""
    attempts = sys.modules.get("fdscale.training.attempts")
    folder = attempts.current_folder() if attempts else None
    if folder is not None:
        from fdscale.training.failures import record_failure

        record_failure(folder, int(_rank() or 0), error)


def _set_up_logging() -> None:
    """The main rank tells events; the others tell warnings, with their rank."""
    rank = _rank() or "0"
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
    rank = _rank()
    if _joined_others():
        print(f"error: [rank {rank}] {error}", file=sys.stderr)
    elif rank in (None, "0"):
        print(f"error: {error}", file=sys.stderr)
    else:
        time.sleep(5)  # rank 0 tells the same; launchers end every rank as soon as one has left


def _rank() -> str | None:
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID"))


def _joined_others() -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized()
