"""Resuming on another number of ranks: this rank's parts of every weight and state, from a universal checkpoint.

DeepSpeed's own loader of that format shares one update counter among all groups (AdamW then counts it once a group),
gives every group the first one's options, and restores neither frozen weights, nor buffers, nor an average. So what
this rank would have saved itself is put together here, and handed to DeepSpeed's loader of ordinary checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.training.engine import gathered
from fdscale.training.partitions import WEIGHT
from fdscale.training.universal import OPTIMIZER_STATE, model_states

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE = ("loss_scaler", "dynamic_loss_scale", "overflow")


@dataclass(frozen=True)
class Part:
    """`count` of a flattened weight's `size` elements, from `start` on: in a flat tensor of this rank from `at` on."""

    name: str
    size: int
    start: int
    count: int
    at: int


def load_universal(engine: DeepSpeedEngine, folder: Path) -> dict[str, Any]:
    """Fill an engine of ZeRO stage 1, 2 or 3 on any number of ranks; returns what the loop kept.

    Raises UserError when the folder lacks a weight of the engine's, or holds one of another size.
    """
    if engine.zero_nvme_offload_optimizer():
        raise UserError(
            "zero_optimization.offload_optimizer.device: optimizer states on NVMe cannot be divided anew: start on as "
            'many ranks as before, or with "cpu"'
        )
    optimizer, zero_3 = engine.optimizer, engine.zero_optimization_partition_weights()
    saved = torch.load(model_states(folder), map_location="cpu", mmap=True, weights_only=False)
    mine = _own_state(engine, folder, zero_3)
    if zero_3:
        optimizer.checkpoint_event_prologue()
    _fill_module(engine, folder, zero_3)
    optimizer.load_state_dict([mine] * engine.dp_world_size, load_optimizer_states=True, load_from_fp32_weights=True)
    if zero_3:
        optimizer.checkpoint_event_epilogue()
    for counter in COUNTERS:
        setattr(engine, counter, saved[counter])
    return saved


def _fill_module(engine: DeepSpeedEngine, folder: Path, zero_3: bool) -> None:
    """Everything but what ZeRO-3 divides, which follows from the fp32 weights: frozen weights, buffers, copies."""
    parameters = dict(engine.module.named_parameters())
    for name, tensor in engine.module.state_dict(keep_vars=True).items():
        parameter = parameters.get(name)
        if parameter is None and not isinstance(tensor, torch.nn.Parameter):
            tensor.copy_(_whole(folder, name, WEIGHT, tensor.numel()).view_as(tensor))
        elif parameter is not None and not (zero_3 and parameter.requires_grad):
            size = parameter.ds_numel if zero_3 else parameter.numel()
            whole = _whole(folder, name, WEIGHT, size)
            with torch.no_grad(), gathered(parameter, written_by=0):
                if engine.global_rank == 0 or not zero_3:
                    parameter.copy_(whole.view_as(parameter))


def _own_state(engine: DeepSpeedEngine, folder: Path, zero_3: bool) -> dict[str, Any]:
    """What `engine.optimizer.state_dict()` would be, had this rank trained up to here among as many as now."""
    optimizer = engine.optimizer
    flats = optimizer.fp32_partitioned_groups_flat if zero_3 else optimizer.single_partition_of_fp32_groups
    layout = list(_parts_of_zero_3(optimizer) if zero_3 else _parts_of_zero_1_or_2(optimizer))
    weights, states = [], {}
    for number, (flat, (first, parts)) in enumerate(zip(flats, layout, strict=True)):
        weights.append(_flat(folder, WEIGHT, parts, flat.numel()))
        kept = sorted(path.stem for path in (folder / "zero" / first).glob("*.pt"))
        states[number] = {s: _flat(folder, s, parts, flat.numel()) for s in kept if s not in (WEIGHT, "step")}
        states[number]["step"] = _load(folder, first, "step")
    mine = optimizer.state_dict()
    mine["fp32_flat_groups" if zero_3 else "single_partition_of_fp32_groups"] = weights
    mine["optimizer_state_dict" if zero_3 else "base_optimizer_state"]["state"] = states
    counters = torch.load(folder / "zero" / OPTIMIZER_STATE, map_location="cpu", weights_only=False)
    return mine | {name: counters[name] for name in LOSS_SCALE}


def _parts_of_zero_3(optimizer: Any) -> Iterator[tuple[str, list[Part]]]:
    """For each flat tensor of this rank a weight's name, and its parts: equal cuts, the last ones filled up."""
    for group in optimizer.fp16_groups:
        parts, at = [], 0
        for weight in group:
            cut = weight.partition_numel()
            start = min(weight.ds_numel, cut * optimizer._get_param_partition_rank(weight))
            count = min(cut, weight.ds_numel - start)
            parts.append(Part(optimizer.param_names[weight], weight.ds_numel, start, count, at))
            at += cut
        yield parts[0].name, parts


def _parts_of_zero_1_or_2(optimizer: Any) -> Iterator[tuple[str, list[Part]]]:
    """Likewise: a group's weights one after the other, cut where a rank's share ends."""
    for group in optimizer.bit16_groups:
        parts = []
        for weight in group:
            if (part := weight._hp_mapping) is not None:
                own, at = part.lp_fragment_address, part.hp_fragment_address.start
                parts.append(Part(optimizer.param_names[weight], weight.numel(), own.start, own.numel, at))
        yield optimizer.param_names[group[0]], parts


def _flat(folder: Path, state: str, parts: list[Part], size: int) -> Tensor:
    flat = torch.zeros(size)
    for part in parts:
        whole = _whole(folder, part.name, state, part.size)
        flat[part.at : part.at + part.count] = whole[part.start : part.start + part.count]
    return flat


def _whole(folder: Path, name: str, state: str, size: int) -> Tensor:
    """A flattened weight or state; its bytes stay in the file until they are read."""
    whole = _load(folder, name, state)["param"].flatten()
    if whole.numel() != size:
        raise UserError(
            f"{folder}: '{name}' has {whole.numel()} elements there and {size} here: it is of another network"
        )
    return whole


def _load(folder: Path, name: str, state: str) -> Any:
    path = folder / "zero" / name / f"{state}.pt"
    if not path.is_file():
        raise UserError(f"{folder}: there is no {state} of '{name}': it is of another network")
    return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
