"""Opens an index and reads the first micro batch of a step deep in an epoch; prints what that took, as JSON."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch

from fdscale.data.augment import Augmentation
from fdscale.data.batches import TrainBatches
from fdscale.data.index import load_index
from fdscale.data.loader import TrainLoader
from fdscale.data.mixture import Mixture

VIEWS = Augmentation((0.08, 1.0), (3 / 4, 4 / 3), "bilinear", 0.5)


def bytes_read() -> int:
    """By this process so far, from files and from caches."""
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["rchar"])


def memory() -> dict[str, int]:
    """Resident bytes: of its own, and of mapped files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("Rss"))
    return {name.rstrip(":"): int(kib) * 1024 for name, kib, _ in lines}


def main(folder: str, micro_batch: int, global_batch: int, percent: int, workers: int) -> None:
    memory_before, read_before, began = memory(), bytes_read(), time.perf_counter()
    mixture = Mixture((load_index(folder),))
    indexed = time.perf_counter()
    order = mixture.order(global_batch, 0)
    step = order.steps_per_epoch * percent // 100
    batches, ranks = TrainBatches(mixture, 224, VIEWS, 0), global_batch // micro_batch
    loader = TrainLoader(batches, order, 0, ranks, micro_batch, workers, torch.device("cpu"))
    steps = loader.steps(step, step + 1)
    (batch,) = next(steps)
    done, after = time.perf_counter(), memory()
    row = {"index_seconds": indexed - began, "first_batch_seconds": done - indexed, "step": step}
    row |= {"images": len(batch.images), "bad": len(batch.bad), "bytes_read": bytes_read() - read_before}
    row |= {"own_bytes": after["RssAnon"] - memory_before["RssAnon"]}
    print(json.dumps(row | {"mapped_bytes": after["RssFile"] - memory_before["RssFile"]}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
