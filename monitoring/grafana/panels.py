"""What a board is made of, as data: queries, panels, rows and boards, with units and help taken from METRICS."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from fdscale.training.metrics import METRICS

RUN = 'run=~"$run"'
GREEN, ORANGE, RED, NEUTRAL = "green", "orange", "red", "blue"

FEW = 6  # ranks, nodes or GPUs that one panel names

# How Grafana writes a unit of METRICS. "locale" leaves a count whole: a step is 126,400, never 126 K.
UNITS = {
    "1": "short",
    "ratio": "percentunit",
    "seconds": "s",
    "bytes": "bytes",
    "steps": "locale",
    "images": "locale",
    "samples": "locale",
    "epochs": "short",
    "images/second": "locale",
    "FLOP": "sishort",
    "FLOP/s": "flops",
}

# What a query waits for beyond a healthy run of one teacher on CPUs: there it is empty, and rightly so.
NEEDS = {
    "gpu": "a GPU",
    "dcgm": "NVIDIA's DCGM exporter on the nodes",
    "pushgateway": "log.pushgateway",
    "targets": "log.prometheus_targets, whose files name the node",
    "teachers": "several teachers",
    "labels": "fine-tuning with labels",
    "held-out": "held-out shards and a step at which they were looked at",
    "segmentation": "segmentation, and held-out images",
    "detection": "detection, and held-out images",
    "plan": "a measured step",
    "restart": "a second attempt",
}


@dataclass(frozen=True)
class Query:
    """One PromQL expression, the legend of its series, and what it waits for (a key of NEEDS), if anything."""

    expr: str
    legend: str = "{{run}}"
    needs: str = ""


@dataclass(frozen=True)
class Panel:
    """One panel: what is asked and how it is drawn; `width` in 24ths of the page, `height` in Grafana's units.

    `colours` are thresholds, (from this value on, colour), the first from None; `names` give values a text and a
    colour. `stacked` draws areas on one another, `points` no line between values, `log` a logarithmic axis, `repeat`
    one panel for each run. The axis reaches from `minimum` to `maximum` exactly, or at least up to `reach`. Series
    that match `dashed` are what others are held against; `paint` gives series a colour by their name.
    """

    title: str
    queries: tuple[Query, ...]
    unit: str
    help: str
    kind: str = "timeseries"
    width: int = 8
    height: int = 8
    colours: tuple[tuple[float | None, str], ...] = ()
    names: dict[int, tuple[str, str]] = field(default_factory=dict)
    decimals: int | None = None
    minimum: float | None = None
    maximum: float | None = None
    reach: float | None = None
    text: str = "auto"
    stacked: bool = False
    points: bool = False
    log: bool = False
    repeat: bool = False
    dashed: str = ""
    paint: dict[str, str] = field(default_factory=dict)
    empty: str = ""


@dataclass(frozen=True)
class Row:
    """Panels under one heading; they fill lines of 24 from the left, all of a line equally high."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Board:
    """One page; its address in Grafana is `uid`.

    `marks` are the events that are drawn into its panels at once: into those under one heading, or into all ("").
    """

    uid: str
    title: str
    help: str
    rows: tuple[Row, ...]
    marks: dict[str, str] = field(default_factory=lambda: {"Restarts": "", "Steps left out": ""})

    @property
    def panels(self) -> tuple[Panel, ...]:
        return tuple(panel for row in self.rows for panel in row.panels)


def of(name: str, *by: str, pick: str = "max", where: str = "") -> str:
    """A metric of the chosen runs, one series a run and label.

    Aggregated, since each attempt and each way out has an instance of its own: a restart would else break the line.
    `pick` is the aggregation, `where` further matchers.
    """
    row = METRICS[name]
    labels = ", ".join(("run", *(by or row.labels)))
    matchers = ", ".join(filter(None, (RUN, where)))
    return f"{pick} by ({labels}) ({fresh(f'{row.prometheus_name}{{{matchers}}}')})"


def fresh(series: str) -> str:
    """Series without what a pushgateway keeps of a run that pushes no more."""
    return f"{series} unless on (run, node, instance) time() - push_time_seconds > 120"


def panel(title: str, *asked: Query | str, needs: str = "", **options: Any) -> Panel:
    """A panel of queries, or of metrics as they are (by name); unit and help are theirs where they are not given."""
    named = len(asked) > 1
    queries = tuple(one if isinstance(one, Query) else Query(of(one), _legend(one, named), needs) for one in asked)
    rows = [METRICS[name] for name in dict.fromkeys(metrics_in(" ".join(query.expr for query in queries)))]
    given = {"unit": UNITS[rows[0].unit] if rows else "none", "help": "; ".join(row.help for row in rows), **options}
    return Panel(title, queries, **given)


def stat(title: str, *asked: Query | str, **options: Any) -> Panel:
    """The newest value as a number, neutral in colour where no value is better than another."""
    return panel(title, *asked, **{"kind": "stat", "width": 4, "height": 4, "colours": ((None, NEUTRAL),), **options})


def metrics_in(expr: str) -> list[str]:
    """Names in METRICS of the series that an expression asks for, in its order."""
    return re.findall(r"\bfdscale_(\w+)", expr)


def band(expr: str) -> tuple[Query, ...]:
    """Least, median and greatest of many series: three lines for eight ranks and for a thousand."""
    return (
        Query(f"max by (run) ({expr})", "{{run}} greatest"),
        Query(f"quantile by (run) (0.5, {expr})", "{{run}} median"),
        Query(f"min by (run) ({expr})", "{{run}} least"),
    )


def few(expr: str, *by: str, least: bool = False) -> str:
    """The few series of an expression with the greatest values of the time shown, or the least on average.

    Chosen once: topk at every point of a line would show another series at each. On average, since all are least
    while a run starts.
    """
    chosen = f"{'avg' if least else 'max'}_over_time(({expr})[$__range:$__interval] @ end())"
    return f"{expr} and on ({', '.join(by)}) {'bottomk' if least else 'topk'}({FEW}, {chosen})"


def _legend(name: str, named: bool) -> str:
    """`{{run}} stage {{stage}}`; with several metrics in a panel also which one it is."""
    labels = (f"{label} {{{{{label}}}}}" if label == "stage" else f"{{{{{label}}}}}" for label in METRICS[name].labels)
    return " ".join(["{{run}}", *([name.replace("_", " ")] if named else []), *labels])


UNCOMMITTED = f"{of('step')} - ({of('checkpoint_step')} or 0 * {of('step')})"  # steps that a crash would lose
