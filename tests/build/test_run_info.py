"""Who a run says it is, before its first step."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fdscale.build.run import Run
from fdscale.build.run_info import code_commit, open_live, run_info
from fdscale.cluster.ranks import Rank
from fdscale.config.recipe import load_recipe
from fdscale.data.index import Index, Shard
from fdscale.data.mixture import Mixture
from fdscale.data.scan import SAMPLE
from fdscale.training.attempts import claim
from fdscale.training.engine import Connection
from fdscale.training.metrics import INFO

ABSENT: Any = None


def run_of(folder: Path, rank: int = 0) -> Run:
    """An attempt of the shipped recipe with two teachers, on rank `rank` of 2 nodes of 4."""
    settings = load_recipe("vit_l_clip_dinov2", ["max_steps=7", "checkpoint.every=3"])
    among = Rank(rank, rank % 4, 8, 4, "127.0.0.1", 29500)
    connection = Connection(among, torch.device("cpu"), ABSENT)
    attempt = claim(folder, 8, 3, {})
    attempt.end(0, "stops its heartbeat")
    index = Index(ABSENT, (Shard("a.tar", 100_000, 1, "", 0),), None, np.zeros(100_000, SAMPLE))
    return Run(settings, {}, connection, ABSENT, attempt, ABSENT, Mixture((index,)), ABSENT, {}, {}, ABSENT)


def test_the_labels_of_a_run(tmp_path: Path) -> None:
    info = run_info(run_of(tmp_path))
    assert set(info) == set(INFO)
    assert {name: info[name] for name in ("attempt", "program", "recipe", "ranks", "nodes")} == {
        "attempt": "1",
        "program": "distill",
        "recipe": "vit_l_clip_dinov2",
        "ranks": "8",
        "nodes": "2",
    }
    assert info["student"].startswith("vit_l")
    assert len(info["teachers"].split(", ")) == 2
    assert all(info.values())


def test_what_is_known_before_the_first_step(tmp_path: Path) -> None:
    run_of(tmp_path)
    live = open_live(run_of(tmp_path))
    expected = {"attempt": 2, "steps_planned": 7, "checkpoint_every": 3, "skipped_steps_total": 0}
    assert {name: live.values[name] for name in expected} == expected
    assert live.values["previous_end/complete"] == 1
    assert live.values["checkpoint_timestamp_seconds"] == live.values["attempt_start_timestamp_seconds"]
    assert live.values["first_start_timestamp_seconds"] < live.values["attempt_start_timestamp_seconds"]
    assert live.values["node_memory_limit_bytes"] > 0
    assert live.state == "starting"


def test_another_rank_tells_what_its_node_has(tmp_path: Path) -> None:
    live = open_live(run_of(tmp_path, rank=4))
    assert "attempt" not in live.values
    assert live.values["node_memory_limit_bytes"] > 0


def test_the_commit_of_the_code() -> None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    assert head[:12] == code_commit()
