"""Numbers and bits that go wrong on one rank: what the guards of the loop make of them, at every stage and placement.

`python -m pytest -m prove tests/prove/test_guard_faults.py` puts the same tests as `make test` has on the page.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.prove.reliability import prove
from tests.training import test_canary, test_finite

pytestmark = [pytest.mark.prove, pytest.mark.timeout(900)]


def test_a_number_that_is_not_one(two_ranks: Any) -> None:
    def done() -> tuple[str, bool]:
        for case in test_finite.CASES:
            test_finite.test_a_step_that_is_not_finite_on_one_rank_is_made_on_none(case, two_ranks)
        cases = len(test_finite.CASES)
        found = (
            f"in {cases} of {cases} engines skipped on both ranks; weights, moments, averages and later losses are "
            "those of a run without that step, bit for bit, and the same on both ranks"
        )
        return found, True

    stages = "NaN in a pixel, or an infinite loss, on rank 1 of 2: ZeRO 0 to 3, fp32, bf16, autocast, offloaded"
    prove("guard_faults", "NaN injected on one rank", stages, done)


def test_a_flipped_bit(two_ranks: Any, tmp_path: Path) -> None:
    def done() -> tuple[str, bool]:
        for placement in test_canary.PLACEMENTS:
            folder = tmp_path / placement
            folder.mkdir()
            check = test_canary.test_the_rank_is_named_whose_teacher_changed
            check(placement, False, torch.float32, folder, two_ranks)
        return f"the rank is named at the next look, in {', '.join(test_canary.PLACEMENTS)}", True

    did = "lowest and highest bit of a byte in the middle of a teacher's largest weight, on rank 1 of 2"
    prove("guard_faults", "one bit flipped in a teacher weight on one rank", did, done)
