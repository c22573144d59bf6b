"""What a rank finds by trying: how fast it multiplies, how fast ranks talk, whether they see the same folder."""

from __future__ import annotations

import os
import secrets
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fdscale.training.engine import Connection, gather_lists

WINDOWS = 5  # of a rate: the best counts, so that a moment's disturbance makes no rank slow
MATRIX = {"cuda": (4096, torch.bfloat16), "cpu": (256, torch.float32)}
TOGETHER = 8  # products between two looks at the clock
SMALL_CALLS, LARGE_CALLS = 20, 3
LARGE_BYTES = {"cuda": 64 << 20, "cpu": 4 << 20}
MESSAGE = ".doctor_"  # begins the names of files that are written for a moment
SEEN_WITHIN = 3.0  # seconds that a shared file system may take to show another node's new file


def matmul_rate(connection: Connection, seconds: float) -> float:
    """FLOP/s of this rank in one fixed matrix product, while all others do the same."""
    size, dtype = MATRIX[connection.device.type]
    a, b = (torch.ones(size, size, dtype=dtype, device=connection.device) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)  # the first call loads libraries
    connection.barrier()
    return 2 * size**3 * max(_products(connection, a, b, out, seconds / WINDOWS) for _ in range(WINDOWS))


def _products(connection: Connection, a: Tensor, b: Tensor, out: Tensor, seconds: float) -> float:
    """Products a second of one window."""
    began, count, passed = time.perf_counter(), 0, 0.0
    while passed < seconds:
        for _ in range(TOGETHER):
            torch.mm(a, b, out=out)
        _wait_for_device(connection)
        count, passed = count + TOGETHER, time.perf_counter() - began
    return count / passed


def collective_rates(connection: Connection) -> tuple[float, float]:
    """Seconds of a small all_reduce, and bytes a second over the wire of each rank in a large one; training's backend.

    A ring sends and receives 2 (n - 1) / n of the bytes on each of n ranks.
    """
    device, ranks = connection.device, connection.rank.world_size
    small = torch.zeros(1, device=device)
    large = torch.zeros(LARGE_BYTES[device.type] // 4, device=device)
    latency = statistics.median(_seconds(connection, small) for _ in range(SMALL_CALLS))
    slowest = statistics.median(_seconds(connection, large) for _ in range(LARGE_CALLS))
    return latency, 2 * (ranks - 1) / ranks * large.nbytes / slowest


def _seconds(connection: Connection, tensor: Tensor) -> float:
    _wait_for_device(connection)
    began = time.perf_counter()
    dist.all_reduce(tensor)
    _wait_for_device(connection)
    return time.perf_counter() - began


def _wait_for_device(connection: Connection) -> None:
    if connection.device.type == "cuda":
        torch.cuda.synchronize(connection.device)


def unshared(connection: Connection, folder: Path) -> list[str]:
    """What speaks against `folder` being one folder that all nodes can write to, a sentence each; all ranks call it.

    The first rank of each node writes a file there. Each must see rank 0's, and rank 0 all of theirs.
    """
    rank, place = connection.rank.rank, nearest_folder(folder)
    token, first = connection.broadcast(secrets.token_hex(8)), connection.rank.local_rank == 0
    mine = place / f"{MESSAGE}{token}_{rank}"
    failure = _failure(lambda: mine.write_text(token)) if first else ""
    hosts = gather_lists([os.uname().nodename], connection)
    told = gather_lists([(rank, failure)] if first else [], connection)
    written = [other for other, why in told if not why]
    expected = written if rank == 0 else [0] if first and 0 in written else []
    unseen = [other for other in expected if not _appears(place / f"{MESSAGE}{token}_{other}", token)]
    pairs = gather_lists([(rank, other) for other in unseen], connection)  # after it nobody looks any more
    with suppress(OSError):
        mine.unlink()
    apart = sorted({rank for pair in pairs for rank in pair} - {0})
    problems = [f"rank {other} ({hosts[other]}) cannot write to {folder}: {why}" for other, why in told if why]
    problems += [
        f"{folder} is another folder on {hosts[other]} (rank {other}) than on {hosts[0]} (rank 0)" for other in apart
    ]
    return connection.broadcast(problems)


def nearest_folder(path: Path) -> Path:
    """The folder, or where it would be made: the nearest above it that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _failure(write: Callable[[], object]) -> str:
    try:
        write()
    except OSError as error:
        return str(error.strerror or error)
    return ""


def _appears(path: Path, token: str) -> bool:
    deadline = time.monotonic() + SEEN_WITHIN
    while True:
        with suppress(OSError):
            if path.read_text() == token:
                return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
