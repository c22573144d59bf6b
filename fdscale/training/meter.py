"""How fast a run goes, and what became of all its time."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fdscale.training.live import Live
from fdscale.training.phases import PHASES
from fdscale.training.progress import Progress


class Meter:
    """Wall-clock since the last row of metrics; `last` is the run's last step, `live` what it knows of itself."""

    def __init__(self, global_batch: int, last: int, live: Live, step: int, waited: float) -> None:
        self.global_batch, self.last, self.live = global_batch, last, live
        self.restart(step, waited)

    def restart(self, step: int, waited: float) -> None:
        """Measure from `step` on; `waited` is the loader's count of seconds by now."""
        self._step, self._waited, self._since = step, waited, time.perf_counter()

    def row(self, progress: Progress, waited: float, phases: Mapping[str, float]) -> dict[str, float]:
        """Throughput and waiting since the last row, the time left at that pace, goodput, model arithmetic.

        `phases` has the mean seconds of a step by phase, equal on all ranks: those are what `progress` keeps.
        """
        steps = progress.step - self._step
        seconds = (time.perf_counter() - self._since) / steps
        progress.training_seconds += steps * sum(phases[f"phase_seconds/{phase}"] for phase in PHASES)
        pace = self.global_batch / seconds
        return {
            "step_seconds": seconds,
            "images_per_second": pace,
            "data_wait_seconds": (waited - self._waited) / steps,
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
