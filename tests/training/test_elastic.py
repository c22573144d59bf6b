"""A run goes on where it was, on another number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.geometry import ViTGeometry
from fdscale.students.student import build_student
from fdscale.training.average import keep_average
from fdscale.training.checkpoint import Checkpoints
from fdscale.training.engine import Connection, full_state, set_learning_rate, start_engine
from fdscale.training.loop import train_step
from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups

VIT = ViTGeometry(30, 2, 3, patch_size=8, image_size=32)
LEAN = {
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
    "sub_group_size": 5000,  # several flat tensors to a group
}
WIDTH, GLOBAL_BATCH, MICRO_BATCH, LAST = 7, 8, 4, 6


class Distillation:
    """A tiny distillation: drop path, layer decay (six groups), an average, a frozen weight and a moving buffer."""

    def __init__(self, connection: Connection, stage: int, seed: int) -> None:
        self.student = build_student(VIT, 0.3, seed)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.student.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        self.student.backbone.patch_embed.proj.bias.requires_grad_(False)
        self.student.register_buffer("seen", torch.tensor(float(seed)))
        layout = TokenLayout(self.student.grid, self.student.prefix_tokens)
        torch.manual_seed(seed)
        self.distiller = Distiller(self.student, self.student.width, WIDTH, TargetMaker(layout, layout), beta=2.0)
        self.connection, self.schedule = connection, Schedule(LAST, 2, peak=1e-3)
        self.accumulation = GLOBAL_BATCH // (connection.rank.world_size * MICRO_BATCH)
        zero = {"stage": stage, **(LEAN if stage == 3 else {})}
        config = {"train_micro_batch_size_per_gpu": MICRO_BATCH, "zero_optimization": zero}
        self.engine = start_engine(self.distiller, self._optimizer(), config, self.accumulation, clip=0.1)

    def _optimizer(self) -> torch.optim.Optimizer:
        scales = layer_scales(self.student.layer_ids(), self.student.layers, 0.5)
        groups = parameter_groups(
            self.distiller,
            0.05,
            {f"student.backbone.{name}" for name in self.student.undecayed_parameters()},
            {f"student.backbone.{name}": scale for name, scale in scales.items()},
        )
        optimizer = adamw(groups, 1e-3, (0.9, 0.999), 1e-8)
        keep_average(optimizer, 0.9)
        return optimizer

    def steps(self, first: int, last: int) -> list[float]:
        """The mean loss over all ranks, for each step."""
        rows = self.accumulation * MICRO_BATCH
        starts = [self.connection.rank.rank * rows + i * MICRO_BATCH for i in range(self.accumulation)]
        unused = torch.zeros(MICRO_BATCH)
        batches = [Batch(unused, unused, unused, slice(start, start + MICRO_BATCH), []) for start in starts]
        losses = []
        for step in range(first, last):
            set_learning_rate(self.engine, self.schedule, step)
            loss = train_step(self.engine, self._terms, batches, step)["loss"].clone()
            torch.distributed.all_reduce(loss)
            losses.append(float(loss) / self.connection.rank.world_size)
            self.student.seen.add_(1)
        return losses

    def _terms(self, engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1000 + step)
        tokens = self.student.grid[0] * self.student.grid[1] + self.student.prefix_tokens
        pixels = torch.rand(GLOBAL_BATCH, 3, 32, 32, generator=generator)[batch.rows]
        target = torch.randn(GLOBAL_BATCH, tokens, WIDTH, generator=generator)[batch.rows]
        sites = self.student.drop_path_sites
        draws = drop_path_rows(0, step, sites, GLOBAL_BATCH, batch.rows, self.connection.device)
        return engine(pixels, target, draws)

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Weights and averages of everything that is trained, frozen, or a buffer."""
        gathered = (full_state(self.engine, self.distiller, wanted=True, average=average) for average in (False, True))
        return dict(zip(("weights", "average"), gathered, strict=True))


def begun(connection: Connection, folder: str, stage: int, steps: int = 3) -> dict[str, Any]:
    """Some steps and a checkpoint, then on to the end, undisturbed."""
    run = Distillation(connection, stage, seed=1)
    run.steps(0, steps)
    Checkpoints(Path(folder), connection, keep=2).save(run.engine, steps, {"step": steps})
    found = {"saved": run.states(), "losses": run.steps(steps, LAST), "end": run.states()}
    run.engine.destroy()
    return found


def continued(connection: Connection, folder: str, stage: int) -> dict[str, Any]:
    """From the checkpoint to the end, by an engine that began with other weights."""
    run = Distillation(connection, stage, seed=2)
    state = Checkpoints(Path(folder), connection, keep=2).load(run.engine)
    assert state is not None
    found = {"step": state["step"], "loaded": run.states(), "generator": torch.initial_seed()}
    found |= {"losses": run.steps(state["step"], LAST), "end": run.states(), "counted": run.engine.global_steps}
    run.engine.destroy()
    return found


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("direction", ["2 to 1", "1 to 2"])
def test_another_number_of_ranks_goes_on(
    stage: int, direction: str, tmp_path: Path, one_rank: Any, two_ranks: Any
) -> None:
    before, after = (two_ranks, one_rank) if direction == "2 to 1" else (one_rank, two_ranks)
    undisturbed = before(begun, str(tmp_path), stage)[0]
    for resumed in after(continued, str(tmp_path), stage):
        assert resumed["step"] == 3
        assert resumed["counted"] == LAST
        for kind in ("weights", "average"):
            assert largest_difference(resumed["loaded"][kind], undisturbed["saved"][kind]) == 0.0
            assert largest_difference(resumed["end"][kind], undisturbed["end"][kind]) <= 1e-5
        differences = [abs(a - b) for a, b in zip(resumed["losses"], undisturbed["losses"], strict=True)]
        assert max(differences) <= 1e-5
