"""How fast a run goes, and what became of all its time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from fdscale.training.live import Live
from fdscale.training.phases import PHASES, Phases
from fdscale.training.progress import Progress


class Meter:
    """Wall-clock of steps since the last row of metrics; what is done `apart` from them is not in it.

    `last` is the run's last step, `live` what it knows of itself.
    """

    def __init__(self, global_batch: int, last: int, live: Live, phases: Phases) -> None:
        self.global_batch, self.last, self.live, self.phases = global_batch, last, live, phases

    def restart(self, step: int, waited: float) -> None:
        """Measure from `step` on; `waited` is the loader's count of seconds by now."""
        self._step, self._waited, self._since = step, waited, time.perf_counter()
        self.phases.restart(step, waited)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is done inside is no training: saving, evaluating. It is in no step's time, nor are its collectives."""
        began = time.perf_counter()
        with self.phases.apart():
            yield
        self._since += time.perf_counter() - began

    def row(self, progress: Progress, waited: float) -> dict[str, float]:
        """Throughput, waiting and phases since the last row, the time left at that pace, goodput, model arithmetic.

        Every rank calls it, when the device has been waited for. `progress` keeps the seconds of the phases, which are
        equal on all ranks.
        """
        steps, now = progress.step - self._step, time.perf_counter()
        seconds = (now - self._since) / steps
        phases = self.phases.row(progress.step, waited)
        progress.training_seconds += steps * sum(phases[f"phase_seconds/{phase}"] for phase in PHASES)
        pace, waiting = self.global_batch / seconds, (waited - self._waited) / steps
        self.restart(progress.step, waited)
        self._since = now  # what this row takes is in the steps to come
        return {
            **phases,
            "step_seconds": seconds,
            "images_per_second": pace,
            "data_wait_seconds": waiting,
            "eta_seconds": seconds * (self.last - progress.step),
            **self._goodput(progress),
            **self._efficiency(pace),
        }

    def _goodput(self, progress: Progress) -> dict[str, float]:
        began = self.live.values.get("first_start_timestamp_seconds")
        return {} if began is None else {"goodput": progress.training_seconds / max(time.time() - began, 1e-3)}

    def _efficiency(self, images_per_second: float) -> dict[str, float]:
        """Once it is known what an image takes, and what the chips could do."""
        flops, peak = (self.live.values.get(name) for name in ("model_flops_per_image", "peak_flops_per_second"))
        if flops is None:
            return {}
        rate = flops * images_per_second
        return {"model_flops_per_second": rate, **({"mfu": rate / peak} if peak else {})}
