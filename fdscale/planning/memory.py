"""Bytes that a run's states take on each rank, and what this machine has; activations are not counted."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fdscale.cluster import host_memory
from fdscale.cluster.gpus import visible_gpus
from fdscale.config.errors import UserError
from fdscale.planning.engine_rules import FP32, EngineRules, engine_rules
from fdscale.planning.placement import Placement

GIB = 2**30
ADAM_MOMENTS = 2
ALIGNMENT = 2  # elements: stages 1 and 2 pad their flat buffers to so many per rank
STATES = ("weights", "persistent", "gradients", "masters", "moments", "ema", "buckets", "teacher")


@dataclass(frozen=True)
class RankMemory:
    """Bytes on one rank that stay: states where the step runs (the GPU, if there is one), and those offloaded.

    `persistent`: small weights that ZeRO-3 keeps whole beside their partitions; `buckets`: its buffer for gradients.
    """

    weights: int = 0
    gradients: int = 0
    masters: int = 0
    moments: int = 0
    teacher: int = 0
    offloaded: int = 0
    persistent: int = 0
    ema: int = 0
    buckets: int = 0

    @property
    def resident(self) -> int:
        """Bytes where the step runs."""
        return sum(getattr(self, name) for name in STATES)

    def __str__(self) -> str:
        return " + ".join(
            f"{name} {size_text(getattr(self, name))}" for name in (*STATES, "offloaded") if getattr(self, name)
        )


@dataclass(frozen=True)
class MachineMemory:
    """Bytes of each GPU (none on a CPU machine) and of the host, container limits respected."""

    gpus: tuple[int, ...]
    host: int

    def of_rank(self, local_ranks: int) -> int:
        """What one of this machine's ranks may have where its steps run: a GPU, or its part of one or of the host."""
        if self.gpus:
            return min(self.gpus) // -(-local_ranks // len(self.gpus))
        return self.host // local_ranks


def memory_per_rank(
    trained: int | Sequence[int],
    teacher: int,
    ranks: int,
    deepspeed_json: Mapping[str, Any],
    ema: bool = False,
) -> RankMemory:
    """Weights, gradients, fp32 masters, Adam moments and a moving average under ZeRO, and `teacher` bytes.

    `trained`: the elements of each trained tensor, or of all of them where no more is known. ZeRO divides optimizer
    states from stage 1, gradients from stage 2, weights from stage 3 (Rajbhandari et al., arXiv 1910.02054,
    section 5); what DeepSpeed 0.19.8 makes of it is said in `engine_rules`.
    """
    rules = engine_rules(deepspeed_json)
    sizes = [trained] if isinstance(trained, int) else list(trained)
    whole, share = sum(sizes), _share(sizes, rules, ranks)
    divided = share if rules.stage >= 1 else whole
    masters, moments = rules.master * divided, ADAM_MOMENTS * rules.moment * divided
    weights = rules.weight * (share if rules.stage >= 3 else whole)
    gradients = rules.gradient * (share if rules.stage >= 2 else whole)
    average = FP32 * divided if ema else 0
    states = masters + moments + average
    on_host = states * (rules.offload_optimizer == "cpu") + weights * (rules.offload_weights == "cpu")
    return RankMemory(
        weights=0 if rules.offload_weights else weights,
        gradients=0 if rules.offload_optimizer else gradients,
        masters=0 if rules.offload_optimizer else masters,
        moments=0 if rules.offload_optimizer else moments,
        teacher=teacher,
        offloaded=on_host + share * _gradient_on_host(rules),
        persistent=_persistent(sizes, rules, ranks) if not isinstance(trained, int) else 0,
        ema=0 if rules.offload_optimizer else average,
        buckets=_buckets(rules) if not isinstance(trained, int) else 0,
    )


def _gradient_on_host(rules: EngineRules) -> int:
    """Bytes of an element beside offloaded states: its fp32 gradient, and what is accumulated or travels back."""
    if rules.offload_optimizer != "cpu":
        return 0
    return FP32 + (rules.gradient if rules.keeper == "zero3" else rules.weight)


def teacher_bytes(parameters: int | Sequence[int], placement: Placement, ranks: int, rules: EngineRules) -> int:
    """Bytes of a frozen teacher's weights on one rank.

    Whole when `replicated`; `fairscale` divides it block by block without a remainder to speak of, `zero3` tensor by
    tensor, its small ones staying whole beside their partitions.
    """
    sizes = [parameters] if isinstance(parameters, int) else list(parameters)
    if placement == "replicated":
        return rules.frozen * sum(sizes)
    divided = sum(-(-size // ranks) for size in sizes)
    small = rules.size("stage3_param_persistence_threshold")
    kept = sum(size for size in sizes if size <= small) if placement == "zero3" and ranks > 1 else 0
    return rules.frozen * (divided + kept)


def _share(sizes: Sequence[int], rules: EngineRules, ranks: int) -> int:
    """Elements of one partition: each tensor is padded to the ranks under ZeRO-3, all of them together before."""
    if rules.stage >= 3:
        return sum(-(-size // ranks) for size in sizes)
    aligned = ALIGNMENT * ranks
    return -(-sum(sizes) // aligned) * aligned // ranks


def _persistent(sizes: Sequence[int], rules: EngineRules, ranks: int) -> int:
    if rules.keeper != "zero3" or ranks == 1:
        return 0
    threshold = rules.size("stage3_param_persistence_threshold")
    return rules.weight * sum(size for size in sizes if size <= threshold)


def _buckets(rules: EngineRules) -> int:
    resident = rules.keeper == "zero3" and rules.zero.get("contiguous_gradients", True)
    return rules.size("reduce_bucket_size") * rules.reduced if resident else 0


def machine_memory(root: Path = Path("/")) -> MachineMemory:
    """What this machine has, asked without torch: nvidia-smi, /proc/meminfo and the control groups."""
    host = host_memory.limit(root)
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


def size_text(size: int) -> str:
    return f"{_gib(size)} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def _gib(size: int) -> str:
    return f"{size / GIB:.0f}" if size >= 10 * GIB else f"{size / GIB:.1f}"


def _gib_down(size: int) -> str:
    return f"{size // GIB}" if size >= 10 * GIB else f"{size * 10 // GIB / 10:.1f}"
