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
