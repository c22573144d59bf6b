"""Mixing is timm's with other pairs, and the same on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.data.mixup import Mixup, cutmix_bbox_and_lam, mixup_target, rand_bbox
from torch import Tensor

from fdscale.data.draws import Purpose, generator
from fdscale.downstream.mix import Mixing, cut_box, kept_share

CLASSES = 7


def mixing(
    mixup: float = 0.8, cutmix: float = 1.0, images: int = 8, probability: float = 1.0, switch: float = 0.5
) -> Mixing:
    return Mixing(mixup, cutmix, probability, switch, images, CLASSES, seed=11)


def batch(rows: int) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(2)
    return torch.rand(rows, 3, 12, 10, generator=drawn), torch.randint(CLASSES, (rows,), generator=drawn)


@given(st.floats(0, 1), st.integers(2, 50), st.integers(2, 50), st.integers(0, 10**6))
def test_the_box_and_its_share_are_timms(share: float, height: int, width: int, seed: int) -> None:
    np.random.seed(seed)
    expected = rand_bbox((3, height, width), share)
    np.random.seed(seed)
    row, column = np.random.randint(0, height), np.random.randint(0, width)
    box = cut_box(height, width, share, int(row), int(column))
    assert box == tuple(int(edge) for edge in expected)
    np.random.seed(seed)
    _, corrected = cutmix_bbox_and_lam((3, height, width), share)
    assert kept_share(height, width, box) == pytest.approx(corrected, abs=1e-12)


class Told(Mixup):
    """timm's Mixup, told what it would draw."""

    def __init__(self, share: float, cut: bool, smoothing: float) -> None:
        super().__init__(0.8, 1.0, label_smoothing=smoothing, num_classes=CLASSES)
        self.told = share, cut

    def _params_per_batch(self) -> tuple[float, bool]:
        return self.told


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_images_targets_and_loss_are_timms_where_the_pairs_are(cutmix: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """timm pairs i with 7 - i: rows dealt from both ends make those our neighbours."""
    order = [0, 7, 1, 6, 2, 5, 3, 4]
    pixels, labels = batch(8)
    ours = mixing(mixup=0.0 if cutmix else 0.8, cutmix=cutmix)
    mixed, shares = ours(pixels[order], labels[order], slice(8, 16), step=5)

    draw = generator(11, 1, 5, Purpose.MIXING)  # rows 8 to 16 are block 1
    draw.random()
    share = float(draw.beta(*[cutmix or 0.8] * 2))
    centre = iter([int(draw.integers(12)), int(draw.integers(10))] if cutmix else [])
    monkeypatch.setattr(np.random, "randint", lambda *_, **__: np.int64(next(centre)))
    expected, targets = Told(share, bool(cutmix), smoothing=0.1)(pixels.clone(), labels)

    torch.testing.assert_close(mixed, expected[order], rtol=0, atol=1e-7)
    assert not torch.equal(mixed, pixels[order])
    smoothed = shares * 0.9 + 0.1 / CLASSES
    torch.testing.assert_close(smoothed, targets[order], rtol=0, atol=1e-6)
    logits = torch.randn(8, CLASSES)
    their_loss = -(targets[order] * logits.log_softmax(dim=1)).sum(dim=1).mean()
    torch.testing.assert_close(F.cross_entropy(logits, shares, label_smoothing=0.1), their_loss)


def test_unsmoothed_targets_are_timms_too() -> None:
    pixels, labels = batch(2)
    _, shares = mixing(cutmix=0.0, images=2)(pixels, labels, slice(0, 2), step=0)
    share = float(shares[0, labels[0]])
    assert labels[0] != labels[1]
    torch.testing.assert_close(shares, mixup_target(labels, CLASSES, share))


def test_targets_are_shares_of_an_image() -> None:
    pixels, labels = batch(8)
    _, shares = mixing(images=2)(pixels, labels, slice(0, 8), step=1)
    assert shares.shape == (8, CLASSES)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(8))
    partners = labels.view(-1, 2).flip(1).flatten()
    for row, own, partner in zip(shares, labels.tolist(), partners.tolist(), strict=True):
        assert float(row[sorted({own, partner})].sum()) == pytest.approx(1)


@pytest.mark.parametrize("images", [2, 3, 4, 8, 100])
def test_any_micro_batches_give_the_same_images(images: int) -> None:
    mix, (pixels, labels) = mixing(images=images), batch(16)
    whole = mix(pixels, labels, slice(0, 16), step=4)
    for size in (2, 4, 8):
        parts = [
            mix(pixels[i : i + size], labels[i : i + size], slice(i, i + size), step=4) for i in range(0, 16, size)
        ]
        assert torch.equal(whole[0], torch.cat([part[0] for part in parts]))
        assert torch.equal(whole[1], torch.cat([part[1] for part in parts]))


def test_one_draw_serves_a_block_and_blocks_steps_and_seeds_differ() -> None:
    pixels, labels = torch.rand(8, 3, 6, 6), torch.arange(8) % CLASSES
    _, shares = mixing(cutmix=0.0, images=4)(pixels, labels, slice(0, 8), step=0)
    own = shares[torch.arange(8), labels].tolist()
    assert len(set(own[:4])) == len(set(own[4:])) == 1
    assert own[0] != own[4]
    _, later = mixing(cutmix=0.0, images=4)(pixels, labels, slice(0, 8), step=1)
    assert own[0] != float(later[0, labels[0]])


def draws(mix: Mixing, count: int = 3000) -> list[tuple[float, bool]]:
    drawn = [mix.draw(32, 32, generator(0, block, 0, Purpose.MIXING)) for block in range(count)]
    return [(share, box is not None) for share, box in drawn]


def test_how_often_and_how_much() -> None:
    both = draws(mixing(switch=0.3, probability=0.8))
    mixed = [(share, cut) for share, cut in both if cut or share != 1.0]
    assert len(mixed) / len(both) == pytest.approx(0.8, abs=0.03)
    assert np.mean([cut for _, cut in mixed]) == pytest.approx(0.3, abs=0.03)
    blended = np.array([share for share, cut in draws(mixing(cutmix=0.0)) if not cut])
    assert blended.mean() == pytest.approx(0.5, abs=0.02)
    assert blended.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.06)  # of Beta(a, a)
    assert all(cut for _, cut in draws(mixing(mixup=0.0), 50))


def test_off_everything_comes_back_as_it_is() -> None:
    pixels, labels = batch(3)
    for mix in (mixing(0.0, 0.0), mixing(probability=0.0)):
        same, still_labels = mix(pixels, labels, slice(0, 3), step=0)
        assert same is pixels
        assert still_labels is labels
