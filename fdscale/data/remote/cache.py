"""Files that all processes of a node share, of so many bytes at most; the least recently used shard goes first.

Whoever needs a file that is not there takes its lock and brings it, while the others wait. It grows under another name,
`.NAME.part`, which is the lock as well, and gets its own when it is whole: a process that is killed leaves nothing that
counts, and its lock is free. A shard may be removed under its readers, who read on from their descriptors; those who
read one say so by its time of access, which readers renew by asking for it again now and then.
"""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from fdscale.config.data_settings import DataSettings
from fdscale.config.errors import UserError

GIB = 2**30
MARK = ".fetched"  # in each folder that the cache has made, with where it is from: no other folder is touched
SHARD = ".tar"  # only these are removed: the rest is read when a run starts
PART = ".part"
RENEWED_SECONDS = 10.0  # after which a process asks again for a file that it goes on using
IN_USE_SECONDS = 60.0  # since when a shard must not have been asked for to give way to one that is not needed yet
JUST_USED_SECONDS = 1.0  # … to one that is: whoever has just asked for it is about to open it
ROOM_SECONDS = 0.1  # between looks for room

Fill = Callable[[BinaryIO], object]  # writes all bytes of a file, or raises


class _File(NamedTuple):
    """One file of the cache: when it was last used (seconds), where it is, and its bytes."""

    used: float
    path: str
    bytes: int


def _counter() -> Any:
    return multiprocessing.get_context("fork").RawValue("Q")


@dataclass(frozen=True)
class Cache:
    """`folder` on a disk of the node's own, `limit` in bytes; `allow_pipe` lets `pipe:` run a shell.

    Processes that are forked off count the bytes that they bring together.
    """

    folder: Path
    limit: int
    allow_pipe: bool = False
    _brought: Any = field(default_factory=_counter, init=False, repr=False, compare=False)

    @property
    def fetched_bytes(self) -> int:
        """Bytes that this process and those forked off since have brought so far."""
        return int(self._brought.value)

    def made(self, name: str, url: str) -> Path:
        """The folder of one data set in the cache, made where it is not there; UserError where that cannot be."""
        folder = self.folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / MARK).write_text(url + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"data.cache: cannot write to {folder} ({error.strerror}); name a folder on the node's own disk"
            ) from error
        return folder

    def keep(self, path: Path, size: int, fill: Fill) -> Path:
        """The file at `path`, of `size` bytes, brought by `fill` where it is not there or not whole.

        Raises UserError where there is no room for it, and whatever `fill` does.
        """
        with self._telling(path, size):
            while not _used(path, size):
                with _claimed(path, wait=True) as part:
                    if part is not None and not _used(path, size):
                        while not self._make_room(part, path, size, JUST_USED_SECONDS):
                            time.sleep(ROOM_SECONDS)
                        self._bring(part, path, size, fill)
        return path

    def keep_ahead(self, path: Path, size: int, fill: Fill) -> bool:
        """The same for a file that will be needed: False where there is no room but that of files in use.

        True at once where another process brings it. Raises as `keep` does.
        """
        with self._telling(path, size):
            if not _used(path, size):
                with _claimed(path, wait=False) as part:
                    if part is not None and not _used(path, size):
                        if not self._make_room(part, path, size, IN_USE_SECONDS):
                            return False
                        self._bring(part, path, size, fill)
        return True

    def _bring(self, part: int, path: Path, size: int, fill: Fill) -> None:
        with open(part, "r+b", closefd=False) as file:
            fill(file)
        os.fsync(part)  # its size alone tells a whole one, and a node may lose its power
        with self._locked():  # whoever counts meanwhile would see neither of its names
            os.replace(_part(path), path)
            self._brought.value += size

    def _make_room(self, part: int, path: Path, size: int, idle: float) -> bool:
        """Give the part its size, having removed shards that were not used for `idle` seconds; False if too few are."""
        path.unlink(missing_ok=True)  # one that is not whole
        with self._locked():
            os.ftruncate(part, 0)
            files = list(self._files())
            excess = sum(file.bytes for file in files) + size - self.limit
            self._refuse_too_large(files, path, size)
            shards = sorted(file for file in files if file.path.endswith(SHARD))
            for shard in shards:
                if excess <= 0 or shard.used > time.time() - idle:
                    break
                Path(shard.path).unlink(missing_ok=True)
                excess -= shard.bytes
            if excess > 0:
                return False
            os.posix_fallocate(part, 0, size)  # the others count it, and a full disk is known before anything comes
            return True

    def _refuse_too_large(self, files: list[_File], path: Path, size: int) -> None:
        stays = sum(file.bytes for file in files if not file.path.endswith((SHARD, PART)))
        if stays + size > self.limit:
            raise UserError(
                f"{path} of {size / GIB:.3g} GiB does not fit into data.cache_gib = {self.limit / GIB:.3g}, of which "
                f"indices hold {stays / GIB:.3g} GiB; raise data.cache_gib, or remove old data sets from {self.folder}"
            )

    def _files(self) -> Iterator[_File]:
        """Everything in the folders of the cache; parts that nobody fills any more are removed."""
        for folder in self.folder.glob(f"*/{MARK}"):
            for entry in os.scandir(folder.parent):
                with suppress(FileNotFoundError):  # it has just got its name, or was given up
                    if not (entry.name.endswith(PART) and _removed_where_left(entry.path)):
                        stat = entry.stat()
                        yield _File(stat.st_atime, entry.path, stat.st_size)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among the processes that use this folder; what holds the lock and is killed lets go of it."""
        descriptor = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            _lock(descriptor, wait=True)
            yield
        finally:
            os.close(descriptor)

    @contextmanager
    def _telling(self, path: Path, size: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"cannot write {path}: {error.strerror}; check data.cache and its disk") from error
            raise UserError(
                f"the disk of data.cache is full: {path} takes {size / GIB:.3g} GiB, and the cache may take "
                f"data.cache_gib = {self.limit / GIB:.3g}; lower that, or free the disk"
            ) from error


def cache_of(data: DataSettings) -> Cache | None:
    """The node's cache that the settings name, for shards that lie behind URLs."""
    return None if data.cache is None else Cache(Path(data.cache), int(data.cache_gib * GIB), data.allow_pipe)


def _used(path: Path, size: int) -> bool:
    """Whether the file is there and whole; if so, it has been used now."""
    try:
        stat = path.stat()
        if stat.st_size == size:
            with suppress(PermissionError):  # another user's, which counts as used when that one used it
                os.utime(path, ns=(time.time_ns(), stat.st_mtime_ns))
        return stat.st_size == size
    except FileNotFoundError:
        return False


def _part(path: Path) -> Path:
    return path.with_name(f".{path.name}{PART}")


@contextmanager
def _claimed(path: Path, wait: bool) -> Iterator[int | None]:
    """The part of a file, locked, as a descriptor; None where another process holds it, or has held it until now.

    When the block ends the part is gone, unless it got its name.
    """
    part = os.open(_part(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _lock(part, wait) or not _is_at(part, _part(path)):
            yield None
            return
        try:
            yield part
        finally:
            if _is_at(part, _part(path)):
                os.unlink(_part(path))
    finally:
        os.close(part)


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether a path still leads to what is open here."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _removed_where_left(part: str) -> bool:
    """Remove a part whose lock nobody holds; whether that was so."""
    descriptor = os.open(part, os.O_RDWR | os.O_CLOEXEC)
    try:
        left = _lock(descriptor, wait=False)
        if left:
            os.unlink(part)  # locked: whoever opened it meanwhile sees that it is gone
        return left
    finally:
        os.close(descriptor)
