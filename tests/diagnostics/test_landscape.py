"""A subject's landscape: by brute force in NumPy at weights moved by hand; which weights move; labels and bad input."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fdscale.config.errors import UserError
from fdscale.data.batches import Batch, EvalBatches
from fdscale.data.index import load_index
from fdscale.data.loader import EvalLoader
from fdscale.data.packing.digits import pack_digits
from fdscale.diagnostics.directions import numbered_direction
from fdscale.diagnostics.heads import fitted_head
from fdscale.diagnostics.landscape import LabelledImages, first_labelled, loss_landscape
from fdscale.diagnostics.lines import LandscapePlan
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject
from fdscale.students.swin_v2 import Linear32
from tests.diagnostics.networks import SIDE, subject_of, walked

CLASSES = 4
PLAN = LandscapePlan(directions=2, points=3, reach=0.5, step=0.1, surface=3, seed=5)


def labelled(images: int = 7) -> LabelledImages:
    drawn = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (images, 3, SIDE, SIDE), dtype=torch.uint8, generator=drawn)
    return LabelledImages(pixels, torch.arange(images) % CLASSES)


def with_head(family: str) -> Subject:
    subject = subject_of(family)
    torch.manual_seed(3)
    head = nn.Sequential(nn.LayerNorm(subject.network.width), Linear32(subject.network.width, CLASSES))
    return replace(subject, head=head.eval().requires_grad_(False))


def landscape(subject: Subject, batch: int = 3) -> list[Measurement]:
    return loss_landscape(subject, labelled(), PLAN, batch, lambda: None)


def bits(subject: Subject) -> dict[str, bytes]:
    modules = [subject.network, *([] if subject.head is None else [subject.head])]
    return {str((i, name)): v.numpy().tobytes() for i, m in enumerate(modules) for name, v in m.state_dict().items()}


def brute_point(subject: Subject, head: nn.Module) -> tuple[float, float]:
    """Loss and accuracy, in NumPy from the pooled tokens on."""
    features = walked(subject, labelled().images.float() / 255)[-1].mean(axis=1)
    logits = head(torch.from_numpy(features).float()).double().numpy()
    labels = labelled().labels.numpy()
    losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    return float(losses.mean()), float((logits.argmax(axis=1) == labels).mean())


@pytest.mark.parametrize("own_head", [True, False], ids=["own_head", "fitted_head"])
@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
def test_each_point_is_what_numpy_finds_at_weights_moved_by_hand(family: str, own_head: bool) -> None:
    subject = with_head(family) if own_head else subject_of(family)
    rows = landscape(subject)
    still, scaled = with_head(family) if own_head else subject_of(family), labelled().images.float() / 255
    head = still.head if still.head is not None else fitted_head(still.pooled(scaled), labelled().labels)
    moved = nn.ModuleList([still.network, head] if own_head else [still.network])  # a fitted head stays
    origin = {name: value.clone() for name, value in moved.named_parameters()}
    one, two = (numbered_direction(moved, 5, number) for number in (0, 1))
    assert any(name.startswith("1.") for name in one) == own_head
    found: dict[tuple[str, int | None, tuple[float, ...] | None], float | None] = {
        (row.measure, row.direction, row.at): row.value for row in rows
    }
    for (a, b), key in {
        (0.5, 0): (0, (0.5,)),
        (-0.1, 0): (0, (-0.1,)),
        (0, 0): (1, (0.0,)),
        (0, 0.5): (1, (0.5,)),
        (-0.5, 0.5): (None, (-0.5, 0.5)),
    }.items():
        for name, value in moved.named_parameters():
            value.copy_(origin[name] + (a * one[name] + b * two[name] if name in one else 0))
        loss, accuracy = brute_point(still, head)
        assert found["landscape_loss", *key] == pytest.approx(loss, rel=1e-5)
        assert found["landscape_accuracy", *key] == pytest.approx(accuracy)


@pytest.mark.parametrize("family", ["beit", "swin_v2"])
def test_everything_is_as_before(family: str) -> None:
    subject = with_head(family)
    before = bits(subject)
    landscape(subject)
    assert bits(subject) == before


def test_batches_of_another_size_are_the_same_landscape() -> None:
    subject = with_head("beit")
    for one, other in zip(landscape(subject, 7), landscape(subject, 2), strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-4, abs=1e-4)
        assert one.images == 7


def test_weights_that_are_not_finite_are_named() -> None:
    subject = subject_of("beit")
    subject.backbone.blocks[1].attn.proj.weight[0, 0] = float("nan")  # type: ignore[union-attr, index]
    with pytest.raises(UserError, match=r"beit: its weight backbone\.blocks\.1\.attn\.proj\.weight holds NaN"):
        landscape(subject)


def test_rows_say_whose_classifier_it_was() -> None:
    assert {row.classifier for row in landscape(subject_of("beit"))} == {"fitted"}
    assert {row.classifier for row in landscape(with_head("beit"))} == {"run"}


@pytest.mark.parametrize("images", [1, 5])
def test_no_classifier_is_fitted_to_one_class_alone(images: int) -> None:
    one_class = replace(labelled(images), labels=torch.full((images,), 2))
    with pytest.raises(UserError, match=rf"beit: .* none can be fitted to {images} images of one class"):
        loss_landscape(subject_of("beit"), one_class, PLAN, 3, lambda: None)
    rows = loss_landscape(with_head("beit"), one_class, PLAN, 3, lambda: None)  # its own head tells classes apart
    assert all(row.value is not None for row in rows)


def test_labels_that_the_head_has_not_are_told() -> None:
    subject = with_head("beit")
    images = labelled()
    with pytest.raises(UserError, match=r"its head tells classes 0 to 3, these images have labels 0 to 9"):
        loss_landscape(subject, replace(images, labels=images.labels * 3), PLAN, 3, lambda: None)


def test_the_first_labelled_images_of_shards_are_held_once(tmp_path: Path) -> None:
    index = load_index(pack_digits(tmp_path / "test", "test").folder)
    batches = list(EvalLoader(EvalBatches(index, SIDE, "bicubic"), 20, 0, 1, 8, 0, torch.device("cpu")))
    held = first_labelled(batches, 11)
    assert (held.images.dtype, held.images.shape) == (torch.uint8, (11, 3, SIDE, SIDE))
    assert torch.equal(held.images, torch.cat([batch.images for batch in batches])[:11])
    assert torch.equal(held.labels, torch.cat([batch.labels for batch in batches])[:11])
    assert len(first_labelled(batches, 50)) == 20  # padding rows are no images


def test_images_without_labels_are_left_out_and_refused_where_none_has_one() -> None:
    images = labelled()
    labels = torch.tensor([-1, 0, -1, 2, -2, 1, 0])
    batch = Batch(images.images, labels, torch.zeros(7, dtype=torch.int64), slice(0, 7), [])
    assert first_labelled([batch, batch], 6).labels.tolist() == [0, 2, 1, 0, 0, 2]
    with pytest.raises(UserError, match="needs labels, and no image here has one"):
        first_labelled([replace(batch, labels=torch.full((7,), -1))], 6)
