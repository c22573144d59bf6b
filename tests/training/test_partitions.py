"""Reading a checkpoint weight by weight gives what gathering the live engine does, bit for bit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.training.average import keep_average
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, full_state, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partitions import open_partitions
from tests.training.first_attempt import first_attempt


class Tied(nn.Module):
    """Frozen weights, buffers, a weight with two names, and sizes that two ranks cannot divide."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(9, 17), nn.Linear(17, 9)
        self.third = nn.Linear(9, 17)
        self.third.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.register_buffer("table", torch.arange(5))
        self.register_buffer("scale", torch.rand(3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.third(self.second(self.first(inputs)))


def saved(connection: Connection, folder: str, stage: int, bf16: bool) -> dict[str, dict[str, Tensor]]:
    """Save after two steps; the engine's weights and averages, gathered."""
    torch.manual_seed(0)
    module = Tied()
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-2, (0.9, 0.999), 1e-8)
    keep_average(optimizer, 0.9)
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 100}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero, "bf16": {"enabled": bf16}}
    engine = start_engine(module, optimizer, config, 1, 1.0)
    for step in range(2):
        inputs = torch.randn(4, 9, generator=torch.Generator().manual_seed(2 * step + connection.rank.rank))
        engine.backward(engine(inputs.bfloat16() if bf16 else inputs).float().square().mean())
        engine.step()
    Checkpoints(first_attempt(folder), connection, keep=2).save(engine, 2, {"step": 2})
    found = {
        "fp32": full_state(engine, engine.module, wanted=True),
        "ema": full_state(engine, engine.module, wanted=True, average=True),
    }
    engine.destroy()
    return found


@pytest.mark.parametrize(("stage", "bf16"), [(0, False), (1, False), (2, True), (3, False), (3, True)])
def test_a_read_weight_is_the_gathered_one(stage: int, bf16: bool, tmp_path: Path, two_ranks: Any) -> None:
    gathered = two_ranks(saved, str(tmp_path), stage, bf16)[0]
    partitions = open_partitions(tmp_path / "0001" / "step_00000002")
    assert list(partitions.names) == list(gathered["fp32"])
    assert partitions.states == ("fp32", "exp_avg", "exp_avg_sq", "ema")
    for name, shape in partitions.names.items():
        for state in ("fp32", "ema"):
            read, wanted = partitions.read(name, state), gathered[state][name]
            assert read.shape == shape == wanted.shape
            assert torch.equal(read.float() if read.is_floating_point() else read, wanted), (name, state)
    assert partitions.read("table").dtype == torch.int64
    assert set(partitions.names) - partitions.trained == {"first.bias", "table", "scale", "third.weight"}
    assert partitions.updates("second.weight") == 2


def test_nothing_in_a_file_is_run_and_deepspeed_is_not_needed(tmp_path: Path, two_ranks: Any) -> None:
    two_ranks(saved, str(tmp_path), 3, False)
    program = (
        "import sys, pathlib; from fdscale.training.partitions import open_partitions; "
        "open_partitions(pathlib.Path(sys.argv[1])).read('second.weight'); print('deepspeed' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "0001" / "step_00000002")], capture_output=True, text=True
    )
    assert done.stdout == "False\n", done.stderr


def test_states_offloaded_to_nvme_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "offloaded_tensors").mkdir()
    with pytest.raises(UserError, match="offloaded to NVMe"):
        open_partitions(tmp_path)
