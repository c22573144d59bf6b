"""Whether Prometheus has an answer to every query of a board."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping

from monitoring.grafana.panels import NEEDS, Board
from tests.monitoring.board_server import ask


def check_queries(
    prometheus_url: str,
    board: Board,
    variables: Mapping[str, str],
    at: float | None = None,
    lacking: Collection[str] = tuple(NEEDS),
) -> tuple[list[str], list[str]]:
    """(failed, empty): the queries that Prometheus refuses, and those without any series now (or at Unix time `at`).

    `variables` are the board's, say {"run": "demo"}. A query that waits for something `lacking` (keys of NEEDS; all
    of them if not given) may be empty.
    """
    failed, empty = [], []
    for name, expr, needs in asked(board, variables):
        answer = ask(prometheus_url, "query", query=expr, time=f"{at or time.time():.3f}")
        if answer["status"] != "success":
            failed.append(f"{name}: {answer['error']}: {expr}")
        elif not answer["data"]["result"] and needs not in lacking:
            empty.append(f"{name}: {expr}")
    return failed, empty


def asked(board: Board, variables: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    """Name, expression with its variables replaced, and need of every query of a board."""
    for panel in board.panels:
        for query in panel.queries:
            yield f"{board.uid}: {panel.title}", resolved(query.expr, variables), query.needs


def resolved(expr: str, variables: Mapping[str, str]) -> str:
    """An expression as Grafana would send it."""
    for name, value in {"__rate_interval": "1m", "__interval": "15s", "__range": "5m", **variables}.items():
        expr = expr.replace(f"${name}", value)
    return expr
