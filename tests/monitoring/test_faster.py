"""The lab's faster clock: every span of time in the rules is shortened, and nothing else."""

from __future__ import annotations

import re

import pytest
import yaml

from tests.cluster.lab.prometheus import faster, shorter
from tests.monitoring.rules import MONITORING, rules

RULE = {
    "alert": "Odd",
    "expr": 'a:b:median6h > 0.5 * quantile_over_time(0.5, x{y="z"}[6h] offset 15m) + 2 * 60 + 60 * 60 + 600',
    "for": "90m",
}


def test_a_rule_is_shortened_in_each_of_its_spans() -> None:
    rule = faster({"groups": [{"name": "g", "rules": [RULE]}]}, 30)
    expected = 'a:b:median6h > 0.5 * quantile_over_time(0.5, x{y="z"}[720000ms] offset 30000ms) + 2 * 2 + 60 * 2 + 600'
    assert rule["groups"][0]["rules"] == [{"alert": "Odd", "expr": expected, "for": "180000ms"}]


@pytest.mark.parametrize(("duration", "milliseconds"), [("5m", "10000ms"), ("1h", "120000ms"), ("1d", "2880000ms")])
def test_a_duration_is_divided(duration: str, milliseconds: str) -> None:
    assert shorter(duration, 30) == milliseconds


@pytest.mark.parametrize("file", ["recording.yml", "alerts.yml"])
def test_of_the_shipped_rules_none_keeps_its_time(file: str) -> None:
    shortened = faster(yaml.safe_load((MONITORING / file).read_text()), 30)["groups"]
    for before, after in zip(rules(file), [rule for group in shortened for rule in group["rules"]], strict=True):
        spans = len(re.findall(r"\[\w+\]|offset \w+", before["expr"]))
        assert len(re.findall(r"\[\d+ms\]|offset \d+ms", after["expr"])) == spans
        assert "* 60" not in after["expr"]
        assert after.get("for", "0ms").endswith("ms")
