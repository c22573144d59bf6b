"""`fdscale launch`: one program on every rank of a SLURM allocation, of a hostfile, or of this machine.

Torch-free: it starts in a second on a login node. It decides where the ranks run and returns one exit code.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

from fdscale.cluster.gpus import visible_gpus
from fdscale.cluster.lives import claimed_since, newest_attempt, record_codes
from fdscale.cluster.ranks import free_port, in_srun_step
from fdscale.cluster.slurm import in_allocation, start_with_srun
from fdscale.cluster.supervise import supervise
from fdscale.config.errors import UserError

CPU_RANKS = 2
"""How many ranks a machine without a GPU gets when nobody says."""

log = logging.getLogger(__name__)


def launch(
    arguments: list[str],
    run_dir: Path | None,
    ranks: int | None = None,
    hostfile: str | None = None,
    at_most: int | None = None,
) -> int:
    """Run `fdscale ARGUMENTS` on every rank and return one exit code: 0 only when every rank returned 0.

    Inside a SLURM allocation srun starts the ranks; with a `hostfile` (lines of `HOST slots=N`) deepspeed
    does, over pdsh; else this machine runs `ranks` of them, by default one per GPU but `at_most` so many.
    The codes are kept beside the attempt in `run_dir`; without one what is started is no run. 85 means: start me
    again; a batch job that ended without being complete has been requeued. Raises UserError for a hostfile that cannot
    be read, a contradicting option, and a launch in a launch.
    """
    command = [sys.executable, "-u", "-m", "fdscale", *arguments]
    _refuse_nesting(os.environ)
    if in_allocation(os.environ):
        _refuse_with("--hostfile", hostfile, "a SLURM allocation, which names the hosts itself")
        _warn_of_more_than(at_most, ranks, os.environ)
        return start_with_srun(command, ranks, run_dir)
    if hostfile is not None:
        _refuse_with("--ranks", ranks, "a hostfile, whose slots= say how many ranks each host runs")
        return _start_with_deepspeed(arguments, Path(hostfile), run_dir)
    return start_ranks(command, _default_ranks(os.environ, at_most) if ranks is None else ranks, run_dir)


def ranks_here(ranks: int | None, hostfile: str | None, at_most: int | None = None) -> int | None:
    """How many ranks `launch` would start on this machine itself; None where srun or deepspeed does."""
    if in_allocation(os.environ) or hostfile is not None:
        return None
    return _default_ranks(os.environ, at_most) if ranks is None else _positive("--ranks", str(ranks))


def start_ranks(command: list[str], ranks: int, run_dir: Path | None) -> int:
    """Run `command` as `ranks` processes on this machine, as torchrun would, and return one exit code.

    Should this process be killed, they are asked to stop: what they have trained is committed.
    """
    _positive("--ranks", str(ranks))
    shared = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        **({} if visible_gpus(os.environ) else {"DS_ACCELERATOR": "cpu"}),
        **os.environ,
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    each = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    before = newest_attempt(run_dir)
    ended = supervise(command, each, on_orphaned=signal.SIGTERM, forward_as={signal.SIGINT: signal.SIGTERM})
    record_codes(claimed_since(run_dir, before), {str(rank): code for rank, code in enumerate(ended.codes)})
    return ended.code


def _default_ranks(env: Mapping[str, str], at_most: int | None) -> int:
    gpus = len(visible_gpus(env))
    # LOCAL_SIZE: what DeepSpeed's CPU accelerator reads
    ranks = gpus or _positive("LOCAL_SIZE", env.get("LOCAL_SIZE", str(CPU_RANKS)))
    return ranks if at_most is None else min(ranks, at_most)


def _positive(name: str, ranks: str) -> int:
    if not re.fullmatch(r"0*[1-9][0-9]*", ranks):
        raise UserError(f"{name} {ranks}: not a number of ranks, 1 or more")
    return int(ranks)


def _warn_of_more_than(at_most: int | None, ranks: int | None, env: Mapping[str, str]) -> None:
    tasks = str(ranks or env.get("SLURM_NTASKS", ""))
    if at_most is not None and tasks.isdigit() and int(tasks) > at_most:
        log.warning(
            "this run is made for %d ranks at most, and the allocation starts %s: should its batch not divide, "
            "add --ranks %d, or a data.global_batch that does",
            *(at_most, tasks, at_most),
        )


def _start_with_deepspeed(arguments: list[str], hostfile: Path, run_dir: Path | None) -> int:
    """DeepSpeed's launcher over pdsh, also for a single host (`--force_multi`): it may be another machine.

    USR1 would kill that launcher and leave its ranks alone, so it goes on as TERM. DeepSpeed then ends every
    run of this Python that belongs to this user on these hosts, each with 30 s to commit, and returns 1.
    """
    hosts = _read_hostfile(hostfile)
    if shutil.which("pdsh") is None:
        raise UserError(f"hostfile {hostfile} needs pdsh, which is not on the PATH: install it, then try again")
    where = [f"--hostfile={hostfile}", f"--master_addr={hosts[0]}", "--force_multi", "--no_local_rank"]
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", *where, "--module", "fdscale"]
    command = [*runner, *(_quoted_for_pdsh(argument) for argument in arguments)]
    as_term = {signal.SIGUSR1: signal.SIGTERM, signal.SIGINT: signal.SIGTERM}
    before = newest_attempt(run_dir)
    code = supervise(command, [os.environ], on_orphaned=signal.SIGTERM, forward_as=as_term).code
    record_codes(claimed_since(run_dir, before), {"deepspeed": code})
    return code


def _read_hostfile(hostfile: Path) -> list[str]:
    """The host names. DeepSpeed itself would take a missing file for this machine alone, without an error."""
    if not hostfile.is_file():
        raise UserError(f"hostfile {hostfile} does not exist: write a line 'HOST slots=GPUS' for each machine")
    lines = [line.split("#")[0].strip() for line in hostfile.read_text().splitlines()]
    hosts = [re.fullmatch(r"(\S+)\s+slots=[1-9]\d*", line) for line in lines if line]
    if not hosts or None in hosts:
        raise UserError(f"hostfile {hostfile}: expected lines such as 'node1 slots=8', got {lines!r}")
    return [host[1] for host in hosts if host]


def _quoted_for_pdsh(argument: str) -> str:
    """What survives the remote shell. DeepSpeed itself only puts double quotes around what holds a blank."""
    return re.sub(r"([\\$`])", r"\\\1", argument) if " " in argument else shlex.quote(argument)


def _refuse_nesting(env: Mapping[str, str]) -> None:
    if "RANK" in env or (in_srun_step(env) and env.get("SLURM_NTASKS", "1") != "1"):
        rank = env.get("RANK", env.get("SLURM_PROCID"))
        raise UserError(
            f"`fdscale launch` starts the ranks, but a launcher already started this process as rank {rank}: "
            "call it without that launcher, or call the program itself (`fdscale distill ...`)"
        )


def _refuse_with(option: str, value: object, place: str) -> None:
    if value is not None:
        raise UserError(f"{option} {value} cannot be used with {place}: leave it out")
