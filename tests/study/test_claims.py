"""The rule that judges claims, and the differences that it judges."""

from __future__ import annotations

import math

import pytest

from fdscale.study.claims import (
    ACCURACY,
    BY_RANDOM,
    CLAIMS,
    DIAGNOSTICS,
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    RESULT,
    Claim,
    judged,
    verdict,
)
from fdscale.study.results import Result
from fdscale.study.tasks import ABLATIONS, AFTER, BEFORE, FULL, SCRATCH, TEACHER


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
        (-1, math.nan, math.nan, INCONCLUSIVE),
        (+1, 0.1, math.inf, INCONCLUSIVE),
        (-1, -2.0, -2.0, INCONCLUSIVE),  # no spread
        (+1, 2.0, 2.0 + 1e-12, INCONCLUSIVE),  # none but rounding
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


@pytest.mark.parametrize(("gains", "expected"), [((0.01, 0.02), INCONCLUSIVE), ((0.02,) * 3, INCONCLUSIVE)])
def test_two_seeds_and_equal_differences_judge_nothing(gains: tuple[float, ...], expected: str) -> None:
    results = [tuned(TEACHER, seed, 0.5 + 0.1 * seed) for seed in range(len(gains))]
    results += [tuned(FULL, seed, 0.5 + 0.1 * seed + gain) for seed, gain in enumerate(gains)]
    found = judged(RESULT[0], results, "contrastive")
    assert found is not None
    assert found.verdict == expected


def test_what_is_not_finite_is_not_compared() -> None:
    results = [tuned(TEACHER, seed, 0.5) for seed in range(4)]
    results += [tuned(FULL, seed, [0.51, 0.52, math.nan, math.inf][seed]) for seed in range(4)]
    found = judged(RESULT[0], results, "contrastive")
    assert found is not None
    assert found.differences == pytest.approx({0: 1.0, 1: 2.0})


@pytest.mark.parametrize("claim", DIAGNOSTICS, ids=lambda claim: claim.sentence)
@pytest.mark.parametrize(
    ("after", "random", "expected"),
    [
        (+1, +1, BY_RANDOM),
        (+1, -1, REPRODUCED),
        (+1, 0, REPRODUCED),
        (-1, +1, NOT_REPRODUCED),
        (0, +1, INCONCLUSIVE),
    ],
)
def test_a_diagnostic_is_held_against_random_weights(claim: Claim, after: int, random: int, expected: str) -> None:
    """Differences from the teacher: on the expected side (+1), on the other (-1), or on both (0)."""
    name = claim.difference.minuend[2].removeprefix(f"{AFTER}.")
    results = []
    for seed, gain in enumerate((1.0, 1.1, 1.3)):
        sided = {side: side * claim.sign * gain if side else (-1) ** seed * gain for side in (after, random)}
        values = {f"{BEFORE}.{name}": 5.0, f"{AFTER}.{name}": 5 + sided[after], f"{SCRATCH}.{name}": 5 + sided[random]}
        results.append(Result(f"{seed}", "diagnose", seed, "contrastive", FULL, values, 0, 0, 0, 0))
    found = judged(claim, results, "contrastive")
    assert found is not None
    assert found.verdict == expected


def test_each_ingredient_has_its_claim() -> None:
    assert {claim.difference.subtrahend[1] for claim in CLAIMS} >= set(ABLATIONS)
