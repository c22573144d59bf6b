"""What ZeRO-3 sends in a step: collectives and bytes of a rank beside the least possible, before and after tuning.

`python -m pytest -m prove tests/prove/test_traffic.py` writes docs/measurements/traffic.json and traffic.md.
"""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

from fdscale.students.geometry import STUDENTS
from fdscale.training.engine import Connection
from tests.prove.networks import (
    distiller_of,
    engine_of,
    one_step,
    parameter_sizes,
    shipped_zero,
    some_batch,
    untuned,
)
from tests.prove.page import Page
from tests.prove.traffic import Traffic

pytestmark = [pytest.mark.prove, pytest.mark.timeout(3000)]

BYTES = 4  # fp32
SWINV2_G = STUDENTS["swinv2_g"].parameters()
SMALL_G = 3_157_246  # of the network with its depths: what its sizes are scaled by
SCALED = {"parameters": SMALL_G, "of": SWINV2_G}
LAPTOP, GIANT = shipped_zero("laptop"), shipped_zero("swinv2_g", **SCALED)
SLOW_LINKS = shipped_zero("swinv2_g_slow_links", **SCALED) | {"zero_hpz_partition_size": 2}
NO_PREFETCH = {"stage3_prefetch_bucket_size": 0}
AHEAD = {"stage3_prefetch_bucket_size": 1_000_000}  # what laptop.json said before
# network -> what was shipped before, what is now; the threshold's 100 k are scaled, too
VARIANTS = {
    "swinv2_t": {"before": untuned(LAPTOP, **AHEAD), "after": LAPTOP},
    "vit_b16": {"before": untuned(LAPTOP, **AHEAD), "after": LAPTOP},
    "swinv2_g depths": {
        "before": untuned(GIANT, stage3_param_persistence_threshold=105, stage3_max_reuse_distance=SMALL_G // 3),
        "after": GIANT,
        "after, nothing ahead": GIANT | NO_PREFETCH,
    },
}
CASES = [
    (network, checkpointing, ranks, variant)
    for network, checkpointing, all_ranks in (
        ("swinv2_t", "none", (1, 2, 4)),
        ("swinv2_t", "blocks", (2,)),
        ("vit_b16", "none", (1, 2, 4)),
        ("vit_b16", "blocks", (2,)),
        ("swinv2_g depths", "blocks", (2, 4)),
    )
    for ranks in all_ranks
    for variant in (VARIANTS[network] if ranks > 1 else ("after",))
]


def measure(
    connection: Connection, network: str, checkpointing: str, zero: dict[str, Any], counted: bool = True, steps: int = 3
) -> dict[str, Any]:
    """Traffic of the last of some steps (the first two record the order), the times of all, and the least possible."""
    distiller, student = distiller_of(network, checkpointing)
    engine = engine_of(distiller, zero)
    seconds = []
    for step in range(steps):
        batch = some_batch(student, 1, seed=step * 10 + connection.rank.rank)
        began, traffic = time.perf_counter(), Traffic()
        if counted:
            with traffic:
                one_step(engine, *batch)
        else:
            one_step(engine, *batch)
        seconds.append(time.perf_counter() - began)
    persistent = [p.ds_numel for p in engine.optimizer.persistent_parameters]
    least = least_traffic(distiller, zero["reduce_bucket_size"], connection.rank.world_size)
    engine.destroy()
    return {
        "parameters": sum(parameter_sizes(distiller)),
        "tensors": len(parameter_sizes(distiller)),
        "persistent_tensors": len(persistent),
        "step_seconds": [round(second, 2) for second in seconds],
        "sent": traffic.as_dict(),
        "collectives": sum(traffic.calls.values()),
        "bytes": sum(traffic.bytes.values()),
        "bytes_in_groups": dict(traffic.bytes_in_groups),
        **least,
    }


def least_traffic(distiller: torch.nn.Module, bucket: int, ranks: int) -> dict[str, int]:
    """The least of a ZeRO-3 step in which no weight stays whole between its forward and its backward.

    Bytes: each weight is gathered for the forward and for the backward pass, each gradient reduced and scattered once:
    3 * (n - 1) / n of the weights' bytes, each tensor rounded up to whole shares. A block that is recomputed needs its
    weights for that and for its backward pass right after: one gather serves both. Collectives: one gather for each
    unit (a block, a merging, any other module with weights of its own) and pass, one reduce-scatter for each
    bucketful of whole gradients in the order of the backward pass, one all-reduce for the gradient norm.
    """
    elements = sum(math.ceil(size / ranks) for size in parameter_sizes(distiller)) * ranks
    units = len(list(_units(distiller)))
    return {
        "least_bytes": round(3 * (ranks - 1) / ranks * elements * BYTES),
        "least_collectives": (2 * units + _bucketfuls(parameter_sizes(distiller), bucket) + 1) if ranks > 1 else 0,
        "units": units,
    }


def _bucketfuls(sizes: list[int], bucket: int) -> int:
    """How often a bucket is sent that takes whole tensors, from the last to the first."""
    sent, inside = 1, 0
    for size in reversed(sizes):
        if inside and inside + size > bucket:
            sent, inside = sent + 1, 0
        inside += size
    return sent


def _units(module: torch.nn.Module) -> Any:
    if type(module).__name__ in ("SwinV2Block", "PatchMerging", "ViTBlock"):
        yield module
        return
    if list(module.parameters(recurse=False)):
        yield module
    for child in module.children():
        yield from _units(child)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page("traffic")


@pytest.mark.parametrize(("network", "checkpointing", "ranks", "variant"), CASES)
def test_traffic_of_a_step(
    network: str, checkpointing: str, ranks: int, variant: str, page: Page, fresh_ranks: Any
) -> None:
    zero = VARIANTS[network][variant]
    key = f"{network}, checkpointing {checkpointing}, {ranks} ranks, {variant}"
    row = page.row(key, lambda: fresh_ranks(ranks)(measure, network, checkpointing, zero, timeout=1000)[0])
    write_table(page)
    if ranks > 1 and variant.startswith("after"):
        assert row["bytes"] <= 1.05 * row["least_bytes"]
        assert row["collectives"] <= 1.05 * row["least_collectives"]


def test_zero_plus_plus_keeps_the_backward_gathers_within_a_node(page: Page, fresh_ranks: Any) -> None:
    """Four ranks as two nodes of two."""
    network = "swinv2_g depths"
    row = page.row(
        f"{network}, checkpointing blocks, 4 ranks, hpz 2",
        lambda: fresh_ranks(4)(measure, network, "blocks", SLOW_LINKS | NO_PREFETCH, timeout=1000)[0],
    )
    plain = page.rows[f"{network}, checkpointing blocks, 4 ranks, after, nothing ahead"]
    write_table(page)
    across = {
        name: one["bytes_in_groups"].get("4", one["bytes_in_groups"].get(4))
        for name, one in (("hpz", row), ("plain", plain))
    }
    assert across["hpz"] <= 0.7 * across["plain"]


def bytes_among(row: dict[str, Any], ranks: int) -> int:
    """What was sent in groups of so many ranks."""
    return {int(size): sent for size, sent in row["bytes_in_groups"].items()}[ranks]


@pytest.mark.parametrize("reuse", [1_000_000_000, 0])
@pytest.mark.parametrize("leaves", [False, True], ids=["modules", "leaves"])
def test_the_slow_second_step(leaves: bool, reuse: int, page: Page, fresh_ranks: Any) -> None:
    """DeepSpeed's search for a weight's next use, over all modules within that distance, at SwinV2-G's depths."""
    sizes = {"stage3_max_reuse_distance": reuse, "stage3_prefetch_bucket_size": 50_000_000}
    zero = (GIANT if leaves else untuned(GIANT, stage3_param_persistence_threshold=100_000)) | sizes
    key = f"second step, {'leaf modules' if leaves else 'every module'}, reuse distance {reuse}"
    row = page.row(key, lambda: fresh_ranks(2)(measure, "swinv2_g depths", "blocks", zero, False, 4, timeout=1000)[0])
    write_table(page)
    if reuse == 0:
        assert row["step_seconds"][1] < 3 * max(row["step_seconds"][2:])


COLUMNS = ("case", "collectives", "least", "x", "MB sent", "least MB", "x ", "step 2, 3 (s)")


def write_table(page: Page) -> None:
    lines = [_line(key, row) for key, row in page.rows.items()]
    how = (
        "Collectives and bytes that one rank sends in the third ZeRO-3 step in fp32, counted at torch's dispatcher "
        "(tests/prove/traffic.py); the least is derived in tests/prove/test_traffic.py."
    )
    page.write_table("Traffic of a step", how, COLUMNS, lines)


def _line(key: str, row: dict[str, Any]) -> dict[str, str]:
    def over(value: int, least: int) -> str:
        return f"{value / least:.2f}" if least and value else "-"

    return {
        "case": key,
        "collectives": str(row["collectives"] or "-"),
        "least": str(row["least_collectives"]),
        "x": over(row["collectives"], row["least_collectives"]),
        "MB sent": f"{row['bytes'] / 1e6:.1f}",
        "least MB": f"{row['least_bytes'] / 1e6:.1f}",
        "x ": over(row["bytes"], row["least_bytes"]),
        "step 2, 3 (s)": ", ".join(f"{second:.1f}" for second in row["step_seconds"][1:3]),
    }
