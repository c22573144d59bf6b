"""A SLURM cluster of two nodes for all tests of this folder, data, and a run that nothing disturbs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from fdscale.data.packing.digits import pack_digits
from tests.cluster.lab.packages import missing, why_not
from tests.cluster.lab.slurm import Slurm
from tests.cluster.slurm.runs import run_here, settings


@pytest.fixture(scope="session")
def lab() -> Iterator[Slurm]:
    """The cluster; a machine that cannot have one fails the tests, since nothing is known there."""
    assert why_not() is None, why_not()
    assert not missing(), f"{missing()} are missing: python -m tests.cluster.lab packages"
    cluster = Slurm.new(2)
    yield cluster
    cluster.down()


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded sample, packed once for all runs."""
    folder = tmp_path_factory.mktemp("shards") / "digits"
    pack_digits(folder, "test")
    return folder


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> Path:
    """The run directory of `fdscale launch` on this machine alone, two ranks."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    run_here(settings(run_dir, digits))
    return run_dir
