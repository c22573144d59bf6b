"""Seconds by phase of each rank, and the rank that the others wait for."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale.cluster.ranks import Rank
from fdscale.training.engine import Connection
from fdscale.training.live import Live
from fdscale.training.phases import OWN, PHASES, Phases, probe_seconds, slowest_of

EVEN = [0.01, 0.2, 0.4, 0.1, 0.05, 0.001]


def measured(connection: Connection, folder: str, waits: list[float]) -> tuple[list[Any], dict[str, float]]:
    """Two rows of two steps each, in which this rank waited so long for its data; and what it noted."""
    rank, live = connection.rank.rank, Live()
    phases = Phases(connection, ["left", "right"], Path(folder) / "phases.json", live)
    phases.restart(0, 7.0)
    rows, waited = [], 7.0
    for step in (2, 4):
        for _ in range(2):
            with phases("forward"):
                time.sleep(0.02)
            with phases("agree"):
                pass
            with phases("collective"):
                time.sleep(0.01)
            waited += waits[rank]
        rows.append(phases.row(step, waited))
        phases.restart(step, waited)
    return rows, live.values


def test_each_rank_has_its_own_seconds_and_the_row_their_mean(tmp_path: Path, two_ranks: Any) -> None:
    (first, noted), (second, noted_elsewhere) = two_ranks(measured, str(tmp_path), [0.5, 3.5])
    assert first == second
    for row in first:
        assert row["phase_seconds/data"] == pytest.approx(2.0)
        assert 0.02 <= row["phase_seconds/forward"] < 2
        assert row["phase_seconds/backward"] == 0
        assert row["slowest_rank"] == 1
        assert row["slowest_lag_seconds"] == pytest.approx(3.0, abs=1)
        assert row["straggler_ratio"] > 2
        assert 0.01 <= row["collective_seconds"] < 1
    assert [noted[f"rank_phase_seconds/{rank}/data"] for rank in (0, 1)] == pytest.approx([0.5, 3.5])
    assert all(noted[f"rank_host_memory_bytes/{rank}"] > 50e6 for rank in (0, 1))
    assert noted["node_memory_available_bytes"] > 0
    assert not any("device" in name for name in noted), "a CPU rank has no memory but its host's"
    assert set(noted_elsewhere) == {"telemetry_seconds_total"}, "one rank tells for its node"
    kept = json.loads((tmp_path / "phases.json").read_text())
    assert kept["step"] == 2  # the second came too soon after it
    assert [(one["rank"], one["host"], one["data"]) for one in kept["seconds"]] == [
        (0, "left", pytest.approx(0.5)),
        (1, "right", pytest.approx(3.5)),
    ]
    assert kept["slowest"]["reason"] == "it waits 3.000 s a step longer for its data"


def test_the_slowest_rank_and_why() -> None:
    late = [EVEN, [0.51, *EVEN[1:]], EVEN, EVEN]
    found = slowest_of(late)
    assert (found.rank, found.lag, found.ratio) == (1, pytest.approx(0.5), pytest.approx(1.21 / 0.71))
    assert found.reason == "it waits 0.500 s a step longer for its data"
    throttled = [EVEN, EVEN, [*EVEN[:-1], 0.003], EVEN]
    found = slowest_of(throttled)
    assert (found.rank, found.lag) == (2, pytest.approx(1.4))  # 0.7 s of computing, three times as long
    assert found.reason.startswith("its chip takes 3.00 times as long")
    assert slowest_of([EVEN]).lag == 0
    assert slowest_of([[0.0] * 6] * 2).ratio == 1.0


def warned(connection: Connection, folder: str, slow: list[int]) -> list[str]:
    """The warnings of rows in which these ranks are slow, one after the other."""
    import logging

    records: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(record.getMessage())

    handler, logger = Kept(), logging.getLogger("fdscale.training.phases")
    logger.addHandler(handler)
    phases, waited = Phases(connection, ["left", "right"], Path(folder) / "phases.json", Live()), 0.0
    for step, rank in enumerate(slow, 1):
        waited += 5.0 if rank == connection.rank.rank else 0.1
        with phases("forward"):
            time.sleep(0.001)
        phases.row(step, waited)
        phases.restart(step, waited)
    logger.removeHandler(handler)
    return records


def test_a_rank_that_stays_slow_is_told_of_once(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(warned, str(tmp_path), [1, 1, 0, 1, 1]) == [[], []]
    main, other = two_ranks(warned, str(tmp_path), [1] * 7)
    assert other == []
    assert len(main) == 1
    assert main[0].startswith("rank 1 on right is slow: its own work takes ")
    assert main[0].endswith("it waits 4.900 s a step longer for its data")


def test_the_probe_takes_milliseconds() -> None:
    assert 0 < probe_seconds(torch.device("cpu")) < 1
    assert OWN[: len(PHASES)] == PHASES, "whose places `slowest_of` knows"
    assert OWN[-1] == "probe"


def of_four(rank: int, hosts: list[str]) -> list[int]:
    connection = Connection(Rank(rank, 0, 4, 2, "127.0.0.1", 29500), torch.device("cpu"), None)
    return list(Phases(connection, hosts, Path("unused"), Live())._ranks_here())


def test_a_node_tells_of_its_own_ranks_however_they_are_numbered() -> None:
    assert of_four(2, ["left", "left", "right", "right"]) == [2, 3]
    assert of_four(1, ["left", "right", "left", "right"]) == [1, 3]  # srun --distribution=cyclic
    assert of_four(2, ["one", "one", "one", "one"]) == [2, 3]  # two nodes of one host
