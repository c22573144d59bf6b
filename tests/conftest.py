"""Fixtures for every room: warm ranks, started once per session, and small data."""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest

from fdscale.imports import importing

hypothesis.settings.register_profile("fdscale", hypothesis.settings(), deadline=None)  # timings are for benchmarks
hypothesis.settings.load_profile("fdscale")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: threads of several pytest workers wait for each other
WORKER = Path(__file__).parent / "rank_worker.py"
REPOSITORY = WORKER.parent.parent
LONGEST = (  # files begun first, so that the workers end together
    "tests/study/test_study.py",
    "tests/test_runs.py",
    "tests/downstream/test_dense.py",
    "tests/test_train.py",
    "tests/test_recipes.py",
    "tests/training/test_engine.py",
    "tests/training/test_watchdog.py",
    "tests/export/test_parity.py",
    "tests/downstream/test_classify.py",
    "tests/training/test_elastic.py",
    "tests/data",
    "tests/downstream/detection",
    "tests/downstream/segmentation",
    "tests/downstream",
    "tests/training",
    "tests/diagnostics",
    "tests/test_plan.py",
    "tests/test_scale.py",
    "tests/export",
    "tests/bench",
)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Every test file is imported, and all that it needs."""
    with importing():
        return (yield)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; a file's tests stay together, in their order."""
    items.sort(key=lambda item: _place(item.nodeid))


def _place(test: str) -> int:
    return next((place for place, path in enumerate(LONGEST) if test.startswith(path)), len(LONGEST))


class RankFailure(AssertionError):
    """A test function raised on a rank; the text is that rank's traceback."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher would set for one rank of one CPU machine."""
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }


class Ranks:
    """Worker processes that joined one process group; they serve every test of the session."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._processes: list[int] = []
        self._pipes: list[Connection] = []

    def __call__(self, function: Callable[..., Any], *arguments: Any, timeout: float = 200) -> list[Any]:
        """`function(connection, *arguments)` on every rank at once; the results in rank order.

        `function` is a top-level function of a test file, called with the rank's `Connection` first. Arguments and
        results travel by pickle: plain types, tensors, or fdscale's own, never classes of a test file.
        """
        if not self._pipes:
            self._start()
        for pipe in self._pipes:
            pipe.send_bytes(pickle.dumps((inspect.getfile(function), function.__name__, arguments)))
        return self._answers(timeout)

    def _answers(self, timeout: float) -> list[Any]:
        deadline, waiting = time.monotonic() + timeout, dict(enumerate(self._pipes))
        results: dict[int, Any] = {}
        while waiting:
            for rank, pipe in list(waiting.items()):
                if pipe.poll(0.01):
                    ok, results[rank] = pickle.loads(pipe.recv_bytes())
                    del waiting[rank]
                    if not ok and waiting:
                        deadline = min(deadline, time.monotonic() + 10)  # its peers may wait for it for ever
            if waiting and time.monotonic() > deadline:
                self.stop()
                raise RankFailure(f"ranks {sorted(waiting)} gave no answer; others: {results}")
            failures = [text for text in results.values() if isinstance(text, str) and "Traceback" in text]
            if failures and not waiting:
                raise RankFailure("\n".join(failures))
        return [results[rank] for rank in range(self.world_size)]

    def _start(self) -> None:
        port = free_port()
        with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/ranks", family="AF_UNIX") as listener:
            for rank in range(self.world_size):
                _forker().send((rank_environment(rank, self.world_size, port), listener.address))
                self._pipes.append(listener.accept())
                self._processes.append(self._pipes[-1].recv())

    def stop(self) -> None:
        for pid in self._processes:
            with suppress(ProcessLookupError), os.fdopen(os.pidfd_open(pid)) as process:
                signal.pidfd_send_signal(process.fileno(), signal.SIGKILL)
                select.select([process], [], [])  # until it is gone
        self._processes, self._pipes = [], []


@functools.cache
def _forker() -> Connection:
    """The way to a process that has imported torch and DeepSpeed once, for all ranks that it forks; it ends with us."""
    with tempfile.TemporaryDirectory() as folder, Listener(f"{folder}/forker", family="AF_UNIX") as listener:
        command = [sys.executable, str(WORKER), str(listener.address)]
        subprocess.Popen(command, env=rank_environment(0, 1, free_port()), cwd=tempfile.gettempdir())
        return listener.accept()


def _warm(world_size: int) -> Iterator[Ranks]:
    ranks = Ranks(world_size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[Ranks]:
    """Two warm CPU ranks."""
    yield from _warm(2)


@pytest.fixture(scope="session")
def one_rank() -> Iterator[Ranks]:
    """One warm CPU rank, for what needs an engine but no peer."""
    yield from _warm(1)


@pytest.fixture
def fresh_ranks() -> Iterator[Callable[[int], Ranks]]:
    """So many ranks of this test's own: what they hold goes with them."""
    started: list[Ranks] = []

    def start(world_size: int) -> Ranks:
        started.append(Ranks(world_size))
        return started[-1]

    yield start
    for ranks in started:
        ranks.stop()


@pytest.fixture(scope="session")
def environment_of_rank() -> Callable[[int, int, int], dict[str, str]]:
    """`rank_environment`, for tests that start real ranks of their own."""
    return rank_environment


@pytest.fixture(scope="session")
def port() -> Callable[[], int]:
    """`free_port`, likewise."""
    return free_port


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """65 labelled digits in shards, held out: no number of ranks or of micro batches divides them."""
    from sklearn.datasets import load_digits

    from fdscale.data.packing.digits import Digits
    from fdscale.data.packing.shards import write_shards

    values, labels = load_digits(return_X_y=True)
    chosen = np.arange(3, 263, 4)  # of those that are not trained on
    digits = Digits("few digits", chosen, values[chosen], labels[chosen])
    return write_shards(digits, tmp_path_factory.mktemp("shards") / "few_digits", 17, seed=None).folder
