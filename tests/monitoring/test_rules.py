"""The shipped rules: their own tests pass, each alert has one of both kinds, and they ask for what there is."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from fdscale.training.metrics import ENDS, METRICS, STATES
from fdscale.training.phases import PHASES
from tests.monitoring.rules import (
    MATCHER,
    MONITORING,
    RECORDED,
    SELECTOR,
    alerts,
    expressions,
    matchers,
    rules,
    stories,
)

RUNBOOKS = Path(__file__).parents[2] / "docs" / "runbooks.md"
OF_TARGETS = {"run", "node", "instance", "job"}  # the labels that Prometheus or a pushgateway adds
ALLOWED = {
    "state": STATES,
    "reason": ENDS,
    "phase": PHASES,
    "ended": ("", "stopped", "canary", "mistake", "error"),
}


@pytest.mark.cluster
def test_promtool_finds_nothing() -> None:
    """Everything at once, as each takes a core for seconds."""
    stories = sorted(MONITORING.glob("tests/*.yml"))
    commands = [["check", "config", "prometheus.yml"], *(["test", "rules", str(file)] for file in stories)]
    started = [
        subprocess.Popen(
            ["promtool", *words], cwd=MONITORING, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for words in commands
    ]
    told = [process.communicate()[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(commands), "\n".join(told)


@pytest.mark.cluster
def test_amtool_takes_the_example() -> None:
    command = ["amtool", "check-config", "alertmanager.example.yml"]
    done = subprocess.run(command, cwd=MONITORING, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_has_an_example_that_fires_and_one_that_does_not() -> None:
    checks = [check for story in stories() for check in story.get("alert_rule_test", [])]
    names = {alert["alert"] for alert in alerts()}
    assert {check["alertname"] for check in checks if check.get("exp_alerts")} == names
    assert {check["alertname"] for check in checks if not check.get("exp_alerts")} == names


def test_each_alert_says_how_bad_it_is_and_where_to_read_on() -> None:
    sections = re.findall(r"^## (\w+)$", RUNBOOKS.read_text(), re.MULTILINE)
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning"), alert["alert"]
        assert set(alert["annotations"]) == {"summary", "description", "runbook_url"}
        assert alert["annotations"]["runbook_url"] == f"docs/runbooks.md#{alert['alert'].lower()}"
    assert sections == list(dict.fromkeys(alert["alert"] for alert in alerts())), "one for each, in their order"


def test_the_rules_ask_for_metrics_that_there_are_by_labels_that_they_have() -> None:
    known = {metric.prometheus_name: metric for metric in METRICS.values()}
    for expression in expressions():
        for name, braces in SELECTOR.findall(expression):
            assert name in known, f"{name}, in: {expression}"
            labels = {label for label, _ in MATCHER.findall(braces)}
            assert labels <= OF_TARGETS | set(known[name].labels), expression


def test_the_rules_ask_for_recorded_series_that_are_recorded() -> None:
    recorded = [rule["record"] for rule in rules() if "record" in rule]
    assert len(set(recorded)) == len(recorded)
    for expression in expressions():
        assert set(RECORDED.findall(expression)) <= set(recorded), expression


def test_the_rules_look_for_values_that_labels_can_have() -> None:
    for expression in expressions():
        for label, values in matchers(expression):
            assert set(values) <= set(ALLOWED.get(label, values)), expression


def test_seconds_are_written_so_that_the_lab_can_shorten_them() -> None:
    """As N * 60 or N * 60 * 60: where time is compared no number is larger."""
    timed = [rule["expr"] for rule in rules() if re.search(r"time\(\)|(age|idle)_seconds", rule["expr"])]
    assert len(timed) > 5
    for expression in timed:
        assert all(int(number) <= 60 for number in re.findall(r"(?<![\w.])\d+\b", expression)), expression


def test_the_exporter_of_gpus_is_told_what_rules_and_dashboards_ask_for() -> None:
    listed = re.findall(r"^(DCGM_\w+),", (MONITORING / "dcgm" / "counters.csv").read_text(), re.MULTILINE)
    dashboards = [file.read_text() for file in MONITORING.glob("grafana/dashboards/*.json")]
    asked = {name for text in (*expressions(), *dashboards) for name in re.findall(r"DCGM_\w+", text)}
    assert asked <= set(listed)
