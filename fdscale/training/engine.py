"""The door to DeepSpeed: process groups, the engine of a module, its weights in full."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fdscale.cluster.ranks import Rank, export_rank

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass(frozen=True)
class Connection:
    """This rank among the others: its device, and a CPU process group for messages.

    Flags and file lists travel by `control` so that agreeing on them never waits for the GPU.
    """

    rank: Rank
    device: torch.device
    control: Any  # a torch process group


def connect(rank: Rank) -> Connection:
    """Join the process group (NCCL on GPUs, gloo on CPUs), once per process."""
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")
    export_rank(rank)
    deepspeed = _quiet_deepspeed()
    if on_gpu:
        torch.cuda.set_device(rank.local_rank)
    if not dist.is_initialized():
        deepspeed.init_distributed("nccl" if on_gpu else "gloo", auto_mpi_discovery=False, verbose=False)
    device = torch.device("cuda", rank.local_rank) if on_gpu else torch.device("cpu")
    return Connection(rank, device, dist.new_group(backend="gloo", timeout=timedelta(minutes=30)))


def _quiet_deepspeed() -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    import deepspeed.ops
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # an optional shared-memory all-reduce for inference: compiling it costs half a minute, training never uses it
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def start_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    deepspeed_json: Mapping[str, Any],
    accumulation_steps: int,
    clip: float,
) -> DeepSpeedEngine:
    """Hand module and optimizer to DeepSpeed, with what the recipe decides added to the JSON.

    `clip` is always written: DeepSpeed clips at 1.0 when the key is absent; 0 switches clipping off.
    """
    config = {
        **deepspeed_json,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    return _quiet_deepspeed().initialize(model=module, optimizer=optimizer, config=config)[0]


def set_learning_rate(engine: DeepSpeedEngine, rate: float) -> None:
    """Give every parameter group `rate` times its own `lr_scale`."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def full_state(engine: DeepSpeedEngine, module: nn.Module, wanted: bool) -> dict[str, Tensor]:
    """The state dict of `module`, a part of the engine's, in fp32 on the CPU, gathered weight by weight.

    Every rank must call it; only ranks with `wanted` keep the tensors. Frozen and plain weights are taken as
    they are, the others from the optimizer's fp32 masters.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    parameters = dict(module.named_parameters())
    state = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        full = safe_get_full_fp32_param(tensor) if name in parameters and tensor.requires_grad else None
        if wanted:
            whole = (tensor if full is None else full).detach().cpu()
            state[name] = whole.float().clone() if whole.is_floating_point() else whole.clone()
    return state


def zero_stage(deepspeed_json: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed JSON."""
    return int(deepspeed_json.get("zero_optimization", {}).get("stage", 0))


def compute_dtype(deepspeed_json: Mapping[str, Any]) -> torch.dtype:
    """The type in which a DeepSpeed JSON computes: what a frozen teacher's weights are kept in."""
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if deepspeed_json.get(key, {}).get("enabled"):
            return dtype
    return torch.float32
