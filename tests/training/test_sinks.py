from __future__ import annotations

import io
import json
import socket

import pytest
from rich.console import Console

from fdscale.cluster.ranks import Rank
from fdscale.training.sinks import open_sinks


def rank(number: int, local: int) -> Rank:
    return Rank(
        rank=number,
        local_rank=local,
        world_size=4,
        local_world_size=2,
        master_addr="127.0.0.1",
        master_port=29500,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize(
    ("number", "local", "shows", "serves"),
    [(0, 0, True, True), (1, 1, False, False), (2, 0, False, True), (3, 1, False, False)],
    ids=["main rank", "its neighbour", "local rank 0 of the second node", "its neighbour there"],
)
def test_the_main_rank_shows_and_each_node_serves(tmp_path, number, local, shows, serves):
    out, port = io.StringIO(), free_port()
    sinks = open_sinks(rank(number, local), tmp_path, "distill", 10, None, "127.0.0.1", port, Console(file=out))
    sinks.write(1, {"loss": 0.25})
    sinks.say("hello")
    assert listens(port) == serves
    sinks.close()
    assert not listens(port)
    assert (out.getvalue() == "step 1/10  loss 0.2500\nhello\n") == shows
    assert [path.name for path in tmp_path.iterdir()] == (["metrics.jsonl"] if shows else [])


def test_no_port_no_endpoint_and_a_resumed_run_keeps_its_rows(tmp_path):
    for resumed_step, step in ((None, 5), (5, 6)):
        sinks = open_sinks(
            rank(0, 0), tmp_path, "distill", 10, resumed_step, "127.0.0.1", None, Console(file=io.StringIO())
        )
        sinks.write(step, {"loss": 0.25})
        sinks.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [5, 6]
