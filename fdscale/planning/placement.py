"""Where the frozen weights of each teacher lie: what the settings say, or what fits."""

from __future__ import annotations

from typing import Literal

from fdscale.config.settings import DistillSettings, FinetuneSettings

Placement = Literal["replicated", "zero3", "fairscale"]


def chosen_placements(settings: DistillSettings | FinetuneSettings) -> dict[str, Placement]:
    """The placement of each teacher, by the setting that names it."""
    if not isinstance(settings, DistillSettings):
        return {}
    tables = {where: table for where, (table, _) in settings.teachers.items()}
    return {where: "replicated" if table.placement == "auto" else table.placement for where, table in tables.items()}
