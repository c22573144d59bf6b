"""Processes that outlive the command which started them: recorded, found again, and ended; no others are touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def birth(pid: int) -> int | None:
    """When a process started, in the kernel's ticks; None when it is gone, or a zombie that nobody has reaped yet."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def wait_until(what: Callable[[], bool], seconds: float, told: str) -> None:
    """Look ten times a second; TimeoutError with `told` when it does not come about."""
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {seconds:g} s: {told}")
        time.sleep(0.1)


class Daemons:
    """Named processes, each with its pid and birth in FOLDER/daemons.json and its output in FOLDER/log."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._file = folder, folder / "daemons.json"
        (folder / "log").mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str | Path]) -> int:
        """Start one in a session of its own; its pid."""
        with (self.folder / "log" / f"{name}.out").open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        self._write({**self._read(), name: [process.pid, birth(process.pid) or 0]})
        return process.pid

    def pid(self, name: str) -> int:
        """The pid of one that runs; KeyError for one that was never started."""
        return self._read()[name][0]

    def pids(self) -> set[int]:
        """Those of all, whether they run or not."""
        return {pid for pid, _ in self._read().values()}

    def runs(self, name: str) -> bool:
        """Whether it was started and is the same process still."""
        pid, born = self._read().get(name, (0, 0))
        return pid != 0 and birth(pid) == born

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash would."""
        if self.runs(name):
            os.kill(self.pid(name), signal.SIGKILL)
            wait_until(lambda: not self.runs(name), 10, f"{name} to be gone")

    def stop(self) -> None:
        """End all, the youngest first: TERM, and KILL after five seconds."""
        for name in reversed(self._read()):
            if self.runs(name):
                os.kill(self.pid(name), signal.SIGTERM)
                try:
                    wait_until(lambda name=name: not self.runs(name), 5, name)
                except TimeoutError:
                    self.kill(name)
        self._write({})

    def _read(self) -> dict[str, list[int]]:
        return json.loads(self._file.read_text()) if self._file.exists() else {}

    def _write(self, processes: dict[str, list[int]]) -> None:
        self._file.write_text(json.dumps(processes))
