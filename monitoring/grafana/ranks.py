"""The second board: which node or rank is slow, short of memory or broken; lines do not grow with the ranks."""

from __future__ import annotations

from monitoring.grafana.gpus import GPUS, TARGETS
from monitoring.grafana.panels import (
    FEW,
    GREEN,
    NEUTRAL,
    ORANGE,
    RED,
    Board,
    Panel,
    Query,
    Row,
    band,
    few,
    of,
    panel,
    stat,
)
from monitoring.grafana.states import PHASE_COLOURS

DEVICE_SHARE = f"{of('rank_device_memory_bytes')} / {of('rank_device_memory_limit_bytes')}"
NODE_SHARE = f"1 - {of('node_memory_available_bytes', 'node')} / {of('node_memory_limit_bytes', 'node')}"


def worst(title: str, expr: str, legend: str, needs: str = "", least: bool = False, **options: object) -> Panel:
    """Bars of the few greatest (or least) values there are now."""
    query = Query(f"{'bottomk' if least else 'topk'} by (run) ({FEW}, {expr})", legend, needs)
    return panel(title, query, **{"kind": "bargauge", "colours": ((None, NEUTRAL),), **options})


MEMORY_COLOURS = ((None, GREEN), (0.9, ORANGE), (0.97, RED))

NOW = Row(
    "Now",
    (
        stat(
            "Nodes that answer",
            Query(f"sum by (run) ({TARGETS}) / count by (run) ({TARGETS})"),
            unit="percentunit",
            decimals=0,
            help="Targets of the run that answered the last scrape",
            colours=((None, RED), (0.99, ORANGE), (1, GREEN)),
        ),
        stat(
            "Slowest rank",
            "slowest_rank",
            unit="none",
        ),
        stat(
            "Its work against the median",
            "straggler_ratio",
            unit="suffix: times",
            decimals=2,
            colours=((None, GREEN), (1.2, ORANGE), (1.5, RED)),
        ),
        stat(
            "What it costs",
            Query(f"{of('slowest_lag_seconds')} / {of('step_seconds')}"),
            unit="percentunit",
            decimals=0,
            help="How much longer its work takes than on the median rank, as a share of a step",
            colours=((None, GREEN), (0.1, ORANGE), (0.3, RED)),
        ),
        stat(
            "Fullest host",
            Query(f"max by (run) ({NODE_SHARE})"),
            unit="percentunit",
            decimals=0,
            help="Host memory in use on the node that has least left, of what it or its job has",
            colours=MEMORY_COLOURS,
        ),
        stat(
            "Fullest device",
            Query(f"max by (run) ({DEVICE_SHARE})", needs="gpu"),
            unit="percentunit",
            decimals=0,
            help="Device memory in use on the fullest device, of what there is",
            colours=MEMORY_COLOURS,
            empty="no GPU",
        ),
    ),
)

SLOW = Row(
    "Who is slow",
    (
        panel(
            "Work of the slowest rank, in that of the median rank",
            "straggler_ratio",
            width=8,
            unit="suffix: times",
            minimum=1,
        ),
        panel("Which rank that is", "slowest_rank", width=8, unit="none", points=True),
        panel(
            "Pace of the chips",
            *band(of("rank_probe_seconds")),
            width=8,
            minimum=0,
            help="Time of a small fixed matrix product. Far above the median: a throttled, shared or broken chip",
        ),
        panel(
            "Waiting for data, by rank",
            *band(of("rank_phase_seconds", where='phase="data"')),
            minimum=0,
            help="Time a step waits for its batch on each rank. Far above the median: a slow disk or decoder there",
        ),
        panel(
            "Forward, by rank",
            *band(of("rank_phase_seconds", where='phase="forward"')),
            minimum=0,
            help="Under ZeRO-3 a forward gathers weights: all ranks wait there for the slowest, and are alike",
        ),
        panel(
            "Collectives, by rank",
            *band(of("rank_collective_seconds")),
            minimum=0,
            help="Time of one step inside collectives. The slowest rank waits least there: look at the least",
        ),
        worst(
            "Slowest chips",
            of("rank_probe_seconds"),
            "rank {{rank}} {{run}}",
            help="Longest times of the matrix product",
        ),
        worst(
            "Longest waits for data",
            of("rank_phase_seconds", "rank", where='phase="data"'),
            "rank {{rank}} {{run}}",
            help="Ranks whose steps wait longest for their batch",
        ),
        worst(
            "Least time in collectives",
            of("rank_collective_seconds"),
            "rank {{rank}} {{run}}",
            least=True,
            help="Ranks that the others wait for: least time inside collectives",
        ),
        panel(
            "Phases of the slowest rank: $run",
            Query(
                f"max by (run, phase) ({of('rank_phase_seconds')} and on (run, rank) "
                f'count_values by (run) ("rank", {of("slowest_rank")}))',
                "{{phase}}",
            ),
            paint=PHASE_COLOURS,
            width=24,
            stacked=True,
            repeat=True,
            minimum=0,
            help="Time of one step by phase on the rank that was slowest at that time",
        ),
    ),
)

MEMORY = Row(
    "Memory",
    (
        panel(
            "Device memory",
            *(Query(query.expr, query.legend, "gpu") for query in band(DEVICE_SHARE)),
            unit="percentunit",
            minimum=0,
            maximum=1,
            help="Device memory in use on each rank's device, of what there is",
        ),
        worst(
            "Fullest devices",
            DEVICE_SHARE,
            "rank {{rank}} {{run}}",
            "gpu",
            unit="percentunit",
            maximum=1,
            colours=MEMORY_COLOURS,
            help="Ranks with least device memory left",
        ),
        panel("Planned and measured peak", "planned_memory_bytes", "measured_memory_bytes", needs="plan", minimum=0),
        panel("Host memory of the ranks", *band(of("rank_host_memory_bytes")), minimum=0),
        panel(
            "Host memory left",
            Query(few(of("node_memory_available_bytes", "node"), "run", "node", least=True), "{{node}} {{run}}"),
            minimum=0,
            help="Host memory that a node can still give: the nodes with least",
        ),
        panel(
            "Host memory in use",
            Query(few(NODE_SHARE, "run", "node"), "{{node}} {{run}}"),
            unit="percentunit",
            minimum=0,
            maximum=1,
            help="Host memory in use, of what the node or its job has: the fullest nodes",
        ),
    ),
)

NODES = Row(
    "Nodes",
    (
        panel(
            "Targets",
            Query(f"sum by (run) ({TARGETS})", "{{run}} answer"),
            Query(f"sum by (run) ({TARGETS} == bool 0)", "{{run}} silent"),
            width=12,
            unit="none",
            minimum=0,
            help="Nodes of the run that answer a scrape, and those that do not",
        ),
        panel(
            "Nodes over time",
            Query(few(f"min by (run, node) ({TARGETS})", "run", "node", least=True), "{{node}} {{run}}", "targets"),
            kind="state-timeline",
            width=12,
            unit="none",
            names={0: ("silent", RED), 1: ("answers", GREEN)},
            help="Whether a node answers; silent ones come first where there are many",
        ),
    ),
)

BOARD = Board(
    "fdscale-ranks",
    "fdscale / nodes and ranks",
    "Which node or rank is slow, short of memory or broken",
    (NOW, SLOW, MEMORY, NODES, GPUS),
)
