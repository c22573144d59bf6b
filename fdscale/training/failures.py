"""What a rank ended with, kept beside its attempt: by the dates one can tell the cause from what followed. No torch."""

from __future__ import annotations

import os
import re
import socket
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fdscale.config.errors import StartAgain, UserError

FAILURES = "failures"
TOLD_IN_FULL = (UserError, StartAgain)  # their text says it all: where they were raised helps nobody
HEAD = re.compile(r"rank (\d+) on (\S+), pid \d+, .* \((\d+\.\d+)\)")


@dataclass(frozen=True)
class Failure:
    """The last words of a rank: `time` in Unix seconds, `text` the traceback, or a mistake's sentence."""

    rank: int
    host: str
    time: float
    text: str

    @property
    def is_mistake(self) -> bool:
        """Whether a person must decide: starting again would meet the same."""
        return self.text.startswith(f"{UserError.__name__}: ")

    @property
    def message(self) -> str:
        """The exception itself: what stands under the last frame, in several lines if it has them."""
        lines = self.text.splitlines()
        frames = [number for number, line in enumerate(lines) if line.startswith("  File ")]
        said = [line for line in lines[frames[-1] :] if not line.startswith("  ")] if frames else lines
        return "\n".join(said)


def record_failure(attempt: Path, rank: int, error: BaseException) -> None:
    """Write a rank's exception beside its attempt; where that cannot be written, what was printed must do."""
    in_full = isinstance(error, TOLD_IN_FULL)
    text = f"{type(error).__name__}: {error}\n" if in_full else "".join(traceback.format_exception(error))
    now = time.time()
    date = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(now))
    head = f"rank {rank} on {socket.gethostname()}, pid {os.getpid()}, {date} ({now:.3f})"
    with suppress(OSError):
        (attempt / FAILURES).mkdir(exist_ok=True)
        (attempt / FAILURES / f"rank_{rank}.txt").write_text(f"{head}\n\n{text}")


def read_failures(attempt: Path) -> list[Failure]:
    """The failures of an attempt, the earliest first."""
    found = []
    for path in (attempt / FAILURES).glob("rank_*.txt"):
        first, _, text = path.read_text(errors="replace").partition("\n")
        if head := HEAD.match(first):
            found.append(Failure(int(head[1]), head[2], float(head[3]), text.strip()))
    return sorted(found, key=lambda failure: failure.time)
