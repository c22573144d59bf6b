"""The ways out for what is measured, open around the loop: an endpoint, a file that says where it is, a push.

None of them ever holds up or ends the training: each failure is one warning and a count.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING

from fdscale.cluster.ranks import REQUEUES, Rank
from fdscale.config.endpoint_files import basic_credentials, tls_context
from fdscale.config.errors import StartAgain, UserError
from fdscale.training.attempts import Attempt
from fdscale.training.discovery import Target
from fdscale.training.endpoint import Endpoint, address_towards
from fdscale.training.lineage import attempt_folders, read_record
from fdscale.training.live import Live
from fdscale.training.outage import Outage

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from fdscale.training.pushgateway import Pusher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ways:
    """The ways out that are wanted: the settings `log.prometheus_…` and `log.pushgateway`."""

    port: int | None = None
    host: str | None = None
    certificate: str | None = None
    key: str | None = None
    password_file: str | None = None
    targets: str | None = None
    pushgateway: str | None = None


class Exports:
    """What one node shows of an attempt, from before the engine starts until the attempt ends.

    A context around the loop, on every rank; those that lead no node do nothing. `done` says that the run is complete:
    how it ended decides what stays behind where Prometheus looks. Nothing in here raises, or waits for long.
    """

    def __init__(self, ways: Ways, live: Live, attempt: Attempt, rank: Rank) -> None:
        self.ways, self.live, self.attempt, self.rank = ways, live, attempt, rank
        self.done = False
        self.endpoint: Endpoint | None = None
        self._pusher: Pusher | None = None
        self._node, run_dir = node_name(attempt, rank), attempt.folder.parent.parent.resolve()
        self._address, self._superseded = "", False
        self.run = run_dir.name.encode(errors="replace").decode()  # a folder's name may hold bytes that are no text
        self._target: Target | None = None
        if ways.targets:
            self._target = Target(Path(ways.targets), self.run, run_dir, attempt.number, self._node)
        self._outages = {way: Outage(live, way) for way in ("prometheus", "targets", "pushgateway")}

    def __enter__(self) -> Exports:
        wanted = self.ways.port is not None or self.ways.pushgateway is not None
        if self.rank.local_rank == 0 and wanted:
            # imported on use: a run that shows nothing needs no prometheus_client
            from fdscale.training.prometheus import registry_of

            registry = registry_of(self.live, self.run, self.rank.is_main)
            self._forget_older_targets()
            self._serve(registry)
            self._start_pushing(registry)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.rank.local_rank:
            return
        ended = how_it_ended(kind, self.done, REQUEUES in os.environ)
        self._try("targets", "whether a newer attempt has begun is not known", self._look_for_a_newer_one)
        if self._superseded:
            ended = None
        if self.endpoint is not None:
            self._list_as({} if ended is None else {"ended": ended}, remove=ended is None)
            self._try("prometheus", "the endpoint could not be closed", self.endpoint.close)
        if self._pusher is not None:  # a gateway knows no `ended`: who will be back, too, takes what it shows away
            self._pusher.close(withdrawing=ended in (None, "stopped", "canary"))

    def forget_older(self) -> None:
        """Take away what killed attempts left behind: of a run that was complete when this attempt began."""
        if self.rank.is_main:
            self._forget_older_targets()
        if self.rank.is_main and (gateway := self.ways.pushgateway):
            from fdscale.training.pushgateway import withdraw_all

            told = f"log.pushgateway={gateway} still shows what a killed attempt left there"
            self._try("pushgateway", told, lambda: withdraw_all(gateway, self.run, self._hosts(older=True)))

    def _serve(self, registry: CollectorRegistry) -> None:
        port = self.ways.port
        if port is None:
            return
        where = f"{self.ways.host or 'this machine'}:{port}"
        told = f"no Prometheus endpoint on {where}: choose another log.prometheus_port or log.prometheus_host"
        if self._try("prometheus", told, lambda: self._open(registry, port)) and self.endpoint is not None:
            self._tell(self.endpoint)
            self._list_as({})

    def _open(self, registry: CollectorRegistry, port: int) -> None:
        from fdscale.training.prometheus import application

        ways, host = self.ways, self.ways.host or self._own_address()
        context = tls_context(ways.certificate, ways.key) if ways.certificate else None
        credentials = basic_credentials(ways.password_file) if ways.password_file else None
        endpoint = Endpoint(application(registry), host, port, context, credentials)
        self._address = self._address_of(endpoint)
        self.endpoint = endpoint

    def _own_address(self) -> str:
        """The address of this node that its peers see; alone, loopback, which nobody else does."""
        return "127.0.0.1" if self._is_alone else address_towards(self.rank.master_addr)

    @property
    def _is_alone(self) -> bool:
        return self.rank.world_size == self.rank.local_world_size

    def _tell(self, endpoint: Endpoint) -> None:
        logger.info("metrics: %s://%s/metrics", endpoint.scheme, self._address)
        loopback = ip_address(endpoint.host).is_loopback
        if loopback and not self._is_alone:
            logger.warning(
                "%s reaches MASTER_ADDR=%s by loopback, where Prometheus finds no metrics: set log.prometheus_host",
                *(self._node, self.rank.master_addr),
            )
        if self.ways.password_file and not self.ways.certificate and not loopback:
            logger.warning(
                "the password of the metrics crosses the network as it is: set log.prometheus_certificate, too"
            )

    def _address_of(self, endpoint: Endpoint) -> str:
        """HOST:PORT for Prometheus; of an endpoint on all addresses of this node, one by which it is known."""
        host = endpoint.host
        if ip_address(host).is_unspecified:
            host = socket.gethostname() if self._is_alone else self._own_address()
        return f"[{host}]:{endpoint.port}" if ":" in host else f"{host}:{endpoint.port}"

    def _list_as(self, labels: Mapping[str, str], remove: bool = False) -> None:
        if (target := self._target) is None or self.endpoint is None:
            return
        secured = {"__scheme__": "https"} if self.endpoint.scheme == "https" else {}
        action = target.remove if remove else lambda: target.write(self._address, {**labels, **secured})
        self._try("targets", f"{target.file} could not be {'removed' if remove else 'written'}", action)

    def _forget_older_targets(self) -> None:
        if self._target is not None and self.rank.is_main:
            told = f"log.prometheus_targets={self.ways.targets}: what older attempts left could not be removed"
            self._try("targets", told, self._target.remove_older)

    def _start_pushing(self, registry: CollectorRegistry) -> None:
        if gateway := self.ways.pushgateway:
            from fdscale.training.pushgateway import Pusher

            left: set[str] = set()
            if self.rank.is_main:
                told = "what older attempts left at log.pushgateway stays there"
                self._try("pushgateway", told, lambda: left.update(self._hosts(older=True) - self._hosts(older=False)))
            outage = self._outages["pushgateway"]
            self._pusher = Pusher(gateway, registry, self.run, self._node, outage, left)
            logger.info("metrics: pushed to %s", gateway)

    def _hosts(self, older: bool) -> set[str]:
        """The nodes of this attempt, or of all before it."""
        folders = attempt_folders(self.attempt.folder.parent) if older else [self.attempt.folder]
        ranks = [rank for folder in folders if not (older and folder == self.attempt.folder) for rank in _ranks(folder)]
        return {rank["host"] for rank in ranks}

    def _look_for_a_newer_one(self) -> None:
        """Whether a newer attempt has begun, which shows the run from now on."""
        try:
            self.attempt.refuse_if_superseded()
        except UserError:
            self._superseded = True

    def _try(self, way: str, told: str, action: Callable[[], None]) -> bool:
        return self._outages[way].spare(told, action)


def node_name(attempt: Attempt, rank: Rank) -> str:
    """This node's host name; where several nodes of an attempt are one host, its later ones are `HOST-1` and so on."""
    host = socket.gethostname()
    ranks = _ranks(attempt.folder)
    before = [ranks[leader]["host"] for leader in range(0, rank.rank, rank.local_world_size) if leader < len(ranks)]
    return f"{host}-{before.count(host)}" if host in before else host


def _ranks(attempt: Path) -> list[dict[str, str]]:
    return read_record(attempt).get("ranks", [])


def how_it_ended(kind: type[BaseException] | None, done: bool, requeued: bool) -> str | None:
    """The label `ended` of a target that stays: by the exception that ended the loop, if one did.

    None where nobody is missed: a run that is complete, or that a signal stopped where no queue starts it again.
    """
    if kind is None or issubclass(kind, KeyboardInterrupt):
        return None if done or not requeued else "stopped"
    if issubclass(kind, StartAgain):
        return "canary"
    return "mistake" if issubclass(kind, UserError) else "error"
