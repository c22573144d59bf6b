"""A way out that fails: one warning until it works again, every failure counted, and no harm to training."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from fdscale.training.live import Live

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that training waits for a way out when it begins and when it ends."""


class Outage:
    """What is told and counted, in `live`, while one `way` out of the metrics cannot be taken."""

    def __init__(self, live: Live, way: str) -> None:
        self._live, self._way = live, way
        self._lasts = False

    def lasts(self, told: str) -> None:
        """It failed, once more or for the first time."""
        self._live.count(f"telemetry_failures_total/{self._way}")
        if not self._lasts:
            logger.warning("%s; training goes on without it", told)
        self._lasts = True

    def is_over(self) -> None:
        """It works: the next failure is told again."""
        self._lasts = False

    def spare(self, told: str, action: Callable[[], None]) -> bool:
        """Do something that may fail in any way, or hang; whether it was done. `told` says what was not."""
        try:
            within(PATIENCE, action)
        except Exception as error:  # metrics are not worth a training run, whatever becomes of them
            self.lasts(f"{told} ({getattr(error, 'strerror', None) or error})")
            return False
        return True


def within(seconds: float, action: Callable[[], None]) -> None:
    """Wait so long for an action, no longer: a share or a name server that hangs must not hold a run.

    Raises what the action raises, or TimeoutError; it goes on then, in a thread that does not keep the process alive.
    """
    raised: list[Exception] = []

    def act() -> None:
        try:
            action()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if raised:
        raise raised[0]
