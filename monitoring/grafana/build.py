"""Writes what is derived: the boards' JSON and the table of metrics; `python -m monitoring.grafana.build`."""

from __future__ import annotations

from pathlib import Path

from fdscale.training.metrics import METRICS, Metric
from monitoring.grafana import overview, ranks, reliability
from monitoring.grafana.draw import board_json

BOARDS = (overview.BOARD, ranks.BOARD, reliability.BOARD)
REPOSITORY = Path(__file__).parents[2]
DASHBOARDS = Path(__file__).parent / "dashboards"
TABLE = REPOSITORY / "docs" / "metrics.md"
BEGIN, END = "<!-- metrics: written by make dashboards -->", "<!-- /metrics -->"


def derived() -> dict[Path, str]:
    """Every file that is written, with its contents."""
    boards = {DASHBOARDS / f"{board.uid}.json": board_json(board) for board in BOARDS}
    before, _, rest = TABLE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    return {**boards, TABLE: f"{before}{BEGIN}\n{metrics_table()}{END}{after}"}


def metrics_table() -> str:
    """METRICS in Markdown, in its order."""
    head = "| metric | type | unit | labels beside `run` | served by | meaning |\n|---|---|---|---|---|---|\n"
    return head + "".join(_line(metric) for metric in METRICS.values())


def _line(metric: Metric) -> str:
    labels = ", ".join(f"`{label}`" for label in metric.labels) or "-"
    served = "main node" if metric.scope == "run" else "each node"
    return f"| `{metric.prometheus_name}` | {metric.kind} | {metric.unit} | {labels} | {served} | {metric.help} |\n"


def main() -> None:
    for path, text in derived().items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


if __name__ == "__main__":
    main()
