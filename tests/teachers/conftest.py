from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


class Golden(NamedTuple):
    """A golden teacher: its state in the original layout, its shape, its input and its target."""

    state: dict[str, Tensor]
    geometry: dict[str, int | list[int]]
    pixels: Tensor
    target: Tensor


def _beside(name: str) -> ModuleType:
    """A module beside this file: test modules cannot import each other."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES, REFERENCES = _beside("original_files"), _beside("references")


@pytest.fixture
def files() -> ModuleType:
    return FILES


@pytest.fixture
def references() -> ModuleType:
    return REFERENCES


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes a `row` runs for every original file."""
    if "row" in metafunc.fixturenames:
        names = [f"{row.teacher} from {row.file}" for row in FILES.ROWS]
        metafunc.parametrize("row", FILES.ROWS, ids=names)


def _golden(file: str, geometry: dict[str, int | list[int]]) -> Golden:
    values = load_file(GOLDEN / f"{file}.safetensors")
    state = {k.removeprefix("teacher."): v for k, v in values.items() if k.startswith("teacher.")}
    pixels = values["x"] * STD.view(3, 1, 1) + MEAN.view(3, 1, 1)
    return Golden(state, geometry, pixels, values["target"])


def vit_shape(width: int, heads: int) -> dict[str, int | list[int]]:
    return {"embed_dim": width, "depth": 2, "num_heads": heads, "patch_size": 8, "image_size": 32}


@pytest.fixture
def clip() -> Golden:
    return _golden("vit_from_clip", vit_shape(64, 1))


@pytest.fixture
def dino() -> Golden:
    return _golden("vit_from_dino", vit_shape(48, 3))


@pytest.fixture
def esvit() -> Golden:
    shape = {"embed_dim": 16, "depths": [1, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
    return _golden("swinv2_from_esvit", shape)
