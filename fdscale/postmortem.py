"""`fdscale doctor RUN`: what happened in each attempt at a run, what ended the last one, and what to do. No torch."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdscale.cluster.ranks import REQUEUE_EXIT_CODE
from fdscale.config.errors import UserError
from fdscale.config.keeping import GuardSettings
from fdscale.evidence import Evidence, evidence_of, innermost_frames, oom_kills
from fdscale.training.attempts import attempts_without_progress
from fdscale.training.failures import Failure
from fdscale.training.lineage import attempt_folders, lineage_of
from fdscale.training.run_directory import RunDirectory

# what a rank raises because another one has gone
FOLLOWED = re.compile(
    r"by peer|\bgloo\b|NCCL|ProcessGroup|Broken pipe|DistNetworkError|DistStoreError|recvValue|Socket Timeout"
)
NO_MEMORY = re.compile(r"out of memory|OutOfMemoryError|MemoryError|can't allocate memory|Cannot allocate memory")
NO_DISK = re.compile(r"No space left|Read-only file system|Disk quota exceeded|could not write|cannot be written")
NOT_FINITE = re.compile(r"not finite")
SUPERSEDED = re.compile(r"attempt \d+ has begun")
MIB, GIB = 2**20, 2**30
ROOM = 16 * MIB  # for a checkpoint of unknown size

AGAIN = "start the same command again"
TRY_LESS = (
    "give a rank more memory or less to do (train_micro_batch_size_per_gpu, student.activation_checkpointing, more "
    f"ranks; `fdscale plan` foresees it), then {AGAIN}"
)


@dataclass(frozen=True)
class Cause:
    """What ended an attempt, in a few words; what shows it, a line each; and what to do about it."""

    told: str
    shown: tuple[str, ...] = ()
    remedy: str = AGAIN


def post_mortem(run: Path) -> Iterator[str]:
    """The story of a run, a line each; raises UserError for a folder that no attempt was made in."""
    attempts = evidence_of(run)
    if not attempts:
        raise UserError(f"{run}: no attempt was made at this run yet: `fdscale launch` starts one")
    yield from _summary(run, attempts)
    causes = [cause_of(one, following) for one, following in zip(attempts, [*attempts[1:], None], strict=True)]
    for attempt, cause in zip(attempts, causes, strict=True):
        yield f"attempt {attempt.number}, {_beginning(attempt)}: {_saved(attempt)}; {cause.told}"
    last, cause = attempts[-1], causes[-1]
    yield ""
    yield f"attempt {last.number}: {cause.told}"
    yield from (f"  {line}" for line in [*cause.shown, *_skipped(last), *_memory(run, cause)])
    loop = _crash_loop(run, last)
    if loop:
        yield loop
    yield f"next: {cause.remedy}"


def _summary(run: Path, attempts: Sequence[Evidence]) -> Iterator[str]:
    """How far it is, and commits that nobody goes on from."""
    lineage, done = lineage_of(run / "attempts"), RunDirectory(run).completed_steps()
    newest = f"the newest checkpoint is {lineage.believed[0]}" if lineage.believed else "nothing was ever committed"
    state = f"complete at step {done}" if done is not None else "not complete"
    yield f"{run}: {state}, {len(attempts)} attempt{'s' if len(attempts) > 1 else ''}; {newest}"
    if lineage.disowned:
        listed = ", ".join(map(str, lineage.disowned))
        yield f"never read, as a newer attempt had gone on from elsewhere when they were committed: {listed}"


def _beginning(attempt: Evidence) -> str:
    started, before = attempt.record.get("started"), attempt.record.get("continues", "unknown")
    date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(started)) if started else "date unknown"
    hosts = f" on {', '.join(dict.fromkeys(attempt.hosts))}" if attempt.hosts else ""
    job = f", {attempt.record['submission']}" if attempt.record.get("submission") else ""
    ranks = f"{attempt.record.get('world_size', '?')} ranks{hosts}{job}"
    if before == "unknown":
        return f"{date}, {ranks}, ended before it had looked for a checkpoint"
    where = f"from step {before['step']} of attempt {before['attempt']}" if before else "from the beginning"
    return f"{date}, {ranks}, {where}"


def _saved(attempt: Evidence) -> str:
    saved = f"has steps {', '.join(map(str, attempt.committed))}" if attempt.committed else "holds no checkpoint"
    return saved + (f", a save of step {attempt.unfinished[-1]} never finished" if attempt.unfinished else "")


def cause_of(attempt: Evidence, following: Evidence | None) -> Cause:
    """What ended an attempt; `following` is the next one at the same run."""
    if following is None and attempt.is_running():
        where = attempt.record["writer"]
        told = f"is running (process {where['pid']} on {where['host']})"
        return Cause(told, remedy="nothing: to stop it, send SIGTERM to its launcher, or `scancel --signal=TERM JOB`")
    found = (_complete, _hang, _superseded, _stopped, _refused_or_failed, _disk, _killed)
    return next((cause for look in found if (cause := look(attempt, following))), _without_a_word(attempt))


def _complete(attempt: Evidence, following: Evidence | None) -> Cause | None:
    if attempt.ended.get("code") != 0:
        return None
    return Cause(f"completed ({attempt.ended['reason']})", remedy="nothing: the run is complete, `fdscale export` it")


def _hang(attempt: Evidence, following: Evidence | None) -> Cause | None:
    """Nothing went on; the frozen ranks could not even write down where they are."""
    if not attempt.stacks:
        return None
    frozen = ", ".join(f"rank {one['rank']} on {one['host']}" for one in attempt.frozen)
    told = f"hung; {frozen} froze" if frozen else "hung, and every rank could still write down where it was"
    rank = next(iter(attempt.stacks))
    at = re.search(r"^at: (.*)$", attempt.stacks[rank], re.MULTILINE)
    waited = f"{attempt.where(rank)} waited{f' (at: {at[1]})' if at else ''} in"
    host = f"; if {frozen} freezes again, leave that host out (sbatch --exclude)" if frozen else ""
    shown = (waited, *innermost_frames(attempt.stacks[rank]), f"all stacks: {attempt.folder / 'stacks'}")
    return Cause(told, shown, f"{AGAIN}{host}")


def _superseded(attempt: Evidence, following: Evidence | None) -> Cause | None:
    if following is None:
        return None
    outlived = not attempt.ended and (attempt.last_beat or 0) > following.record.get("started", float("inf"))
    refused = any(SUPERSEDED.search(failure.message) for failure in attempt.failures)
    if outlived or refused or SUPERSEDED.search(attempt.ended.get("reason", "")):
        return Cause(f"was still alive when attempt {following.number} began, which took its place")
    return None


def _stopped(attempt: Evidence, following: Evidence | None) -> Cause | None:
    """An orderly end that asks for another start: a signal, or a guard."""
    if attempt.ended.get("code") != REQUEUE_EXIT_CODE:
        return None
    reason = attempt.ended["reason"]
    if reason.startswith("StartAgain: "):
        return Cause("a guard stopped it before harm was done", (reason.removeprefix("StartAgain: "),))
    return Cause(f"{reason}: it committed and asked to be started again")


def _refused_or_failed(attempt: Evidence, following: Evidence | None) -> Cause | None:
    """An error of its own on some rank: the earliest, unless that only tells of another rank's end."""
    causes = [failure for failure in attempt.failures if not FOLLOWED.search(failure.message)]
    if causes:
        return _of_failure(causes[0], attempt)
    reason = attempt.ended.get("reason", "")
    if attempt.failures or not reason or FOLLOWED.search(reason):
        return None
    return Cause("ended with a message", (reason,), f"do what it says, then {AGAIN}")


def _of_failure(failure: Failure, attempt: Evidence) -> Cause:
    where, file = f"rank {failure.rank} on {failure.host}", attempt.folder / "failures" / f"rank_{failure.rank}.txt"
    others = len(attempt.failures) - 1
    followers = (f"{others} other rank{'s' if others > 1 else ''} failed after it",) if others else ()
    shown = (failure.message.removeprefix("UserError: "), *followers, f"in full: {file}")
    if NO_MEMORY.search(failure.message):
        return Cause(f"{where} had no memory left", shown, TRY_LESS)
    if NO_DISK.search(failure.message):
        remedy = f"make room, or make the folder writable, then {AGAIN}"
        return Cause(f"{where} could not write to the disk", shown, remedy)
    if NOT_FINITE.search(failure.message):
        remedy = (
            f"look at the samples of these steps, then {AGAIN}, or begin another run, with a run_dir of its own and a "
            "lower optim.lr or optim.clip"
        )
        return Cause(f"{where} ended it: too many steps in a row were not finite", shown, remedy)
    if failure.text.startswith("UserError: "):
        return Cause(f"{where} ended it with a message", shown, f"do what it says, then {AGAIN}")
    return Cause(f"{where} raised an error", shown, f"mend what the traceback names, then {AGAIN}")


def _disk(attempt: Evidence, following: Evidence | None) -> Cause | None:
    """A disk that is full or read-only now, where nothing was written to the end: it keeps no last words either."""
    if following is not None or attempt.failures or attempt.ended:
        return None
    if os.statvfs(attempt.folder).f_flag & os.ST_RDONLY:
        return Cause("left no word, and its disk is read-only", remedy=f"make it writable, then {AGAIN}")
    commits, free = lineage_of(attempt.folder.parent).believed, shutil.disk_usage(attempt.folder).free
    needed = sum(file.stat().st_size for file in commits[0].folder.rglob("*") if file.is_file()) if commits else ROOM
    if free >= needed or not attempt.unfinished:
        return None
    shown = (f"{free / MIB:,.0f} MiB are free there, a checkpoint takes {needed / MIB:,.0f} MiB",)
    told = f"left no word, and its disk is full: the save of step {attempt.unfinished[-1]} never finished"
    return Cause(told, shown, f"make room, then {AGAIN}")


def _killed(attempt: Evidence, following: Evidence | None) -> Cause | None:
    """A rank that a signal ended, or that left nothing but a code; TERM is the launcher's own to the others."""
    signals = {name: _signal(code) for name, code in attempt.codes.items()}
    for signum in (signal.SIGBUS, signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT):
        if signum in signals.values():
            names = [name for name in signals if signals[name] == signum]
            here = {attempt.host(name) for name in names} == {socket.gethostname()}
            return _of_signal(signum, _those(attempt, names), here)
    failed = [name for name, code in attempt.codes.items() if code not in (0, REQUEUE_EXIT_CODE) and not signals[name]]
    if failed and not attempt.failures:
        told = f"{_those(attempt, failed)} ended with code {attempt.codes[failed[0]]} and left no word"
        return Cause(told, remedy=f"see its log, then {AGAIN}")
    ended = [name for name in signals if signals[name] == signal.SIGTERM]
    return Cause(f"{_those(attempt, ended)} was ended by SIGTERM before it could commit") if ended else None


def _those(attempt: Evidence, names: Sequence[str]) -> str:
    """The ranks of exit codes; of a launcher's one code for ranks elsewhere, those that left no word."""
    if all(name.isdigit() for name in names):
        return ", ".join(attempt.where(int(name)) for name in sorted(names))
    silent = _silent(attempt)
    return ", ".join(silent) if attempt.failures and silent else f"a rank under {', '.join(sorted(names))}"


def _silent(attempt: Evidence) -> list[str]:
    """The ranks that left no word, with their hosts."""
    told = {failure.rank for failure in attempt.failures}
    return [attempt.where(rank) for rank in range(attempt.record.get("world_size", 0)) if rank not in told]


def _signal(code: int) -> int:
    """The signal of an exit code: Popen's -9, a shell's and srun's 137; 0 where there was none."""
    return -code if code < 0 else code - 128 if 128 < code < 160 else 0


def _of_signal(signum: int, where: str, here: bool) -> Cause:
    """`here`: the ranks ran on this machine, whose kernel can be asked."""
    name = signal.Signals(signum).name
    if signum == signal.SIGKILL:
        return _of_kill(f"{where} was killed by {name}", oom_kills() if here else None)
    if signum == signal.SIGBUS:
        return Cause(
            f"{where} died of {name}: /dev/shm is full", (), f"enlarge /dev/shm or lower data.workers, then {AGAIN}"
        )
    return Cause(f"{where} died of {name} in a library", remedy=f"{AGAIN}; if it dies so again, try another host")


def _of_kill(told: str, oom: int | None) -> Cause:
    """`oom`: how many processes the kernel has killed for want of memory, where that is known."""
    if oom == 0:
        return Cause(f"{told}: by somebody, this machine has killed nothing for want of memory")
    shown = () if oom is None else (f"this machine has killed {oom} processes for want of memory since it started",)
    return Cause(f"{told}: by somebody, or by the kernel for want of memory", shown, f"if nobody did it, {TRY_LESS}")


def _without_a_word(attempt: Evidence) -> Cause:
    """Nothing tells: the ranks that left no word are those that were lost, as far as the others know."""
    job = attempt.record.get("submission")
    ask = f"`sacct -j {job}` may know more; {AGAIN}" if job else AGAIN
    if not attempt.failures:
        return Cause("ended without a word: its node, its launcher or all its ranks were lost at once", (), ask)
    silent = _silent(attempt)
    lost = f"{', '.join(silent)} was lost without a word" if silent else "the ranks lost one another: see the network"
    first = attempt.failures[0]
    return Cause(lost, (f"{attempt.where(first.rank)} then raised: {first.message}",), ask)


def _skipped(attempt: Evidence) -> Iterator[str]:
    """Steps that were applied on no rank, and whose loss it was."""
    if not attempt.skipped:
        return
    steps = ", ".join(str(row["step"]) for row in attempt.skipped[-5:])
    ranks = {
        rank
        for row in attempt.skipped
        for rank, loss in enumerate(row.get("losses", []))
        if str(loss) in ("nan", "inf", "-inf")
    }
    whose = f", the loss of rank {', '.join(map(str, sorted(ranks)))} was not finite" if ranks else ""
    yield f"{len(attempt.skipped)} steps were not applied, the last ones {steps}{whose}: samples in " + str(
        attempt.folder / "skipped.jsonl"
    )


def _memory(run: Path, cause: Cause) -> Iterator[str]:
    """What was planned and measured, where memory is what it may have lacked."""
    file = run / "memory.json"
    if TRY_LESS not in cause.remedy or not file.exists():
        return
    kept: dict[str, Any] = json.loads(file.read_text())
    sizes = {name: kept.get(f"{name}_bytes") for name in ("planned", "measured")}
    told = ", ".join(f"{name} {size / GIB:,.1f} GiB" for name, size in sizes.items() if size)
    yield f"memory of rank 0 in step {kept.get('step')}: {told}"


def _crash_loop(run: Path, last: Evidence) -> str:
    """Whether the guard will refuse the next attempt of this submission."""
    file = RunDirectory(run).recipe
    recipe = tomllib.loads(file.read_text()) if file.exists() else {}  # it died before it wrote one
    most = recipe.get("guards", {}).get("attempts", GuardSettings().attempts)
    submission = last.record.get("submission")
    made = attempts_without_progress(attempt_folders(run / "attempts"), submission)
    if submission is None or made < most or last.ended.get("code") == 0:
        return ""
    return f"a crash loop: {made} attempts of {submission} in a row made no new checkpoint; the next is refused"
