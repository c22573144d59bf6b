"""What is measured: the one table of metrics, from which exporter, docs and the dashboards' checks derive.

A new metric is one row of `METRICS`. The loop measures and calls `Sinks.write`; what changes between two rows is noted
in `Live`. No torch in here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["gauge", "counter", "info"]
Scope = Literal["run", "node"]

STATES = (
    "starting",
    "waiting for data",
    "training",
    "saving",
    "evaluating",
    "looking at the teachers",
    "going back",
    "writing the result",
)
WAYS_OUT = ("prometheus", "targets", "pushgateway", "monitor")
ENDS = ("complete", "stopped", "canary", "hang", "killed", "mistake", "error")


@dataclass(frozen=True)
class Metric:
    """One measured quantity: its name in the loop and in `metrics.jsonl`, kind, base unit and meaning.

    With `labels` it is measured for each of several things: `teacher_loss/dino` is that of the teacher `dino`. The
    main rank's node serves those of the `run`; each node serves those of its own ranks.
    """

    name: str
    kind: Kind
    unit: str
    help: str
    labels: tuple[str, ...] = ()
    scope: Scope = "run"

    @property
    def prometheus_name(self) -> str:
        return f"fdscale_{self.name}"

    def measures(self, name: str) -> bool:
        """Whether a value of that name is this quantity's."""
        return name.partition("/")[0] == self.name and name.count("/") == len(self.labels)


def _gauge(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", unit, help, labels)


def _counter(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(name, "counter", unit, help, labels)


def _of_rank(name: str, unit: str, help: str, *labels: str) -> Metric:
    return Metric(name, "gauge", unit, help, ("rank", *labels), "node")


INFO = ("attempt", "commit", "version", "recipe", "program", "student", "teachers", "ranks", "nodes", "chip")

_ROWS = (
    # the run
    Metric("run_info", "info", "1", "Always 1: what runs, in the labels; commit is that of the code", INFO),
    _gauge("run_state", "1", "1 for what the main rank is doing, 0 for the other states", "state"),
    _gauge("attempt", "1", "Number of this start of the run, from 1; restarts are one less"),
    _gauge("attempt_start_timestamp_seconds", "seconds", "Unix time at which this attempt began"),
    _gauge("first_start_timestamp_seconds", "seconds", "Unix time at which the first attempt began"),
    _gauge("attempts_without_commit", "1", "Starts in a row, this one included, without a new checkpoint; 0 after one"),
    _gauge("previous_end", "1", "1 for how the attempt before this one ended", "reason"),
    _gauge("goodput", "ratio", "Share of the time since the first start that went into steps which count"),
    # progress
    _gauge("step", "steps", "Optimizer steps done since the run began; falls back on resume"),
    _gauge("steps_planned", "steps", "The step at which the run is complete"),
    _gauge("epoch", "epochs", "Passes over the data set, fractional"),
    _gauge("images", "images", "Images trained on since the run began; falls back on resume"),
    _gauge("eta_seconds", "seconds", "Estimated time to the last step"),
    _gauge("last_step_timestamp_seconds", "seconds", "Unix time at which the last step ended"),
    # what is learned
    _gauge("loss", "1", "Training loss of the global batch"),
    _gauge("loss_zero", "1", "Distillation loss that predicting zero would have on the same target"),
    _gauge("feature_cosine", "1", "Mean cosine between projected student tokens and target tokens"),
    _gauge("target_variance", "1", "Variance of the target tokens; 1 when they are whitened"),
    _gauge("teacher_loss", "1", "Distillation loss of one of several teachers, not weighted", "teacher"),
    _gauge("teacher_cosine", "1", "Mean cosine between projected tokens and one teacher's", "teacher"),
    _gauge("accuracy", "ratio", "Correctly classified share of the global batch"),
    _gauge("pixel_accuracy", "ratio", "Correctly classified share of the global batch's labelled pixels"),
    _gauge("loss_part", "1", "One part of a dense head's loss", "part"),
    _gauge("grad_norm", "1", "Total gradient norm before clipping"),
    _gauge("lr", "1", "Learning rate of the head's or projector's group, which layer decay leaves whole"),
    _gauge(
        "residual_amplitude",
        "1",
        "Largest absolute activation of the residual stream, mean of ranks",
        "stage",
    ),
    _gauge("eval_loss", "1", "Loss on the held-out shards"),
    _gauge("eval_accuracy", "ratio", "Correctly classified share of the held-out images"),
    _gauge("eval_ema_loss", "1", "Loss on the held-out shards of the weights' moving average"),
    _gauge("eval_ema_accuracy", "ratio", "Correctly classified share of the held-out images by the moving average"),
    _gauge("eval_miou", "ratio", "Mean over the classes of the held-out pixels' intersection over union"),
    _gauge("eval_ema_miou", "ratio", "The same of the weights' moving average"),
    _gauge("eval_pixel_accuracy", "ratio", "Correctly classified share of the held-out pixels"),
    _gauge("eval_mean_accuracy", "ratio", "Mean over the classes of their correctly classified held-out pixels"),
    _gauge(
        "eval_ap", "ratio", "COCO's average precision on the held-out images: of boxes or masks, at what", "of", "at"
    ),
    _gauge("eval_ema_ap", "ratio", "The same of the weights' moving average", "of", "at"),
    _gauge("eval_knn_accuracy", "ratio", "k-NN accuracy of student features on the held-out shards"),
    # how fast
    _gauge("images_per_second", "images/second", "Training throughput of all ranks together"),
    _gauge("step_seconds", "seconds", "Time of one step, data wait included; mean since last row"),
    _gauge("phase_seconds", "seconds", "Time of one step by phase; mean over ranks, since last row", "phase"),
    _gauge("data_wait_seconds", "seconds", "Time a step waited for its batch on the main rank; mean since last row"),
    _gauge("collective_seconds", "seconds", "Time of one step inside the engine's collectives; mean over ranks"),
    _gauge("model_flops_per_image", "FLOP", "Model arithmetic of one image, teachers included, recomputation not"),
    _gauge("peak_flops_per_second", "FLOP/s", "Peak of all ranks' chips: published for GPUs, measured on CPUs"),
    _gauge("model_flops_per_second", "FLOP/s", "Model arithmetic of all ranks, recomputation not counted"),
    _gauge("mfu", "ratio", "Model FLOP/s as a share of the chips' peak"),
    _gauge("slowest_rank", "1", "The rank whose own work takes longest"),
    _gauge("slowest_lag_seconds", "seconds", "How much longer a step's work takes there than on the median rank"),
    _gauge("straggler_ratio", "ratio", "The slowest rank's own work over the median rank's"),
    # memory
    _gauge("planned_memory_bytes", "bytes", "Peak of a rank as planned, activations included"),
    _gauge("measured_memory_bytes", "bytes", "Peak of rank 0 as measured in one step"),
    # what can be lost, and what was
    _gauge("checkpoint_step", "steps", "Step of the newest commit"),
    _gauge("checkpoint_timestamp_seconds", "seconds", "Unix time of the newest commit; that of the start before one"),
    _gauge("checkpoint_bytes", "bytes", "Size of the newest commit, all ranks together"),
    _gauge("checkpoint_seconds", "seconds", "Time the last checkpoint took until it was committed"),
    _gauge("checkpoint_every", "steps", "Steps between checkpoints, as the recipe says"),
    _gauge("skipped_steps", "steps", "Steps applied on no rank since the run began; falls back on resume"),
    _counter("skipped_steps_total", "steps", "Steps whose loss or gradient was not finite, in this attempt"),
    _counter("rollbacks_total", "1", "Times this attempt went back to its last checkpoint"),
    _gauge("bad_samples", "samples", "Undecodable images replaced since the run began; falls back on resume"),
    _counter("bad_samples_total", "samples", "Undecodable images replaced in this attempt"),
    _counter("fetched_bytes_total", "bytes", "Bytes that all ranks have brought from behind URLs in this attempt"),
    _counter("canary_checks_total", "1", "Times all teachers were what they had been"),
    # the nodes
    _of_rank("rank_phase_seconds", "seconds", "Time of one step by phase on one rank; mean since last row", "phase"),
    _of_rank("rank_collective_seconds", "seconds", "Time of one step inside the engine's collectives on one rank"),
    _of_rank("rank_probe_seconds", "seconds", "Time of a small fixed matrix product on one rank: its chip's pace"),
    _of_rank("rank_device_memory_bytes", "bytes", "Device memory in use on a rank's device, by anyone"),
    _of_rank("rank_device_memory_limit_bytes", "bytes", "Device memory that there is"),
    _of_rank("rank_host_memory_bytes", "bytes", "Resident memory of one rank's process"),
    Metric("node_memory_available_bytes", "gauge", "bytes", "Host memory that a node can still give", (), "node"),
    Metric(
        "node_memory_limit_bytes",
        "gauge",
        "bytes",
        "Host memory that a node or its job has",
        (),
        "node",
    ),
    # the telling itself
    _counter("telemetry_seconds_total", "seconds", "Time the training loop spent on handing over its measurements"),
    Metric(
        "telemetry_failures_total", "counter", "1", "Times that a node could not tell by one way out", ("way",), "node"
    ),
)
METRICS: dict[str, Metric] = {row.name: row for row in _ROWS}


def counters() -> dict[str, float]:
    """Every counter at 0: one that first appears as 1 has not risen, for Prometheus."""
    plain = [row.name for row in _ROWS if row.kind == "counter" and not row.labels]
    return dict.fromkeys((*plain, *(f"telemetry_failures_total/{way}" for way in WAYS_OUT)), 0.0)


def row_of(name: str) -> Metric | None:
    """The metric that a value's name belongs to, `teacher_loss/dino` to `teacher_loss`; None for none."""
    metric = METRICS.get(name.partition("/")[0])
    return metric if metric is not None and metric.measures(name) else None
