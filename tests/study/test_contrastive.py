"""SimCLR's loss against NumPy loops, and views that depend on seed, row and step alone."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from fdscale.students.student import Student
from fdscale.study.contrastive import Contrast, info_nce, view_of


def by_loops(projected: np.ndarray, temperature: float) -> tuple[float, float]:
    """NT-Xent as its paper has it, one view after the other."""
    unit = projected / np.linalg.norm(projected, axis=1, keepdims=True)
    views, losses, right = len(unit), [], 0
    for i in range(views):
        partner = (i + views // 2) % views
        likeness = {j: float(unit[i] @ unit[j]) / temperature for j in range(views) if j != i}
        losses.append(-likeness[partner] + math.log(sum(math.exp(value) for value in likeness.values())))
        right += max(likeness, key=lambda j: likeness[j]) == partner
    return float(np.mean(losses)), right / views


def test_the_loss_is_simclrs() -> None:
    projected = torch.randn(10, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = info_nce(projected, temperature=0.3)
    loss, accuracy = by_loops(projected.numpy(), 0.3)
    assert float(found["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(found["accuracy"]) == pytest.approx(accuracy)


def test_equal_views_are_told_from_all_others() -> None:
    once = torch.eye(5)
    found = info_nce(torch.cat([once, once]), temperature=0.1)
    assert float(found["accuracy"]) == 1
    assert float(found["loss"]) == pytest.approx(math.log(math.exp(10) + 8) - 10, abs=1e-6)


def test_views_are_drawn_by_row_whatever_the_micro_batch() -> None:
    pixels = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    whole = view_of(pixels, slice(0, 6), 3, 7, 0)
    parts = torch.cat([view_of(pixels[:2], slice(0, 2), 3, 7, 0), view_of(pixels[2:], slice(2, 6), 3, 7, 0)])
    assert torch.equal(whole, parts)
    assert 0 <= whole.min() <= whole.max() <= 1
    others = {"which": (3, 7, 1), "step": (3, 8, 0), "seed": (4, 7, 0)}
    for what, drawn in others.items():
        other = view_of(pixels, slice(0, 6), *drawn)
        assert all(not torch.equal(a, b) for a, b in zip(whole, other, strict=True)), what
    same = view_of(pixels[:1].expand(2, -1, -1, -1), slice(0, 2), 3, 7, 0)
    assert not torch.equal(same[0], same[1])  # rows draw apart


def test_a_view_still_shows_its_image() -> None:
    pixels = torch.zeros(4, 3, 32, 32)  # a square in each corner
    for row in range(4):
        top, left = 16 * (row // 2) + 4, 16 * (row % 2) + 4
        pixels[row, :, top : top + 8, left : left + 8] = 1
    first, second = (view_of(pixels, slice(0, 4), 0, 0, which).flatten(1) for which in (0, 1))
    likeness = torch.corrcoef(torch.cat([first, second]))[:4, 4:]
    assert torch.equal(likeness.argmax(dim=1), torch.arange(4))


def test_the_projection_is_not_part_of_what_is_kept() -> None:
    student = Student(nn.Sequential(nn.Flatten(2), nn.Linear(16, 6)), 6, (1, 3), 0, 4)
    module = Contrast(student, 5)
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"student", "projection"}
    pixels = torch.rand(4, 3, 4, 4)
    assert set(module.train()(pixels)) == {"loss", "accuracy"}
    assert torch.allclose(module.eval()(pixels)["features"], student(pixels).mean(dim=1))
