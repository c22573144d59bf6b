"""Exporting more than a gigabyte of ZeRO-3 weights takes a small part of their size in memory.

python -m pytest -m prove tests/prove/test_export_memory.py -s
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from tests.training.first_attempt import first_attempt

pytestmark = pytest.mark.prove

WIDTH, LAYERS = 4096, 16  # 16 x 67 MB: 1.07 GB
WATCHED = Path(__file__).parent / "export_under_watch.py"


class Wide(nn.Module):
    """Named as a trained module: `student.backbone.N.weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.student = nn.Module()
        self.student.backbone = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=i == 0) for i in range(LAYERS)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.student.backbone(inputs)


def saved(connection: Connection, folder: str) -> dict[str, float]:
    """One ZeRO-3 step and a checkpoint; a checksum of each weight in fp64, and the bytes of this rank's files."""
    torch.manual_seed(0)
    module = Wide()
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-3, (0.9, 0.999), 1e-8)
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3, "sub_group_size": 40_000_000}}
    engine = start_engine(module, optimizer, config, 1, 1.0)
    engine.backward(engine(torch.randn(1, WIDTH)).square().mean())
    engine.step()
    Checkpoints(first_attempt(folder), connection, keep=1).save(engine, 1, {"step": 1})
    from fdscale.training.engine import gathered

    sums = {}
    for name, parameter in module.student.backbone.named_parameters():
        with gathered(parameter):
            sums[name] = float(parameter.detach().double().sum())
    engine.destroy()
    return sums


@pytest.mark.timeout(1800)
def test_a_gigabyte_is_exported_in_a_quarter_of_its_size(tmp_path: Path, two_ranks: Any) -> None:
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "recipe.toml").write_text('program = "distill"\n')
    (run / "student.json").write_text("{}")
    sums = two_ranks(saved, str(run / "checkpoints"), timeout=900)[0]
    two_ranks.stop()
    command = [sys.executable, str(WATCHED), str(run), str(tmp_path / "out")]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    print("\n" + ", ".join(f"{name} {value / 2**20:,.1f} MiB" for name, value in found.items() if name != "seconds"))
    print(f"{found['seconds']:.1f} s")
    assert found["bytes"] >= 10**9
    assert 0 < found["allocated"] <= found["bytes"] / 4
    assert found["anonymous"] <= found["bytes"] / 4
    with safe_open(tmp_path / "out" / "student.safetensors", framework="pt") as file:
        assert {name: float(file.get_tensor(name).double().sum()) for name in file.keys()} == sums  # noqa: SIM118
