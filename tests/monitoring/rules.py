"""The shipped rules as data: alerts, what they and their tests ask for, by name and label."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

MONITORING = Path(__file__).parents[2] / "monitoring"
SELECTOR = re.compile(r"(?<![\w:])(fdscale_\w+)\b(?!:)(?:\{([^}]*)\})?")  # a metric, and what stands in its braces
RECORDED = re.compile(r"\b[a-z_]+:\w+:\w+\b")
MATCHER = re.compile(r'(\w+)\s*(?:=~|!~|!=|=)\s*"((?:[^"\\]|\\.)*)"')


def rules(*files: str) -> list[dict[str, Any]]:
    """Every rule of these files, of recording.yml and alerts.yml unless named."""
    groups = [yaml.safe_load((MONITORING / file).read_text()) for file in files or ("recording.yml", "alerts.yml")]
    return [rule for file in groups for group in file["groups"] for rule in group["rules"]]


def alerts() -> list[dict[str, Any]]:
    return [rule for rule in rules("alerts.yml") if "alert" in rule]


def stories() -> list[dict[str, Any]]:
    """The tests of all files in monitoring/tests."""
    files = sorted((MONITORING / "tests").glob("*.yml"))
    return [story for file in files for story in yaml.safe_load(file.read_text())["tests"]]


def expressions() -> list[str]:
    """What the rules compute, and the series that their tests hold."""
    return [rule["expr"] for rule in rules()] + [
        series["series"] for story in stories() for series in story["input_series"]
    ]


def matchers(expression: str) -> Iterator[tuple[str, list[str]]]:
    """(label, the values that are named) of every matcher, alternatives apart."""
    for label, value in MATCHER.findall(expression):
        yield label, value.split("|")
