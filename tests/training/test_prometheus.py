from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from fdscale.training.metrics import METRICS
from fdscale.training.prometheus import PrometheusSink, serve_prometheus


@pytest.fixture
def endpoint() -> Iterator[PrometheusSink]:
    sink = serve_prometheus("swinv2_g [1]", "127.0.0.1", 0)
    assert sink is not None
    yield sink
    sink.close()


def families(port: int) -> list[Metric]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return list(text_string_to_metric_families(answer.read().decode()))


def scrape(port: int) -> dict[str, tuple[str, float, dict[str, str]]]:
    return {s.name: (family.type, s.value, s.labels) for family in families(port) for s in family.samples}


def test_a_scrape_shows_the_latest_values_under_their_run(endpoint):
    endpoint.write(10, {"step": 10, "loss": 0.25, "bad_samples_total": 2})
    endpoint.write(20, {"step": 20, "loss": 0.125})
    run = {"run": "swinv2_g [1]"}
    assert scrape(endpoint.port) == {
        "fdscale_step": ("gauge", 20.0, run),
        "fdscale_loss": ("gauge", 0.125, run),
        "fdscale_bad_samples_total": ("counter", 2.0, run),
    }


def test_every_metric_is_served_under_its_own_name(endpoint):
    names = [metric.name if metric.label is None else f"{metric.name}/dino" for metric in METRICS.values()]
    endpoint.write(1, dict.fromkeys(names, 1.5))
    served = scrape(endpoint.port)
    assert set(served) == {metric.prometheus_name for metric in METRICS.values()}
    assert {served[m.prometheus_name][0] for m in METRICS.values() if m.kind == "counter"} == {"counter"}


def test_what_is_measured_of_several_things_is_one_metric_with_a_label(endpoint):
    endpoint.write(1, {"teacher_loss/clip": 0.25, "teacher_loss/dino": 0.125, "loss": 0.5})
    (family,) = [family for family in families(endpoint.port) if family.name == "fdscale_teacher_loss"]
    assert {sample.labels["teacher"]: sample.value for sample in family.samples} == {"clip": 0.25, "dino": 0.125}


def test_close_frees_the_port():
    first = serve_prometheus("run", "127.0.0.1", 0)
    first.close()
    second = serve_prometheus("run", "127.0.0.1", first.port)
    assert second is not None
    second.close()


def test_a_port_in_use_is_one_warning_and_no_endpoint(caplog):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert serve_prometheus("run", "127.0.0.1", port) is None
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"127.0.0.1:{port}" in record.message
    assert "log.prometheus_port" in record.message


def test_two_runs_in_one_process_do_not_share_their_values(endpoint):
    other = serve_prometheus("other", "127.0.0.1", 0)
    other.write(3, {"loss": 1.0})
    assert scrape(endpoint.port) == {}
    other.close()
