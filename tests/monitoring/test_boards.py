"""The boards: they ask for what is measured, all of it, and their committed JSON is what their description gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from fdscale.training.metrics import ENDS, METRICS, STATES
from monitoring.grafana.build import BOARDS, DASHBOARDS, REPOSITORY, derived
from monitoring.grafana.draw import PAGE_WIDTH, placed
from monitoring.grafana.panels import NEEDS, Board, metrics_in
from monitoring.grafana.states import END_NAMES, STATE_NAMES, end_number, state_number

# What others measure, with the labels that a query may use.
FOREIGN = {
    "up": {"job", "run", "node", "ended"},
    "ALERTS": {"alertname", "alertstate", "run"},
    "push_time_seconds": {"run", "node", "instance"},
}
DCGM_LABELS = {"Hostname", "gpu"}
TARGET_LABELS = {"run", "node", "instance"}  # of every series of a run
UNSHOWN = {  # a metric on no board, and why
    "model_flops_per_image": "a constant of the networks, inside model_flops_per_second",
    "peak_flops_per_second": "a constant of the chips, inside mfu",
}
SOURCES = Path(__file__).parent / "boards"

each_board = pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)


def committed(board: Board) -> dict[str, Any]:
    return json.loads((DASHBOARDS / f"{board.uid}.json").read_text())


def expressions() -> Iterator[str]:
    """Every expression in the committed JSON: those of panels, and of annotations."""
    for board in map(committed, BOARDS):
        yield from (target["expr"] for panel in board["panels"] for target in panel.get("targets", ()))
        yield from (annotation["target"]["expr"] for annotation in board["annotations"]["list"])


def labels_of(name: str) -> set[str]:
    row = METRICS.get(name.removeprefix("fdscale_"))
    return {*TARGET_LABELS, *row.labels} if row and name.startswith("fdscale_") else FOREIGN[name]


def labels_in(expr: str) -> set[str]:
    """What the series of an expression may be grouped, joined and named by."""
    names = re.findall(r"\b(\w+)\{", expr)
    made = re.findall(r'label_replace\(.*?, "(\w+)", "', expr) + re.findall(r'count_values by \(\w+\) \("(\w+)"', expr)
    return {*made, *(DCGM_LABELS if "DCGM_" in expr else ()), *(one for name in names for one in labels_of(name))}


def test_what_is_committed_is_what_the_description_gives() -> None:
    stale = [str(path) for path, text in derived().items() if not path.exists() or path.read_text() != text]
    assert not stale, f"run `make dashboards`: {stale}"


def test_only_what_is_measured_is_asked_for() -> None:
    for expr in expressions():
        for name, matchers in re.findall(r"\b(\w+)\{(.*?)\}", expr):
            asked = set(re.findall(r"(\w+)(?:=~|!~|!=|=)", matchers))
            assert asked <= labels_of(name), f"{name} has no {asked - labels_of(name)}: {expr}"
        assert all(name in METRICS for name in metrics_in(expr)), expr


def test_series_are_grouped_by_labels_that_they_have() -> None:
    for expr in expressions():
        grouped = re.findall(r"\b(?:by|on) \(([^)]*)\)", expr)
        used = {label for labels in grouped for label in re.split(r",\s*", labels) if label}
        assert used <= labels_in(expr), f"{used - labels_in(expr)}: {expr}"


@each_board
def test_a_legend_names_labels_that_are_there(board: Board) -> None:
    for panel in board.panels:
        for query in panel.queries:
            assert query.legend, f"{panel.title}: a line without a name"
            assert set(re.findall(r"\{\{(\w+)\}\}", query.legend)) <= labels_in(query.expr), panel.title
            assert not query.needs or query.needs in NEEDS


def test_the_exporter_of_the_gpus_is_told_to_tell_what_is_asked_for() -> None:
    counters = (REPOSITORY / "monitoring" / "dcgm" / "counters.csv").read_text()
    told = {line.split(",")[0] for line in counters.splitlines()}
    assert {name for expr in expressions() for name in re.findall(r"DCGM_\w+", expr)} <= told


def test_runbooks_name_panels_that_are_there() -> None:
    text = " ".join((REPOSITORY / "docs" / "runbooks.md").read_text().split())
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", text)) - {"Delete group"}  # the gateway's own button
    assert named
    assert named <= {panel.title.removesuffix(": $run") for board in BOARDS for panel in board.panels}


def test_every_metric_is_on_a_board() -> None:
    queries = (query for board in BOARDS for panel in board.panels for query in panel.queries)
    shown = {name for query in queries for name in metrics_in(query.expr)}
    assert METRICS.keys() - shown == UNSHOWN.keys()


def test_every_state_and_end_has_a_word_and_a_number() -> None:
    assert [word for word, _ in STATE_NAMES.values()][: len(STATES)] == list(STATES)
    assert [word for word, _ in END_NAMES.values()] == list(ENDS)
    assert all(f'state="{state}"' in state_number() for state in STATES)
    assert all(f'reason="{end}"' in end_number() for end in ENDS)


@each_board
def test_every_panel_says_what_it_shows_and_in_what_unit(board: Board) -> None:
    for panel in board.panels:
        assert panel.title
        assert panel.help, panel.title
        assert panel.unit, panel.title


@each_board
def test_panels_lie_beside_one_another(board: Board) -> None:
    places = [place for _, place in placed(board)]
    assert all(place.x + place.w <= PAGE_WIDTH for place in places)
    for one, other in combinations(places, 2):
        beside = one.x + one.w <= other.x or other.x + other.w <= one.x
        assert beside or one.y + one.h <= other.y or other.y + other.h <= one.y
    assert all(panel.width == PAGE_WIDTH for panel in board.panels if panel.repeat), "repeated ones take a line"


@each_board
def test_the_data_source_is_the_boards_variable_everywhere(board: Board) -> None:
    plain = committed(board)
    sources = list(_all_under(plain, "datasource"))
    assert sources
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
    assert [variable["name"] for variable in plain["templating"]["list"]] == ["datasource", "run"]


@each_board
def test_a_board_is_found_again(board: Board) -> None:
    plain = committed(board)
    numbers = [panel["id"] for panel in plain["panels"]]
    assert len(set(numbers)) == len(numbers)
    assert (plain["uid"], plain["tags"], plain["refresh"]) == (board.uid, ["fdscale"], "30s")
    assert plain["links"][0]["tags"] == ["fdscale"]
    marks = {mark["name"]: mark for mark in plain["annotations"]["list"]}
    assert marks.keys() == {"Checkpoints", "Restarts", "Steps left out"}
    assert {name for name, mark in marks.items() if mark["enable"]} == board.marks.keys()


def test_the_drawing_knows_every_option_that_the_boards_set() -> None:
    """The library's list of options is filled by our drawing; one that is missing there would be ignored."""
    known = set(re.findall(r"'(\w+)'", (SOURCES / "data.ts").read_text()))
    for board in map(committed, BOARDS):
        lines = [panel["fieldConfig"] for panel in board["panels"] if panel["type"] == "timeseries"]
        plain = {name for panel in lines for name in panel["defaults"] if name != "custom"}
        custom = {name for panel in lines for name in panel["defaults"].get("custom", {})}
        overridden = {one["id"] for panel in lines for each in panel["overrides"] for one in each["properties"]}
        assert {*plain, *custom, *(name.removeprefix("custom.") for name in overridden)} <= known


def _all_under(value: Any, key: str) -> Iterator[Any]:
    """Every value under a key of a tree."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    for name, inner in value.items() if isinstance(value, dict) else ():
        if name == key:
            yield inner
        else:
            yield from _all_under(inner, key)
