"""Prometheus, pushgateway and Alertmanager on loopback, from the shipped configuration, with its clock made faster."""

from __future__ import annotations

import json
import re
import shutil
import socket
import tempfile
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import urlopen

import yaml

from tests.cluster.lab.daemons import Daemons, wait_until

MONITORING = Path(__file__).parents[3] / "monitoring"
SPEED = 30  # a target's change takes Prometheus up to 5 s whatever its intervals: in 5 min / 30 there is room for that
INTERVAL = "500ms"  # of scrapes and evaluations
SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
DURATION = re.compile(r"(\d+)(ms|s|m|h|d)")


def faster(rules: dict[str, Any], speed: int) -> dict[str, Any]:
    """The same groups of rules, every span of time in them divided by `speed`: for, ranges, offsets, `N * 60`."""
    groups = rules["groups"]
    return {"groups": [{**group, "rules": [_faster(rule, speed) for rule in group["rules"]]} for group in groups]}


def _faster(rule: dict[str, Any], speed: int) -> dict[str, Any]:
    expression = re.sub(r"(\[|\boffset )(\w+)", lambda found: found[1] + shorter(found[2], speed), rule["expr"])
    expression = re.sub(r"\* 60\b", f"* {60 / speed:g}", expression)
    waits = {"for": shorter(rule["for"], speed)} if "for" in rule else {}
    return {**rule, "expr": expression, **waits}


def shorter(duration: str, speed: int) -> str:
    """A duration of Prometheus', divided by `speed`, in milliseconds."""
    found = DURATION.fullmatch(duration)
    assert found, duration
    return f"{round(int(found[1]) * SECONDS[found[2]] * 1000 / speed)}ms"


class Prometheus:
    """The three daemons; `targets` is the folder that is watched."""

    def __init__(self, speed: int = SPEED) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fdscale-prometheus-", dir="/tmp"))
        self.targets, self._daemons = self.folder / "targets", Daemons(self.folder)
        self.targets.mkdir()
        ports = _free_ports(3)
        self.url, self.pushgateway, self.alertmanager = (f"http://127.0.0.1:{port}" for port in ports)
        self._configure(speed)

    def up(self) -> None:
        """Start them, and wait until each answers."""
        # Debian's pushgateway keeps what was pushed under /var/lib unless told not to
        self._start("pushgateway", self.pushgateway, "--persistence.file=")
        config, storage = f"--config.file={self.folder}/alertmanager.yml", f"--storage.path={self.folder}/alertmanager"
        self._start("alertmanager", self.alertmanager, config, storage, "--cluster.listen-address=")
        config, storage = f"--config.file={self.folder}/prometheus.yml", f"--storage.tsdb.path={self.folder}/data"
        self._start("", self.url, config, storage, "--rules.alert.resend-delay=1s")
        for url in (self.url, self.pushgateway, self.alertmanager):
            wait_until(lambda url=url: _answers(f"{url}/-/ready"), 15, f"{url}; see {self.folder}/log")

    def down(self) -> None:
        """End them and remove the folder."""
        self._daemons.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples of an instant query: each with `metric`, its labels, and `value`."""
        return _get(f"{self.url}/api/v1/query?query={quote(expression)}")["data"]["result"]

    def answers(self, run: str, ended: str = "") -> list[str]:
        """Of each target of a run, or of one that ended so, whether it answers: "1" or "0"."""
        samples = self.query(f'up{{job="fdscale", run="{run}", ended="{ended}"}}')
        return [sample["value"][1] for sample in samples]

    def rules(self) -> list[dict[str, Any]]:
        """Every rule with its `health`, `lastError` and, of alerts, `state`."""
        groups = _get(f"{self.url}/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    def told(self) -> set[tuple[str, str]]:
        """(alert, run) of all that Alertmanager tells somebody of: not of those that another one inhibits."""
        alerts = _get(f"{self.alertmanager}/api/v2/alerts?active=true&inhibited=false")
        return {(alert["labels"]["alertname"], alert["labels"].get("run", "")) for alert in alerts}

    def fired(self, run: str) -> set[str]:
        """The alerts that a run has fired since the start, those that are over included."""
        samples = self.query(f'last_over_time(ALERTS{{alertstate="firing", run="{run}"}}[1h])')
        return {sample["metric"]["alertname"] for sample in samples}

    def _start(self, name: str, url: str, *arguments: str) -> None:
        program = f"prometheus-{name}" if name else "prometheus"
        address = f"--web.listen-address={url.removeprefix('http://')}"
        self._daemons.start(program, [program, address, *arguments])

    def _configure(self, speed: int) -> None:
        config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": INTERVAL, "evaluation_interval": INTERVAL}
        alertmanagers = config["alerting"]["alertmanagers"][0]["static_configs"][0]
        alertmanagers["targets"] = [self.alertmanager.removeprefix("http://")]
        jobs = {job["job_name"]: job for job in config["scrape_configs"]}
        jobs["pushgateway"]["static_configs"][0]["targets"] = [self.pushgateway.removeprefix("http://")]
        jobs["fdscale"]["file_sd_configs"][0]["refresh_interval"] = "1s"
        self._write("prometheus.yml", config)
        for name in config["rule_files"]:
            self._write(name, faster(yaml.safe_load((MONITORING / name).read_text()), speed))
        manager = yaml.safe_load((MONITORING / "alertmanager.example.yml").read_text())
        manager["route"] |= {"group_wait": "1s", "group_interval": "1s"}
        self._write("alertmanager.yml", manager)

    def _write(self, name: str, contents: dict[str, Any]) -> None:
        (self.folder / name).write_text(yaml.safe_dump(contents, width=1000))


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _get(url: str) -> Any:
    with urlopen(url, timeout=10) as answer:
        return json.load(answer)


def _answers(url: str) -> bool:
    try:
        with urlopen(url, timeout=2):
            return True
    except OSError:
        return False
