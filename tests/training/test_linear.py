"""The linear classifier: the same on any number of ranks, none included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from fdscale.training.engine import Connection
from fdscale.training.linear import Features, accuracy_of, best_linear, fitted


def uneven_fit(connection: Connection) -> list[float]:
    """A rank may have no rows at all."""
    drawn = torch.Generator().manual_seed(5)
    rows, labels = torch.randn(30, 4, generator=drawn), torch.randint(3, (30,), generator=drawn)
    mine = slice(0, 30) if connection.rank.rank == 0 else slice(30, 30)
    layer = fitted(Features(rows[mine], labels[mine], labels[mine]), 3, 1e-2)
    return [float(value) for value in layer.weight.detach().flatten()]


def test_a_rank_may_be_left_without_images(one_rank: Any, two_ranks: Any) -> None:
    (alone,), (one, other) = one_rank(uneven_fit), two_ranks(uneven_fit)
    assert one == other == pytest.approx(alone, abs=1e-4)


def test_a_process_of_no_group_fits_alone(one_rank: Any) -> None:
    """Far apart, the classes are found; and the weights are those that a rank finds."""
    assert not dist.is_initialized()
    drawn = torch.Generator().manual_seed(5)
    rows, labels = torch.randn(30, 4, generator=drawn), torch.randint(3, (30,), generator=drawn)
    (of_a_rank,) = one_rank(uneven_fit)
    layer = fitted(Features(rows, labels, labels), 3, 1e-2)
    assert layer.weight.flatten().tolist() == pytest.approx(of_a_rank, abs=1e-4)
    apart = Features(rows + 10 * torch.eye(4)[labels], labels, torch.arange(30))
    assert accuracy_of(best_linear(apart.by(apart.standard()), 3)[0], apart.by(apart.standard())) == 1
