"""What the settings of a run ask of its machines beside memory: disk, shared memory, open files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdscale.config.programs import AnySettings, DenseSettings
from fdscale.data.images import open_shards
from fdscale.planning.check import Plan
from fdscale.planning.cost import BATCHES_A_WORKER, checkpoint_bytes
from fdscale.planning.dense_sizes import image_bytes, trained_parameters
from fdscale.planning.engine_rules import FP32, engine_rules
from fdscale.training.preflight import Demand


def demand_of(settings: AnySettings, plan: Plan, deepspeed_json: Mapping[str, Any], local_ranks: int) -> Demand:
    """Of a node with `local_ranks` ranks, and of the one folder of the run."""
    return Demand(
        _disk(settings, plan, deepspeed_json), _shared_memory(settings, plan.micro_batch, local_ranks), open_shards()
    )


def _shared_memory(settings: AnySettings, micro_batch: int, local_ranks: int) -> int:
    """Bytes of /dev/shm: the batches of dense tasks; those of shards come in memory that a rank lends its workers."""
    if not isinstance(settings, DenseSettings):
        return 0
    images = local_ranks * settings.data.workers * BATCHES_A_WORKER * micro_batch
    return images * image_bytes(settings, settings.data.crop)


def _disk(settings: AnySettings, plan: Plan, deepspeed_json: Mapping[str, Any]) -> int | None:
    """Bytes: the checkpoints that stay and one that is being written, and what the run leaves; None: size unknown."""
    parameters, width = trained_parameters(settings, plan.student), plan.student.width
    if parameters is None or width is None:
        return None
    ema, kept = settings.optim.ema_decay > 0, settings.checkpoint
    trained = parameters + sum((width + 1) * (teacher.width or 0) for teacher in plan.teachers.values())
    for_ever = (plan.steps or 0) // kept.keep_every if kept.keep_every else 0
    checkpoints = kept.keep + 1 + for_ever
    left = FP32 * parameters * (2 if ema else 1)
    return checkpoints * checkpoint_bytes(trained, engine_rules(deepspeed_json), ema) + left
