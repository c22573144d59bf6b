"""A SLURM allocation: one srun step, one log for each life of the job, and requeueing until the run is complete."""

from __future__ import annotations

import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from fdscale.cluster.lives import claimed_since, is_mistake, log_apart, newest_attempt, record_codes
from fdscale.cluster.ranks import REQUEUES, USER_ERROR_EXIT_CODE, in_srun_step
from fdscale.cluster.supervise import supervise
from fdscale.config.errors import UserError

STEP_GRACE_SECONDS = 60
"""How long SLURM lets the other ranks go on after the first one has ended."""

log = logging.getLogger(__name__)


def in_allocation(env: Mapping[str, str]) -> bool:
    """Whether srun can start ranks: in a batch script or an salloc shell, not in a step of srun's own."""
    return "SLURM_JOB_ID" in env and not in_srun_step(env)


def _in_batch_script(env: Mapping[str, str]) -> bool:
    """Whether this is a batch script's process: it carries task 0's variables, an salloc shell none."""
    return in_allocation(env) and "SLURM_PROCID" in env


def start_with_srun(command: list[str], ranks: int | None, run_dir: Path | None) -> int:
    """One srun step over the allocation; without `ranks`, one task for each that sbatch allotted.

    A batch job is requeued after every end but completion and a mistake, which the next life would meet again, and
    only when this life has claimed an attempt: otherwise the start itself is broken. Without a `run_dir` it is no run:
    nothing is kept, and nothing requeued.
    """
    srun = _srun(os.environ)
    command = [*srun, *([] if ranks is None else [f"--ntasks={ranks}"]), *_container(os.environ), *command]
    requeued = run_dir is not None and _in_batch_script(os.environ)
    if run_dir is not None and requeued:
        _log_apart(run_dir, os.environ)
    before = newest_attempt(run_dir)
    # srun passes USR1 to its tasks but answers TERM by killing them, and INT by a report: all reach it as USR1
    as_usr1 = {signal.SIGTERM: signal.SIGUSR1, signal.SIGINT: signal.SIGUSR1}
    code = supervise(command, [_for_srun(os.environ, requeued)], on_orphaned=signal.SIGUSR1, forward_as=as_usr1).code
    attempt = claimed_since(run_dir, before)
    record_codes(attempt, {"srun": code})
    if code != 0 and attempt is not None and is_mistake(attempt):
        code = USER_ERROR_EXIT_CODE
    if requeued and code not in (0, USER_ERROR_EXIT_CODE):
        _start_again(os.environ, code, attempt)
    return code


def _srun(env: Mapping[str, str]) -> list[str]:
    """srun itself. The first rank to end, badly or with 85, leaves the others STEP_GRACE_SECONDS for their checkpoint.

    Those of a broken run wait in a collective, and would for ever.
    """
    if shutil.which("srun") is None:
        raise UserError(
            f"SLURM_JOB_ID={env['SLURM_JOB_ID']} means a SLURM allocation, but srun is not "
            "on the PATH: add it, or unset SLURM_JOB_ID to use this machine alone"
        )
    return ["srun", "--kill-on-bad-exit=0", f"--wait={STEP_GRACE_SECONDS}"]


def _container(env: Mapping[str, str]) -> list[str]:
    """What a site puts before the interpreter of every task: `apptainer exec --nv image.sif`."""
    text = env.get("FDSCALE_CONTAINER", "")
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"FDSCALE_CONTAINER={text!r}: {error}; write it as in a shell, e.g. 'run \"my image.sif\"'"
        ) from error


def _for_srun(env: Mapping[str, str], requeued: bool) -> dict[str, str]:
    """Since SLURM 22.05 srun does not inherit the CPUs per task of its job."""
    cpus = {"SRUN_CPUS_PER_TASK": env["SLURM_CPUS_PER_TASK"]} if "SLURM_CPUS_PER_TASK" in env else {}
    return {**cpus, **env, **({REQUEUES: "1"} if requeued else {})}


def _restarts(env: Mapping[str, str]) -> str:
    """Which life of its job this is; the number may jump."""
    return env.get("SLURM_RESTART_COUNT", "0")


def _log_apart(run_dir: Path, env: Mapping[str, str]) -> None:
    try:
        log_apart(run_dir, env["SLURM_JOB_ID"], _restarts(env))
    except OSError as error:  # the ranks will say what is wrong with the folder
        log.warning("no log of this life's own, all is told here: %s", error)


def _start_again(env: Mapping[str, str], code: int, attempt: Path | None) -> None:
    """Requeue the job, unless that would repeat a broken start or touch a life that is not this one.

    A cancelled job would come back to life, a preempted one is SLURM's, and on a node that was cut off a former life
    may end while the next one runs. A failure is told and no more: what is committed is committed.
    """
    job = env["SLURM_JOB_ID"]
    if attempt is None:
        log.error(
            "code %d before an attempt began: the start itself fails, so job %s is not requeued; repair what is told "
            "above, then submit it again",
            *(code, job),
        )
        return
    try:
        state, restarts = _told_by_scontrol(job)
        if state != "RUNNING" or restarts != _restarts(env):
            log.info("job %s is %s with restart %s: SLURM decides whether it runs again", job, state, restarts)
            return
        log.info("the ranks ended with code %d and go on from the last commit: scontrol requeue %s", code, job)
        _scontrol("requeue", job)
    except (OSError, subprocess.CalledProcessError) as error:
        log.error("job %s is not requeued, submit it again to go on: %s", job, error)


def _told_by_scontrol(job: str) -> tuple[str, str]:
    """A job's state and its restarts; a line's first word counts, since a job's name may hold anything."""
    told = _scontrol("show", "job", job)
    state = re.search(r"^\s+JobState=(\w+)", told, re.MULTILINE)
    restarts = re.search(r"^\s+Requeue=.*\bRestarts=(\d+)", told, re.MULTILINE)
    return state[1] if state else "gone", restarts[1] if restarts else "0"


def _scontrol(*arguments: str) -> str:
    return subprocess.run(["scontrol", *arguments], stdout=subprocess.PIPE, text=True, check=True).stdout
