"""The images that are looked at: a seeded, evenly spread sample of a data set, the same for every model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fdscale.data.batches import PADDING, Batch, EvalBatches, Request
from fdscale.data.index import Index
from fdscale.data.loader import EvalLoader

logger = logging.getLogger(__name__)


def evenly_spread(samples: int, wanted: int, seed: int = 0) -> NDArray[np.int64]:
    """So many of `samples` numbers, int64 (min(wanted, samples),): one drawn from each of as many equal parts.

    In an order of chance, since shards are often packed class by class, and batches shall be mixed.
    """
    draw, count = np.random.default_rng(seed), min(wanted, samples)
    edges = np.arange(count + 1) * samples // max(count, 1)
    return draw.permutation(draw.integers(edges[:-1], edges[1:]))


class Sampled:
    """Micro batches of a sample: its n-th image is number `chosen[n]` of the data set."""

    def __init__(self, batches: EvalBatches, chosen: NDArray[np.int64]) -> None:
        self._batches, self._chosen = batches, chosen

    @property
    def image_bytes(self) -> int:
        return self._batches.image_bytes

    def __getitem__(self, request: Request) -> Batch:
        known = request.samples != PADDING
        samples = np.where(known, self._chosen[np.where(known, request.samples, 0)], PADDING)
        return self._batches[replace(request, samples=samples)]

    def name(self, sample: int) -> str:
        """`SHARD:MEMBER` of an image."""
        return self._batches.name(sample)

    def close(self) -> None:
        """Let go of the open shards."""
        self._batches.close()


def batches_by_size(
    index: Index, chosen: NDArray[np.int64], sizes: Iterable[int], batch: int, workers: int, device: torch.device
) -> Iterator[dict[int, Batch]]:
    """Batch after batch of the chosen images: image side -> the images at that side, uint8 (B, 3, side, side).

    Each side is read by loaders of its own, in step: a model sees just what it sees in evaluation, and models of
    different sizes see the same images in the same batches. Images that cannot be decoded are left out, and told.
    """
    loaders = {side: _loader(index, chosen, side, batch, workers, device) for side in sorted(set(sizes))}
    for parts in zip(*loaders.values(), strict=True):
        for bad in parts[0].bad:
            logger.warning("left out, it cannot be decoded: %s", bad)
        if parts[0].valid.any():
            yield {side: _decoded(part) for side, part in zip(loaders, parts, strict=True)}


def _loader(
    index: Index, chosen: NDArray[np.int64], side: int, batch: int, workers: int, device: torch.device
) -> EvalLoader:
    images = Sampled(EvalBatches(index, side, "bicubic"), chosen)
    return EvalLoader(images, len(chosen), 0, 1, min(batch, len(chosen)), workers, device)


def _decoded(batch: Batch) -> Batch:
    """Without padding rows and images that could not be decoded."""
    valid = batch.valid
    return replace(batch, images=batch.images[valid], labels=batch.labels[valid], keys=batch.keys[valid.cpu()])
