"""The nearest configuration that fits where a plan does not: changes tried one on top of the other; torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fdscale.planning.placement import Placement

MOST_NODES = 1024


@dataclass(frozen=True)
class Configuration:
    """What may change so that a recipe fits, and what is learned stays the same."""

    nodes: int
    checkpointing: str
    deepspeed_json: dict[str, Any]
    placements: dict[str, Placement]

    @property
    def micro_batch(self) -> int:
        return int(self.deepspeed_json["train_micro_batch_size_per_gpu"])


Change = tuple[str, Callable[[Configuration], Configuration]]
Fits = Callable[[Configuration], bool]


def nearest_fit(start: Configuration, fits: Fits) -> tuple[Configuration, list[str]] | None:
    """The configuration nearest to `start` that fits, and the changes that lead there; None where none does.

    Changes are tried in the order of what they cost: recomputation (a third more arithmetic), a higher ZeRO stage and
    divided teachers (traffic), smaller micro batches (traffic once more for each, and less busy GPUs), an optimizer on
    the host (a wait in every step), twice the nodes. What turns out not to be needed is taken back.
    """
    taken: list[Change] = []
    for change in _changes(start):
        taken.append(change)
        if fits(_apply(start, taken)):
            needed = _needed(start, taken, fits)
            return _apply(start, needed), [name for name, _ in needed]
    return None


def _needed(start: Configuration, taken: list[Change], fits: Fits) -> list[Change]:
    """The changes without those that can be left out, the costliest that came first being tried last."""
    kept = list(taken)
    for change in reversed(taken[:-1]):
        without = [each for each in kept if each is not change]
        if fits(_apply(start, without)):
            kept = without
    return kept


def _apply(configuration: Configuration, changes: list[Change]) -> Configuration:
    for _, change in changes:
        configuration = change(configuration)
    return configuration


def _changes(start: Configuration) -> Iterator[Change]:
    zero = start.deepspeed_json["zero_optimization"]
    if start.checkpointing == "none":
        yield "student.activation_checkpointing=blocks", lambda c: replace(c, checkpointing="blocks")
    for stage in range(zero["stage"] + 1, 4):
        yield f"zero_optimization.stage {stage} in the DeepSpeed JSON", _with_zero(stage=stage)
    for where, placement in start.placements.items():
        if placement == "replicated":
            yield f"{where}.placement=zero3", _divided(where)
    micro_batch = start.micro_batch
    while micro_batch > 1 and micro_batch % 2 == 0:
        micro_batch //= 2
        yield f"train_micro_batch_size_per_gpu {micro_batch} in the DeepSpeed JSON", _with_micro_batch(micro_batch)
    if not zero.get("offload_optimizer") and zero["stage"]:
        yield "zero_optimization.offload_optimizer to cpu", _with_zero(offload_optimizer={"device": "cpu"})
    nodes = start.nodes
    while nodes < MOST_NODES:
        nodes *= 2
        yield f"--nodes {nodes}", _with_nodes(nodes)


def _with_zero(**values: Any) -> Callable[[Configuration], Configuration]:
    def change(configuration: Configuration) -> Configuration:
        config = configuration.deepspeed_json
        return replace(
            configuration, deepspeed_json={**config, "zero_optimization": {**config["zero_optimization"], **values}}
        )

    return change


def _divided(where: str) -> Callable[[Configuration], Configuration]:
    return lambda c: replace(c, placements={**c.placements, where: "zero3"})


def _with_micro_batch(size: int) -> Callable[[Configuration], Configuration]:
    return lambda c: replace(c, deepspeed_json={**c.deepspeed_json, "train_micro_batch_size_per_gpu": size})


def _with_nodes(nodes: int) -> Callable[[Configuration], Configuration]:
    return lambda c: replace(c, nodes=nodes)
