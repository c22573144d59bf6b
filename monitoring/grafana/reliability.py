"""The third board: whether the data comes, what was lost, what a crash would cost."""

from __future__ import annotations

from monitoring.grafana.panels import GREEN, ORANGE, RED, RUN, UNCOMMITTED, Board, Query, Row, of, panel, stat
from monitoring.grafana.states import END_NAMES, STATE_NAMES, end_number, state_number

CHECKPOINT_AGE = f"time() - {of('checkpoint_timestamp_seconds')}"
DATA_SHARE = f"{of('data_wait_seconds')} / {of('step_seconds')}"
BAD_SHARE = f"1e6 * {of('bad_samples')} / {of('images')}"
FETCHED = f"max by (run) (rate(fdscale_fetched_bytes_total{{{RUN}}}[10m]))"
TELLING_SHARE = f"max by (run) (rate(fdscale_telemetry_seconds_total{{{RUN}}}[10m]))"
NONE_IS_BEST = ((None, GREEN), (1, ORANGE))

NOW = Row(
    "Now",
    (
        stat(
            "Waiting for data",
            Query(DATA_SHARE),
            unit="percentunit",
            decimals=1,
            help="Share of a step in which the main rank waits for its batch",
            colours=((None, GREEN), (0.05, ORANGE), (0.2, RED)),
        ),
        stat("Age of the checkpoint", Query(CHECKPOINT_AGE), help="What a crash would lose now, at most"),
        stat("Steps left out", "skipped_steps", colours=NONE_IS_BEST),
        stat(
            "Starts without a checkpoint",
            "attempts_without_commit",
            unit="none",
            colours=((None, GREEN), (2, ORANGE), (3, RED)),
        ),
        stat(
            "The attempt before ended",
            Query(end_number(), needs="restart"),
            unit="none",
            names=END_NAMES,
            empty="first attempt",
            help="How the attempt before this one ended",
        ),
        stat(
            "Telemetry failures",
            Query(f"sum by (run) ({of('telemetry_failures_total')})"),
            unit="none",
            help="Failures of the ways out in this attempt, all together; training goes on without them",
            colours=NONE_IS_BEST,
        ),
    ),
)

DATA = Row(
    "Data",
    (
        panel(
            "Share of a step that waits for data",
            Query(DATA_SHARE),
            unit="percentunit",
            minimum=0,
            help="On the main rank; every rank: the board of nodes and ranks",
        ),
        panel(
            "Fetched from behind URLs",
            Query(FETCHED),
            unit="Bps",
            minimum=0,
            help="Bytes a second that all ranks bring into their nodes' caches; 0 where the shards are local",
        ),
        panel("Undecodable images replaced", "bad_samples", minimum=0, reach=1),
        panel(
            "Of a million images",
            Query(BAD_SHARE),
            unit="short",
            minimum=0,
            reach=1,
            help="Undecodable images, of those trained on since the run began",
        ),
    ),
)

LOST = Row(
    "What was lost",
    (
        panel("Goodput", "goodput", maximum=1),
        panel("Steps left out", "skipped_steps", minimum=0, reach=1),
        panel(
            "In this attempt",
            Query(of("skipped_steps_total"), "{{run}} steps left out"),
            Query(of("rollbacks_total"), "{{run}} times gone back"),
            Query(of("bad_samples_total"), "{{run}} images replaced"),
            unit="none",
            minimum=0,
            reach=1,
        ),
    ),
)

CHECKPOINTS = Row(
    "Checkpoints",
    (
        panel(
            "Age",
            Query(CHECKPOINT_AGE),
            Query(f"{of('checkpoint_every')} * {of('step_seconds')}", "{{run}} between two"),
            dashed="between two$",
            minimum=0,
            help="Age of the newest commit, and the time that the steps between two take",
        ),
        panel("Time until it is committed", "checkpoint_seconds", minimum=0),
        panel("Size", "checkpoint_bytes", minimum=0),
        panel(
            "Rate",
            Query(f"{of('checkpoint_bytes')} / {of('checkpoint_seconds')}"),
            unit="Bps",
            minimum=0,
            help="Bytes of the newest commit over the time that it took, hashes and fsync included",
        ),
        panel(
            "Steps that are safe",
            Query(of("step"), "{{run}} step"),
            Query(of("checkpoint_step"), "{{run}} committed"),
            dashed="committed$",
        ),
        panel(
            "Steps at risk",
            Query(UNCOMMITTED),
            Query(of("checkpoint_every"), "{{run}} between two checkpoints"),
            dashed="between two checkpoints$",
            minimum=0,
            help="Steps done since the newest commit, and those between two as the recipe says",
        ),
    ),
)

ATTEMPTS = Row(
    "Attempts",
    (
        panel(
            "State over time",
            Query(state_number()),
            kind="state-timeline",
            width=12,
            height=6,
            unit="none",
            names=STATE_NAMES,
            help="What the main rank is doing; no answer: the target went away without an orderly end",
        ),
        panel(
            "How the attempt before ended",
            Query(end_number(), needs="restart"),
            kind="state-timeline",
            width=12,
            height=6,
            unit="none",
            names=END_NAMES,
            empty="no attempt before",
            help="How the attempt before this one ended; killed: nobody heard from it, as after kill -9 or a power cut",
        ),
        panel("Attempt", "attempt", unit="none", width=6, minimum=0),
        panel(
            "Age of the attempt",
            Query(f"time() - {of('attempt_start_timestamp_seconds')}"),
            width=6,
            minimum=0,
            help="Time since this attempt began",
        ),
        panel("Starts in a row without a checkpoint", "attempts_without_commit", width=6, unit="none", minimum=0),
        panel("Looks that found the teachers unchanged", "canary_checks_total", width=6, unit="none", minimum=0),
    ),
)

TELLING = Row(
    "The telling itself",
    (
        panel(
            "Cost",
            Query(TELLING_SHARE),
            unit="percentunit",
            minimum=0,
            help="Share of the loop's time that goes into handing over measurements",
        ),
        panel(
            "Failures by way out",
            Query(of("telemetry_failures_total"), "{{run}} {{way}}"),
            unit="none",
            minimum=0,
            reach=1,
            help="What one way out could not take: prometheus, pushgateway, targets, monitor",
        ),
        panel(
            "Age of what was pushed",
            Query(f"time() - min by (run) (push_time_seconds{{{RUN}}})", needs="pushgateway"),
            unit="s",
            minimum=0,
            help="Since the last push of the node that is longest silent; every ten seconds when all is well",
        ),
    ),
)

BOARD = Board(
    "fdscale-reliability",
    "fdscale / data and reliability",
    "Whether the data comes, what was lost, what a crash would cost",
    (NOW, DATA, LOST, CHECKPOINTS, ATTEMPTS, TELLING),
    marks={"Checkpoints": "Checkpoints", "Restarts": "", "Steps left out": ""},
)
