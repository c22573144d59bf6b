"""A file that torch writes, hashed on its way to the disk: nothing is read again to know what was written.

It goes past the system's page cache where the file system allows it: a checkpoint of tens of gigabytes would push out
the shards that are being read, and costs a copy.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.serialization import get_crc32_options, set_crc32_options

BLOCK = 4096  # what direct writes are multiples of, in the file and in memory
PIECE = 2048 * BLOCK


def save_hashed(value: Any, path: Path) -> dict[str, Any]:
    """`torch.save`, forced to the disk; returns {"size", "sha256"} of what was written. Raises OSError."""
    with HashedFile(path) as file, _without_crc32():
        torch.save(value, cast(IO[bytes], file))
    return {"size": file.size, "sha256": file.sha256.hexdigest()}


class HashedFile:
    """What torch asks of a file, `write` and `flush`: one piece is hashed while the one before goes to the disk."""

    def __init__(self, path: Path) -> None:
        self._descriptor = _open(path)
        self._pool = ThreadPoolExecutor(1)
        self._pieces = [memoryview(mmap.mmap(-1, PIECE)) for _ in range(2)]  # which begin at a page of memory
        self._filled = 0
        self._on_its_way: Future[None] | None = None
        self._failure: OSError | None = None
        self.size, self.sha256 = 0, hashlib.sha256()

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.size += view.nbytes
        written = view.nbytes
        while view:
            taken = min(len(view), PIECE - self._filled)
            self._pieces[0][self._filled : self._filled + taken] = view[:taken]
            self._filled, view = self._filled + taken, view[taken:]
            if self._filled == PIECE:
                self._send(PIECE)
        return written

    def flush(self) -> None:
        """Nothing: it is all on the disk once the file is closed."""

    def _send(self, size: int) -> None:
        """Hash the piece that is full, once the one before is written, and let it be written meanwhile."""
        self._wait()
        piece = self._pieces[0]
        self._on_its_way = self._pool.submit(_write_all, self._descriptor, piece[:size])
        self.sha256.update(piece[: self._filled])
        self._pieces.reverse()
        self._filled = 0

    def _wait(self) -> None:
        sent, self._on_its_way = self._on_its_way, None
        try:
            if sent is not None:
                sent.result()
        except OSError as error:  # torch would tell of a position in its archive instead
            self._failure = error
            raise

    def __enter__(self) -> HashedFile:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                self._send(-(-self._filled // BLOCK) * BLOCK)  # whole blocks, and then cut to its size
                self._wait()
                os.ftruncate(self._descriptor, self.size)
                os.fsync(self._descriptor)
        finally:
            self._pool.shutdown()
            os.close(self._descriptor)
        if self._failure is not None:
            raise self._failure


def _open(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    try:
        return os.open(path, flags | getattr(os, "O_DIRECT", 0), 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)  # a file system in memory, for one, has no other way


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def _without_crc32() -> Iterator[None]:
    """torch's own check sums, which nobody reads, would take as long as the hash."""
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
