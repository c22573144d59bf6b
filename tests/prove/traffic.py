"""What ranks really say to each other: every collective that reaches c10d, with its bytes, whoever asked for it.

Counted at torch's dispatcher, below DeepSpeed and below `torch.distributed`: neither's own bookkeeping is believed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

GATHER, SCATTER, REDUCE, OTHER = "all_gather", "reduce_scatter", "all_reduce", "other"
KINDS = {
    "_allgather_base_": GATHER,
    "allgather_": GATHER,
    "allgather_into_tensor_coalesced_": GATHER,
    "_reduce_scatter_base_": SCATTER,
    "reduce_scatter_": SCATTER,
    "reduce_scatter_tensor_coalesced_": SCATTER,
    "allreduce_": REDUCE,
}


class Traffic(TorchDispatchMode):
    """Counts collectives, and the bytes that this rank sends (it receives as many) by a bandwidth-optimal algorithm.

    With B bytes of the whole tensor in a group of n: (n - 1) / n * B for an all-gather or a reduce-scatter, twice
    that for an all-reduce (Rajbhandari et al., arXiv 1910.02054, section 7.1). `bytes_in_groups` has the same bytes
    by the size of the group.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()
        self.bytes_in_groups: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, operation: str, arguments: Any) -> None:
        kind = KINDS.get(operation, OTHER)
        if kind == OTHER and "barrier" in operation:
            return
        whole = max((_bytes(tensors) for tensors in map(list, map(_tensors, arguments))), default=0)
        ranks = next(_group_sizes(arguments))
        sent = round(whole * (ranks - 1) / ranks * (2 if kind == REDUCE else 1))
        self.calls[kind] += 1
        self.bytes[kind] += sent
        self.bytes_in_groups[ranks] += sent

    def as_dict(self) -> dict[str, dict[str, int]]:
        return {kind: {"calls": self.calls[kind], "bytes": self.bytes[kind]} for kind in sorted(self.calls)}


def _group_sizes(arguments: Any) -> Iterator[int]:
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            yield dist.ProcessGroup.unbox(argument).size()


def _tensors(node: Any) -> Iterator[Tensor]:
    if isinstance(node, torch.Tensor):
        yield node
    elif isinstance(node, list | tuple):
        for child in node:
            yield from _tensors(child)


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
