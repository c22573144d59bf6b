"""Soft-NMS beside its pseudo-code, one box after the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.downstream.detection.soft_nms import soft_nms, suppressed
from tests.downstream.detection.small import design

Row = tuple[float, float, float, float, float, int]  # left, top, width, height, score, label
COORDINATES = st.integers(0, 12).map(float)
SIDES = st.integers(1, 12).map(float)
ROWS = st.lists(
    st.tuples(COORDINATES, COORDINATES, SIDES, SIDES, st.integers(1, 10**6), st.integers(0, 3)), max_size=20
)


def iou(one: Row, other: Row) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    both = max(width, 0.0) * max(height, 0.0)
    return both / (one[2] * one[3] + other[2] * other[3] - both)


def by_hand(rows: list[Row], sigma: float | None, threshold: float) -> list[tuple[float, int]]:
    """Every class on its own, until nothing is left (the paper's figure 3): (score, number) in falling order."""
    found = []
    for label in {row[5] for row in rows}:
        left = {number: row[4] for number, row in enumerate(rows) if row[5] == label}
        while left:
            best = max(left, key=lambda number: left[number])
            score = left.pop(best)
            if score <= threshold:
                break
            found.append((score, best))
            for number in left:
                overlap = iou(rows[best], rows[number])
                if sigma is not None:
                    left[number] *= math.exp(-(overlap**2) / sigma)
                elif overlap > 0.3:
                    left[number] *= 1 - overlap
    return sorted(found, reverse=True)


@settings(max_examples=150)
@given(ROWS, st.sampled_from([0.5, 0.1, None]), st.sampled_from([0.0, 0.2]), st.integers(1, 25))
def test_it_is_its_pseudo_code(drawn: list[Row], sigma: float | None, threshold: float, most: int) -> None:
    # no ties in fp32, before or after a decay: exponentials are no fractions of each other
    rows = [(*row[:4], row[4] / 10**6 + 1e-3 * math.exp(-number / 7), row[5]) for number, row in enumerate(drawn)]
    boxes = torch.tensor([[row[0], row[1], row[0] + row[2], row[1] + row[3]] for row in rows]).view(-1, 4)
    scores = torch.tensor([row[4] for row in rows], dtype=torch.float64)
    labels = torch.tensor([row[5] for row in rows], dtype=torch.long)
    kept, told = soft_nms(boxes, scores, labels, sigma, 0.3, threshold, most)
    expected = by_hand(rows, sigma, threshold)[:most]
    assert told.tolist() == pytest.approx([score for score, _ in expected], abs=1e-6)
    own = {number: score for score, number in by_hand(rows, sigma, -1.0)}
    assert [own[number] for number in kept.tolist()] == pytest.approx(told.tolist(), abs=1e-6)
    assert len(set(kept.tolist())) == len(kept)


@pytest.mark.parametrize("kind", ["hard", "linear", "gaussian"])
def test_boxes_of_another_class_do_not_matter(kind: str) -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10]])
    scores, labels = torch.tensor([0.9, 0.8, 0.7, 0.6]), torch.tensor([0, 0, 1, 0])
    numbers = design(suppression=kind, score_threshold=0.01, detections=4)
    kept, told = suppressed(boxes, scores, labels, numbers)
    decayed = {"hard": [], "linear": [0.8 * 0.1], "gaussian": [0.8 * math.exp(-(0.9**2) / 0.5)]}[kind]
    assert told.tolist() == pytest.approx([0.9, 0.7, 0.6, *decayed])
    assert kept.tolist() == [0, 2, 3, *([1] if decayed else [])]
    assert suppressed(boxes[:0], scores[:0], labels[:0], numbers)[0].tolist() == []
