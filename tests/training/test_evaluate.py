"""Evaluation sees every held-out image once on any number of ranks; k-NN leaves the image itself out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.data.batches import PADDING_LABEL, Batch
from fdscale.training.engine import Connection, start_engine
from fdscale.training.evaluate import evaluate, knn_accuracy
from fdscale.training.optim import adamw, parameter_groups

LEAN = {  # nothing stays resident: a tiny network would hide that uneven forwards deadlock
    "stage": 3,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
BATCH, CLASSES = 4, 3


class Classifier(nn.Module):
    """Images (B, 3, 2, 2) -> one row per image: a loss and features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12, 8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.second(self.first(images.flatten(1).float() / 255).tanh())
        return {"loss": features.square().mean(1), "features": features}


def classifier() -> Classifier:
    torch.manual_seed(0)
    return Classifier()


def held_out(samples: int, labelled: bool = True) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(samples) % CLASSES
    images = torch.randint(0, 100, (samples, 3, 2, 2), generator=generator) + 50 * labels.view(-1, 1, 1, 1)
    return images.to(torch.uint8), labels if labelled else torch.full((samples,), -1)


def batches_of(rank: int, world_size: int, samples: int, labelled: bool = True) -> list[Batch]:
    """As the loader deals them: equally many on every rank, the last ones padded."""
    images, labels = held_out(samples, labelled)
    together = BATCH * world_size
    padding = -samples % together
    images = torch.cat([images, torch.full((padding, 3, 2, 2), 255, dtype=torch.uint8)])
    labels = torch.cat([labels, torch.full((padding,), PADDING_LABEL)])
    rows = [slice(start + rank * BATCH, start + (rank + 1) * BATCH) for start in range(0, len(images), together)]
    return [Batch(images[part], labels[part], labels[part], part, []) for part in rows]


def engine_of(module: nn.Module) -> Any:
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-3, (0.9, 0.999), 1e-8)
    config = {"train_micro_batch_size_per_gpu": BATCH, "zero_optimization": LEAN}
    return start_engine(module, optimizer, config, 1, 1.0)


def sample_terms(engine: Any, batch: Batch) -> dict[str, Tensor]:
    assert not engine.module.training
    return engine(batch.images)


def evaluated(
    connection: Connection, samples: int, neighbours: int = 5, labelled: bool = True
) -> list[dict[str, float]]:
    """Twice on the same engine: the second pass meets the first one's traces."""
    engine = engine_of(classifier())
    batches = batches_of(connection.rank.rank, connection.rank.world_size, samples, labelled)
    results = [evaluate(engine, sample_terms, batches, neighbours) for _ in range(2)]
    engine.destroy()
    return results


def in_one_process(samples: int) -> dict[str, float]:
    images, labels = held_out(samples)
    with torch.no_grad():
        rows = classifier().eval()(images)
    return {
        "eval_loss": float(rows["loss"].double().mean()),
        "eval_knn_accuracy": knn_accuracy(rows["features"], labels, 5),
    }


@pytest.mark.parametrize("samples", [16, 13, 9, 3])
def test_two_ranks_with_uneven_counts_equal_one_process(samples: int, two_ranks: Any) -> None:
    """13 leaves rank 1 a half-padded batch, 9 a batch of padding alone, 3 nothing at all."""
    expected = in_one_process(samples)
    for rank in two_ranks(evaluated, samples, timeout=60):
        for result in rank:
            assert result == pytest.approx(expected, rel=1e-6)


def test_one_rank_equals_one_process(one_rank: Any) -> None:
    assert one_rank(evaluated, 10)[0][0] == pytest.approx(in_one_process(10), rel=1e-6)


def test_without_labels_or_neighbours_there_is_no_accuracy(two_ranks: Any) -> None:
    for arguments in ((9, 5, False), (9, 0, True)):
        for rank in two_ranks(evaluated, *arguments):
            assert set(rank[0]) == {"eval_loss"}


def trained_after_evaluating(connection: Connection, evaluating: bool) -> list[float]:
    """Three updates, with an evaluation before each or not."""
    engine = engine_of(classifier())
    batch, losses = batches_of(connection.rank.rank, 2, 16)[0], []
    for _ in range(3):
        if evaluating:
            evaluate(engine, sample_terms, batches_of(connection.rank.rank, 2, 9), 3)
        engine.train()
        loss = engine(batch.images)["loss"].mean()
        engine.backward(loss)
        engine.step()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(float(total))
    engine.destroy()
    return losses


def test_evaluating_between_updates_changes_none_of_them(two_ranks: Any) -> None:
    plain, between = (two_ranks(trained_after_evaluating, evaluating, timeout=60) for evaluating in (False, True))
    assert plain == between
    assert plain[0][0] > plain[0][2]


def clusters(per_class: int, distance: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(4).repeat(per_class)
    centres = torch.eye(4, 16) * distance
    return centres[labels] + torch.randn(len(labels), 16, generator=generator), labels


def test_knn_finds_separable_clusters_whatever_the_length_of_features() -> None:
    features, labels = clusters(50, distance=50.0)
    lengths = torch.rand(len(labels), 1, generator=torch.Generator().manual_seed(1)) + 0.01
    assert knn_accuracy(features, labels, neighbours=20) == 1.0
    assert knn_accuracy(features * lengths, labels, neighbours=20) == 1.0


def test_knn_on_random_labels_is_chance() -> None:
    features, _ = clusters(500, distance=0.0)
    labels = torch.randint(0, 4, (2000,), generator=torch.Generator().manual_seed(2))
    assert knn_accuracy(features, labels, neighbours=20) == pytest.approx(0.25, abs=0.04)


def test_knn_leaves_the_image_itself_out() -> None:
    """Two classes that alternate on a circle: the nearest other image is always of the other class."""
    angles = torch.arange(8) * torch.pi / 4
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    assert knn_accuracy(features, torch.arange(8) % 2, neighbours=2) == 0.0


def test_knn_votes_are_weighted_by_similarity() -> None:
    """One very near neighbour of its class outweighs two far ones of the other."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.01], [0.0, 1.0], [-0.01, 1.0]])
    assert knn_accuracy(features, torch.tensor([0, 0, 1, 1]), neighbours=3) == 1.0


def test_knn_looks_at_every_image_when_there_are_fewer_than_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    assert knn_accuracy(features, torch.tensor([0, 0, 1]), neighbours=20) == pytest.approx(2 / 3)


def test_knn_goes_through_its_images_in_pieces() -> None:
    features, labels = clusters(300, distance=3.0)  # 1,200 images: more than one piece
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = (unit @ unit.T).fill_diagonal_(-torch.inf)
    weights, nearest = similarity.topk(7)
    votes = torch.stack([((weights / 0.07).exp() * (labels[nearest] == c)).sum(1) for c in range(4)], dim=1)
    expected = float((votes.argmax(1) == labels).float().mean())
    assert 0.5 < expected < 0.99
    assert knn_accuracy(features, labels, neighbours=7) == pytest.approx(expected, abs=1e-3)
