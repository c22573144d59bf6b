"""Whether the process that writes an attempt still lives: a run directory has one writer. No torch in here."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fdscale.cluster.orphans import process_start

logger = logging.getLogger(__name__)

ALIVE = "alive"
BEAT_SECONDS = 10.0
SILENT_SECONDS = 60.0  # file systems' clients may keep a date for a minute


def this_process() -> dict[str, Any]:
    """What tells this process from any other, on this machine and elsewhere."""
    return {
        "host": socket.gethostname(),
        "kernel": _kernel(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
    }


def _kernel() -> str:
    """Where pids mean the same: this boot of this machine, and its namespace of processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


class Heartbeat:
    """A thread that touches the file `alive` of an attempt until it is stopped, so that other nodes see it live."""

    def __init__(self, attempt: Path) -> None:
        self._file, self._stopped = attempt / ALIVE, threading.Event()
        self._file.touch()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(BEAT_SECONDS):
            with suppress(OSError):  # a disk that is full or gone for a while ends no run by itself
                os.utime(self._file)

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def is_alive(attempt: Path, writer: Mapping[str, Any], silent: float = SILENT_SECONDS) -> bool:
    """Whether the `writer` of an attempt lives; may wait `silent` seconds for a sign of life from another machine."""
    here = this_process()
    if writer.get("kernel") and writer["kernel"] == here["kernel"]:
        mine = writer["pid"] == here["pid"]  # and has ended, or it would not ask
        return not mine and process_start(writer["pid"]) == writer["started"]
    return _is_touched(attempt / ALIVE, silent)


def _is_touched(file: Path, silent: float) -> bool:
    """Whether a file is touched within `silent` seconds from its last date on, by the file system's own clock."""
    last = _touched(file)
    if last is None:
        return False
    age = max(0.0, clock_of(file.parent) - last)
    if age < silent:
        logger.info("%s was alive %.0f s ago: waiting up to %.0f s for a sign of life", file.parent, age, silent - age)
    deadline = time.monotonic() + silent - age
    while time.monotonic() < deadline:
        time.sleep(0.2)
        if _touched(file) != last:
            return True
    return False


def _touched(file: Path) -> float | None:
    try:
        with file.open("rb") as opened:  # opening asks the server, a bare stat may be answered from a cache
            return os.fstat(opened.fileno()).st_mtime
    except OSError:
        return None


def clock_of(folder: Path) -> float:
    """Now, as the file system of a folder has it: its server's clock need not be this machine's."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".clock_") as probe:
        os.utime(probe.name)
        return os.stat(probe.name).st_mtime
