"""Forks warm ranks: each joins a process group once, then runs test functions until its pytest session ends."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Client, Connection
from types import ModuleType

from fdscale.imports import importing

IMPORTED = ("fdscale.train", "deepspeed.runtime.zero.muon.muon_optimizer")  # they start no threads
MODULES: dict[str, ModuleType] = {}


def module_at(path: str) -> ModuleType:
    """The test file as a module, loaded once per rank."""
    if path not in MODULES:
        name = "on_rank_" + str(len(MODULES))
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        MODULES[path] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(MODULES[path])
    return MODULES[path]


def forget_engines() -> None:
    """DeepSpeed keeps every module that ever had a ZeRO-3 engine in a list of the process, with all its states."""
    offload = sys.modules.get("deepspeed.runtime.zero.parameter_offload")
    if offload is not None:
        offload.FWD_MODULE_STACK.clear()


def serve(pytest_session: Connection) -> None:
    """Run what is asked for, one function at a time, and answer with its result or its traceback."""
    from fdscale.cluster.ranks import rank_from_environment
    from fdscale.training.engine import connect

    pytest_session.send(os.getpid())
    connection = connect(rank_from_environment(os.environ))
    gc.freeze()  # ZeRO-3 collects garbage at each start: what is imported is none
    # plain pickle: multiprocessing's own would send tensors as shared memory, which the receiver cannot open
    while True:
        path, function, arguments = pickle.loads(pytest_session.recv_bytes())
        try:
            answer = (True, getattr(module_at(path), function)(connection, *arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        forget_engines()
        pytest_session.send_bytes(pickle.dumps(answer))
        gc.collect()  # ZeRO-3 does at each start, of all there is: what stays, modules above all, is no garbage
        gc.freeze()


def become_rank(environment: Mapping[str, str], address: str) -> None:
    """In a new process, until its pytest session has ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    with suppress(EOFError), Client(address, family="AF_UNIX") as to_pytest:
        serve(to_pytest)


def fork_ranks(requests: Connection) -> None:
    """A rank for each (environment, address) that is sent."""
    with importing():
        for module in IMPORTED:
            importlib.import_module(module)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for ranks
    while True:
        environment, address = requests.recv()
        if os.fork() == 0:
            try:
                requests.close()
                become_rank(environment, address)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)


if __name__ == "__main__":
    with suppress(EOFError), Client(sys.argv[1], family="AF_UNIX") as to_pytest:
        fork_ranks(to_pytest)
