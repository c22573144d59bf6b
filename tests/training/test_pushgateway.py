"""The push: what a gateway gets, and what one that fails costs."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fdscale.training import pushgateway as module
from fdscale.training.live import Live
from fdscale.training.outage import PATIENCE, Outage
from fdscale.training.prometheus import registry_of
from fdscale.training.pushgateway import Pusher
from tests.training.gateway import Gateway, grouping

COUNT = "telemetry_failures_total/pushgateway"


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    server = Gateway()
    yield server
    server.shutdown()
    server.server_close()


def pusher(url: str, live: Live, run: str = "run", left: tuple[str, ...] = ()) -> Pusher:
    return Pusher(url, registry_of(live, run, True), run, "n1", Outage(live, "pushgateway"), left)


def soon(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_it_pushes_at_once_and_again_and_takes_away_at_an_orderly_end(gateway: Gateway, monkeypatch):
    monkeypatch.setattr(module, "SECONDS_APART", 0.05)
    live = Live()
    live.note({"loss": 0.5})
    pushing = pusher(gateway.url, live)
    soon(lambda: gateway.requests)
    live.note({"loss": 0.25})
    soon(lambda: len(gateway.requests) > 2)
    pushing.close(withdrawing=True)
    assert set(gateway.methods[:-1]) == {"PUT"}
    assert gateway.methods[-1] == "DELETE"
    assert {path for _, path, _ in gateway.requests} == {"/metrics/job/fdscale/node/n1/run/run"}
    assert 'fdscale_loss{run="run"} 0.5' in gateway.requests[0][2]
    assert 'fdscale_loss{run="run"} 0.25' in gateway.requests[2][2]
    assert live.values.get(COUNT) is None


def test_a_short_job_leaves_its_last_values_behind_when_it_fails(gateway: Gateway):
    live = Live()
    pushing = pusher(gateway.url, live)
    live.note({"loss": 0.125})
    pushing.close(withdrawing=False)
    assert set(gateway.methods) == {"PUT"}
    assert 'fdscale_loss{run="run"} 0.125' in gateway.requests[-1][2]


def test_nodes_that_left_are_forgotten_after_the_first_push(gateway: Gateway):
    pushing = pusher(gateway.url, Live(), left=("gone",))
    soon(lambda: len(gateway.requests) > 1)
    pushing.close(withdrawing=False)
    assert [(method, grouping(path)["node"]) for method, path, _ in gateway.requests[:2]] == [
        ("PUT", "n1"),
        ("DELETE", "gone"),
    ]


@pytest.mark.parametrize("run", ['q"uote', "new\nline", "back\\slash", "ünï ☃", "a/b c", "%2F+&?#;=", "x" * 255, ""])
def test_odd_names_arrive_as_they_are(gateway: Gateway, run: str):
    pusher(gateway.url, Live(), run).close(withdrawing=False)
    _, path, body = gateway.requests[0]
    assert grouping(path) == {"job": "fdscale", "run": run, "node": "n1"}
    samples = [sample for family in text_string_to_metric_families(body) for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {run}


def fail_for_a_while(url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Three tries and an end against a gateway that does not work: one warning, all counted, nobody waits."""
    monkeypatch.setattr(module, "SECONDS_APART", 0.01)
    live = Live()
    began = time.monotonic()
    pushing = pusher(url, live)
    assert time.monotonic() - began < 0.5
    soon(lambda: live.values.get(COUNT, 0) >= 3)
    began = time.monotonic()
    pushing.close(withdrawing=True)
    assert time.monotonic() - began < PATIENCE
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"log.pushgateway={url}" in record.message


def test_nobody_listens(monkeypatch, caplog):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    fail_for_a_while(f"http://127.0.0.1:{port}", monkeypatch, caplog)


def test_nobody_answers(monkeypatch, caplog):
    monkeypatch.setattr(module, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        fail_for_a_while(f"http://127.0.0.1:{deaf.getsockname()[1]}", monkeypatch, caplog)


def test_it_answers_500(gateway: Gateway, monkeypatch, caplog):
    gateway.status = 500
    fail_for_a_while(gateway.url, monkeypatch, caplog)
    assert "500" in caplog.text


def test_a_second_outage_is_told_again(gateway: Gateway, monkeypatch, caplog):
    monkeypatch.setattr(module, "SECONDS_APART", 0.01)
    live = Live()
    pushing = pusher(gateway.url, live)
    for outage in (1, 2):
        gateway.status = 500
        soon(lambda told=outage: len(caplog.records) == told)
        gateway.status, before = 202, len(gateway.requests)
        soon(lambda before=before: len(gateway.requests) > before + 2)
    pushing.close(withdrawing=True)
    assert len(caplog.records) == 2


def test_the_end_does_not_wait_for_a_gateway_that_drips(monkeypatch):
    """One byte a moment: no single wait is too long, all of them together are."""
    monkeypatch.setattr(module, "PATIENCE", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as slow:
        pushing = pusher(f"http://127.0.0.1:{slow.getsockname()[1]}", Live())
        client, _ = slow.accept()
        dripping = threading.Event()

        def drip() -> None:
            while not dripping.wait(0.05):
                client.send(b"H")

        thread = threading.Thread(target=drip, daemon=True)
        thread.start()
        began = time.monotonic()
        pushing.close(withdrawing=True)
        assert time.monotonic() - began < 2
        dripping.set()
        thread.join()
        client.close()
