"""May this start here? Settings that fit together, and memory that suffices: before a GPU is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fdscale.config.settings import DistillSettings, FinetuneSettings
from fdscale.planning.check import Plan, check
from fdscale.planning.memory import machine_memory, refuse_if_it_cannot_fit


def check_start(
    settings: DistillSettings | FinetuneSettings,
    deepspeed_json: Mapping[str, Any],
    ranks: int,
    local_ranks: int,
) -> Plan:
    """The plan of a run of `ranks` ranks, `local_ranks` of them on this machine.

    Raises SettingsError with every problem across settings, or UserError with the arithmetic of the memory.
    """
    plan = check(settings, deepspeed_json, ranks)
    if plan.memory is not None:
        refuse_if_it_cannot_fit(plan.memory, ranks, local_ranks, machine_memory())
    return plan
