"""Before a run: whether its ranks agree, its folder is shared and roomy, and no rank is slow. All ranks call it."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fdscale.config.errors import UserError
from fdscale.training.engine import Connection, gather_lists
from fdscale.training.probes import collective_rates, matmul_rate, nearest_folder, unshared
from fdscale.training.run_directory import versions

SLOW = 0.7  # of the median matmul rate
MIB, GIB = 2**20, 2**30
SHARED_MEMORY = Path("/dev/shm")  # where loader workers leave the batches of dense tasks
TEMPORARY_BYTES = 64 << 20
OPEN_FILES = "open files"
OWN_FILES = 256  # open files of a rank beside its peers' connections and the shards
SOCKETS_A_PEER = 4  # two process groups, and the meeting
SLOW_NETWORK = 1e9  # bytes/s between GPUs: a tenth of what one 100 Gbit/s port gives
SECONDS_AT_A_START = {"cuda": 0.5, "cpu": 0.1}  # of the rate probe

logger = logging.getLogger(__name__)

Weight = Literal["ok", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `told` ends with the next step where there is one to take."""

    check: str
    weight: Weight
    told: str


@dataclass(frozen=True)
class Demand:
    """What a run asks of its machines: bytes in its folder (None: unknown) and in shared memory, open shards a rank."""

    disk: int | None
    shared_memory: int
    open_shards: int


@dataclass(frozen=True)
class Facts:
    """What a rank finds where it runs."""

    host: str
    versions: dict[str, str]
    device: str
    free: int
    held: int
    shared_memory: int
    temporary: int
    open_files: int


def preflight(connection: Connection, folder: Path, demand: Demand) -> None:
    """The quick checks of every start, within a second or so: raises UserError on all ranks for what would fail later.

    What is slow or tight is told as a warning, and one line when nothing is.
    """
    findings = examine(connection, folder, demand, SECONDS_AT_A_START[connection.device.type])
    faults = [finding.told for finding in findings if finding.weight == "fault"]
    if faults:
        raise UserError("\n".join(faults))
    if not connection.rank.is_main:
        return
    for finding in findings:
        if finding.weight == "warning":
            logger.warning("%s: %s", finding.check, finding.told)
    if all(finding.weight == "ok" for finding in findings):
        logger.info("preflight: %s", "; ".join(f"{finding.check} {finding.told}" for finding in findings[:4]))


def examine(connection: Connection, folder: Path, demand: Demand, seconds: float) -> list[Finding]:
    """Everything but collectives and weights, in order of gravity; the same on every rank."""
    ranks = gather_lists([facts(connection, folder)], connection)
    rates = gather_lists([matmul_rate(connection, seconds)], connection)
    return [
        of_versions(ranks),
        of_sharing(unshared(connection, folder)),
        of_disk(ranks, folder, demand.disk),
        of_rates(rates, ranks),
        of_devices(ranks),
        *of_limits(ranks, demand),
    ]


def facts(connection: Connection, folder: Path) -> Facts:
    """This rank's; where the folder does not exist yet, those of the place where it would be."""
    on_gpu = connection.device.type == "cuda"
    return Facts(
        host=os.uname().nodename,
        versions=versions(),
        device=torch.cuda.get_device_name(connection.device) if on_gpu else "cpu",
        free=shutil.disk_usage(nearest_folder(folder)).free,
        held=_held(folder) if connection.rank.is_main else 0,
        shared_memory=shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0,
        temporary=shutil.disk_usage(tempfile.gettempdir()).free,
        open_files=_open_files(),
    )


def _open_files() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def _held(folder: Path) -> int:
    """Bytes that a run has on the disk already; what is removed meanwhile counts for nothing."""
    held = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            held += path.lstat().st_size
    return held


def of_versions(ranks: Sequence[Facts]) -> Finding:
    """Whether every rank has the packages that most ranks have."""
    odd = []
    for package in ranks[0].versions:
        found = [one.versions.get(package, "absent") for one in ranks]
        usual = Counter(found).most_common(1)[0][0]
        odd += [
            f"{package} is {mine} on rank {rank} ({ranks[rank].host}), {usual} on the others"
            for rank, mine in enumerate(found)
            if mine != usual
        ]
    if odd:
        told = f"{_first(odd)}; give every node the same environment"
        return Finding("versions", "fault", told)
    return Finding("versions", "ok", f"equal on all {len(ranks)} ranks")


def of_sharing(problems: Sequence[str]) -> Finding:
    if problems:
        told = f"{_first(problems)}; name a folder that every node can write to with run_dir=…"
        return Finding("run directory", "fault", told)
    return Finding("run directory", "ok", "shared and writable")


def of_disk(ranks: Sequence[Facts], folder: Path, needed: int | None) -> Finding:
    """Free bytes, the least that any rank sees, against what the run will come to hold and does not hold yet."""
    free = min(one.free for one in ranks)
    if needed is None:
        return Finding("disk", "ok", f"{_size(free)} free; what the run needs is known once its student is built")
    missing = needed - ranks[0].held - free
    if missing > 0:
        told = (
            f"{folder}: {_size(free)} are free, the run comes to hold {_size(needed)} there, of which "
            f"{_size(ranks[0].held)} are written: make room for {_size(missing)}, lower checkpoint.keep, or name "
            "another run_dir=…"
        )
        return Finding("disk", "fault", told)
    return Finding("disk", "ok", f"{_size(free)} free, {_size(needed)} needed in all")


def of_rates(rates: Sequence[float], ranks: Sequence[Facts]) -> Finding:
    """Matmul rates against their median, the upper one of two; every step waits for the slowest rank."""
    median = statistics.median_high(rates)
    slow = sorted((rate, rank) for rank, rate in enumerate(rates) if rate < SLOW * median)
    if slow:
        named = [f"rank {rank} ({ranks[rank].host}) gives {rate / median:.0%} of the median" for rate, rank in slow]
        told = f"{_first(named)}, {_flops(median)}; look there for other programs, heat and power limits"
        return Finding("matmul", "warning", told)
    return Finding("matmul", "ok", f"{_flops(median)} a rank, the slowest {min(rates) / median:.0%} of it")


def of_devices(ranks: Sequence[Facts]) -> Finding:
    kinds = Counter(one.device for one in ranks)
    if len(kinds) > 1:
        listed = ", ".join(f"{count} x {kind}" for kind, count in kinds.most_common())
        return Finding("devices", "warning", f"{listed}: each step waits for the slowest kind")
    return Finding("devices", "ok", f"{len(ranks)} x {ranks[0].device}")


def of_limits(ranks: Sequence[Facts], demand: Demand) -> list[Finding]:
    """Shared memory, open files and room for temporary files, of the rank that has least."""
    own = OWN_FILES + SOCKETS_A_PEER * len(ranks)
    files, enough = own + demand.open_shards, f"`ulimit -n {2 * own}` before the start"  # half of them are for shards
    shared = "enlarge it (containers: --shm-size), or lower data.workers"
    return [
        _limit("/dev/shm", [one.shared_memory for one in ranks], demand.shared_memory, ranks, shared),
        _limit("temporary files", [one.temporary for one in ranks], TEMPORARY_BYTES, ranks, "make room, or set TMPDIR"),
        _limit(OPEN_FILES, [one.open_files for one in ranks], files, ranks, enough),
    ]


def _limit(check: str, found: Sequence[int], needed: int, ranks: Sequence[Facts], remedy: str) -> Finding:
    least = min(found)
    shown = str if check == OPEN_FILES else _size
    if least < needed:
        host = ranks[found.index(least)].host
        return Finding(check, "warning", f"{shown(least)} on {host}, {shown(needed)} wanted: {remedy}")
    return Finding(check, "ok", shown(least))


def collectives(connection: Connection) -> Finding:
    """How fast the ranks talk on the backend of training; the numbers are the main rank's, which waits for all."""
    if connection.rank.world_size == 1:
        return Finding("collectives", "ok", "one rank has nobody to talk to")
    latency, rate = connection.broadcast(collective_rates(connection))
    told = f"{latency * 1e6:,.0f} us for a small all_reduce, {rate / 1e9:.2f} GB/s in a large one"
    if connection.device.type == "cuda" and rate < SLOW_NETWORK:
        remedy = "NCCL may use the wrong network: see NCCL_SOCKET_IFNAME and NCCL_DEBUG=INFO"
        return Finding("collectives", "warning", f"{told}; {remedy}")
    return Finding("collectives", "ok", told)


def verdict(found: Sequence[Finding]) -> str:
    """The one thing to fix first: a fault before a warning, each in the order of the checks."""
    for weight in ("fault", "warning"):
        worst = [finding for finding in found if finding.weight == weight]
        if worst:
            return f"fix first: {worst[0].check}: {worst[0].told}"
    return "nothing to fix: start it"


def _first(sentences: Sequence[str]) -> str:
    return sentences[0] + (f" (and {len(sentences) - 1} more)" if len(sentences) > 1 else "")


def _size(size: int) -> str:
    return f"{size / GIB:,.1f} GiB" if size >= GIB else f"{size / MIB:,.0f} MiB"


def _flops(rate: float) -> str:
    return f"{rate / 1e12:,.0f} TFLOP/s" if rate > 1e13 else f"{rate / 1e9:,.0f} GFLOP/s"
