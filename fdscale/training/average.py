"""An exponential moving average of the trained weights, kept where the optimizer keeps its moments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

AVERAGE = "ema"  # its name among a weight's `exp_avg` and `exp_avg_sq`


def keep_average(optimizer: torch.optim.Optimizer, decay: float) -> None:
    """From now on, after each update: average = decay * average + (1 - decay) * weight, from the weights of the start.

    What the optimizer steps is what is averaged: DeepSpeed hands it this rank's fp32 partitions, so the average is
    divided, offloaded and saved as the moments are, and nothing is gathered. A step that is skipped does not move it.
    """
    update = get_ema_multi_avg_fn(decay)
    started: dict[Tensor, Tensor] = {}

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for weight in _stepped(optimizer):
            if AVERAGE not in optimizer.state.get(weight, {}):
                started[weight] = weight.detach().clone()  # beside: AdamW makes its moments where a state is empty

    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        weights = _stepped(optimizer)
        for weight in weights:
            if weight in started:
                optimizer.state[weight][AVERAGE] = started.pop(weight)
        if weights:
            update([optimizer.state[weight][AVERAGE] for weight in weights], weights, 0)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _stepped(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
