"""What a checkpoint holds, weight by weight: read from the files of all ranks, memory-mapped, without DeepSpeed."""

from __future__ import annotations

import math
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Size, Tensor

from fdscale.config.errors import UserError
from fdscale.training.average import AVERAGE

WEIGHT = "fp32"  # the name of the weight itself among what is kept for it
STATES = (WEIGHT, "exp_avg", "exp_avg_sq", AVERAGE)
ORDER = "optimizer_names"  # under ZeRO-0 the optimizer numbers the weights: their names, in its order
AS_THEY_ARE = ("torch", "collections")  # packages whose names in a file are honoured

Span = tuple[int, int, int]  # number of the flat tensor, first element in it, elements


@dataclass(frozen=True)
class Share:
    """What one rank holds: its flat tensors by state, updates made to each, and where its part of a weight lies."""

    flats: Mapping[str, Sequence[Tensor]]
    updates: Sequence[Tensor]
    spans: Mapping[str, Span]


@dataclass(frozen=True)
class Partitions:
    """The weights of one checkpoint of ZeRO stage 0 to 3, saved by any number of ranks (`open_partitions`).

    `names` are those of the trained module's state dict, in its order, each with its shape; `trained` the ones that
    the optimizer keeps `states` for. `fixed` are frozen weights and buffers, in parts; `shared` are second names.
    """

    folder: Path
    names: Mapping[str, Size]
    trained: frozenset[str]
    states: tuple[str, ...]
    shares: Sequence[Share]
    fixed: Mapping[str, Sequence[Tensor]]
    shared: Mapping[str, str]

    def parts(self, name: str, state: str = WEIGHT) -> Iterator[Tensor]:
        """The flattened weight, part by part in order; its bytes stay in the files until they are read."""
        name = self.shared.get(name, name)
        if name not in self.trained:
            yield from self.fixed[name]
            return
        for share in self.shares:
            if name in share.spans:
                flat, at, count = share.spans[name]
                yield share.flats[state][flat].detach().narrow(0, at, count)

    def read(self, name: str, state: str = WEIGHT) -> Tensor:
        """The weight in full, in its shape. What is not trained has its value and no other state."""
        return torch.cat(list(self.parts(name, state))).view(self.names[name])

    def updates(self, name: str) -> Tensor:
        """How often the optimizer has updated a trained weight: its `step`."""
        share = next(share for share in self.shares if name in share.spans)
        return share.updates[share.spans[name][0]]


def open_partitions(folder: Path) -> Partitions:
    """Map the files of a checkpoint folder, which was verified before.

    Raises UserError for a checkpoint whose optimizer states DeepSpeed has left in files of its own (NVMe offload).
    """
    if (folder / "offloaded_tensors").exists():
        raise UserError(f"{folder}: its optimizer states were offloaded to NVMe, in files that only as many ranks read")
    models = [read_mapped(path) for path in _by_rank(folder, "*_model_states.pt")]
    optimizers = [read_mapped(path)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
    shapes = _trained_shapes(models[0])
    if not optimizers:
        shares = [_undivided(models[0], shapes)]
    elif "fp32_flat_groups" in optimizers[0]:
        shares = [_of_zero_3(rank, len(optimizers), o, models[0]["param_shapes"]) for rank, o in enumerate(optimizers)]
    else:
        shares = [_of_zero_1_or_2(optimizer) for optimizer in optimizers]
    fixed = _fixed(models, shapes)
    shared = _second_names(models[0], shapes) if models[0]["shared_params"] is None else models[0]["shared_params"]
    known = shapes | {name: size for name, (size, _) in fixed.items()}
    return Partitions(
        folder,
        {name: known[shared.get(name, name)] for name in models[0]["module"]},
        frozenset(shapes),
        tuple(state for state in STATES if state in shares[0].flats),
        shares,
        {name: parts for name, (_, parts) in fixed.items()},
        shared,
    )


def read_mapped(path: Path) -> dict[str, Any]:
    """A file that torch saved, its tensors memory-mapped; objects of DeepSpeed's become inert `Recorded` ones."""
    inert = SimpleNamespace(__name__="inert", Unpickler=_Unpickler)
    return torch.load(path, map_location="cpu", mmap=True, weights_only=False, pickle_module=inert)


class Recorded:
    """An object of a class that is not ours to run: its arguments, and its attributes as they were."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        self.arguments = arguments


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        return super().find_class(module, name) if module.split(".")[0] in AS_THEY_ARE else Recorded


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    """The files of all ranks in the order of the ranks, which their names tell."""

    def rank(path: Path) -> int:
        found = re.search(r"zero_pp_rank_(\d+)", path.name)
        return int(found[1]) if found else 0

    return sorted(folder.glob(pattern), key=rank)


def _trained_shapes(model: Mapping[str, Any]) -> dict[str, Size]:
    """Every weight that the optimizer has, with its shape."""
    if model["param_shapes"] is not None:
        return {name: size for group in model["param_shapes"] for name, size in group.items()}
    return {name: model["module"][name].shape for name in model.get(ORDER, ())}


def _second_names(model: Mapping[str, Any], shapes: Mapping[str, Size]) -> dict[str, str]:
    """Names of trained weights that stand for one with another name, told by where their bytes lie."""
    first = {model["module"][name].data_ptr(): name for name in shapes}
    others = ((name, t.data_ptr()) for name, t in model["module"].items() if name not in shapes)
    return {name: first[place] for name, place in others if place in first}


def _of_zero_3(rank: int, ranks: int, optimizer: Mapping[str, Any], groups: Sequence[Mapping[str, Size]]) -> Share:
    """Each weight is cut into equal parts, the last ones padded; a flat tensor is this rank's parts of a sub-group."""
    spans: dict[str, Span] = {}
    for flat, group in enumerate(groups):
        at = 0
        for name, size in group.items():
            part = math.ceil(size.numel() / ranks)
            spans[name] = (flat, at, min(part, max(0, size.numel() - rank * part)))
            at += part
    return _share(optimizer["fp32_flat_groups"], optimizer["optimizer_state_dict"]["state"], spans)


def _of_zero_1_or_2(optimizer: Mapping[str, Any]) -> Share:
    """A group's weights lie one after the other, and are cut where a rank's share ends; each rank notes its parts."""
    notes = enumerate(optimizer["param_slice_mappings"])
    spans = {name: (flat, note.start, note.numel) for flat, group in notes for name, note in group.items()}
    states = optimizer["base_optimizer_state"]["state"]
    return _share(optimizer["single_partition_of_fp32_groups"], states, spans)


def _undivided(model: Mapping[str, Any], shapes: Mapping[str, Size]) -> Share:
    """ZeRO-0: a weight is its own flat tensor; one that never had a gradient is its own average."""
    weights = [model["module"][name].flatten() for name in shapes]
    states = model["optimizer"]["state"]
    filled = {n: states.get(n, {"step": torch.tensor(0.0), AVERAGE: weight}) for n, weight in enumerate(weights)}
    return _share(weights, filled, {name: (flat, 0, size.numel()) for flat, (name, size) in enumerate(shapes.items())})


def _share(weights: Sequence[Tensor], states: Mapping[int, Mapping[str, Tensor]], spans: Mapping[str, Span]) -> Share:
    order = [states[flat] for flat in range(len(weights))]
    kept = [state for state in STATES if order and all(state in of_flat for of_flat in order)]
    flats = {state: [of_flat[state].flatten() for of_flat in order] for state in kept}
    return Share({WEIGHT: weights, **flats}, [of_flat["step"] for of_flat in order], spans)


def _fixed(models: Sequence[Mapping[str, Any]], shapes: Mapping[str, Size]) -> dict[str, tuple[Size, list[Tensor]]]:
    """Frozen weights, which ZeRO-3 divides as well, and rank 0's buffers: the shape and the parts of each."""
    found = {name: (t.shape, [t.flatten()]) for name, t in models[0]["module"].items() if name not in shapes}
    for name, size in (models[0]["frozen_param_shapes"] or {}).items():
        parts = [model["frozen_param_fragments"][name].flatten() for model in models]
        padding = sum(part.numel() for part in parts) - size.numel()
        found[name] = (size, _without_padding(parts, padding))
    return found


def _without_padding(parts: Sequence[Tensor], padding: int) -> list[Tensor]:
    """The parts without what their last elements were filled up with; the padding may span several of them."""
    lean: list[Tensor] = []
    for part in reversed(parts):
        dropped = min(padding, part.numel())
        lean.insert(0, part[: part.numel() - dropped])
        padding -= dropped
    return lean
