"""How well the order mixes, beside a true shuffle, and which bytes it has nodes read.

`python -m pytest -m prove tests/prove/test_order.py` writes docs/measurements/order.json and order.md.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fdscale.data.order import GlobalOrder, Numbers, Order, WindowedOrder
from tests.prove.page import Page

pytestmark = [pytest.mark.prove, pytest.mark.timeout(1200)]

SAMPLES, SHARD, BATCH = 1_281_167, 1111, 2048  # ImageNet-1K, in shards whose borders are not those of lanes
CLASSES = 1000
STARTS = np.minimum(np.arange(0, SAMPLES + SHARD, SHARD), SAMPLES)
ORDERS = {
    "true shuffle": lambda: GlobalOrder(SAMPLES, BATCH, 0),
    "shuffle = 2^18 (default)": lambda: WindowedOrder(STARTS, BATCH, 0, 2**18),
    "shuffle = 2^16": lambda: WindowedOrder(STARTS, BATCH, 0, 2**16),
    "shuffle = 2^14": lambda: WindowedOrder(STARTS, BATCH, 0, 2**14),
}
NODES = (1, 2, 4, 16, 64)
COLUMNS = ["order", "shards a batch", "classes a batch, sorted shards", "same shard, x true", "read / used: 1 node"]
COLUMNS += ["2", "4", "16", "64 nodes", "GiB at once: 1 node", "16 nodes"]
MEAN_BYTES = 110_000  # ImageNet's JPEGs


def test_the_order_mixes_and_has_each_node_read_little_more_than_it_uses() -> None:
    page = Page("order", ("fdscale/data/order.py", "tests/prove/test_order.py"))
    rows = {name: page.row(name, lambda make=make: measured(make())) for name, make in ORDERS.items()}  # type: ignore[misc]
    page.write_table(
        "The global sample order",
        f"One epoch of {SAMPLES:,} samples in shards of {SHARD:,}, global batch {BATCH:,}; exact counts, no timing. "
        "*Classes a batch*: where shards were packed class by class, the worst case (`fdscale shards pack` has them "
        "mixed). *Same shard*: pairs of one batch that come from one shard, beside a true shuffle. *Read / "
        "used*: bytes of the shards that each node reads once, whole, over the bytes of its samples. *At once*: shards "
        f"that one node needs within a window of steps, at {MEAN_BYTES // 1000} kB an image. A true shuffle needs all.",
        COLUMNS,
        [line(name, row) for name, row in rows.items()],
    )
    default = rows["shuffle = 2^18 (default)"]
    assert default["classes"] > 0.3 * rows["true shuffle"]["classes"]
    assert default["read_by_nodes"]["16"] < 1.15


def measured(order: Order) -> dict[str, Any]:
    """Counts over one epoch."""
    epoch = np.stack([order.batch(step) for step in range(order.steps_per_epoch)])
    assert len(np.unique(epoch)) == epoch.size
    shards, classes = epoch // SHARD, epoch * CLASSES // SAMPLES
    return {
        "shards": distinct(shards),
        "classes": distinct(classes),
        "same_shard_pairs": float(np.mean([pairs(batch) for batch in shards])),
        "read_by_nodes": {str(nodes): read_over_used(shards, nodes) for nodes in NODES},
        "gib_at_once": {str(nodes): at_once(order, shards, nodes) * SHARD * MEAN_BYTES / 2**30 for nodes in (1, 16)},
    }


def distinct(batches: Numbers) -> float:
    return float(np.mean([len(np.unique(batch)) for batch in batches]))


def pairs(batch: Numbers) -> float:
    counts = np.unique(batch, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(batch) * (len(batch) - 1)))


def read_over_used(shards: Numbers, nodes: int) -> float:
    """Samples in all shards that each node reads, over the samples that are shown."""
    lengths = np.diff(STARTS)
    read = [lengths[np.unique(rows)].sum() for rows in np.split(shards, nodes, axis=1)]
    return float(sum(read) / shards.size)


def at_once(order: Order, shards: Numbers, nodes: int) -> int:
    """Shards that the first node needs within any window of steps."""
    steps = order.window_steps if isinstance(order, WindowedOrder) else len(shards)
    mine = shards[:, : shards.shape[1] // nodes]
    return max(len(np.unique(mine[start : start + steps])) for start in range(0, len(mine), max(1, steps // 4)))


def line(name: str, row: dict[str, Any]) -> dict[str, str]:
    true = pairs_of_a_true_shuffle()
    told = [name, f"{row['shards']:.0f}", f"{row['classes']:.0f}", f"{row['same_shard_pairs'] / true:.2f}"]
    told += [f"{row['read_by_nodes'][str(nodes)]:.2f}" for nodes in NODES]
    told += [f"{row['gib_at_once'][str(nodes)]:.1f}" for nodes in (1, 16)]
    return dict(zip(COLUMNS, told, strict=True))


def pairs_of_a_true_shuffle() -> float:
    """The chance that two samples drawn without replacement are of one shard."""
    lengths = np.diff(STARTS)
    return float((lengths * (lengths - 1)).sum() / (SAMPLES * (SAMPLES - 1)))
