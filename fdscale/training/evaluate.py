"""Held-out evaluation on every rank together: sums over valid images, and k-NN where labels exist."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from fdscale.data.batches import Batch
from fdscale.training.engine import averaged_weights, has_average

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

logger = logging.getLogger(__name__)

SampleTerms = Callable[["DeepSpeedEngine", Batch], dict[str, Tensor]]  # one row per image


@torch.no_grad()
def evaluate(
    engine: DeepSpeedEngine,
    sample_terms: SampleTerms,
    batches: Iterable[Batch],
    neighbours: int,
) -> dict[str, float]:
    """Means of each term over all held-out images, prefixed `eval_`, and `eval_knn_accuracy`.

    `sample_terms` gives one row per image: (B,) values, and optionally `features` (B, C). Every rank must be given
    as many batches: under ZeRO-3 uneven forward counts deadlock. The engine is left in evaluation mode.
    """
    engine.eval()
    rows: dict[str, list[Tensor]] = {"labels": []}
    for batch in batches:
        for bad in batch.bad:
            logger.warning("held-out image left out, it cannot be decoded: %s", bad)
        for name, value in {**sample_terms(engine, batch), "labels": batch.labels}.items():
            rows.setdefault(name, []).append(value[batch.valid])  # not the rows that only make the ranks' batches equal
    gathered = {name: gather_rows(torch.cat(values)) for name, values in rows.items()}
    labels, features = gathered.pop("labels"), gathered.pop("features", None)
    result = {f"eval_{name}": float(value.double().mean()) for name, value in gathered.items()}
    if features is not None and neighbours and bool((labels >= 0).all()):
        result["eval_knn_accuracy"] = knn_accuracy(features, labels, neighbours)
    return result


def evaluate_average(engine: DeepSpeedEngine, sample_terms: SampleTerms, batches: Iterable[Batch]) -> dict[str, float]:
    """`eval_ema_loss` and, with labels, `eval_ema_accuracy`: the moving average's; nothing before there is one."""
    if not has_average(engine):
        return {}
    with averaged_weights(engine):
        found = evaluate(engine, sample_terms, batches, neighbours=0)
    return {f"eval_ema_{name}": found[f"eval_{name}"] for name in ("loss", "accuracy") if f"eval_{name}" in found}


def gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, in rank order; ranks may hold different numbers of them."""
    counts = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
    counts[dist.get_rank()] = len(rows)
    dist.all_reduce(counts)
    padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def knn_accuracy(features: Tensor, labels: Tensor, neighbours: int, temperature: float = 0.07) -> float:
    """Leave-one-out k-NN on features (S, C) with labels (S,): cosine similarity, votes weighted by exp(sim / 0.07).

    The weighting is DINO's; leaving one out needs no second set of shards.
    """
    unit = F.normalize(features.float(), dim=1)
    classes, correct = int(labels.max()) + 1, 0
    for start in range(0, len(unit), 1024):
        similarity = unit[start : start + 1024] @ unit.T
        own = torch.arange(start, start + len(similarity), device=unit.device)
        similarity[torch.arange(len(similarity)), own] = -float("inf")
        weights, nearest = similarity.topk(min(neighbours, len(unit) - 1))
        votes = torch.zeros(len(similarity), classes, device=unit.device)
        votes.scatter_add_(1, labels[nearest], (weights / temperature).exp())
        correct += int((votes.argmax(1) == labels[own]).sum())
    return correct / len(unit)
