"""Bytes that a run's states take on each rank, and what this machine has; activations are not counted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdscale.cluster.gpus import visible_gpus
from fdscale.config.errors import UserError

GIB = 2**30
ADAM_MOMENTS = 2


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank: states where the step runs (the GPU, if there is one), and those offloaded."""

    weights: int
    gradients: int
    masters: int
    moments: int
    teacher: int
    offloaded: int

    @property
    def resident(self) -> int:
        """Bytes where the step runs."""
        return self.weights + self.gradients + self.masters + self.moments + self.teacher

    def __str__(self) -> str:
        names = ("weights", "gradients", "masters", "moments", "teacher", "offloaded")
        return " + ".join(f"{name} {_size(getattr(self, name))}" for name in names if getattr(self, name))


@dataclass(frozen=True)
class MachineMemory:
    """Bytes of each GPU (none on a CPU machine) and of the host, container limits respected."""

    gpus: tuple[int, ...]
    host: int


def memory_per_rank(
    trained_parameters: int, teacher_parameters: int, ranks: int, deepspeed_json: Mapping[str, Any]
) -> RankMemory:
    """Weights, gradients, fp32 masters and Adam moments under ZeRO, and the teacher, whole on every rank.

    ZeRO divides optimizer state from stage 1, gradients from stage 2, weights from stage 3 (Rajbhandari
    et al., arXiv 1910.02054, section 5). As read in DeepSpeed 0.19.8: masters exist beside 16-bit weights,
    and as a second fp32 copy under stages 1 and 2; gradients have the weights' type unless
    `data_types.grad_accum_dtype` says otherwise.
    """
    stage = deepspeed_json["zero_optimization"]["stage"]
    weight, gradient, master, moment = _bytes_per_parameter(deepspeed_json)
    share = -(-trained_parameters // ranks)
    optimizer_elements = share if stage >= 1 else trained_parameters
    masters, moments = master * optimizer_elements, ADAM_MOMENTS * moment * optimizer_elements
    weights = weight * (share if stage >= 3 else trained_parameters)
    offloads_optimizer = _device(deepspeed_json, "optimizer")
    offloads_weights = _device(deepspeed_json, "param")
    return RankMemory(
        weights=0 if offloads_weights else weights,
        gradients=gradient * (share if stage >= 2 else trained_parameters),
        masters=0 if offloads_optimizer else masters,
        moments=0 if offloads_optimizer else moments,
        teacher=weight * teacher_parameters,
        offloaded=(masters + moments) * (offloads_optimizer == "cpu") + weights * (offloads_weights == "cpu"),
    )


def _bytes_per_parameter(config: Mapping[str, Any]) -> tuple[int, int, int, int]:
    """Bytes of a weight, a gradient, a master weight and an Adam moment."""
    stage = config["zero_optimization"]["stage"]
    reduced = [config[key] for key in ("bf16", "fp16") if config.get(key, {}).get("enabled")]
    weight = 2 if reduced else 4
    accumulated = config.get("data_types", {}).get("grad_accum_dtype")
    gradient = weight if accumulated is None else 4 if accumulated in ("fp32", "float32", "float") else 2
    block = reduced[0] if reduced else {}
    copies_fp32 = stage in (1, 2) or bool(_device(config, "optimizer"))
    master = 4 if reduced or copies_fp32 else 0
    if block.get("bf16_master_weights_and_grads") or block.get("fp16_master_weights_and_grads"):
        master = 2
    return weight, gradient, master, 2 if block.get("bf16_optimizer_states") else 4


def _device(config: Mapping[str, Any], what: str) -> str:
    """Where `offload_optimizer` or `offload_param` sends its states: `cpu`, `nvme`, or "" for nowhere."""
    device = (config["zero_optimization"].get(f"offload_{what}") or {}).get("device", "none")
    return "" if device == "none" else device


def machine_memory(root: Path = Path("/")) -> MachineMemory:
    """What this machine has, asked without torch: nvidia-smi, /proc/meminfo and the control groups."""
    host = min([_total_memory(root), *_cgroup_limits(root)])
    gpus = visible_gpus(os.environ)
    return MachineMemory(tuple(host if size is None else size for size in gpus), host)  # untold: it shares the host's


def refuse_if_it_cannot_fit(needed: RankMemory, ranks: int, local_ranks: int, machine: MachineMemory) -> None:
    """Raise UserError with the arithmetic when the states of this machine's ranks exceed its memory."""
    if machine.gpus:
        ranks_per_gpu = -(-local_ranks // len(machine.gpus))
        _refuse(needed, needed.resident, ranks, ranks_per_gpu, "each GPU", min(machine.gpus))
        _refuse(needed, needed.offloaded, ranks, local_ranks, "this machine's host memory", machine.host)
    else:
        per_rank = needed.resident + needed.offloaded
        _refuse(needed, per_rank, ranks, local_ranks, "this machine", machine.host)


def _refuse(needed: RankMemory, per_rank: int, ranks: int, sharing: int, where: str, has: int) -> None:
    together = per_rank * sharing
    if together <= has:
        return
    needs, holds = _gib(together), _gib_down(has)
    if needs == holds:  # rounding hides the difference
        needs, holds = f"{together / GIB:.2f}", f"{has / GIB:.2f}"
    raise UserError(
        f"needs {_gib(per_rank)} GiB on each of {ranks} ranks, {needs} GiB on {where}, which has {holds}: "
        f"add nodes, offload, or --smoke (a rank holds {needed}; activations come on top)"
    )


def _size(size: int) -> str:
    return f"{_gib(size)} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"


def _gib_down(size: int) -> str:
    return f"{size // GIB}" if size >= 10 * GIB else f"{size * 10 // GIB / 10:.1f}"


def _total_memory(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise UserError(f"{root / 'proc/meminfo'} has no MemTotal line: how much memory is there?")


def _cgroup_limits(root: Path) -> list[int]:
    """The limits of this process's control groups, versions 2 and 1, every ancestor included."""
    memberships = root / "proc/self/cgroup"
    lines = memberships.read_text().splitlines() if memberships.exists() else []
    groups = [line.split(":", 2)[1:] for line in lines if line.count(":") >= 2]
    limits: list[int] = []
    for controllers, group in groups:
        if controllers == "":
            limits += _limits_upwards(root / "sys/fs/cgroup", group, "memory.max")
        elif "memory" in controllers.split(","):
            limits += _limits_upwards(root / "sys/fs/cgroup/memory", group, "memory.limit_in_bytes")
    return limits


def _limits_upwards(mount: Path, group: str, file: str) -> list[int]:
    here = Path(group.lstrip("/"))
    files = [mount / folder / file for folder in (here, *here.parents)]
    texts = [path.read_text().strip() for path in dict.fromkeys(files) if path.is_file()]
    return [int(text) for text in texts if text.isdigit()]
