"""Who this process is among its ranks, and the signals that ask it to stop. No torch in here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

from fdscale.config.errors import UserError

REQUEUE_EXIT_CODE = 85
"""A run's exit code when it was asked to stop, has committed a checkpoint, and wants to be started again."""

USER_ERROR_EXIT_CODE = 2
"""A run's exit code after a user's mistake, or when a person must decide: starting it again would change nothing."""

REQUEUES = "FDSCALE_REQUEUES"
"""The variable that tells ranks that their launcher puts their job back into the queue until the run is complete."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(frozen=True)
class Rank:
    """One process among `world_size`, of which `local_world_size` share its node."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    master_addr: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def rank_from_environment(env: Mapping[str, str]) -> Rank:
    """The rank a launcher gave this process: torchrun's or deepspeed's variables, srun's, or one process.

    SLURM's variables count only inside an srun step that no other launcher has entered: a batch script and
    an salloc shell carry a job's variables too. Raises UserError naming what is missing or garbled.
    """
    if "RANK" in env:
        rank = _from_launcher(env)
    elif in_srun_step(env):
        rank = _from_slurm(env)
    elif left_over := [name for name in ("LOCAL_RANK", "WORLD_SIZE") if name in env]:
        raise UserError(
            f"the environment sets {left_over[0]}={env[left_over[0]]!r} but not RANK: start all ranks with "
            f"`fdscale launch`, deepspeed, torchrun or srun, or unset {left_over[0]} to run one process"
        )
    else:
        rank = Rank(0, 0, 1, 1, "127.0.0.1", free_port())
    _check(rank)
    return rank


def in_srun_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, and no other launcher under it."""
    return "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and "RANK" not in env


def export_rank(rank: Rank) -> None:
    """Write the rank to `os.environ`, where torch.distributed and DeepSpeed look for it."""
    os.environ.update(
        RANK=str(rank.rank),
        LOCAL_RANK=str(rank.local_rank),
        WORLD_SIZE=str(rank.world_size),
        LOCAL_WORLD_SIZE=str(rank.local_world_size),
        MASTER_ADDR=rank.master_addr,
        MASTER_PORT=str(rank.master_port),
    )


def free_port() -> int:
    """A TCP port that nothing on this machine listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _from_launcher(env: Mapping[str, str]) -> Rank:
    local_size = "LOCAL_WORLD_SIZE" if "LOCAL_WORLD_SIZE" in env else "LOCAL_SIZE"  # torchrun's, deepspeed's
    return Rank(
        rank=_number(env, "RANK"),
        local_rank=_number(env, "LOCAL_RANK"),
        world_size=_number(env, "WORLD_SIZE"),
        local_world_size=_number(env, local_size),
        master_addr=_text(env, "MASTER_ADDR"),
        master_port=_number(env, "MASTER_PORT"),
    )


def _from_slurm(env: Mapping[str, str]) -> Rank:
    restarts = _number(env, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in env else 0
    return Rank(
        rank=_number(env, "SLURM_PROCID"),
        local_rank=_number(env, "SLURM_LOCALID"),
        world_size=_number(env, "SLURM_NTASKS"),
        local_world_size=_slurm_tasks_here(env),
        master_addr=env.get("MASTER_ADDR") or _first_slurm_node(env),
        # A requeued job keeps its id: the restart count keeps it off a port its first life may still hold.
        master_port=20000 + (_number(env, "SLURM_JOB_ID") * 7 + restarts) % 10000,
    )


def _slurm_tasks_here(env: Mapping[str, str]) -> int:
    """This node's entry of SLURM's run-length list: `2(x3),1` is 2, 2, 2, 1."""
    name = "SLURM_STEP_TASKS_PER_NODE" if "SLURM_STEP_TASKS_PER_NODE" in env else "SLURM_TASKS_PER_NODE"
    runs = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", run) for run in _text(env, name).split(",")]
    tasks = [int(run[1]) for run in runs if run for _ in range(int(run[2] or 1))]
    node = _number(env, "SLURM_NODEID")
    if None in runs or node >= len(tasks):
        raise UserError(
            f"{name}={env[name]!r} has no entry for SLURM_NODEID={node}: expected one count per node, such "
            "as '2(x3),1'; start the ranks with srun, or with `fdscale launch` inside the allocation"
        )
    return tasks[node]


def _first_slurm_node(env: Mapping[str, str]) -> str:
    nodes = _text(env, "SLURM_JOB_NODELIST")
    scontrol = shutil.which("scontrol")
    if scontrol is None:
        raise UserError("scontrol is not on the PATH, so SLURM_JOB_NODELIST cannot be read: export MASTER_ADDR")
    answer = subprocess.run([scontrol, "show", "hostnames", nodes], capture_output=True, text=True)
    if answer.returncode != 0 or not answer.stdout.split():
        raise UserError(
            f"scontrol cannot read SLURM_JOB_NODELIST={nodes!r} ({answer.stderr.strip() or 'no host'}): "
            "export MASTER_ADDR with the name of the first node"
        )
    return answer.stdout.split()[0]


def _text(env: Mapping[str, str], name: str) -> str:
    if not env.get(name):
        found = ", ".join(f"{key}={env[key]}" for key in ("RANK", "SLURM_PROCID") if key in env)
        raise UserError(
            f"the environment says {found}, but {name} is missing or empty: "
            "start all ranks with `fdscale launch`, deepspeed, torchrun or srun"
        )
    return env[name]


def _number(env: Mapping[str, str], name: str) -> int:
    text = _text(env, name)
    if not re.fullmatch(r"[0-9]+", text):
        raise UserError(f"environment variable {name}={text!r} is not a whole number, 0 or more")
    return int(text)


def _check(rank: Rank) -> None:
    if not (rank.rank < rank.world_size and rank.local_rank < rank.local_world_size <= rank.world_size):
        raise UserError(
            f"the environment contradicts itself: RANK {rank.rank} of WORLD_SIZE {rank.world_size}, "
            f"LOCAL_RANK {rank.local_rank} of {rank.local_world_size} on this node; "
            "ranks count from 0 to the size - 1"
        )
    if not 0 < rank.master_port < 65536:
        raise UserError(f"MASTER_PORT={rank.master_port} is not a TCP port: 1 to 65535 are allowed")


def hold_stop_signals(env: Mapping[str, str]) -> None:
    """Let a rank's stop signals wait until `StopSignals` is installed: one that came during its imports would kill."""
    if "RANK" in env or in_srun_step(env):
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)


class StopSignals:
    """SIGTERM and SIGUSR1 set a flag and nothing else: the loop ends its step and commits before it exits.

    A handler that exited at once would leave the other ranks inside a collective. As a context manager it
    installs itself and puts the former handlers back. Signals may arrive any number of times.
    """

    def __init__(self) -> None:
        self.requested = False
        self.received: signal.Signals | None = None  # the first one
        self.ended = threading.Event()  # the run has, and nobody heeds a request any more
        self._former: dict[signal.Signals, Any] = {}

    def install(self) -> None:
        """Take over the signals; a second call changes nothing. Only the main thread may."""
        for signum in STOP_SIGNALS:
            if signum not in self._former:
                self._former[signum] = signal.signal(signum, self._handle)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def request(self) -> None:
        """Stop as if a signal had come."""
        self.requested = True

    def restore(self) -> None:
        """Put the former handlers back; once a stop was requested, ignore the signals instead.

        The launcher repeats them, and one that came while Python exits would change this process's code.
        """
        self.ended.set()
        while self._former:
            signum, former = self._former.popitem()
            # None: a handler that C code had installed, which Python cannot put back
            handler = signal.SIG_DFL if former is None else former
            signal.signal(signum, signal.SIG_IGN if self.requested else handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        self.requested = True
        self.received = self.received or signal.Signals(signum)

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()
