"""compose.yml and what it mounts: no container engine runs here, so what can be read is checked."""

from __future__ import annotations

import re
from typing import Any

import yaml

from tests.monitoring.rules import MONITORING

KEYS = {"image", "network_mode", "restart", "command", "volumes", "environment"}  # of a service, that we use
TAGGED = re.compile(r"(prom|grafana)/\w+:v?\d+\.\d+\.\d+")


def compose() -> dict[str, Any]:
    return yaml.safe_load((MONITORING / "compose.yml").read_text())


def mounts() -> list[tuple[str, str]]:
    """(source, where it appears) of every mount of a file or folder; defaults put in."""
    listed = [volume for service in compose()["services"].values() for volume in service.get("volumes", ())]
    named = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":") for volume in listed]
    return [(source, inside) for source, inside, *_ in named if source.startswith(".")]


def test_every_image_has_a_version_and_every_key_is_one() -> None:
    assert set(compose()) == {"services", "volumes"}
    for service in compose()["services"].values():
        assert set(service) <= KEYS
        assert TAGGED.fullmatch(service["image"]), service["image"]


def test_what_is_mounted_is_there_and_volumes_are_named() -> None:
    absent = [source for source, _ in mounts() if not (MONITORING / source).exists()]
    assert not absent
    used = {volume.split(":")[0] for service in compose()["services"].values() for volume in service.get("volumes", ())}
    assert {name for name in used if re.fullmatch(r"\w+", name)} == set(compose()["volumes"])


def test_nobody_else_is_listened_to() -> None:
    for name, service in compose()["services"].items():
        listening = [word for word in service.get("command", ()) if word.startswith("--web.listen-address=")]
        addresses = [*listening, service.get("environment", {}).get("GF_SERVER_HTTP_ADDR", "")]
        assert any("127.0.0.1" in address for address in addresses), name


def test_prometheus_finds_its_rules_and_targets_where_they_are_mounted() -> None:
    """Its paths are relative to its own file, here as there."""
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    discovered = [one for job in config["scrape_configs"] for one in job.get("file_sd_configs", ())]
    asked = {*config["rule_files"], *(file.split("/")[0] for one in discovered for file in one["files"])}
    mounted = {inside.removeprefix("/etc/prometheus/") for _, inside in mounts()}
    assert asked <= mounted


def test_everyone_is_asked_at_the_port_that_it_listens_on() -> None:
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    source = yaml.safe_load((MONITORING / "grafana/provisioning/datasources/prometheus.yml").read_text())
    listening = set(re.findall(r"listen-address=\S*127\.0\.0\.1:(\d+)", (MONITORING / "compose.yml").read_text()))
    jobs = {job["job_name"]: job.get("static_configs") for job in config["scrape_configs"]}
    alertmanager = config["alerting"]["alertmanagers"][0]["static_configs"][0]["targets"]
    asked = [*jobs["pushgateway"][0]["targets"], *alertmanager, source["datasources"][0]["url"]]
    assert {address.rsplit(":", 1)[1] for address in asked} == listening


def test_grafana_finds_the_dashboards_where_they_are_mounted() -> None:
    provider = yaml.safe_load((MONITORING / "grafana/provisioning/dashboards/fdscale.yml").read_text())
    path = provider["providers"][0]["options"]["path"]
    assert ("./grafana/dashboards", path) in mounts()
