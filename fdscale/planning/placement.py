"""Where the frozen weights of each teacher lie: what the settings say, or what fits; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fdscale.config.settings import DistillSettings, RunSettings

Placement = Literal["replicated", "zero3", "fairscale"]
PLACEMENTS: tuple[Placement, ...] = ("replicated", "zero3", "fairscale")
FREE_FOR_ACTIVATIONS = 0.5  # of a rank's memory: more than any shipped recipe's activations, known without a trace


@dataclass(frozen=True)
class Choice:
    """A teacher's placement, and why."""

    placement: Placement
    reason: str


def chosen_placements(
    settings: RunSettings,
    teachers: Mapping[str, int] | None = None,
    states: int = 0,
    memory: int | None = None,
) -> dict[str, Choice]:
    """The placement of each teacher, by the setting that names it.

    `auto` keeps teachers whole while they and the student's `states` leave half of the rank's `memory` free for
    activations, and divides them by ZeRO-3 otherwise; the small ones are placed first. `teachers`: bytes of each when
    whole, absent or 0 where that is not known. `memory` None: another machine than this will run it.
    """
    if not isinstance(settings, DistillSettings):
        return {}
    sizes = teachers or {}
    room = None if memory is None else memory * (1 - FREE_FOR_ACTIVATIONS) - states
    chosen: dict[str, Choice] = {}
    for where in sorted(settings.teachers, key=lambda where: sizes.get(where, 0)):
        table, _ = settings.teachers[where]
        if table.placement != "auto":
            chosen[where] = Choice(table.placement, "as set")
            room = room if room is None or table.placement != "replicated" else room - sizes.get(where, 0)
            continue
        chosen[where] = _fitting(sizes.get(where, 0), room)
        if room is not None and chosen[where].placement == "replicated":
            room -= sizes.get(where, 0)
    return {where: chosen[where] for where in settings.teachers}


def _fitting(size: int, room: float | None) -> Choice:
    if room is None:
        return Choice("replicated", "auto: whole, unless a rank turns out to lack the room")
    if not size:
        return Choice("replicated", "auto: its size is known once it is built")
    if size <= room:
        return Choice("replicated", "auto: whole, it leaves half of a rank's memory for activations")
    return Choice("zero3", "auto: whole, it would leave less than half of a rank's memory for activations")
