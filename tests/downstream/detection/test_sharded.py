"""A detector divided over ranks is the one of a single process, whatever objects each rank has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.downstream.detection.detector import Detector
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide
from tests.downstream.detection.small import LEAN, design, objects_of, pixels_of, student_of


def two_steps(
    connection: Connection, kind: str, changes: dict[str, Any], lean: bool, numbers: list[list[int]]
) -> list[tuple[dict[str, float], dict[str, Tensor]]]:
    """Losses and whole gradients of two steps, blocks recomputed; `numbers` of objects of each rank's images.

    Lean: the student is divided before the detector is built on it, and nothing stays resident.
    """
    from deepspeed.utils import safe_get_full_grad

    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": LEAN if lean else {"stage": 0}}
    student, rank = student_of(kind, 0.3, "blocks"), connection.rank.rank
    if lean:
        divide(student, config, connection)
    torch.manual_seed(3)
    detector = Detector(student, design(**changes))
    engine = start_engine(
        detector, adamw(parameter_groups(detector, 0.05, ()), 1e-2, (0.9, 0.99), 1e-8), config, 1, 0.0
    )
    found = []
    for step in range(2):
        draws = torch.rand(student.drop_path_sites, 2, generator=torch.Generator().manual_seed(rank))
        torch.manual_seed(10 * step + rank)
        losses = engine(pixels_of(2, seed=step + 5 * rank), objects_of(numbers[rank], seed=step + rank), draws)
        engine.backward(losses["loss"])
        gradients = {name: safe_get_full_grad(p).clone() for name, p in detector.named_parameters()}
        engine.step()
        found.append(({name: float(part.detach()) for name, part in losses.items()}, gradients))
    engine.destroy()
    return found


ONE_STAGE: dict[str, Any] = {}
CASCADE = {"cascade": True}
VITDET = {"cascade": True, "box_convolutions": 2, "norms": True}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("vit", ONE_STAGE), ("swin", ONE_STAGE), ("vit", CASCADE), ("swin", VITDET)],
    ids=["vit-one_stage", "swin-one_stage", "vit-cascade", "swin-vitdet"],
)
def test_losses_and_gradients_do_not_depend_on_the_stage(kind: str, changes: dict[str, Any], two_ranks: Any) -> None:
    numbers = [[3, 1], [0, 0]]
    whole, divided = (two_ranks(two_steps, kind, changes, lean, numbers) for lean in (False, True))
    assert whole[0][0][0]["loss_mask"] > 0.1
    assert whole[1][0][0]["loss_mask"] == whole[1][0][0]["loss_box"] == 0  # no objects on this rank
    assert abs(whole[0][1][0]["loss"] - whole[0][0][0]["loss"]) > 0.005  # it learns
    for rank in (0, 1):
        for (expected, theirs), (losses, found) in zip(whole[rank], divided[rank], strict=True):
            assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)
            assert found.keys() == theirs.keys()
            for name, gradient in found.items():
                torch.testing.assert_close(
                    gradient, theirs[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
    moving = [name for name, gradient in whole[0][0][1].items() if gradient.abs().max() > 1e-6]
    assert len(moving) > 0.9 * len(whole[0][0][1])
