"""The loss is the paper's in closed form, and what stands beside it tells whether anything is learned."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fdscale.distill.losses import measure, smooth_l1

DISTANCES = st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=12)


def closed_form(distance: float, beta: float) -> float:
    return distance**2 / (2 * beta) if abs(distance) < beta else abs(distance) - beta / 2


@given(DISTANCES, st.floats(0.125, 4, width=32))
def test_both_zones_in_closed_form(distances: list[float], beta: float) -> None:
    difference = torch.tensor(distances).view(1, 1, -1)
    expected = sum(closed_form(distance, beta) for distance in distances) / len(distances)
    for predicted, target in ((difference, torch.zeros_like(difference)), (torch.zeros_like(difference), difference)):
        assert float(smooth_l1(predicted, target, beta)) == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("distance", "loss"), [(0.0, 0.0), (1.0, 0.25), (1.999, 0.999), (2.0, 1.0), (5.0, 4.0)])
def test_the_papers_beta(distance: float, loss: float) -> None:
    assert float(smooth_l1(torch.full((2, 3, 4), distance), torch.zeros(2, 3, 4), 2.0)) == pytest.approx(loss, abs=1e-4)


def test_it_is_the_mean_over_all_elements_in_fp32() -> None:
    predicted, target = torch.randn(3, 5, 8).bfloat16(), torch.randn(3, 5, 8)
    loss = smooth_l1(predicted, target, 2.0)
    assert loss.dtype is torch.float32
    one_by_one = [float(smooth_l1(p, t, 2.0)) for p, t in zip(predicted.flatten(), target.flatten(), strict=True)]
    assert float(loss) == pytest.approx(sum(one_by_one) / 120, rel=1e-5)


def test_predicting_zero_costs_about_a_quarter() -> None:
    """Of a unit-variance Gaussian: 0.25 E[d^2] inside two sigma, a little less outside."""
    target = torch.randn(16, 197, 768, generator=torch.Generator().manual_seed(0))
    measured = measure(torch.randn_like(target), target, beta=2.0)
    assert float(measured["loss_zero"]) == pytest.approx(0.246, abs=0.002)
    assert float(measured["target_variance"]) == pytest.approx(1.0, abs=0.01)


def test_cosine_is_of_tokens_and_blind_to_their_length() -> None:
    target = torch.randn(2, 3, 8)
    for predicted, cosine in ((3 * target, 1.0), (-target, -1.0)):
        assert float(measure(predicted, target, 2.0)["feature_cosine"]) == pytest.approx(cosine, abs=1e-6)
    lengths = torch.tensor([1.0, 5.0, 0.1]).view(1, 3, 1)  # each token counts the same
    assert float(measure(lengths * target, target, 2.0)["feature_cosine"]) == pytest.approx(1.0, abs=1e-6)
    mixed = torch.cat([target[:1], -target[1:]])
    assert float(measure(mixed, target, 2.0)["feature_cosine"]) == pytest.approx(0.0, abs=1e-6)


def test_the_variance_is_over_channels() -> None:
    target = torch.tensor([[[1.0, -1.0], [3.0, 3.0]]])  # token variances 1 and 0
    assert float(measure(target, target, 2.0)["target_variance"]) == pytest.approx(0.5)


def test_measurements_carry_no_gradient() -> None:
    predicted = torch.randn(1, 2, 4, requires_grad=True)
    target = torch.randn(1, 2, 4, requires_grad=True)
    assert not any(value.requires_grad for value in measure(predicted, target, 2.0).values())
    assert smooth_l1(predicted, torch.randn(1, 2, 4), 2.0).requires_grad
