"""The latest value of every metric of this process, for whoever asks: a scrape, a push."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from fdscale.config.errors import UserError
from fdscale.training.metrics import METRICS, STATES, row_of

logger = logging.getLogger(__name__)


class Live:
    """Values by their names in `METRICS`, kept on every rank; `info` are the labels of `run_info`.

    The training's thread notes, that of a way out counts its failures; `values` is replaced and never changed, so that
    any may read it.
    """

    def __init__(self, info: Mapping[str, str] | None = None) -> None:
        self.info = dict(info or {})
        self.values: dict[str, float] = {}
        self._writing = threading.RLock()
        self.enter(STATES[0])

    def note(self, values: Mapping[str, float]) -> None:
        """Take over new values. Raises KeyError for a name that `METRICS` lacks (our mistake, on every rank)."""
        if unknown := sorted(name for name in values if row_of(name) is None):
            raise KeyError(f"metrics without a row in METRICS: {', '.join(unknown)}")
        with self._writing:
            self.values = {**self.values, **values}

    def look(self, values: Callable[[], Mapping[str, float]]) -> None:
        """Note what is found out by looking at files or the machine; what cannot be is told, and is no end of a run."""
        try:
            found = values()
        except (OSError, LookupError, ValueError, UserError) as error:
            logger.warning("of this run's metrics some are not known: %r", error)
            return
        self.note(found)

    def count(self, name: str, by: float = 1) -> None:
        """A counter of this attempt goes up."""
        assert METRICS[name.partition("/")[0]].kind == "counter", name
        with self._writing:
            self.note({name: self.values.get(name, 0) + by})

    def enter(self, state: str) -> None:
        """The process is in one of STATES from now on."""
        assert state in STATES, state
        self.state = state

    @contextmanager
    def handing_over(self) -> Iterator[None]:
        """What is done inside is metrics' work, not training's: its time is counted."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.count("telemetry_seconds_total", time.perf_counter() - began)
