"""What would fail or slow a run is found before it, with the rank and the host that it is about."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fdscale.config.errors import UserError
from fdscale.training.engine import Connection
from fdscale.training.preflight import (
    Demand,
    Finding,
    collectives,
    examine,
    facts,
    of_disk,
    of_rates,
    preflight,
    verdict,
)
from fdscale.training.probes import MESSAGE, unshared

MODEST = Demand(disk=1 << 20, shared_memory=1 << 20, open_shards=16)
HOST = os.uname().nodename


def told_at_start(connection: Connection, folder: str, demand: Demand) -> str:
    try:
        preflight(connection, Path(folder), demand)
    except UserError as error:
        return str(error)
    return ""


def examined(connection: Connection, folder: str) -> list[Finding]:
    return [*examine(connection, Path(folder), MODEST, 0.1), collectives(connection)]


def test_two_sound_ranks_pass_and_nothing_is_left_behind(tmp_path: Path, two_ranks: Any) -> None:
    found, same = two_ranks(examined, str(tmp_path / "run"))
    assert found == same
    assert {finding.weight for finding in found if finding.check != "matmul"} == {"ok"}
    assert "us for a small all_reduce" in found[-1].told
    assert list(tmp_path.iterdir()) == []
    assert two_ranks(told_at_start, str(tmp_path), MODEST) == ["", ""]


@contextmanager
def package(folder: Path, name: str, version: str) -> Iterator[None]:
    """An installed distribution more, as a second installation of it would be."""
    described = folder / f"{name}-{version}.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    before = list(sys.path)
    sys.path[:] = [str(folder), *before]
    try:
        yield
    finally:
        sys.path[:] = before


def with_another_timm_on_rank_1(connection: Connection, folder: str) -> str:
    if connection.rank.is_main:
        return told_at_start(connection, folder, MODEST)
    with package(Path(folder) / "site", "timm", "0.0.1"):
        return told_at_start(connection, folder, MODEST)


def test_another_version_on_one_rank_is_named(tmp_path: Path, two_ranks: Any) -> None:
    told, same = two_ranks(with_another_timm_on_rank_1, str(tmp_path))
    assert told == same
    assert f"timm is 0.0.1 on rank 1 ({HOST})" in told
    assert "the same environment" in told


def seen_apart(connection: Connection, folders: list[str]) -> list[str]:
    """Two nodes with one rank each, as far as the ranks know."""
    of_a_node = replace(connection, rank=replace(connection.rank, local_rank=0, local_world_size=1))
    return unshared(of_a_node, Path(folders[connection.rank.rank]))


def test_a_folder_that_is_another_one_on_each_node_is_not_shared(tmp_path: Path, two_ranks: Any) -> None:
    (tmp_path / "0" / "run").mkdir(parents=True)
    (tmp_path / "1" / "run").mkdir(parents=True)
    told, same = two_ranks(seen_apart, [str(tmp_path / "0" / "run"), str(tmp_path / "1" / "run")])
    assert told == same
    assert len(told) == 1
    assert f"is another folder on {HOST} (rank 1) than on {HOST} (rank 0)" in told[0]
    assert list(tmp_path.rglob(f"{MESSAGE}*")) == []
    assert two_ranks(seen_apart, [str(tmp_path), str(tmp_path)]) == [[], []]


def test_nodes_that_cannot_write_are_named(two_ranks: Any) -> None:
    for told in two_ranks(seen_apart, ["/proc/sys", "/proc/sys"]):  # not even root makes a file there
        assert len(told) == 2
        assert all(f"rank {rank} ({HOST}) cannot write to /proc/sys" in told[rank] for rank in (0, 1))


def test_too_small_a_disk_is_told_with_what_is_missing(tmp_path: Path, two_ranks: Any) -> None:
    told, same = two_ranks(told_at_start, str(tmp_path), replace(MODEST, disk=10**18))
    assert told == same
    assert str(tmp_path) in told
    assert "the run comes to hold 931,322,574.6 GiB" in told
    assert "make room for" in told


def held_by(connection: Connection, folder: str) -> int:
    return facts(connection, Path(folder)).held


def test_what_a_run_has_written_is_not_asked_for_again(tmp_path: Path, two_ranks: Any) -> None:
    (tmp_path / "attempts" / "0001").mkdir(parents=True)
    (tmp_path / "attempts" / "0001" / "weights.pt").write_bytes(bytes(1 << 20))
    held, nothing = two_ranks(held_by, str(tmp_path))
    assert 1 << 20 <= held < 1 << 21
    assert nothing == 0  # the main rank's figure counts
    free = shutil.disk_usage(tmp_path).free
    ranks = [replace(two_ranks(facts_here, str(tmp_path))[0], free=free, held=held)]
    assert of_disk(ranks, tmp_path, free + held).weight == "ok"
    assert of_disk(ranks, tmp_path, free + held + 1).weight == "fault"
    assert of_disk(ranks, tmp_path, None).weight == "ok"


@contextmanager
def busy_threads(count: int) -> Iterator[None]:
    """So many threads of this process that never rest: each turn of the one that computes waits for all of theirs."""
    done = threading.Event()

    def spin() -> None:
        while not done.is_set():
            pass

    threads = [threading.Thread(target=spin) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        done.set()
        for thread in threads:
            thread.join()


def with_other_work_on_rank_1(connection: Connection, folder: str) -> list[Finding]:
    with busy_threads(4 * connection.rank.rank):
        return examine(connection, Path(folder), MODEST, 0.5)


def test_a_rank_with_other_work_is_slow_and_named(tmp_path: Path, two_ranks: Any) -> None:
    found, _ = two_ranks(with_other_work_on_rank_1, str(tmp_path))
    slow = next(finding for finding in found if finding.check == "matmul")
    assert slow.weight == "warning"
    assert slow.told.startswith(f"rank 1 ({HOST}) gives")


def test_of_many_ranks_the_slowest_is_named_first_and_the_others_counted(tmp_path: Path, two_ranks: Any) -> None:
    fact = two_ranks(facts_here, str(tmp_path))[0]
    ranks = [replace(fact, host=f"n{rank}") for rank in range(4)]
    assert of_rates([1e12, 0.69e12, 1.1e12, 0.2e12], ranks).told.startswith("rank 3 (n3) gives 20% of the median")
    assert "(and 1 more)" in of_rates([1e12, 0.69e12, 1.1e12, 0.2e12], ranks).told
    assert of_rates([1e12, 0.71e12, 1e12, 1e12], ranks).weight == "ok"


def facts_here(connection: Connection, folder: str) -> Any:
    return facts(connection, Path(folder))


def test_the_one_thing_to_fix_is_the_gravest() -> None:
    ok, slow, apart = (
        Finding("disk", "ok", "roomy"),
        Finding("matmul", "warning", "rank 1 is slow"),
        Finding("run directory", "fault", "apart"),
    )
    assert verdict([ok, slow, apart]) == "fix first: run directory: apart"
    assert verdict([ok, slow]) == "fix first: matmul: rank 1 is slow"
    assert verdict([ok]) == "nothing to fix: start it"
