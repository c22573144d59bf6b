"""The boards: drawn with Grafana's UI library from a simulated run, and answered by a real one, in a real Prometheus.

`python -m pytest -m prove tests/prove/test_boards.py` writes docs/measurements/dashboards.json and dashboards.md, and
the pictures in docs/images. It needs Node.js 20 and Debian's prometheus, chromium and fonts-dejavu-core.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from monitoring.grafana.build import BOARDS, DASHBOARDS
from monitoring.grafana.panels import NEEDS, Board, Panel, Query, Row, of
from tests.monitoring.board_queries import check_queries, resolved
from tests.monitoring.board_rendering import View, install, render, type_errors
from tests.monitoring.board_server import ask, prometheus, write_blocks
from tests.monitoring.board_simulation import HOUR, HOURS, Run
from tests.prove.lives import LIFE_SECONDS, Launch, printed_by, steps_of_this_life
from tests.prove.page import REPOSITORY, Page

PROGRAMS = {"prometheus": "prometheus", "promtool": "prometheus", "chromium": "chromium", "npm": "nodejs and npm"}
MISSING = sorted({package for program, package in PROGRAMS.items() if shutil.which(program) is None})
pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(bool(MISSING), reason=f"missing: {', '.join(MISSING)}"),
]

RUN = "swinv2g-clip-dino"
LACKING = ("gpu", "dcgm", "pushgateway", "teachers", "labels", "held-out")  # what a real run here does not have
IMAGES = REPOSITORY / "docs" / "images"
LARGEST_PICTURE = 250_000
MEASURED = ("fdscale/training", "monitoring/grafana", "tests/monitoring/board*", "tests/prove/test_boards.py")
HOW = (
    "Each board's committed JSON: held against `Dashboard` of @grafana/schema 12.4.11 by `tsc --strict`; every query "
    "asked of a real Prometheus; every panel drawn with Grafana's UI library 12.4.10 in headless Chromium. No Grafana "
    "server was there: variables, annotations, tables and state timelines are stood in for. The run is simulated: "
    f"{HOURS} hours on two nodes, told by fdscale's own endpoint code; what waits for fine-tuning has no answer there. "
    "The real run is the smoke student on two CPU ranks, stopped and started again, found by its target files; what "
    f"waits for {', '.join(NEEDS[need] for need in LACKING)} has no answer there."
)
COLUMNS = ("board", "panels", "queries", "types", "failed", "empty", "drawn", "marks")


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Iterator[View]:
    """A Prometheus that holds the simulated run up to now."""
    install()
    folder = tmp_path_factory.mktemp("simulated")
    end = int(time.time()) // 60 * 60
    write_blocks(folder, Run(RUN, end - HOURS * HOUR).samples())
    with prometheus(folder) as address:
        yield View(address, (RUN,), end - HOURS * HOUR, end - 60)


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.uid)
def test_a_board_is_a_dashboard_and_every_panel_is_drawn(board: Board, view: View) -> None:
    page = Page("dashboards", MEASURED)
    row = page.row(board.uid, lambda: measured(board, view))
    write(page)
    assert row["types"] == ""
    assert (row["failed"], row["empty"]) == ([], [])
    assert row["drawing"]["failed"] == row["drawing"]["empty"] == []
    assert row["drawing"]["rendered"] == row["panels"]
    assert (IMAGES / f"{board.uid}.png").stat().st_size < LARGEST_PICTURE


def test_a_real_run_has_an_answer_to_every_query(launch: Launch, tmp_path: Path) -> None:
    page = Page("dashboards", MEASURED)
    row = page.row("all, by a real run", lambda: answered(launch, tmp_path))
    write(page)
    assert (row["failed"], row["empty"]) == ([], [])


def test_what_is_wrong_is_told_from_what_is_not_there(view: View) -> None:
    queries = (Query("sum(("), Query("fdscale_nothing"), Query("fdscale_none", needs="gpu"), Query("up"))
    board = Board("probe", "Probe", "", (Row("", (Panel("Probe", queries, "none", ""),)),))
    failed, empty = check_queries(view.prometheus, board, {"run": RUN}, at=view.end)
    assert [told.partition(": parse error")[0] for told in failed] == ['probe: Probe: invalid parameter "query": 1:6']
    assert empty == ["probe: Probe: fdscale_nothing"]
    assert len(check_queries(view.prometheus, board, {"run": RUN}, at=view.end, lacking=())[1]) == 2


def test_what_a_gateway_keeps_of_a_run_that_is_gone_is_left_out(tmp_path: Path) -> None:
    now = int(time.time())
    samples = []
    for run, pushed in (("goes on", now - 15), ("gone", now - 600)):
        labels = {"run": run, "node": "a", "job": "fdscale"}
        samples += [("fdscale_loss", labels, 1, now - 10), ("push_time_seconds", labels, pushed, now - 10)]
    write_blocks(tmp_path, samples)
    with prometheus(tmp_path) as address:
        answer = ask(address, "query", query=resolved(of("loss"), {"run": ".*"}), time=str(now))
    assert [series["metric"]["run"] for series in answer["data"]["result"]] == ["goes on"]


def test_a_wrong_board_is_no_dashboard(view: View, tmp_path: Path) -> None:
    right = (DASHBOARDS / f"{BOARDS[0].uid}.json").read_text()
    wrong = tmp_path / "wrong.json"
    wrong.write_text(right.replace('"gridPos"', '"gridpos"'))
    assert "gridpos" in type_errors(wrong)


def test_a_panel_that_cannot_be_drawn_is_told(view: View, tmp_path: Path) -> None:
    right = (DASHBOARDS / f"{BOARDS[0].uid}.json").read_text()
    wrong = tmp_path / "wrong.json"
    wrong.write_text(right.replace("max by (run) (fdscale_lr", "max by (run) ((fdscale_lr"))
    drawing = render(wrong, view, tmp_path / "wrong.png")
    assert [failed.partition(":")[0] for failed in drawing["failed"]] == ["Learning rate"]


def measured(board: Board, view: View) -> dict[str, Any]:
    json = DASHBOARDS / f"{board.uid}.json"
    failed, empty = check_queries(view.prometheus, board, {"run": RUN}, at=view.end, lacking=("labels",))
    types, drawing = type_errors(json), render(json, view, IMAGES / f"{board.uid}.png")
    return {
        "panels": len(board.panels),
        "queries": sum(len(panel.queries) for panel in board.panels),
        "types": types,
        "failed": failed,
        "empty": empty,
        "drawing": drawing,
        "held": not (types or failed or empty or drawing["failed"] or drawing["empty"]),
    }


def answered(launch: Launch, folder: Path) -> dict[str, Any]:
    """Asks for everything while a run trains that was stopped and started again."""
    run, targets = folder / "here" / "run", folder / "targets"
    targets.mkdir()
    told = ("max_steps=1000", "log.prometheus_port=0", f"log.prometheus_targets={targets}")
    with prometheus(folder, f"{targets}/*.json") as address:
        stop(train(launch, run, told))
        life = train(launch, run, told)
        failed, empty = [], ["nothing asked yet"]
        deadline = time.monotonic() + 120
        while (failed or empty) and time.monotonic() < deadline and life.poll() is None:
            time.sleep(1)
            answers = [check_queries(address, board, {"run": run.name}, lacking=LACKING) for board in BOARDS]
            failed, empty = ([told for each in answers for told in each[kind]] for kind in (0, 1))
        stop(life)
    panels = [panel for board in BOARDS for panel in board.panels]
    queries = sum(len(panel.queries) for panel in panels)
    return {"panels": len(panels), "queries": queries, "failed": failed, "empty": empty, "held": not (failed or empty)}


def train(launch: Launch, run: Path, told: Sequence[str]) -> subprocess.Popen[bytes]:
    """A life that has done some steps of its own."""
    since, life = time.time(), launch(run, *told)
    deadline = time.monotonic() + LIFE_SECONDS
    while steps_of_this_life(run, since) < 6:
        assert life.poll() is None, printed_by(run)
        assert time.monotonic() < deadline, printed_by(run)
        time.sleep(0.5)
    return life


def stop(life: subprocess.Popen[bytes]) -> None:
    life.terminate()
    life.wait(LIFE_SECONDS)


def write(page: Page) -> None:
    lines = []
    for board, row in page.rows.items():
        drawing = row.get("drawing", {"failed": [], "empty": [], "rendered": "-", "marks": "-"})
        line = {
            "board": board,
            "panels": row["panels"],
            "queries": row["queries"],
            "types": row.get("types", "-") or "ok",
            "failed": len(row["failed"]) + len(drawing["failed"]),
            "empty": len(row["empty"]) + len(drawing["empty"]),
            "drawn": drawing["rendered"],
            "marks": drawing["marks"],
        }
        lines.append({column: str(told) for column, told in line.items()})
    page.write_table("Dashboards", HOW, COLUMNS, lines)
