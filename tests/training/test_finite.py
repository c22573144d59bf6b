"""An update that is not finite on one rank is made on none: real engines of every stage, against a run without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.data.batches import Batch
from fdscale.training.average import keep_average
from fdscale.training.engine import Connection, full_state, start_engine
from fdscale.training.finite import carried_by_gradient, searches_scale
from fdscale.training.loop import train_step
from fdscale.training.optim import adamw, parameter_groups

STEPS, BROKEN, MICRO_BATCHES = 5, 2, 2
LEAVE_OUT, NAN, INF = "leave the step out", "a pixel that is not a number", "an infinite loss of finite gradients"
BF16 = {"bf16": {"enabled": True}}
CASES = {
    "stage 0": {"zero_optimization": {"stage": 0}},
    "stage 0 autocast": {
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": True, "dtype": "bfloat16"},
    },
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}},
    "stage 3 persistent": {"zero_optimization": {"stage": 3}},
    "stage 1 bf16": {"zero_optimization": {"stage": 1}, **BF16},
    "stage 1 bf16, fp32 sums": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}, **BF16},
    "stage 2 bf16": {"zero_optimization": {"stage": 2}, **BF16},
    "stage 2 offloaded": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "stage 3 bf16": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, **BF16},
}


def engine_of(case: str) -> tuple[Any, nn.Module]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 2))
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-2, (0.9, 0.999), 1e-8)
    keep_average(optimizer, 0.9)
    config = {"train_micro_batch_size_per_gpu": 2, **CASES[case]}
    return start_engine(module, optimizer, config, MICRO_BATCHES, 1.0), module


def batches_of(rank: int, step: int, how: str) -> list[Batch]:
    """Two micro batches of this rank; rank 1's first of the broken step holds what is wrong."""
    batches = []
    for micro in range(MICRO_BATCHES):
        images = torch.rand(2, 6, generator=torch.Generator().manual_seed(step * 10 + micro * 4 + rank))
        if (rank, step, micro, how) == (1, BROKEN, 0, NAN):
            images[1, 3] = torch.nan
        labels = torch.full((2,), step)
        batches.append(Batch(images, labels, labels, slice(0, 2), []))
    return batches


def optimizer_state(engine: Any) -> list[Tensor]:
    """This rank's masters, moments, their counters and averages, copied."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    states = [torch.as_tensor(value) for weight in weights for value in optimizer.state.get(weight, {}).values()]
    return [tensor.detach().clone() for tensor in [*weights, *states]]


def trained(connection: Connection, case: str, how: str) -> dict[str, Any]:
    """Five steps on this rank, of which one is broken or left out: what was applied, kept and learned."""
    (engine, module), rank = engine_of(case), connection.rank.rank
    dtype = next(module.parameters()).dtype

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        loss = engine(batch.images.to(dtype)).float().square().mean()
        broken = (rank, step, how) == (1, BROKEN, INF) and batch is batches[0]
        return {"loss": loss + torch.inf if broken else loss}

    applied, losses, kept = [], [], None
    for step in range(STEPS):
        if step == BROKEN and how == LEAVE_OUT:
            continue
        before, batches = optimizer_state(engine), batches_of(rank, step, how)
        losses.append(float(train_step(engine, terms, batches, step)["loss"]))
        applied.append(engine.was_step_applied())
        if not applied[-1]:
            after = optimizer_state(engine)
            kept = len(before) == len(after) and all(map(torch.equal, before, after))
    weights, states = full_state(engine, module, wanted=True), optimizer_state(engine)
    counts, searching = (engine.skipped_steps, engine.global_steps), searches_scale(engine)
    engine.destroy()
    return {
        "applied": applied, "kept": kept, "losses": losses, "weights": weights, "states": states, "counts": counts,
        "searching": searching,
    }  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_that_is_not_finite_on_one_rank_is_made_on_none(case: str, two_ranks: Any) -> None:
    without = two_ranks(trained, case, LEAVE_OUT)
    assert len(without[0]["losses"]) == 4
    for how in (NAN, INF):
        found = two_ranks(trained, case, how)
        for rank, undisturbed in zip(found, without, strict=True):
            assert rank["applied"] == [step != BROKEN for step in range(STEPS)], how
            assert rank["kept"], how  # masters, moments, counters and averages, bit for bit
            assert rank["counts"] == (1, STEPS)
            assert rank["losses"][BROKEN + 1 :] == undisturbed["losses"][BROKEN:]
            assert all(map(torch.equal, rank["states"], undisturbed["states"]))
            assert not rank["searching"]
        for name, weight in found[0]["weights"].items():
            assert torch.isfinite(weight).all()
            assert torch.equal(weight, found[1]["weights"][name])
            assert torch.equal(weight, without[0]["weights"][name])


def test_a_finite_loss_is_carried_bit_for_bit() -> None:
    weights = torch.rand(1000, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):
        plain = (weights.to(dtype).square() / 3).sum()
        gradient = torch.autograd.grad(plain, weights, retain_graph=True)[0]
        carried = carried_by_gradient(plain)
        assert torch.equal(carried, plain)
        assert torch.equal(torch.autograd.grad(carried, weights)[0], gradient)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_leaves_no_finite_gradient(value: float) -> None:
    weights = torch.rand(5, requires_grad=True)
    carried_by_gradient(weights.sum() + value).backward()
    assert weights.grad is not None
    assert torch.isnan(weights.grad).all()
