"""What a run's metrics begin with: who it is, which attempt this is, what it plans to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import fdscale
from fdscale.build.run import Run
from fdscale.cluster import host_memory
from fdscale.config.settings import DistillSettings
from fdscale.training.canary import chip_of
from fdscale.training.history import newest_commit, of_attempt
from fdscale.training.live import Live
from fdscale.training.metrics import counters


def open_live(run: Run) -> Live:
    """The latest values of this rank's process, with those that are known before the first step."""
    live = Live(run_info(run))
    live.note(counters())
    live.look(lambda: {"node_memory_limit_bytes": host_memory.limit()})
    if run.connection.rank.is_main:
        live.note({"steps_planned": run.last_step, "checkpoint_every": run.settings.checkpoint.every})
        live.look(lambda: of_attempt(run.attempt.folder))
        live.look(lambda: newest_commit(run.attempt.folder.parent))
    return live


def run_info(run: Run) -> dict[str, str]:
    """The labels of `fdscale_run_info`."""
    settings, rank = run.settings, run.connection.rank
    teachers = settings.teachers.values() if isinstance(settings, DistillSettings) else ()
    return {
        "attempt": str(run.attempt.number),
        "commit": code_commit() if rank.is_main else "",
        "version": fdscale.__version__,
        "recipe": settings.recipe or "",
        "program": settings.program,
        "student": settings.student.name,
        "teachers": ", ".join(table.name for table, _ in teachers),
        "ranks": str(rank.world_size),
        "nodes": str(-(-rank.world_size // rank.local_world_size)),
        "chip": chip_of(run.device),
    }


def code_commit() -> str:
    """The commit that this code was checked out at; empty where it was installed without its repository."""
    folder = Path(__file__).resolve().parents[2]
    if not (folder / ".git").exists():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
