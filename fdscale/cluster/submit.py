"""`fdscale submit`: the batch script of a recipe, rendered and handed to sbatch. Torch-free.

The script's #SBATCH lines are numbers and fixed text. What a user wrote (settings, paths, sbatch's own arguments) is a
word of a command line that no shell reads, or is quoted in the script's body, behind sbatch's last look for #SBATCH.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fdscale.config.errors import UserError
from fdscale.config.settings import RunSettings
from fdscale.config.shipped import shipped
from fdscale.training.run_directory import RunDirectory

OUTPUT = "fdscale-%j.out"  # of the job, all lives: it says where each life's own log is
COMMIT_SECONDS = 120  # USR1 comes so long before the time limit, at most a minute earlier
TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")  # what sbatch takes for a time limit
SOURCE_SITE = '. "$1"; shift; exec "$@"'  # for bash -c: the site's variables, then the command as it is


@dataclass(frozen=True)
class Job:
    """What a batch job shall run: `arguments` of `fdscale launch`, on `nodes` x `ranks_per_node` ranks."""

    name: str
    arguments: Sequence[str]
    nodes: int
    ranks_per_node: int
    cpus_per_rank: int
    gpus: bool
    time: str | None = None


def batch_script(job: Job, python: str, site: Path | None) -> str:
    """The exact script, which bash runs once for each life of the job. Raises UserError for what is no time limit."""
    if job.time is not None and not TIME.fullmatch(job.time):
        raise UserError(
            f"--time {job.time!r}: allowed: minutes, [hours:]minutes:seconds, days-hours[:minutes[:seconds]]"
        )
    options = {
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        **({"gpus-per-node": job.ranks_per_node} if job.gpus else {}),
        "cpus-per-task": job.cpus_per_rank,
        **({"time": job.time} if job.time else {}),
        "signal": f"B:USR1@{COMMIT_SECONDS}",
        "output": OUTPUT,
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items()]
    sourced = [f". {quoted(str(site))}"] if site else []
    run = f'exec "${{FDSCALE_PYTHON:-$python}}" -m fdscale launch {" ".join(map(quoted, job.arguments))}'
    return "\n".join(["#!/bin/bash", *lines, "#SBATCH --requeue", *sourced, f"python={quoted(python)}", run, ""])


def quoted(word: str) -> str:
    """One word for bash, on one line: sbatch refuses scripts with carriage returns, and people read them."""
    if not re.search(r"[\x01-\x1f\x7f]", word):
        return shlex.quote(word)
    escaped = re.sub(r"[\\']", r"\\\g<0>", word)
    return "$'" + re.sub(r"[\x01-\x1f\x7f]", lambda found: f"\\{ord(found[0]):03o}", escaped) + "'"


def site_file(env: Mapping[str, str]) -> Path | None:
    """A site's variables: $FDSCALE_SITE, else launchers/site.env if there is one. Raises UserError for no file."""
    if named := env.get("FDSCALE_SITE"):
        if not Path(named).is_file():
            raise UserError(f"FDSCALE_SITE={named!r} is no file: copy launchers/site.example.env there, or unset it")
        return Path(named).resolve()
    beside = shipped("launchers") / "site.env"
    return beside if beside.is_file() else None


def sbatch_command(job: Job, further: Sequence[str], site: Path | None) -> list[str]:
    """The command line that takes the script from standard input; `further` are arguments of sbatch's own."""
    name = re.sub(r"[^\w.-]", "_", job.name, flags=re.ASCII)
    sbatch = ["sbatch", "--parsable", f"--job-name={name}", *further]
    return ["bash", "-c", SOURCE_SITE, "site", str(site), *sbatch] if site else sbatch


def submit(script: str, command: Sequence[str]) -> str:
    """Hand a script to sbatch; the job's number. Raises UserError with what sbatch said when it refuses."""
    if shutil.which("sbatch") is None and command[0] == "sbatch":
        raise UserError("sbatch is not on the PATH: submit from a login node of a SLURM cluster, or see --dry-run")
    answer = subprocess.run(command, input=os.fsencode(script), capture_output=True)
    if answer.returncode != 0:
        told = answer.stderr.decode(errors="replace").strip()
        raise UserError(f"sbatch refuses, code {answer.returncode}: {told}; nothing was submitted")
    return answer.stdout.decode().strip().splitlines()[-1].split(";")[0]


def completed(run_dir: Path, settings: RunSettings) -> int | None:
    """The step at which a run like this was completed in its directory; None when there is something to do."""
    directory = RunDirectory(run_dir)
    step = directory.completed_steps()
    if step is None:
        return None
    before = tomllib.loads(directory.recipe.read_text())
    lengths = {length: getattr(settings, length) or math.inf for length in ("epochs", "steps", "max_steps")}
    longer = any(now > before.get(length, math.inf) for length, now in lengths.items())
    return None if longer else step
