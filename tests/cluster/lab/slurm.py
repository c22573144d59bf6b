"""A real SLURM cluster on one machine: munged and slurmctld on the controller, a slurmd on each node.

Partitions: `low` (its jobs are preempted and requeued), `main` (the default), `high`. A requeued job starts again after
about six seconds, SLURM's own two minutes being the time for which it keeps a job's credential.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from tests.cluster.lab.daemons import Daemons, wait_until
from tests.cluster.lab.nodes import CONTROLLER, NETWORK, Nodes

SOCKET_PATH = 107 - 40  # bytes of a Unix socket's path, less what SLURM appends to the folder
GPUS, CPUS, MEMORY = 2, 16, 16000  # of each node, claimed

CONFIGURATION = """\
ClusterName=fdscale
SlurmctldHost={controller}({network}.254)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/state/slurmctld.pid
SlurmdPidFile={folder}/state/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=10000
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
SlurmdTimeout={node_timeout}
SlurmctldTimeout=20
KillWait=5
MinJobAge=3600
GresTypes=gpu
{nodes}
PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=INFINITE
PartitionName=main Nodes=ALL PriorityTier=5 PreemptMode=OFF MaxTime=INFINITE Default=YES
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF MaxTime=INFINITE
"""
NO_CGROUPS = """\
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainCores=no
ConstrainRAMSpace=no
"""


class Slurm:
    """The cluster whose state lies in `folder`; another process may take it up again from there."""

    def __init__(self, folder: Path, nodes: int) -> None:
        assert re.fullmatch(r"[\w/.-]+", str(folder)), f"slurm.conf takes no such path: {folder}"
        assert len(str(folder)) <= SOCKET_PATH, f"a longer path than a socket may have: {folder}"
        self.folder = folder
        self.daemons = Daemons(folder)
        variables = {"SLURM_CONF": str(folder / "slurm.conf")}
        self.nodes = Nodes(folder, self.daemons, nodes, variables)

    @classmethod
    def new(cls, nodes: int = 2, node_timeout: int = 20) -> Slurm:
        """Bring one up under /tmp; a node that is silent for `node_timeout` seconds counts as down."""
        lab = cls(Path(tempfile.mkdtemp(prefix="fdscale-lab-", dir="/tmp")), nodes)
        try:
            lab._up(node_timeout)
        except BaseException:
            lab.down()
            raise
        return lab

    def _up(self, node_timeout: int) -> None:
        self._configure(node_timeout)
        self.nodes.up()
        munge = self.folder / "munge"
        files = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "seed", "log")]
        self._start(CONTROLLER, "munged", "--foreground", "--force", f"--socket={munge}/socket", *files)
        wait_until((munge / "socket").exists, 10, "munged's socket")
        self._start(CONTROLLER, "slurmctld", "-D", "-i", "-f", f"{self.folder}/slurm.conf")
        for name in self.nodes.names:
            (self.folder / "spool" / name).mkdir(parents=True)
            self.start_slurmd(name)
        wait_until(self.all_idle, 30, f"idle nodes; see {self.folder}/log")

    def start_slurmd(self, name: str) -> None:
        """Start a node's daemon, for the first time or after its death."""
        command = ["slurmd", "-D", "-N", name, "-f", f"{self.folder}/slurm.conf"]
        self.daemons.start(f"slurmd-{name}", self.nodes.on(name, command))

    def down(self) -> None:
        """End every job and every daemon, and remove the folder."""
        with suppress(subprocess.SubprocessError, KeyError, OSError):
            for job in self.client("squeue", "--noheader", "--format=%A").split():
                self.client("scancel", job)
            wait_until(lambda: not self.client("squeue", "--noheader").strip(), 15, "the jobs' end")
        with suppress(KeyError, OSError):
            self.nodes.end_processes()
        self.daemons.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def client(self, *command: str | Path, timeout: float = 30) -> str:
        """Run one of SLURM's clients on the controller; what it printed."""
        return self.nodes.run(CONTROLLER, *command, timeout=timeout)

    def sbatch(self, *arguments: str | Path, env: dict[str, str] | None = None) -> str:
        """Submit from this folder with these variables; the job's number."""
        command = self.nodes.on(CONTROLLER, ["sbatch", "--parsable", *arguments])
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def told(self, job: str, name: str) -> str:
        """What `scontrol show job` says: JobState, Restarts, ExitCode, BatchHost and the like."""
        found = re.search(rf"\b{name}=(\S+)", self.client("scontrol", "show", "job", job))
        return found[1] if found else ""

    def state(self, job: str) -> str:
        return self.told(job, "JobState")

    def all_idle(self) -> bool:
        """Whether every node waits for work."""
        with suppress(subprocess.SubprocessError):
            states = self.client("sinfo", "--noheader", "--Node", "--partition=main", "--format=%T", timeout=3).split()
            return states == ["idle"] * len(self.nodes.names)
        return False

    def _start(self, node: str, program: str, *arguments: str) -> None:
        self.daemons.start(program, self.nodes.on(node, [program, *arguments]))

    def _configure(self, node_timeout: int) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", "dev"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        (self.folder / "munge" / "key").write_bytes(os.urandom(1024))
        (self.folder / "munge" / "key").chmod(0o600)
        gpus = [self.folder / "dev" / f"nvidia{number}" for number in range(GPUS)]
        for gpu in gpus:  # /dev/null under another name: SLURM only looks whether there is a device
            os.mknod(gpu, 0o020666, os.makedev(1, 3))
        lines = [
            f"NodeName={name} NodeHostname={name} NodeAddr={NETWORK}.{number} CPUs={CPUS} RealMemory={MEMORY} "
            f"Gres=gpu:{GPUS} State=UNKNOWN"
            for number, name in enumerate(self.nodes.names, 1)
        ]
        text = CONFIGURATION.format(
            controller=CONTROLLER,
            network=NETWORK,
            folder=self.folder,
            node_timeout=node_timeout,
            nodes="\n".join(lines),
        )
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "cgroup.conf").write_text(NO_CGROUPS)
        gres = [f"NodeName={name} Name=gpu File={self.folder}/dev/nvidia[0-{GPUS - 1}]\n" for name in self.nodes.names]
        (self.folder / "gres.conf").write_text("".join(gres))
