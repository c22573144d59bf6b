"""The push to a gateway: for nodes that Prometheus cannot reach, and jobs shorter than a scrape."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from fdscale.training.outage import PATIENCE, Outage
from fdscale.training.prometheus import push, withdraw

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

SECONDS_APART = 10.0
TIMEOUT = 2.0
"""Seconds that the gateway has for each answer: with both of an end's they stay within PATIENCE."""


class Pusher:
    """A thread that puts a node's values to `gateway` every 10 s, from now on until `close`.

    However slow the gateway is, training never waits for it. What the nodes `left` behind by an earlier attempt still
    show there is taken away first.
    """

    def __init__(
        self,
        gateway: str,
        registry: CollectorRegistry,
        run: str,
        node: str,
        outage: Outage,
        left: Iterable[str] = (),
    ) -> None:
        self._gateway, self._registry = gateway, registry
        self._run, self._node, self._left = run, node, tuple(left)
        self._outage = outage
        self._ending, self._withdrawing = threading.Event(), False
        self._thread = threading.Thread(target=self._push_until_the_end, name="pushgateway", daemon=True)
        self._thread.start()

    def close(self, withdrawing: bool) -> None:
        """Push no more; with `withdrawing` the gateway forgets this node."""
        self._withdrawing = withdrawing
        self._ending.set()
        self._thread.join(PATIENCE)

    def _push_until_the_end(self) -> None:
        self._push_and_clear()
        while not self._ending.wait(SECONDS_APART):
            self._push_and_clear()
        # by the same thread: a push that was under way would bring it back
        self._try(self._withdraw if self._withdrawing else self._push)

    def _push_and_clear(self) -> None:
        if self._try(self._push) and self._left and self._try(self._clear):
            self._left = ()

    def _try(self, request: Callable[[], None]) -> bool:
        try:
            request()
        except Exception as error:  # an answer may be wrong in any way
            self._outage.lasts(f"no metrics reach log.pushgateway={self._gateway} ({error})")
            return False
        self._outage.is_over()
        return True

    def _push(self) -> None:
        push(self._gateway, self._registry, self._run, self._node, TIMEOUT)

    def _withdraw(self) -> None:
        withdraw(self._gateway, self._run, self._node, TIMEOUT)

    def _clear(self) -> None:
        withdraw_all(self._gateway, self._run, self._left)


def withdraw_all(gateway: str, run: str, nodes: Iterable[str]) -> None:
    """Take away what several nodes of a run still show. Raises OSError when the gateway does not answer."""
    for node in nodes:
        withdraw(gateway, run, node, TIMEOUT)
