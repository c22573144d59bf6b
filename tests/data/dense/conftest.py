"""Tiny rendered data sets in both real layouts, and copies of them that a test may damage."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fdscale.data.dense.scenes import write_ade20k, write_coco

TRAIN, VALIDATION, SIZE = 12, 5, 64


@pytest.fixture(scope="session")
def ade20k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ADE20K's layout; for reading only."""
    folder = tmp_path_factory.mktemp("ade20k")
    write_ade20k(folder, TRAIN, VALIDATION, SIZE, seed=3)
    return folder


@pytest.fixture(scope="session")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """COCO's layout; for reading only."""
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, TRAIN, VALIDATION, SIZE, seed=3)
    return folder


@pytest.fixture
def own_ade20k(ade20k: Path, tmp_path: Path) -> Path:
    """A copy for this test."""
    return Path(shutil.copytree(ade20k, tmp_path / "ade20k"))


@pytest.fixture
def own_coco(coco: Path, tmp_path: Path) -> Path:
    """A copy for this test."""
    return Path(shutil.copytree(coco, tmp_path / "coco"))
