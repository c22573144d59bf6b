"""The rule that judges claims, and the differences that it judges."""

from __future__ import annotations

import pytest

from fdscale.study.claims import (
    ACCURACY,
    CLAIMS,
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    RESULT,
    judged,
    verdict,
)
from fdscale.study.results import Result
from fdscale.study.tasks import ABLATIONS, FULL, TEACHER


def tuned(network: str, seed: int, accuracy: float, of: str = "contrastive") -> Result:
    return Result(f"{seed}/{of}/{network}", "finetune", seed, of, network, {ACCURACY: accuracy}, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("sign", "low", "high", "expected"),
    [
        (+1, 0.1, 2.0, REPRODUCED),
        (+1, -2.0, -0.1, NOT_REPRODUCED),
        (-1, -2.0, -0.1, REPRODUCED),
        (-1, 0.1, 2.0, NOT_REPRODUCED),
        (+1, -0.1, 2.0, INCONCLUSIVE),
        (-1, -0.1, 2.0, INCONCLUSIVE),
        (+1, 0.0, 2.0, INCONCLUSIVE),  # zero is inside
        (-1, 0.0, 0.0, INCONCLUSIVE),
        (+1, None, None, INCONCLUSIVE),  # a single seed
    ],
)
def test_the_rule(sign: int, low: float | None, high: float | None, expected: str) -> None:
    assert verdict(sign, low, high) == expected


def test_differences_are_between_runs_of_one_seed_and_of_one_teacher() -> None:
    results = [
        *(tuned(TEACHER, seed, 0.80 + 0.05 * seed) for seed in range(4)),
        *(tuned(FULL, seed, 0.81 + 0.05 * seed) for seed in range(3)),  # the last seed's is not done yet
        tuned(FULL, 0, 0.1, of="supervised"),
    ]
    found = judged(RESULT[0], results, "contrastive")
    assert found is not None
    assert found.differences == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0})  # points, whatever the seeds differ in
    assert judged(RESULT[0], results, "supervised") is None


def test_the_interval_is_students() -> None:
    gains = [1.0, 2.0, 3.0, 4.0, 5.0]
    results = [tuned(TEACHER, seed, 0.5) for seed in range(5)]
    results += [tuned(FULL, seed, 0.5 + gain / 100) for seed, gain in enumerate(gains)]
    found = judged(RESULT[0], results, "contrastive")
    assert found is not None
    assert found.mean == pytest.approx(3.0)
    assert (found.low, found.high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-3)  # 2.7764 * sqrt(2.5 / 5)
    assert found.verdict == REPRODUCED


def test_each_ingredient_has_its_claim() -> None:
    assert {claim.difference.subtrahend[1] for claim in CLAIMS} >= set(ABLATIONS)
