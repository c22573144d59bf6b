"""The latest value of every metric in Prometheus' words: for a scrape, and for a push to a gateway."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, delete_from_gateway, make_wsgi_app, push_to_gateway
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from fdscale.training.live import Live
from fdscale.training.metrics import METRICS, STATES, Metric

if TYPE_CHECKING:
    from wsgiref.types import WSGIApplication

JOB = "fdscale"


Family = CounterMetricFamily | GaugeMetricFamily


class LatestValues(Collector):
    """What `live` has, read by another thread at every scrape; the label `run` names it.

    A collector instead of the library's Gauge and Counter objects: the loop hands over totals, and a Counter
    could only be incremented. `whole`: with what is the whole run's, or the node's alone.
    """

    def __init__(self, live: Live, run: str, whole: bool) -> None:
        self._live, self._run = live, run
        self._metrics = [metric for metric in METRICS.values() if whole or metric.scope == "node"]

    def collect(self) -> Iterator[Family]:
        measured = self._measured()
        for metric in self._metrics:
            if found := measured.get(metric.name):
                family = _family(metric)
                for labels, value in found:
                    family.add_metric([self._run, *labels], value)
                yield family

    def _measured(self) -> dict[str, list[tuple[list[str], float]]]:
        """Labels and values by metric."""
        values, state, info = self._live.values, self._live.state, self._live.info
        measured: dict[str, list[tuple[list[str], float]]] = {
            "run_info": [([as_label(info.get(label, "")) for label in METRICS["run_info"].labels], 1)],
            "run_state": [([one], float(one == state)) for one in STATES],
        }
        for name, value in values.items():
            metric, *labels = name.split("/")
            measured.setdefault(metric, []).append((labels, value))
        return measured


def _family(metric: Metric) -> Family:
    family_type = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    labels = ["run", *metric.labels]
    return family_type(metric.prometheus_name, f"{metric.help} [{metric.unit}]", labels=labels)


def as_label(text: str) -> str:
    """Text as a label's value: names of files may hold bytes that are no text."""
    return text.encode(errors="replace").decode()


def registry_of(live: Live, run: str, whole: bool) -> CollectorRegistry:
    """What a node has to tell, to be rendered by any of the functions below."""
    registry = CollectorRegistry()
    registry.register(LatestValues(live, run, whole))
    return registry


def application(registry: CollectorRegistry) -> WSGIApplication:
    """What answers a scrape, not compressed: that would take the training's CPU longer than the network."""
    return make_wsgi_app(registry, disable_compression=True)


def push(gateway: str, registry: CollectorRegistry, run: str, node: str, timeout: float) -> None:
    """Put a node's values in place of those that the gateway has of it."""
    push_to_gateway(gateway, JOB, registry, {"run": run, "node": node}, timeout)


def withdraw(gateway: str, run: str, node: str, timeout: float) -> None:
    """Take a node's values away from the gateway, which would keep them for ever."""
    delete_from_gateway(gateway, JOB, {"run": run, "node": node}, timeout)
