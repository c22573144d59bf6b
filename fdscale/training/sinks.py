"""Which rank shows and keeps what: the fan-out of a row of metrics to console, file, and whoever serves the latest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from rich.console import Console

from fdscale.cluster.ranks import Rank
from fdscale.training.console import ConsoleSink
from fdscale.training.json_lines import JsonLines
from fdscale.training.live import Live


class Sink(Protocol):
    """Shows or keeps the values of a step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Hands every row to each sink and every event to `say`; with no sinks (another rank) it is silent.

    The step is itself a metric, so the sinks are given `values` with `step` first. `live` keeps the latest of each.
    """

    def __init__(
        self, sinks: Sequence[Sink] = (), say: Callable[[str], None] | None = None, live: Live | None = None
    ) -> None:
        self._sinks = tuple(sinks)
        self._say = say
        self.live = live or Live()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one row. Raises KeyError for a name that `METRICS` lacks (our mistake, on every rank)."""
        with self.live.handing_over():
            self.live.note({"step": step, **values})
            for sink in self._sinks:
                sink.write(step, {"step": step, **values})

    def say(self, text: str) -> None:
        """Tells an event (resumed, saved, stopped) to whoever reads the console."""
        if self._say is not None:
            self._say(text)

    def go_back(self, step: int) -> None:
        """Forget the rows after `step`, where rows are kept: their steps are done once more."""
        for sink in self._sinks:
            if isinstance(sink, JsonLines):
                sink.cut(step)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


def open_sinks(
    rank: Rank,
    run_dir: Path,
    program: str,
    total_steps: int,
    resumed_step: int | None,
    console: Console,
    live: Live,
    monitor: Sink | None = None,
) -> Sinks:
    """The sinks of this rank, none on most; `resumed_step` is the loaded checkpoint's step, None without one.

    Every rank calls this, and writes every row: the values are those of the whole run, equal on all ranks.
    """
    if not rank.is_main:
        return Sinks(live=live)
    screen = ConsoleSink(program, total_steps, console, first_step=resumed_step or 0)
    rows = JsonLines(run_dir / "metrics.jsonl", resumed_step)
    return Sinks([screen, rows, *([monitor] if monitor else [])], screen.say, live)
