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

from fdscale.training.metrics import METRICS, Metric

logger = logging.getLogger(__name__)


class LatestValues(Collector):
    """The latest value of each metric, read by the server's thread at every scrape; the label `run` names it.

    A collector instead of the library's Gauge and Counter objects: the loop hands over totals, and a Counter
    could only be incremented.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._values: dict[str, float] = {}

    def update(self, values: Mapping[str, float]) -> None:
        self._values = {
            **self._values,
            **values,
        }  # a new dict: the server's thread may be walking the old one

    def collect(self) -> Iterator[Family]:
        values = self._values
        for metric in METRICS.values():
            measured = {name: value for name, value in values.items() if metric.measures(name)}
            if measured:
                yield _family(metric, self._run, measured)


class PrometheusSink:
    """A running endpoint, `http://host:port/metrics`; `close` frees the port."""

    def __init__(self, latest: LatestValues, server: WSGIServer, thread: threading.Thread) -> None:
        self._latest = latest
        self._server = server
        self._thread = thread

    @property
    def port(self) -> int:
        return self._server.server_port

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._latest.update({**values, "step": step})

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def serve_prometheus(run: str, host: str, port: int) -> PrometheusSink | None:
    """Starts the endpoint of this node; port 0 takes a free one.

    A port that cannot be had (in use, forbidden, an unknown host) is one warning and None: metrics are not
    worth a training run.
    """
    latest = LatestValues(run)
    registry = CollectorRegistry()
    registry.register(latest)
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        logger.warning(
            "no Prometheus endpoint: %s:%d cannot be served (%s); training goes on without it, "
            "choose another log.prometheus_port or log.prometheus_host",
            host, port, error.strerror or error,
        )  # fmt: skip
        return None
    return PrometheusSink(latest, server, thread)


def _family(metric: Metric, run: str, measured: Mapping[str, float]) -> Family:
    family_type = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    labels = ["run"] if metric.label is None else ["run", metric.label]
    family = family_type(metric.prometheus_name, f"{metric.help} [{metric.unit}]", labels=labels)
    for name, value in measured.items():
        family.add_metric([run, *name.split("/")[1:]], value)
    return family
