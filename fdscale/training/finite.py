"""An update whose loss or gradient is not finite on any rank is made on none, at every ZeRO stage.

ZeRO-1, 2 and 3 leave it out by themselves: they compute the norm of the whole gradient, equal on all ranks, and ask
for it on the host. ZeRO-0 would apply it; here it does what the others do, at the same price.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def carried_by_gradient(loss: Tensor) -> Tensor:
    """The same loss, bit for bit; one that is not finite gives every weight a gradient of NaN.

    An infinite loss can have finite gradients, and no rank would hear of it. Nothing waits for the device here.
    """
    value = loss.detach()
    return loss * (1 + (value - value))  # 1, or NaN


def take_step(engine: DeepSpeedEngine) -> None:
    """`engine.step()`, after which `engine.was_step_applied()` tells the truth at ZeRO-0, too.

    At a step's last micro batch, an update that is not finite on any rank leaves weights, moments, their counter and
    the moving average as they are, on all ranks; the gradients are dropped.
    """
    unguarded = not engine.zero_optimization() and engine.is_gradient_accumulation_boundary()
    if not unguarded or _finite_everywhere(engine):
        engine.step()
        return
    scaler = engine.torch_autocast_z0_gradscaler  # fp16's leaves the update out itself
    with nullcontext() if scaler is not None else _without_gradients(engine.optimizer):
        engine.step()
    engine._step_applied = False
    engine.skipped_steps += 1


@contextmanager
def _without_gradients(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimizer finds no gradients, and passes over the weights, as their average does; clipping did."""
    handle = optimizer.register_step_pre_hook(lambda optimizer, *_: optimizer.zero_grad(set_to_none=True))
    yield
    handle.remove()


def _finite_everywhere(engine: DeepSpeedEngine) -> bool:
    """Whether the gradient, already the mean over the ranks, is finite on every one of them; waits for the device."""
    gradients = [weight.grad for weight in engine.module.parameters() if weight.grad is not None]
    broken = ~torch.isfinite(torch.nn.utils.get_total_norm(gradients))
    flag = broken.float()
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return not flag.item()


def searches_scale(engine: DeepSpeedEngine) -> bool:
    """Whether gradients may overflow on purpose: fp16 with a loss scale that grows until they do."""
    scaler = engine.torch_autocast_z0_gradscaler
    return scaler is not None or bool(getattr(engine.optimizer, "dynamic_loss_scale", False))
