"""What proofs on whole runs share: how one is started, and one that nothing disturbed."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from statistics import median

import pytest

from fdscale.training.json_lines import read_rows
from tests.prove.lives import LIFE_SECONDS, Launch, Life, Undisturbed, printed_by


@pytest.fixture(scope="session")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Launch:
    from fdscale.data.packing.digits import pack_digits

    shards = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(shards, "test")
    mine = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return Launch(shards, {**os.environ, **mine})


@pytest.fixture(scope="session")
def undisturbed(launch: Launch, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    life = Life(launch(run), run, time.time(), [])
    life.wait_for_ranks()
    ranks_began = time.time()
    assert life.process.wait(LIFE_SECONDS) == 0, printed_by(run)
    rows = read_rows(run / "metrics.jsonl")
    ends = [row["time"] for row in rows if "loss" in row]
    saves = [row["checkpoint_seconds"] for row in rows if "checkpoint_seconds" in row]
    return Undisturbed(run, ends[0] - ranks_began, median(b - a for a, b in pairwise(ends)), median(saves))
