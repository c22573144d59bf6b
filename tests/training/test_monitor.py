"""DeepSpeed's monitor: what TensorBoard, CSV files and Weights & Biases then hold, and that none of them ends a run."""

from __future__ import annotations

import csv
import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fdscale.training import monitor as module
from fdscale.training.engine import Connection, set_learning_rate, start_engine
from fdscale.training.live import Live
from fdscale.training.monitor import MonitorSink, monitored
from fdscale.training.optim import Schedule, adamw, parameter_groups
from fdscale.training.sinks import Sinks

FILES = {"tensorboard": {"enabled": True}, "csv_monitor": {"enabled": True}}
GLOBAL_BATCH = 8


def trained(connection: Connection, run_dir: str, blocks: dict[str, Any], break_after: int | None = None) -> dict:
    """Four steps of a tiny engine under a JSON with monitor blocks, a row after every second one."""
    torch.manual_seed(0)
    module, world = nn.Linear(4, 1), connection.rank.world_size
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": 1}, **blocks}
    optimizer = adamw(parameter_groups(module, 0.0, set(), {}), 1e-3, (0.9, 0.999), 1e-8)
    engine = start_engine(module, optimizer, config, GLOBAL_BATCH // (2 * world), clip=0.0)
    live, found = Live(), monitored(config, Path(run_dir))
    sink = MonitorSink(engine, found, GLOBAL_BATCH, live) if connection.rank.is_main else None
    sinks = Sinks([sink] if sink else [], live=live)
    for step in range(1, 5):
        if break_after == step - 1:
            os.rename(run_dir, f"{run_dir} is gone")
            Path(run_dir).touch()
        set_learning_rate(engine, Schedule(10, 0, peak=1e-3, start=1e-3, end=1e-3), step)
        for _ in range(GLOBAL_BATCH // (2 * world)):
            engine.backward(engine(torch.ones(2, 4)).mean())
            engine.step()
        if step % 2 == 0:
            values = {"loss": float("nan") if step == 4 else 0.5, "images": step * GLOBAL_BATCH}
            sinks.write(step, {**values, "teacher_loss/dino": 0.25})
            sinks.write(step, {"checkpoint_seconds": 1.5})
    sinks.close()
    return {"live": live.values, "samples": engine.global_samples, "enabled": bool(engine.monitor.enabled)}


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {tag: [(one.step, one.value) for one in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_rows_lie_over_images_beside_deepspeeds_own(two_ranks, tmp_path: Path):
    main, other = two_ranks(trained, str(tmp_path), FILES)
    assert (main["enabled"], other["enabled"]) == (True, False)
    assert main["samples"] == 4 * GLOBAL_BATCH
    found = points(tmp_path / "tensorboard")
    assert found["fdscale/teacher_loss/dino"] == [(16, 0.25), (32, 0.25)]
    assert found["fdscale/checkpoint_seconds"] == [(16, 1.5), (32, 1.5)]
    assert [images for images, _ in found["Train/Samples/lr"]] == [8, 16, 24, 32]
    (early, late) = found["fdscale/loss"]
    assert early == (16, 0.5)
    assert late[0] == 32
    assert late[1] != late[1]  # a loss that is not a number is shown as such
    assert "fdscale/images" not in found
    assert "fdscale/step" in found
    with (tmp_path / "csv_monitor" / "fdscale_loss.csv").open() as file:
        assert list(csv.reader(file)) == [["step", "loss"], ["16", "0.5"], ["32", "nan"]]
    assert not Path("DeepSpeedJobName").exists()


def test_a_writer_that_breaks_ends_no_run(one_rank, tmp_path: Path):
    """The folder goes away amid the run: DeepSpeed's own event of the next step finds out first."""
    (told,) = one_rank(trained, str(tmp_path / "run"), {"csv_monitor": {"enabled": True}}, 2)
    assert told["live"]["telemetry_failures_total/monitor"] == 1
    assert told["samples"] == 4 * GLOBAL_BATCH


def test_a_writer_that_cannot_begin_ends_no_run(two_ranks, tmp_path: Path):
    (tmp_path / "run").touch()
    main, other = two_ranks(trained, str(tmp_path / "run"), FILES)
    assert main["live"]["telemetry_failures_total/monitor"] == 2  # each of them once
    assert "telemetry_failures_total/monitor" not in other["live"]


def hung(connection: Connection, run_dir: str) -> tuple[float, dict[str, float]]:
    """`trained` onto a share that hangs: a pipe, opened for writing, waits for a reader."""
    file = Path(run_dir, "csv_monitor", "Train_Samples_lr.csv")
    file.parent.mkdir()
    os.mkfifo(file)
    usual = module.WAITING, module.PATIENCE
    module.WAITING, module.PATIENCE = 2, 0.1
    began = time.monotonic()
    told = trained(connection, run_dir, {"csv_monitor": {"enabled": True}})
    seconds = time.monotonic() - began
    module.WAITING, module.PATIENCE = usual
    os.close(os.open(file, os.O_RDONLY | os.O_NONBLOCK))
    return seconds, told["live"]


def test_a_share_that_hangs_holds_no_run(one_rank, tmp_path: Path):
    ((seconds, live),) = one_rank(hung, str(tmp_path))
    assert seconds < 30, "it was waited for"
    assert live["telemetry_failures_total/monitor"] >= 4  # of eight rows and events one is being written, two wait


def test_one_writer_that_breaks_leaves_the_others(one_rank, tmp_path: Path):
    (tmp_path / "file").touch()
    blocks = {**FILES, "tensorboard": {"enabled": True, "output_path": str(tmp_path / "file")}}
    (told,) = one_rank(trained, str(tmp_path), blocks)
    assert told["live"]["telemetry_failures_total/monitor"] == 1
    assert (tmp_path / "csv_monitor" / "fdscale_loss.csv").read_text().splitlines() == ["step,loss", "16,0.5", "32,nan"]


def test_what_is_on_is_written_into_the_run_directory_unless_it_says_where(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_DIR", "taken back when the test ends")
    monkeypatch.delenv("WANDB_DIR")
    monkeypatch.setenv("WANDB_NAME", "chosen")
    run, there = Path("/runs/vit"), {"enabled": True, "output_path": "/boards"}
    blocks = {"tensorboard": there, "csv_monitor": {"enabled": False}, "wandb": {"enabled": True, "project": "p"}}
    found = monitored({"zero_optimization": {}, **blocks}, run)
    assert found == {"tensorboard": {"job_name": "vit", **there}, "wandb": {"enabled": True, "project": "p"}}
    assert (os.environ["WANDB_DIR"], os.environ["WANDB_NAME"]) == ("/runs/vit", "chosen")
    named = monitored({"tensorboard": {**there, "job_name": "mine"}, "csv_monitor": {"enabled": True}}, run)
    assert named["tensorboard"]["job_name"] == "mine"
    assert named["csv_monitor"] == {"enabled": True, "output_path": "/runs/vit/csv_monitor", "job_name": ""}
    (inside,) = monitored({"tensorboard": {"enabled": True, "job_name": "mine"}}, run).values()
    assert inside == {"enabled": True, "output_path": "/runs/vit/tensorboard", "job_name": "mine"}


def in_wandb(connection: Connection, run_dir: str) -> dict[str, float]:
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", WANDB_CONSOLE="off")
    told = trained(connection, run_dir, {"wandb": {"enabled": True, "project": "distillation"}})
    import wandb

    wandb.finish()
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_SILENT", "WANDB_CONSOLE", "WANDB_DIR", "WANDB_NAME"):
        del os.environ[name]
    return told["live"]


def records(data: bytes) -> Iterator[bytes]:
    """What is in a LevelDB log, the format of offline runs: 32 KiB blocks, of pieces with CRC, length and type."""
    place, pieces, block = 7, b"", 32768
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        pieces += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            yield pieces
            pieces = b""


def history(folder: Path) -> dict[int, dict[str, str]]:
    """The rows of an offline run, by step."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    rows = {}
    for record in map(Record.FromString, records(file.read_bytes())):
        if record.HasField("history"):
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows[int(row["_step"])] = row
    return rows


def test_weights_and_biases_gets_them_as_well(one_rank, tmp_path: Path):
    (live,) = one_rank(in_wandb, str(tmp_path))
    assert "telemetry_failures_total/monitor" not in live
    rows = history(tmp_path)
    assert [step for step in rows if "fdscale/loss" in rows[step]] == [16, 32]
    assert rows[16]["fdscale/teacher_loss/dino"] == "0.25"
    assert rows[16]["fdscale/checkpoint_seconds"] == "1.5"
    assert [step for step in rows if "Train/Samples/lr" in rows[step]] == [8, 16, 24, 32]
