"""Machines that are namespaces: each has a network, a host name, mounts and a /dev/shm of its own, no more.

`n1` is 10.77.0.1 on a bridge that is in `ctl`'s network, `ctl` is 10.77.0.254. A sleeping process holds each machine,
so that its daemons can be killed and started again; with that process the machine is gone.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.lab.daemons import Daemons, wait_until
from tests.cluster.lab.packages import PATH

CONTROLLER = "ctl"
NETWORK = "10.77.0"
BECOME = """
mount --bind "$1" /etc/hosts
mount -t tmpfs shm /dev/shm
hostname "$2"
ip link set lo up
exec sleep infinity
"""


class Nodes:
    """`count` machines n1, n2, ... and their controller."""

    def __init__(self, folder: Path, daemons: Daemons, count: int, variables: dict[str, str]) -> None:
        self.names = [f"n{number}" for number in range(1, count + 1)]
        self._folder, self._daemons, self._variables = folder, daemons, variables

    def up(self) -> None:
        """Make the machines and connect them."""
        hosts = self._folder / "hosts"
        hosts.write_text("".join(f"{address}\t{name}\n" for name, address in self._addresses().items()))
        for name in (CONTROLLER, *self.names):
            become = ["unshare", "--net", "--uts", "--mount", "sh", "-ec", BECOME, "sh", str(hosts), name]
            self._daemons.start(f"hold-{name}", become)
        for name in (CONTROLLER, *self.names):
            wait_until(lambda name=name: self._holds(name), 10, f"the namespaces of {name}")
        self._plug_in()

    def on(self, name: str, command: Sequence[str | Path]) -> list[str]:
        """The command line that runs `command` as if on that machine, in this folder."""
        pid = self._daemons.pid(f"hold-{name}")
        variables = [f"{key}={value}" for key, value in self._variables.items()]
        enter = ["nsenter", f"--target={pid}", "--net", "--uts", "--mount", f"--wdns={Path.cwd()}"]
        return [*enter, "--", "env", f"PATH={PATH}", *variables, *map(str, command)]

    def run(self, name: str, *command: str | Path, timeout: float = 30) -> str:
        """Run a command there and return what it printed; CalledProcessError when it fails."""
        done = subprocess.run(self.on(name, command), capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return done.stdout

    def cut_off(self, name: str) -> None:
        """Pull that machine's cable."""
        self.run(name, "ip", "link", "set", "eth0", "down")

    def back(self, name: str) -> None:
        """Plug it in again."""
        self.run(name, "ip", "link", "set", "eth0", "up")

    def end_processes(self) -> None:
        """Kill what still runs on these machines, besides the lab's own daemons: tasks that outlived their job."""
        networks = {os.readlink(f"/proc/{self._daemons.pid(f'hold-{name}')}/ns/net") for name in self.names}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                inside = os.readlink(folder / "ns" / "net") in networks
                if inside and int(folder.name) not in self._daemons.pids():
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:
                continue  # it has ended meanwhile

    def _addresses(self) -> dict[str, str]:
        numbered = {name: f"{NETWORK}.{name.removeprefix('n')}" for name in self.names}
        return {"localhost": "127.0.0.1", CONTROLLER: f"{NETWORK}.254", **numbered}

    def _holds(self, name: str) -> bool:
        return Path(f"/proc/{self._daemons.pid(f'hold-{name}')}/comm").read_text() == "sleep\n"

    def _plug_in(self) -> None:
        self.run(CONTROLLER, "ip", "link", "add", "br0", "type", "bridge")
        self.run(CONTROLLER, "ip", "addr", "add", f"{NETWORK}.254/24", "dev", "br0")
        self.run(CONTROLLER, "ip", "link", "set", "br0", "up")
        for name in self.names:
            there = str(self._daemons.pid(f"hold-{name}"))
            self.run(CONTROLLER, "ip", "link", "add", f"v-{name}", "type", "veth", "peer", "eth0", "netns", there)
            self.run(CONTROLLER, "ip", "link", "set", f"v-{name}", "master", "br0", "up")
            self.run(name, "ip", "addr", "add", f"{self._addresses()[name]}/24", "dev", "eth0")
            self.run(name, "ip", "link", "set", "eth0", "up")
