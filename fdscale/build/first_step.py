"""What an attempt's start took, told and kept when its first step has been done."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from fdscale.build.run import Run
from fdscale.training.loop import Watch
from fdscale.training.sinks import Sinks


class FirstStep:
    """Hands every step on to `watch`; after the first, the main rank tells and keeps its start's phases."""

    def __init__(self, run: Run[Any, Any], sinks: Sinks, watch: Watch) -> None:
        self.run, self.sinks, self.watch = run, sinks, watch
        self._waits = run.connection.rank.is_main

    def __call__(self, step: int) -> AbstractContextManager[object]:
        return self.watch(step)

    def tell(self, step: int) -> None:
        if self._waits:
            self._waits = False
            self.run.startup.ends("first step")
            self.sinks.say(self.run.startup.told())
            self.run.attempt.record_startup(self.run.startup.seconds)
        self.watch.tell(step)
