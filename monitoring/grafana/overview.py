"""The first board: is the run healthy, what slows it, when does it end."""

from __future__ import annotations

from monitoring.grafana.panels import GREEN, ORANGE, RED, RUN, UNCOMMITTED, Board, Query, Row, fresh, of, panel, stat
from monitoring.grafana.states import PHASE_COLOURS, STATE_NAMES, state_number

FIRING = f'ALERTS{{alertstate="firing", {RUN}}}'

# Parts of a step in which a run does not get on: the greatest is what slows it. In collectives all ranks wait for the
# slowest one, so that its lag is taken out of them.
LOSSES = {
    "data": of("phase_seconds", "run", where='phase="data"'),
    "collectives, at most": f"clamp_min({of('collective_seconds')} - {of('slowest_lag_seconds')}, 0)",
    "straggler": of("slowest_lag_seconds"),
}
SLOWED_BY = " or ".join(
    f'label_replace({seconds} / {of("step_seconds")}, "cause", "{cause}", "", "")' for cause, seconds in LOSSES.items()
)

HEALTH = Row(
    "Is it healthy",
    (
        stat(
            "State",
            Query(state_number()),
            unit="none",
            names=STATE_NAMES,
            empty="ended",
            help="What the main rank is doing",
        ),
        stat(
            "Firing alerts",
            Query(f"count by (run) ({FIRING}) or 0 * {of('run_info', 'run')}"),
            unit="none",
            help="Alerts of the run; which ones, see below",
            colours=((None, GREEN), (1, RED)),
        ),
        stat(
            "Since the last step",
            Query(f"time() - {of('last_step_timestamp_seconds')}"),
            help="A stalled run counts up here; saving, evaluating and starting do too",
            colours=((None, GREEN), (300, ORANGE), (1800, RED)),
        ),
        stat(
            "Checkpoint age in intervals",
            Query(f"({UNCOMMITTED}) / {of('checkpoint_every')}"),
            unit="none",
            decimals=1,
            help="Steps done since the newest commit, in those between two: what a crash would lose",
            colours=((None, GREEN), (1.5, ORANGE), (3, RED)),
        ),
        stat("Restarts", Query(f"{of('attempt')} - 1"), unit="none", help="Starts of the run after the first one"),
        stat("Loss", "loss", decimals=4),
    ),
)

PACE = Row(
    "How fast, and until when",
    (
        stat(
            "Progress",
            Query(f"{of('step')} / {of('steps_planned')}"),
            unit="percentunit",
            decimals=1,
            help="Steps done, of those planned",
        ),
        stat(
            "Finishes",
            Query(f"(time() + {of('eta_seconds')}) * 1000"),
            unit="dateTimeAsIso",
            help="When the last step will be done, at this pace",
        ),
        stat("Time left", "eta_seconds", unit="dtdurations"),
        stat(
            "Images per second",
            "images_per_second",
            decimals=0,
        ),
        stat(
            "Goodput",
            "goodput",
            colours=((None, RED), (0.8, ORANGE), (0.95, GREEN)),
            decimals=1,
        ),
        stat(
            "Slowed most by",
            Query(f"topk by (run) (1, {SLOWED_BY})", "{{cause}} {{run}}"),
            unit="percentunit",
            decimals=0,
            text="value_and_name",
            help="The greatest part of a step that is no computing: data, the wait for the slowest rank, collectives; "
            "on GPUs these may run beside computation",
            colours=((None, GREEN), (0.15, ORANGE), (0.4, RED)),
        ),
    ),
)

STORY = Row(
    "What happened",
    (
        panel(
            "State over time",
            Query(state_number()),
            kind="state-timeline",
            width=12,
            height=5,
            unit="none",
            names=STATE_NAMES,
            help="What the main rank is doing; no answer: the target went away without an orderly end",
        ),
        panel(
            "Alerts over time",
            Query(
                f"max by (run, alertname) ({FIRING}) "
                f'or (label_replace(vector(0), "alertname", "none fires", "", "") unless on () {FIRING})',
                "{{alertname}} {{run}}",
            ),
            kind="state-timeline",
            width=12,
            height=5,
            unit="none",
            names={0: ("calm", GREEN), 1: ("firing", RED)},
            help="Alerts that fire for the run, by name; docs/runbooks.md has a section on each",
        ),
    ),
)

LEARNED = Row(
    "What is learned",
    (
        panel(
            "Loss",
            Query(of("loss"), "{{run}}"),
            Query(of("loss_zero"), "{{run}} predicting zero"),
            width=12,
            dashed="predicting zero$",
            log=True,
        ),
        panel("Feature cosine and target variance", "feature_cosine", "target_variance", width=12),
        panel("Loss of each teacher", "teacher_loss", needs="teachers", width=6),
        panel("Cosine to each teacher", "teacher_cosine", needs="teachers", width=6),
        panel("Gradient norm before clipping", "grad_norm", width=6, log=True),
        panel("Learning rate", "lr", width=6, unit="sci"),
        panel("Residual amplitude by stage", "residual_amplitude", width=12, log=True),
        panel(
            "Held-out shards",
            Query(of("eval_loss"), "{{run}} loss", "held-out"),
            Query(of("eval_knn_accuracy"), "{{run}} k-NN accuracy", "held-out"),
            Query(of("eval_accuracy"), "{{run}} accuracy", "labels"),
            Query(of("eval_ema_loss"), "{{run}} loss of the average", "labels"),
            Query(of("eval_ema_accuracy"), "{{run}} accuracy of the average", "labels"),
            Query(of("accuracy"), "{{run}} accuracy while training", "labels"),
            width=12,
        ),
        panel("Parts of a dense head's loss", "loss_part", needs="detection", width=8),
        panel(
            "Segmentation of held-out images",
            Query(of("eval_miou"), "{{run}} mIoU", "segmentation"),
            Query(of("eval_ema_miou"), "{{run}} mIoU of the average", "segmentation"),
            Query(of("eval_mean_accuracy"), "{{run}} mean accuracy", "segmentation"),
            Query(of("eval_pixel_accuracy"), "{{run}} pixel accuracy", "segmentation"),
            Query(of("pixel_accuracy"), "{{run}} pixel accuracy while training", "segmentation"),
            width=8,
        ),
        panel("Average precision on held-out images", "eval_ap", "eval_ema_ap", needs="detection", width=8),
    ),
)

SPEED = Row(
    "How fast",
    (
        panel(
            "Images per second",
            Query(of("images_per_second")),
            Query(
                f"max by (run) (quantile_over_time(0.5, fdscale_images_per_second{{{RUN}}}[1h]))",
                "{{run}} median of the last hour",
            ),
            dashed="median of the last hour$",
            help="Training throughput of all ranks together, and its own median over the last hour",
            minimum=0,
        ),
        panel("Model arithmetic", "model_flops_per_second", minimum=0),
        panel("MFU", "mfu", minimum=0),
        panel(
            "A step by phase: $run",
            Query(of("phase_seconds"), "{{phase}}"),
            width=24,
            stacked=True,
            paint=PHASE_COLOURS,
            repeat=True,
            minimum=0,
            help="Time of one step by phase, mean over ranks; collectives are inside forward, backward and update. "
            "Under ZeRO-3 all ranks wait for the slowest one in each of them",
        ),
    ),
)

ABOUT = Row(
    "What runs",
    (
        panel(
            "The run",
            Query(fresh(f"fdscale_run_info{{{RUN}}}")),
            kind="table",
            width=24,
            height=4,
            unit="none",
            help="Attempt, commit, recipe and machines, as the main rank tells them",
        ),
        panel("Step", "step", "steps_planned", width=6, dashed="steps planned$"),
        panel("Epoch", "epoch", width=6),
        panel("Images trained on", "images", width=6),
        stat(
            "First start",
            Query(f"1000 * {of('first_start_timestamp_seconds')}"),
            unit="dateTimeAsIso",
            width=6,
            height=8,
            help="When the first attempt of the run began",
        ),
    ),
)

BOARD = Board(
    "fdscale-overview",
    "fdscale / run overview",
    "Is the run healthy, what slows it, when does it end",
    (HEALTH, PACE, STORY, LEARNED, SPEED, ABOUT),
)
