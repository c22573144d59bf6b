"""A private sshd on 127.0.0.2 and 127.0.0.3: hosts for pdsh and `deepspeed --hostfile`. ~/.ssh stays untouched."""

from __future__ import annotations

import getpass
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.cluster.lab.daemons import Daemons, wait_until
from tests.cluster.lab.packages import PATH

SERVER = """\
Port {port}
{listen}
HostKey {folder}/host_key
PidFile {folder}/sshd.pid
AuthorizedKeysFile {folder}/user_key.pub
PasswordAuthentication no
KbdInteractiveAuthentication no
PermitRootLogin prohibit-password
UsePAM no
StrictModes no
AllowUsers {user}
"""
CLIENT = """\
Host 127.0.0.*
  User {user}
  Port {port}
  IdentityFile {folder}/user_key
  IdentitiesOnly yes
  UserKnownHostsFile {folder}/known_hosts
  StrictHostKeyChecking yes
  BatchMode yes
"""


class Hosts:
    """`count` hosts with one slot each; `variables` lets pdsh and DeepSpeed reach them."""

    def __init__(self, port: int, count: int = 2) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fdscale-ssh-", dir="/tmp"))
        self.addresses = [f"127.0.0.{number + 2}" for number in range(count)]
        self.hostfile = self.folder / "hostfile"
        self.variables = {"PATH": f"{self.folder}/bin:{PATH}", "PDSH_RCMD_TYPE": "ssh"}
        self._daemons, self._port = Daemons(self.folder), port

    def up(self) -> None:
        """Make keys, start sshd, and wait until each host answers."""
        for name in ("host_key", "user_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.folder / name], check=True)
        self._configure()
        sshd = shutil.which("sshd", path=PATH)
        assert sshd, "sshd is not installed"
        Path("/run/sshd").mkdir(exist_ok=True)  # it refuses to start without
        self._daemons.start(
            "sshd", [sshd, "-D", "-f", self.folder / "sshd_config", "-E", self.folder / "log" / "sshd.log"]
        )
        for address in self.addresses:
            wait_until(lambda address=address: self._answers(address), 10, f"an answer from {address}")

    def down(self) -> None:
        """End sshd and remove the folder."""
        self._daemons.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self, address: str) -> bool:
        return subprocess.run([self.folder / "bin" / "ssh", address, "true"], capture_output=True).returncode == 0

    def _configure(self) -> None:
        told = {"port": self._port, "folder": self.folder, "user": getpass.getuser()}
        listen = "\n".join(f"ListenAddress {address}" for address in self.addresses)
        (self.folder / "sshd_config").write_text(SERVER.format(listen=listen, **told))
        (self.folder / "ssh_config").write_text(CLIENT.format(**told))
        key = (self.folder / "host_key.pub").read_text()
        known = [f"[{address}]:{self._port} {key}" for address in self.addresses]
        (self.folder / "known_hosts").write_text("".join(known))
        self.hostfile.write_text("".join(f"{address} slots=1\n" for address in self.addresses))
        ssh = self.folder / "bin" / "ssh"  # DeepSpeed's own check and pdsh both call a bare `ssh`
        ssh.parent.mkdir()
        ssh.write_text(f'#!/bin/sh\nexec /usr/bin/ssh -F {self.folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
