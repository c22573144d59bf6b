"""The Debian packages of the lab: what is missing is installed when root, and no service starts by itself."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PACKAGES = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "munged": "munge",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "pdsh": "pdsh",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "prometheus-pushgateway": "prometheus-pushgateway",
    "prometheus-alertmanager": "prometheus-alertmanager",
    "amtool": "prometheus-alertmanager",
}
POLICY = Path("/usr/sbin/policy-rc.d")
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def missing() -> list[str]:
    """Packages whose command is not there."""
    return sorted({package for command, package in PACKAGES.items() if shutil.which(command, path=PATH) is None})


def why_not() -> str | None:
    """Why the lab cannot run on this machine, or None."""
    if os.geteuid() != 0:
        return "its namespaces and SLURM need root"
    if missing() and shutil.which("apt-get") is None:
        return f"{', '.join(missing())} must be there, and there is no apt-get to install them with"
    return None


def install() -> None:
    """Install what is missing."""
    if not missing():
        return
    apt = ["apt-get", "-o", "DPkg::Lock::Timeout=300", "-qq"]
    with _no_service_starts():
        subprocess.run([*apt, "update"], check=True)
        subprocess.run(
            [*apt, "install", "-y", "--no-install-recommends", *missing()],
            check=True,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdout=subprocess.DEVNULL,
        )


@contextmanager
def _no_service_starts() -> Iterator[None]:
    """Debian asks this script before it starts a service: 101 forbids it."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()
