"""A linear classifier on features that may lie divided over the ranks: fitted to the end, the same on each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4)  # of the mean loss, on the weights' squares
HELD_BACK = 10  # one in so many training images chooses the penalty
ROUNDS = 500
PART = 65_536  # rows
STABLE = 1e-6  # the official probe's batch norm adds it to the variance


@dataclass(frozen=True)
class Features:
    """This rank's rows (S, C), fp32, their labels (S,), and the hashes (S,) by which some are held back."""

    rows: Tensor
    labels: Tensor
    keys: Tensor

    def standard(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel over all ranks, as the official probe's batch norm has them."""
        count = _summed(torch.tensor(len(self.rows), dtype=torch.float64, device=self.rows.device))
        nothing = torch.zeros(self.rows.shape[1], dtype=torch.float64, device=self.rows.device)
        parts = self.rows.split(PART)  # in double precision a part at a time
        mean = _summed(sum((part.double().sum(0) for part in parts), nothing)) / count
        variance = _summed(sum(((part.double() - mean).square().sum(0) for part in parts), nothing.clone())) / count
        return mean.float(), (variance + STABLE).sqrt().float()

    def by(self, standard: tuple[Tensor, Tensor]) -> Features:
        """The same, standardised."""
        return Features((self.rows - standard[0]) / standard[1], self.labels, self.keys)

    def part(self, chosen: Tensor) -> Features:
        """The rows of a mask."""
        return Features(self.rows[chosen], self.labels[chosen], self.keys[chosen])


def best_linear(known: Features, classes: int) -> tuple[nn.Linear, float]:
    """The layer fitted to all of `known`, and its penalty, which is best for a tenth that was held back.

    Of a handful of images none may be: then it is the strongest penalty.
    """
    held_back = known.keys % HELD_BACK == 0  # the same images on any number of ranks
    if min(_summed(held_back.sum()), _summed((~held_back).sum())) == 0:  # too few to choose by
        return fitted(known, classes, PENALTIES[0]), PENALTIES[0]
    learned, judged = known.part(~held_back), known.part(held_back)
    scores = {penalty: accuracy_of(fitted(learned, classes, penalty), judged) for penalty in PENALTIES}
    chosen = max(scores, key=lambda penalty: scores[penalty])  # of equals, the strongest
    return fitted(known, classes, chosen), chosen


def fitted(known: Features, classes: int, penalty: float) -> nn.Linear:
    """Cross entropy and penalty minimised by L-BFGS from zero; every rank takes the same steps."""
    layer = nn.Linear(known.rows.shape[1], classes, device=known.rows.device)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    count = _summed(torch.tensor(float(len(known.rows)), device=known.rows.device))
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=ROUNDS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        own = F.cross_entropy(layer(known.rows), known.labels, reduction="sum") / count
        own.backward()
        for parameter in layer.parameters():
            assert parameter.grad is not None
            _summed(parameter.grad)
        with torch.no_grad():
            assert layer.weight.grad is not None
            layer.weight.grad.add_(layer.weight, alpha=2 * penalty)
            return _summed(own.detach()) + penalty * layer.weight.square().sum()

    optimizer.step(loss)
    return layer


@torch.no_grad()
def accuracy_of(layer: nn.Linear, asked: Features) -> float:
    """The share of all ranks' rows that the layer classifies correctly."""
    right = (layer(asked.rows).argmax(dim=1) == asked.labels).sum()
    counts = _summed(torch.stack([right, torch.tensor(len(asked.rows), device=right.device)]))
    return float(counts[0]) / float(counts[1])


def _summed(value: Tensor) -> Tensor:
    """Over all ranks, in place; a process that joined none has all of it."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value
