"""CKA: by brute force over all quadruples of images, with known answers, and where it has none."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from fdscale.diagnostics.cka import KernelAlignment
from fdscale.diagnostics.features import watching_tokens
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject
from tests.diagnostics.networks import Array, pixels, subject_of, walked


def pooled(subject: Subject, batch: Tensor) -> list[Tensor]:
    layers: list[Tensor] = []
    with watching_tokens(subject, lambda layer, tokens: layers.append(tokens.double().mean(dim=1))):
        subject.tokens(batch)
    return layers


def brute_hsic(own: Array, theirs: Array) -> float:
    """The U-statistic over all quadruples of different images (Song et al. 2012, equation 4), of features (B, C)."""
    k, m = own @ own.T, theirs @ theirs.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(len(own)), 4)]
    return float(np.mean(terms))


def brute_cka(own: list[Array], theirs: list[Array]) -> float:
    """Of one layer of each, batch by batch; sums are weighted by images."""

    def total(first: list[Array], second: list[Array]) -> float:
        return sum(len(a) * brute_hsic(a, b) for a, b in zip(first, second, strict=True))

    return total(own, theirs) / math.sqrt(total(own, own) * total(theirs, theirs))


def aligned(own: list[Tensor], theirs: list[Tensor]) -> list[Measurement]:
    alignment = KernelAlignment("a", "b")
    alignment.update(own, theirs)
    return alignment.rows()


@pytest.mark.parametrize(("one", "two"), [("beit", "vit"), ("swin_v2", "beit"), ("vit", "vit")])
def test_every_pair_of_layers_is_what_numpy_finds(one: str, two: str) -> None:
    subjects, batches = (subject_of(one), subject_of(two, seed=3)), (pixels(6), pixels(5, seed=1))
    alignment = KernelAlignment(one, two)
    for batch in (*batches, pixels(3, seed=2)):  # the last is too few
        alignment.update(*(pooled(subject, batch) for subject in subjects))
    rows = {(row.layer, row.other_layer): row for row in alignment.rows()}
    own, theirs = ([[x.mean(axis=1) for x in walked(each, batch)] for batch in batches] for each in subjects)
    assert rows.keys() == {(a, b) for a in range(len(own[0])) for b in range(len(theirs[0]))}
    for (a, b), row in rows.items():
        expected = brute_cka([layers[a] for layers in own], [layers[b] for layers in theirs])
        assert row.value == pytest.approx(expected, abs=1e-5)
        assert (row.model, row.other, row.images) == (one, two, 11)


def test_a_layer_and_itself_turned_and_scaled_are_1() -> None:
    drawn = torch.Generator().manual_seed(0)
    layer, turned = torch.randn(8, 5, generator=drawn), torch.linalg.qr(torch.randn(5, 5, generator=drawn))[0]
    rows = aligned([layer], [layer, layer @ turned * 7 + 100, layer * torch.tensor([9.0, 1, 1, 1, 1])])
    assert [row.value for row in rows[:2]] == pytest.approx([1, 1], abs=1e-5)
    assert rows[2].value is not None
    assert rows[2].value < 0.95


def test_of_independent_layers_it_falls_to_0_where_the_biased_one_does_not() -> None:
    drawn = torch.Generator().manual_seed(0)
    alignment = KernelAlignment("a", "b")
    for _ in range(200):
        alignment.update([torch.randn(8, 50, generator=drawn)], [torch.randn(8, 50, generator=drawn)])
    (row,) = alignment.rows()
    assert row.value == pytest.approx(0, abs=0.05)
    assert row.images == 1600


def test_what_has_no_value_has_a_reason() -> None:
    (row,) = aligned([torch.rand(3, 5)] * 2, [torch.rand(3, 5)] * 2)
    assert (row.value, row.reason, row.layer) == (None, "CKA needs batches of 4 images or more", None)
    rounded = torch.full((7, 5), 7.0) + torch.rand(7, 5) * 1e-6
    for broken in (rounded, torch.zeros(7, 5), torch.full((7, 5), math.nan)):
        first, second = aligned([torch.rand(7, 5)], [broken, torch.rand(7, 5)])
        assert first.value is None
        assert first.reason == "a layer does not tell the images apart, or is not finite"
        assert second.value is not None
