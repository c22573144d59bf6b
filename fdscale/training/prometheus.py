"""One Prometheus endpoint per node: the latest value of every metric, served by the node's local rank 0."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.registry import Collector

from fdscale.training.live import Live
from fdscale.training.metrics import METRICS, STATES, Metric

logger = logging.getLogger(__name__)


class LatestValues(Collector):
    """What `live` has, read by the server's thread at every scrape; the label `run` names it.

    A collector instead of the library's Gauge and Counter objects: the loop hands over totals, and a Counter
    could only be incremented. `whole`: with what is the whole run's, or the node's alone.
    """

    def __init__(self, live: Live, run: str, whole: bool) -> None:
        self._live, self._run, self._whole = live, run, whole

    def collect(self) -> Iterator[Family]:
        values, state = self._live.values, self._live.state
        states = {f"run_state/{one}": float(one == state) for one in STATES}
        named: dict[str, dict[str, float]] = {}
        for name, value in {**values, **states}.items():
            named.setdefault(name.partition("/")[0], {})[name] = value
        for metric in METRICS.values():
            if not self._whole and metric.scope == "run":
                continue
            if metric.kind == "info":
                labels = {label: self._live.info.get(label, "") for label in metric.labels}
                yield _info(metric, {"run": self._run, **labels})
            elif metric.name in named:
                yield _family(metric, self._run, named[metric.name])


class Endpoint:
    """A running endpoint, `http://host:port/metrics`; `close` frees the port."""

    def __init__(self, server: WSGIServer, thread: threading.Thread) -> None:
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        return self._server.server_port

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_prometheus(live: Live, run: str, whole: bool, host: str, port: int) -> Endpoint | None:
    """Starts the endpoint of this node; port 0 takes a free one.

    A port that cannot be had (in use, forbidden, an unknown host) is one warning and None: metrics are not
    worth a training run.
    """
    registry = CollectorRegistry()
    registry.register(LatestValues(live, run, whole))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        logger.warning(
            "no Prometheus endpoint: %s:%d cannot be served (%s); training goes on without it, "
            "choose another log.prometheus_port or log.prometheus_host",
            host, port, error.strerror or error,
        )  # fmt: skip
        return None
    return Endpoint(server, thread)


def _family(metric: Metric, run: str, measured: Mapping[str, float]) -> Family:
    family_type = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = family_type(metric.prometheus_name, f"{metric.help} [{metric.unit}]", labels=["run", *metric.labels])
    for name, value in measured.items():
        family.add_metric([run, *name.split("/")[1:]], value)
    return family


def _info(metric: Metric, labels: Mapping[str, str]) -> Family:
    family = GaugeMetricFamily(metric.prometheus_name, metric.help, labels=list(labels))
    family.add_metric(list(labels.values()), 1)
    return family
