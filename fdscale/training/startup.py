"""What became of the time between a run's command and the end of its first step. No torch in here."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress

from fdscale.cluster.orphans import NOTED, process_start

TOLD_FROM = 0.05  # seconds: shorter phases are in the sum alone

_commands: list[Startup] = []


class Startup:
    """Seconds of each phase of a start; a phase begins where the one before ended, so that they add up to the whole."""

    def __init__(self, began: float, seconds: Mapping[str, float] | None = None) -> None:
        self.seconds = dict(seconds or {})
        self._since = began

    def ends(self, phase: str) -> None:
        """What was done since the last phase ended was this one; a phase may come more than once."""
        now = since_boot()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + max(0.0, now - self._since)
        self._since = now

    def told(self) -> str:
        """The whole and its phases in order, in one line."""
        parts = [f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items() if seconds >= TOLD_FROM]
        return f"started in {sum(self.seconds.values()):.1f} s: {', '.join(parts)}"


def note_command(env: Mapping[str, str]) -> None:
    """Remember that this process runs a command, and since when; to be called first, after `note_launchers`.

    A rank's command began with the first of the launchers that are noted: what they took is the phase `launchers`.
    """
    own = process_start(os.getpid())
    if own is None:  # no Linux: it counts from here
        _commands[:] = [Startup(since_boot())]
        return
    births = [int(launcher.split(":")[1]) for launcher in env.get(NOTED, "").split()]
    ticks = os.sysconf("SC_CLK_TCK")
    _commands[:] = [Startup(own / ticks, {"launchers": (own - min([own, *births])) / ticks})]


def this_start() -> Startup:
    """The start of the run that begins here: with its command, or now where none is noted or it has started a run."""
    with suppress(IndexError):
        return _commands.pop()
    return Startup(since_boot())


def since_boot() -> float:
    """Seconds on the clock by which the kernel notes when a process was started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()
