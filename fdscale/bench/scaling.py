"""What a rank loses when another joins it: ranks of one recipe, and as many processes that exchange nothing."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from fdscale.bench.apart import in_own_process
from fdscale.bench.pairs import Pair
from fdscale.bench.parts import Row
from fdscale.bench.planned import own_geometry_of
from fdscale.bench.product import product_step
from fdscale.bench.ratios import Ratio
from fdscale.bench.tables import Table
from fdscale.cluster.ranks import free_port
from fdscale.training.collectives import timed_collectives
from fdscale.training.engine import Connection

WARM_UP = 2
HOW = """The same images a rank, a core each (gloo): the steps of all ranks, medians. "Apart": as many processes at once
that exchange nothing, which shows what the cores cost each other by memory and clock. Efficiency is beside one rank
alone; "of apart" is what the exchange leaves."""


def scaling_row(words: Sequence[str], counts: Sequence[int], seconds: float) -> Row:
    """Images/s of one rank, and of each larger count as ranks of one run and apart; `failed` where one did."""
    row: Row = {"1": _start(words, 1, joined=False, seconds=seconds)}
    for count in counts:
        row[f"{count} apart"] = _start(words, count, joined=False, seconds=seconds)
        row[f"{count} ranks"] = _start(words, count, joined=True, seconds=seconds)
    failed = [f"{name}: {told['failed']}" for name, told in row.items() if "failed" in told]
    return {"failed": failed[0]} if failed else row


def _start(words: Sequence[str], count: int, joined: bool, seconds: float) -> Row:
    """So many processes at once, of one run when `joined`; their images/s together."""
    port = free_port()
    ranks = [_environment(rank, count, port) if joined else {"OMP_NUM_THREADS": "1"} for rank in range(count)]
    with ThreadPoolExecutor(count) as pool:
        rows = list(pool.map(lambda environment: in_own_process(words, seconds, environment), ranks))
    failed = [row["failed"] for row in rows if "failed" in row]
    if failed:
        return {"failed": failed[0]}
    rates = [row["images"] / statistics.median(row["seconds"]) for row in rows]
    collective = statistics.mean(statistics.median(row["collective_seconds"]) for row in rows)
    step = statistics.mean(statistics.median(row["seconds"]) for row in rows)
    return {"images_per_second": sum(rates), "step_seconds": step, "collective_seconds": collective}


def _environment(rank: int, count: int, port: int) -> dict[str, str]:
    here = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1}
    return {name: str(value) for name, value in (here | where).items()}


def rank_row(pair: Pair, images: int, repeats: int, connection: Connection) -> Row:
    """This process's steps as one of the ranks: seconds of each, and of each in collectives."""
    settings = pair.settings(images * connection.rank.world_size)
    side = own_geometry_of(settings.student).image_size
    step = product_step(settings, torch.rand(images, 3, side, side), bf16=True)
    for _ in range(WARM_UP):
        step()
    waited = _Waited()
    seconds, collective = [], []
    with timed_collectives(waited.measure):
        for _ in range(repeats):
            connection.barrier()
            before, began = waited.seconds, time.perf_counter()
            step()
            seconds.append(time.perf_counter() - began)
            collective.append(waited.seconds - before)
    return {"images": images, "seconds": seconds, "collective_seconds": collective}


class _Waited:
    """Seconds inside collectives so far."""

    seconds = 0.0

    @contextmanager
    def measure(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began


def scaling_tables(rows: Mapping[str, Row]) -> list[Table]:
    """A line for each count of each pair."""
    lines = [line for name, row in rows.items() for line in _lines(name, row)]
    columns = ["pair, processes", "images/s", "efficiency", "of apart", "s a step", "in collectives"]
    return [Table("Ranks", HOW, columns, lines)]


def _lines(name: str, row: Row) -> Iterator[list[str]]:
    for way, told in row.items():
        if isinstance(told, dict):  # beside commit, date and seconds
            step, waited = told["step_seconds"], told["collective_seconds"]
            apart = f"{_of_apart(row, way):.2f}" if "ranks" in way else ""
            figures = [f"{told['images_per_second']:.2f}", f"{_efficiency(row, way):.2f}", apart]
            yield [f"{name}, {way}", *figures, f"{step:.3f}", f"{waited / step:.1%}"]


def _efficiency(row: Row, way: str) -> float:
    return float(row[way]["images_per_second"] / row["1"]["images_per_second"] / int(way.split()[0]))


def _of_apart(row: Row, way: str) -> float:
    return float(row[way]["images_per_second"] / row[way.replace("ranks", "apart")]["images_per_second"])


def scaling_ratios(name: str, row: Row) -> list[Ratio]:
    """The efficiency of each number of ranks, beside one and beside as many apart."""
    joined = [way for way in row if "ranks" in way]
    return [
        *(Ratio(f"{name}: efficiency of {way}", _efficiency(row, way)) for way in joined),
        *(Ratio(f"{name}: {way} to apart", _of_apart(row, way)) for way in joined),
    ]
