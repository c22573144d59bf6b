"""A run's planned memory, told beside what one of its steps was measured to hold; its arithmetic beside its chips'."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fdscale.build.outline import Outline, Traces, traces_of
from fdscale.build.run import Run
from fdscale.config.programs import AnySettings
from fdscale.data.order import accumulation_steps
from fdscale.planning.cost import Flops, flops_per_image
from fdscale.planning.forecast import IMAGE_CHANNELS, Forecast, forecast
from fdscale.planning.gpus import gpu_called
from fdscale.planning.memory import size_text
from fdscale.planning.placement import Placement
from fdscale.training.allocator import Peak, peak_of_step
from fdscale.training.engine import compute_dtype
from fdscale.training.phases import host_flops_per_second
from fdscale.training.run_directory import write_text
from fdscale.training.sinks import Sinks

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

MEASURED_AFTER, FEWEST = 20, 5  # steps of an attempt; in the first ones not every buffer is there


def forecast_of(
    traces: Traces,
    settings: AnySettings,
    deepspeed_json: Mapping[str, Any],
    placements: Mapping[str, Placement],
    ranks: int,
) -> Forecast:
    """The memory of one rank; raises UserError where the global batch does not divide."""
    micro_batch = int(deepspeed_json["train_micro_batch_size_per_gpu"])
    return forecast(
        traces.student,
        traces.teachers,
        placements,
        deepspeed_json,
        ranks,
        accumulation_steps(settings.data.global_batch, ranks, micro_batch),
        image_bytes=micro_batch * IMAGE_CHANNELS * traces.image_size**2,
        ema=settings.optim.ema_decay > 0,
    )


class StepWatch:
    """What the loop puts around each step: rank 0 measures one of them, its 20th or the last of a shorter run.

    Planned and measured bytes are told and kept in `memory.json`, while the other ranks wait. `outline` None: networks
    given in Python are measured only.
    """

    def __init__(
        self,
        run: Run,
        teachers: Mapping[str, nn.Module],
        outline: Callable[[], Outline] | None,
        engine: DeepSpeedEngine,
        sinks: Sinks,
        first_step: int,
    ) -> None:
        self.run, self.outline, self.sinks, self._held = run, outline, sinks, (engine, list(teachers.values()))
        last = min(first_step + MEASURED_AFTER, run.last_step)
        self.measured_step = last if last - first_step >= FEWEST else None  # as it is counted when it is done
        self._peak = Peak()

    @contextmanager
    def __call__(self, step: int) -> Iterator[None]:
        if step + 1 != self.measured_step or not self.run.connection.rank.is_main:
            yield
            return
        with peak_of_step(self.run.device, *self._held) as self._peak:
            yield

    def tell(self, step: int) -> None:
        if step != self.measured_step:
            return
        if self.run.connection.rank.is_main:
            _tell(self.run, self.outline, self._peak.size, step, self.sinks)
        self.run.connection.barrier()  # tracing a giant takes a while: it is in nobody's next step


def _tell(run: Run, outline: Callable[[], Outline] | None, measured: int, step: int, sinks: Sinks) -> None:
    found = None if outline is None else _traced(run, outline)
    planned = None if found is None else found[0]
    device = "GPU" if run.device.type == "cuda" else "CPU allocator"
    told = f"memory of rank 0 at its peak in step {step}: {size_text(measured)} measured ({device})"
    sinks.live.note({"measured_memory_bytes": measured})
    if found is not None:
        planned, flops = found
        told += f", {size_text(planned.peak)} planned, {measured / planned.peak - 1:+.1%}"
        sinks.live.note({"planned_memory_bytes": planned.peak, "model_flops_per_image": flops.model, **_peak(run)})
    sinks.say(told)
    kept = {"step": step, "measured_bytes": measured, "planned_bytes": None if planned is None else planned.peak}
    phases = {} if planned is None else {"states": planned.states.resident, **planned.phases}
    try:
        write_text(run.directory.folder / "memory.json", json.dumps({**kept, "planned": phases}, indent=2) + "\n")
    except OSError as error:
        logger.warning("memory.json could not be written: %s", error)


def _traced(run: Run, outline: Callable[[], Outline]) -> tuple[Forecast, Flops] | None:
    """Memory and arithmetic; None for a network that cannot be traced: what is only told must not end a run."""
    cuda, ranks = run.device.type == "cuda", run.connection.rank.world_size
    try:
        traces = traces_of(outline(), run.settings, run.deepspeed_json, run.micro_batch, cuda)
        planned = forecast_of(traces, run.settings, run.deepspeed_json, run.placements, ranks)
        return planned, flops_per_image(traces.student, traces.teachers, run.micro_batch)
    except Exception as error:  # networks raise whatever their operations do on fake tensors
        logger.warning("the memory of this run cannot be planned (%s: %s)", type(error).__name__, error)
        return None


def _peak(run: Run) -> dict[str, float]:
    """The most arithmetic that the chips of all ranks can do; nothing for a GPU that the table lacks."""
    ranks = run.connection.rank.world_size
    if run.device.type != "cuda":
        return {"peak_flops_per_second": ranks * host_flops_per_second()}
    properties = torch.cuda.get_device_properties(run.device)
    gpu = gpu_called(properties.name, properties.total_memory)
    sixteen_bits = compute_dtype(run.deepspeed_json) != torch.float32
    return {} if gpu is None else {"peak_flops_per_second": ranks * (gpu.bf16 if sixteen_bits else gpu.fp32)}
