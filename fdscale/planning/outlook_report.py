"""A plan as tables for people."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from fdscale.planning.memory import STATES, size_text
from fdscale.planning.outlook import Outlook
from fdscale.planning.placement import PLACEMENTS

MEANINGS = {
    "weights": "as they run",
    "persistent": "small weights, whole beside their partitions",
    "gradients": "accumulated",
    "masters": "fp32",
    "moments": "of AdamW",
    "ema": "fp32",
    "buckets": "of gradients on their way",
    "teacher": "frozen weights",
}
PARTS = {
    "batch": "the micro batch and its targets",
    "activations": "inputs of the backward pass",
    "gathered": "weights of other ranks, while they are used",
    "gradients": "before they are reduced",
    "buckets": "gradients on their way",
}


def outlook_tables(outlook: Outlook) -> Group:
    """One rank's memory by part, the teachers' placements, and what the run takes."""
    parts: list[Table | Text] = [_heading(outlook), _memory(outlook)]
    if outlook.forecast.teachers:
        parts.append(_teachers(outlook))
    return Group(*parts, _run(outlook), _verdict(outlook))


def _heading(outlook: Outlook) -> Text:
    where = f"{outlook.nodes} x {outlook.gpus_per_node} {outlook.machine.name} = {outlook.ranks} ranks"
    batch = f"{outlook.global_batch} = {outlook.ranks} ranks x {outlook.micro_batch} x {outlook.accumulation}"
    return Text.assemble(
        (f"{outlook.recipe}", "bold"),
        f" on {where}, ZeRO-{outlook.zero_stage}, activation checkpointing {outlook.checkpointing}\n"
        f"{outlook.cost.parameters / 1e6:,.1f} M trained parameters; global batch {batch} accumulation",
    )


def _memory(outlook: Outlook) -> Table:
    forecast = outlook.forecast
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("memory of a rank")
    table.add_column("bytes", justify="right")
    table.add_column("")
    for name in STATES:
        if size := getattr(forecast.states, name):
            table.add_row(name, size_text(size), MEANINGS[name])
    table.add_row("images", size_text(forecast.images), "uint8, this step's and the next", end_section=True)
    largest = max(forecast.phases, key=lambda name: forecast.phases[name])
    for name, size in forecast.phases.items():
        if size:
            mark = "the phase that adds most" if name == largest else "adds less, at another time"
            table.add_row(f"+ {name}", size_text(size), mark)
            if name == "forward and backward":
                for part, of_part in vars(forecast.step).items():
                    if of_part:
                        table.add_row(f"    {part}", size_text(of_part), PARTS[part], style="dim")
    table.add_section()
    style = "bold green" if outlook.fits else "bold red"
    table.add_row("peak", size_text(forecast.peak), _room(outlook), style=style)
    return table


def _room(outlook: Outlook) -> str:
    machine = outlook.machine
    return f"of {size_text(machine.usable)} that can be used of {size_text(machine.memory)}"


def _teachers(outlook: Outlook) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False, show_edge=False)
    table.add_column("teacher's weights on a rank")
    for placement in PLACEMENTS:
        table.add_column(placement, justify="right")
    for where, teacher in outlook.forecast.teachers.items():
        sizes = [
            Text(size_text(teacher.placements[each]), style="bold" if each == teacher.placement else "dim")
            for each in PLACEMENTS
        ]
        table.add_row(f"{outlook.names[where]} ({teacher.parameters / 1e6:,.1f} M)", *sizes)
    return table


def _run(outlook: Outlook) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, told in _rows(outlook):
        table.add_row(name, told)
    return table


def _rows(outlook: Outlook) -> Iterator[tuple[str, str]]:
    cost = outlook.cost
    modes = ", ".join(f"{name} {size_text(size)}" for name, size in outlook.activations.items())
    yield "activations", f"by checkpointing, at their most: {modes}"
    host = outlook.host
    told = f"{size_text(host.peak)} a node: {size_text(host.building)} while networks are built, then "
    yield "host memory", f"{told}{size_text(host.loaders)} of loaders (roughly) + {size_text(host.offloaded)} offloaded"
    yield "checkpoint", f"{size_text(cost.checkpoint_bytes)} over all ranks"
    flops = cost.flops
    again = f", {flops.recomputed / 1e9:,.1f} of them recomputed" if flops.recomputed else ""
    frozen = f" + {flops.teachers / 1e9:,.1f} teachers" if flops.teachers else ""
    yield (
        "FLOPs an image",
        f"{flops.total / 1e9:,.1f} G = {flops.forward / 1e9:,.1f} forward + {flops.backward / 1e9:,.1f} backward"
        f"{again}{frozen}",
    )
    if cost.pace is None:
        yield "pace", "not told: no peak is known for this machine"
        return
    pace = cost.pace
    yield (
        "pace",
        f"{pace.images_per_second:,.0f} images/s, {pace.days:,.1f} days, {pace.gpu_hours:,.0f} GPU-hours for "
        f"{cost.epochs:g} epochs of {cost.samples:,} samples ({cost.samples_are}), "
        f"if the GPUs reach {pace.efficiency:.0%} of their peak, recomputation counted: assumed, not measured",
    )


def _verdict(outlook: Outlook) -> Text:
    if outlook.fits:
        free = outlook.machine.usable - outlook.forecast.peak
        return Text(f"fits, {size_text(free)} to spare", style="bold green")
    missing = outlook.forecast.peak - outlook.machine.usable
    told = Text(f"does not fit: {size_text(missing)} a rank are missing", style="bold red")
    if outlook.nearest is None:
        return told.append("\nno change of checkpointing, placement, micro batch, offload or nodes makes it fit")
    changes = "".join(f"\n  {change}" for change in outlook.nearest.changes)
    return told.append(f"\nthe nearest that fits ({size_text(outlook.nearest.peak)} a rank):{changes}", style="default")
