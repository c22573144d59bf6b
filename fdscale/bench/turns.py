"""Ways of doing the same, timed in turns, and the matrix products' rates in the same turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from fdscale.bench.measured import wait_for

SIDES = {"bf16": (2048, 4096), "fp32": (2048,)}  # of the square matrices
TYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

Seconds = Mapping[str, Sequence[float]]


def turns(ways: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """What each way gives in each turn; every turn begins with another way."""
    names = list(ways)
    given: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeats):
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            given[name].append(ways[name]())
    return given


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Of the second of two runs: the first finds again what lay still while others had their turn."""
    run()
    wait_for(device)
    began = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - began


def paired(slower: Sequence[float], faster: Sequence[float]) -> float:
    """How many times as long the first takes, the median over the turns: what disturbs a turn disturbs both."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))


def products(device: torch.device, sides: Mapping[str, Sequence[int]] = SIDES) -> dict[str, Callable[[], object]]:
    """Square matrix products by their names, `bf16 4096`."""
    return {f"{name} {side}": _product(side, TYPES[name], device) for name in sides for side in sides[name]}


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    torch.mm(a, b, out=out)
    return lambda: torch.mm(a, b, out=out)


def ceiling(seconds: Seconds, name: str) -> float:
    """TFLOP/s of the best of the products of that precision."""
    sides = {key: int(key.split()[1]) for key in seconds if key.startswith(f"{name} ")}
    return max(2 * side**3 / statistics.median(seconds[key]) / 1e12 for key, side in sides.items())
