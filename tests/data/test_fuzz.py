"""Mutated shards: every sample is read with its right pixels, or it is named; nothing crashes, hangs or gets out."""

from __future__ import annotations

import pytest

from tests.data.examined import examine_all

CASES = range(100)


@pytest.mark.filterwarnings("ignore")  # of PIL, about what it is given
def test_a_hundred_mutated_folders(tmp_path):
    cases = examine_all(CASES, tmp_path)
    assert [f"{case.number} {case.done}: {case.wrong}" for case in cases if case.wrong] == []
    assert [case.number for case in cases] == list(CASES)
    assert {case.ended for case in cases} >= {"read", "refused when indexed", "refused when loaded"}
    assert sum(case.read for case in cases) > 200
    assert sum(case.bad for case in cases) > 20


def test_a_process_that_ends_early_is_told_with_the_case_that_it_held(tmp_path):
    (tmp_path / "3" / "outside").mkdir(parents=True)  # which case 3 cannot make again
    cases = examine_all([2, 3, 4], tmp_path)
    assert [case.wrong for case in cases] == [None, "it crashed: status 256", None]
