"""Ranks with other images and sizes evaluate what one process would: the same counts, and nobody waits for ever."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.cluster.ranks import Rank
from fdscale.downstream.segmentation.confusion import confusion_of, metrics_of
from fdscale.downstream.segmentation.evaluation import evaluate_segmentation
from fdscale.downstream.segmentation.files import load_segmenter, save_segmenter
from fdscale.training.engine import Connection, full_state, start_engine
from fdscale.training.optim import adamw, parameter_groups
from tests.downstream.segmentation.test_sharded import segmenter_of
from tests.downstream.test_backbone import LEAN

ALONE = Connection(Rank(0, 0, 1, 1, "127.0.0.1", 0), torch.device("cpu"), None)
SIZES = [(40, 90), (120, 50), (33, 50)]
SLIDING: dict[str, Any] = {"crop": 48, "stride": 32, "window_batch": 2, "short_side": 56, "long_side": 100}
WHOLE: dict[str, Any] = {"crop": None, "stride": 1, "window_batch": 1, "short_side": 48, "long_side": 100}


@dataclass(frozen=True)
class Item:
    """An image, its labels, and its number, -1 for padding."""

    image: Tensor
    labels: Tensor
    number: int


def items(rank: int = 0, world_size: int = 1) -> list[Item]:
    """This rank's images of all, and padding, so that every rank has as many."""
    drawn = torch.Generator().manual_seed(8)
    found = []
    for number, size in enumerate(SIZES):
        colours = torch.rand(1, 3, 4, 4, generator=drawn) * 255
        image = F.interpolate(colours, size, mode="bilinear")[0].to(torch.uint8)
        labels = torch.randint(5, size, generator=drawn).to(torch.uint8)
        labels[: 8 * number] = 255
        found.append(Item(image, labels, number))
    blank = Item(torch.zeros(3, 8, 8, dtype=torch.uint8), torch.full((8, 8), 255, dtype=torch.uint8), -1)
    found += [blank] * (-len(found) % world_size)
    return found[rank::world_size]


def evaluated(segment: Any, mine: list[Item], connection: Connection, how: dict[str, Any]) -> Any:
    """A class's score is where it stands out: untrained heads would find one class everywhere."""

    def standing_out(given: Tensor) -> Tensor:
        scores = segment(given)
        return (scores - scores.mean(dim=(2, 3), keepdim=True)) / scores.std(dim=(2, 3), keepdim=True)

    views: dict[str, Any] = {"scales": (0.75, 1.0), "flip": True}
    return evaluate_segmentation(
        standing_out, mine, 5, **views, **how, connection=connection, device=torch.device("cpu")
    )


def on_a_rank(connection: Connection, head: str, kind: str, how: dict[str, Any], folder: str) -> tuple[Any, Any, int]:
    """What ranks under ZeRO-3 find together, what each finds of all images, and the forwards of this one for the first.

    Rank 0 saves the segmenter.
    """
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": LEAN}
    segmenter = segmenter_of(head, kind)
    optimizer = adamw(parameter_groups(segmenter, 0.05, ()), 1e-3, (0.9, 0.99), 1e-8)
    engine = start_engine(segmenter, optimizer, config, 1, 1.0)
    engine.eval()
    forwards: list[int] = []
    segmenter.backbone.register_forward_pre_hook(lambda *_: forwards.append(1))
    together = evaluated(engine, items(connection.rank.rank, connection.rank.world_size), connection, how)
    count = len(forwards)
    alone = evaluated(engine, items(), ALONE, how)
    state = full_state(engine, segmenter, wanted=connection.rank.is_main)
    if connection.rank.is_main:
        save_segmenter(segmenter, state, Path(folder))
    engine.destroy()
    return together, alone, count


def as_by_one_process(head: str, kind: str, how: dict[str, Any], ranks: Any, folder: Path) -> None:
    """To the bit by the same kernels; ZeRO-3's linear layers round otherwise than a process's without an engine."""
    answers = ranks(on_a_rank, head, kind, how, str(folder))
    assert len({forwards for *_, forwards in answers}) == 1
    expected, per_class = evaluated(load_segmenter(folder), items(), ALONE, how)
    assert float(per_class.min()) > 0.02
    for (found, found_per_class), (alone, alone_per_class), _ in answers:
        assert found == alone == pytest.approx(expected, abs=1e-3)
        assert torch.equal(found_per_class, alone_per_class)


def test_two_ranks_evaluate_as_one(two_ranks: Any, tmp_path: Path) -> None:
    """Windows, and UperNet, on ranks: `tests/downstream/test_dense.py`; three ranks: `tests/prove`."""
    as_by_one_process("mask2former", "vit", WHOLE, two_ranks, tmp_path)


def by_colour(pixels: Tensor) -> Tensor:
    """Scores (B, 3, h, w): whatever is red is class 0, green 1, blue 2."""
    return pixels.softmax(dim=1)


def test_every_image_counts_once_at_its_own_size_and_is_shown() -> None:
    shown: list[tuple[int, Tensor]] = []
    images = items()
    for item in images:
        item.image[:] = 0
        for colour in range(3):
            item.image[colour, :, colour::3] = 255
        item.labels[:] = torch.arange(item.labels.shape[1]) % 3
        item.labels[0] = 255
    crop = {"crop": 200, "stride": 100, "window_batch": 1}  # nothing is resized
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for item in images:
        short, long = sorted(item.labels.shape)
        found, per_class = evaluate_segmentation(
            by_colour,
            [item, Item(item.image, item.labels, -1)],
            3,
            **crop,
            short_side=short,
            long_side=long,
            scales=(1.0,),
            flip=True,
            connection=ALONE,
            device=torch.device("cpu"),
            overlays=lambda of, predicted: shown.append((of.number, predicted)),
        )
        assert found == {"miou": 1.0, "mean_accuracy": 1.0, "pixel_accuracy": 1.0}
        assert per_class.tolist() == [1.0, 1.0, 1.0]
        counts += confusion_of(shown[-1][1], item.labels, 3)
    assert [number for number, _ in shown] == [item.number for item in images]
    assert metrics_of(counts)["pixel_accuracy"] == 1.0
