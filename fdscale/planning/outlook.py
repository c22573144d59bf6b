"""Everything that `fdscale plan` says of a run, and as JSON; torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from fdscale.planning.cost import Cost, HostMemory
from fdscale.planning.forecast import Forecast
from fdscale.planning.memory import GIB, RankMemory

FORMAT = 1  # of the JSON: raised when a key changes its meaning or goes
OUTSIDE_THE_ALLOCATOR = 2 * GIB  # of a GPU: CUDA's context, NCCL's buffers, the kernels' workspaces; an estimate
PROCESS = int(0.7 * GIB)  # of a CPU rank beside its tensors: Python, torch and DeepSpeed as loaded
FRAGMENTATION = 0.05  # of the memory: what an allocator cannot hand out at the peak


@dataclass(frozen=True)
class Machine:
    """Where a rank runs: its memory in bytes, `host` that of a node where it is known."""

    name: str
    memory: int
    on_gpu: bool
    host: int | None = None

    @property
    def usable(self) -> int:
        """What a forecast may fill."""
        outside = OUTSIDE_THE_ALLOCATOR if self.on_gpu else PROCESS
        return max(int(self.memory * (1 - FRAGMENTATION)) - outside, 0)


@dataclass(frozen=True)
class Nearest:
    """The nearest configuration that fits: what to change, and a rank's peak then."""

    changes: tuple[str, ...]
    peak: int


@dataclass(frozen=True)
class Outlook:
    """A run's plan. `activations`: the most bytes of inputs and activations under each way of checkpointing them.

    `nearest` is None where the plan fits, and where nothing does.
    """

    recipe: str
    program: str
    student: str
    names: Mapping[str, str]  # of the teachers, by the setting that names them
    machine: Machine
    nodes: int
    gpus_per_node: int
    micro_batch: int
    accumulation: int
    global_batch: int
    zero_stage: int
    checkpointing: str
    forecast: Forecast
    activations: Mapping[str, int]
    host: HostMemory
    cost: Cost
    nearest: Nearest | None

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def fits(self) -> bool:
        return self.forecast.peak <= self.machine.usable


def as_json(outlook: Outlook) -> dict[str, Any]:
    """A stable, machine-readable object: bytes, FLOPs, seconds as plain numbers."""
    forecast, cost = outlook.forecast, outlook.cost
    return {
        "format": FORMAT,
        "recipe": outlook.recipe,
        "program": outlook.program,
        "fits": outlook.fits,
        "machine": {**asdict(outlook.machine), "usable": outlook.machine.usable},
        "nodes": outlook.nodes,
        "gpus_per_node": outlook.gpus_per_node,
        "ranks": outlook.ranks,
        "micro_batch": outlook.micro_batch,
        "accumulation": outlook.accumulation,
        "global_batch": outlook.global_batch,
        "zero_stage": outlook.zero_stage,
        "activation_checkpointing": outlook.checkpointing,
        "student": {"name": outlook.student, "trained_parameters": cost.parameters},
        "teachers": {
            where: {
                "name": outlook.names[where],
                "parameters": teacher.parameters,
                "placement": teacher.placement,
                "bytes_by_placement": dict(teacher.placements),
            }
            for where, teacher in forecast.teachers.items()
        },
        "rank_bytes": {
            "peak": forecast.peak,
            "states": {field.name: getattr(forecast.states, field.name) for field in fields(RankMemory)},
            "images": forecast.images,
            "phases": forecast.phases,
            "forward_and_backward": asdict(forecast.step),
            "activations_by_checkpointing": dict(outlook.activations),
        },
        "host_bytes": {**asdict(outlook.host), "peak": outlook.host.peak},
        "checkpoint_bytes": cost.checkpoint_bytes,
        "flops_per_image": {**asdict(cost.flops), "total": cost.flops.total},
        "run": {
            "epochs": cost.epochs,
            "samples": cost.samples,
            "samples_are": cost.samples_are,
        },
        "pace": None if cost.pace is None else asdict(cost.pace),
        "nearest_fit": None if outlook.nearest is None else asdict(outlook.nearest),
    }
