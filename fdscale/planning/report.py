"""The plan of a run as a table for people."""

from __future__ import annotations

from rich.table import Table

from fdscale.config.settings import DistillSettings, RunSettings
from fdscale.planning.check import Plan
from fdscale.planning.memory import GIB
from fdscale.planning.networks import TeacherGeometry, teacher_parameters


def plan_table(settings: RunSettings, plan: Plan) -> Table:
    """What was checked and derived, one row each."""
    table = Table(box=None, show_header=False, title="valid", title_style="bold green", title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("program", settings.program)
    table.add_row("student", f"{settings.student.name}: {_network(plan.student, plan.student.parameters())}")
    if isinstance(settings, DistillSettings):
        for where, teacher in plan.teachers.items():
            name = settings.teachers[where][0].name
            table.add_row(where, f"{name}: {_network(teacher, teacher_parameters(teacher))}")
            choice = plan.placements[where]
            table.add_row("placement", f"{choice.placement} ({choice.reason})")
    table.add_row(
        "global batch",
        f"{plan.global_batch} = {plan.ranks} ranks x micro batch {plan.micro_batch} x {plan.accumulation} accumulation",
    )
    if plan.steps is not None:
        table.add_row("steps", f"{plan.steps:,} ({plan.steps_per_epoch:,} an epoch, {plan.samples:,} samples)")
    if plan.memory is not None:
        resident = plan.memory.resident / GIB
        table.add_row("memory", f"at least {resident:.2f} GiB on a rank, without activations ({plan.memory})")
    table.add_row("run directory", str(settings.run_dir))
    for note in plan.notes:
        table.add_row("note", note)
    return table


def _network(network: TeacherGeometry | None, parameters: int | None) -> str:
    if network is None or network.grid is None:
        return "size known once it is built"
    size = f"{parameters / 1e6:,.1f} M parameters, " if parameters else ""
    height, width = network.grid
    prefix = f" + {network.prefix_tokens}" if network.prefix_tokens else ""
    return f"{size}{network.width} wide, {height}x{width}{prefix} tokens at {network.image_size} px"
