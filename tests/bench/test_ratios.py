"""What a benchmark was to reach, and what has fallen: on made-up reports, both ways."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fdscale.bench.conduct as conduct_module
from fdscale.bench.conduct import Benchmark, conduct
from fdscale.bench.ratios import Ratio, compared, musts
from fdscale.bench.scaling import scaling_ratios, scaling_tables
from fdscale.bench.step_report import step_ratios, step_tables
from fdscale.bench.tables import Table

STEP = {
    "images": 8,
    "precision": "bf16",
    "flops_per_image": 1e12,
    "losses": {"fdscale": [1.0], "plain": [1.0]},
    "seconds": {"fdscale": [4.0, 5.0, 3.0], "plain": [8.0, 5.0, 6.0], "bf16 1000": [1e-3] * 3, "fp32 1000": [4e-3] * 3},
    "peak_activation_bytes": {"fdscale": 6 * 2**20, "plain": 8 * 2**20},
}


def test_a_step_is_told_beside_the_ceiling_of_its_own_run() -> None:
    steps, ceilings = step_tables({"vit_b16": STEP})
    assert steps.lines[0] == ["vit_b16, fdscale", "4.000", "2.00", "2.00", "1.00", "1.00", "6"]
    assert steps.lines[1] == ["vit_b16, plain", "6.000", "1.33", "1.33", "0.67", "2.00", "8"]  # 2, 1 and 2 in the turns
    assert ceilings.lines == [["vit_b16", "2.00", "0.50", "4.0"]]


def test_a_machine_without_bf16_in_hardware_is_told() -> None:
    slow = {**STEP, "seconds": {**STEP["seconds"], "bf16 1000": [3e-3] * 3}}  # type: ignore[dict-item]
    assert "gains little by bf16" in step_tables({"vit_b16": slow})[1].lines[0][-1]


def test_musts_and_aims() -> None:
    ratios = {ratio.name: ratio for ratio in step_ratios("swinv2_b", STEP)}
    assert ratios["swinv2_b: speed to plain"].reaches(1.9)
    assert not ratios["swinv2_b: peak to plain"].reaches(0.7)  # 0.75: less is better
    told = {line[0]: line[-1] for line in musts(ratios.values()).lines}
    assert told == {
        "swinv2_b: speed to plain": "aim reached",
        "swinv2_b: part of the ceiling": "aim reached",
        "swinv2_b: peak to plain": "missed",
    }
    assert musts([Ratio("a", 0.5, None, 0.6)]).lines[0][-1] == "aim missed"
    assert musts([Ratio("a", 1.2, 1.1, 1.3)]).lines[0][-1] == "held"


@pytest.mark.parametrize(
    ("now", "kept", "better", "fallen"),
    [
        (1.20, 1.30, "higher", False),
        (1.10, 1.30, "higher", True),
        (2.00, 1.30, "higher", False),
        (0.54, 0.50, "lower", False),
        (0.60, 0.50, "lower", True),
        (0.10, 0.50, "lower", False),
    ],
)
def test_a_ratio_falls_when_it_is_worse_by_more_than_a_tenth(
    now: float, kept: float, better: Any, fallen: bool
) -> None:
    table, names = compared([Ratio("a", now, better=better)], [Ratio("a", kept, better=better)])
    assert names == (["a"] if fallen else [])
    assert table.lines[0][-1] == ("fallen" if fallen else "held")


def test_what_is_measured_no_more_has_fallen_and_what_is_new_has_not() -> None:
    assert compared([Ratio("new", 1.0)], [Ratio("gone", 1.0)])[1] == ["gone"]


def benchmark(values: Mapping[str, float | str], measured: list[str]) -> Benchmark:
    """One whose parts are numbers that are there already, or why they failed."""

    def part(name: str) -> dict[str, Any]:
        measured.append(name)
        value = values[name]
        return {"failed": value} if isinstance(value, str) else {"value": value}

    return Benchmark(
        "made-up",
        "Made up",
        {name: lambda name=name: part(name) for name in values},  # type: ignore[misc]
        lambda rows: [
            Table("Values", "", ["part", "value"], [[name, str(row["value"])] for name, row in rows.items()])
        ],
        lambda name, row: [Ratio(name, row["value"], must=1.0)],
    )


def test_a_fallen_ratio_is_named_and_the_kept_report_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert conduct(benchmark({"a": 2.0, "b": 2.0}, []), tmp_path, [], False, None) == 0
    kept = tmp_path / "bench_made-up.json"
    before = kept.read_text()
    assert conduct(benchmark({"a": 2.1, "b": 1.9}, []), None, [], False, kept) == 0
    capsys.readouterr()
    assert conduct(benchmark({"a": 2.1, "b": 1.5}, []), None, [], False, kept) == 1
    assert "fallen: b" in capsys.readouterr().out
    assert conduct(benchmark({"a": 2.1, "b": 1.5}, []), None, ["a"], False, kept) == 0  # b was not measured
    assert kept.read_text() == before
    assert "| b | 2.00 | ≥ 1.00 |" in kept.with_suffix(".md").read_text()


def test_a_stopped_benchmark_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conduct_module, "measured_commit", lambda: "abc1234")
    measured: list[str] = []
    assert conduct(benchmark({"a": 1.0, "b": "no luck"}, measured), tmp_path, [], False, None) == 1
    assert "- b failed: no luck" in (tmp_path / "bench_made-up.md").read_text()
    assert conduct(benchmark({"a": 1.0, "b": 1.0}, measured), tmp_path, [], False, None) == 0
    assert measured == ["a", "b", "b"]
    conduct(benchmark({"a": 1.0, "b": 1.0}, measured), tmp_path, ["a"], True, None)
    assert measured == ["a", "b", "b", "a"]
    monkeypatch.setattr(conduct_module, "measured_commit", lambda: "abc1234-dirty")
    conduct(benchmark({"a": 1.0, "b": 1.0}, measured), tmp_path, [], False, None)
    assert measured[4:] == ["a", "b"]
    assert list(json.loads((tmp_path / "bench_made-up.json").read_text())["parts"]) == ["a", "b"]


def test_ranks_are_told_beside_one_and_beside_as_many_apart() -> None:
    row = {
        "1": {"images_per_second": 10.0, "step_seconds": 1.0, "collective_seconds": 0.0},
        "2 apart": {"images_per_second": 18.0, "step_seconds": 1.0, "collective_seconds": 0.0},
        "2 ranks": {"images_per_second": 16.0, "step_seconds": 1.25, "collective_seconds": 0.125},
        "commit": "abc1234",
    }
    assert scaling_tables({"swinv2_t": row})[0].lines[-1] == [
        "swinv2_t, 2 ranks", "16.00", "0.80", "0.89", "1.250", "10.0%"
    ]  # fmt: skip
    assert [round(ratio.value, 2) for ratio in scaling_ratios("swinv2_t", row)] == [0.8, 0.89]
