"""Where a frozen teacher's weights lie: whole on every rank, or divided over the ranks and gathered for each block."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fdscale.blocks import blocks_of
from fdscale.config.errors import UserError
from fdscale.teachers.teacher import Teacher
from fdscale.training.engine import Connection, quiet_deepspeed
from fdscale.training.partition import divide, share

# What the student's engine says of gathering holds for the teacher's, too; offload and hpZ partitions do not.
GATHERING = (
    "overlap_comm",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_param_persistence_threshold",
)


def place(
    teacher: Teacher,
    placement: Literal["replicated", "zero3", "fairscale"],
    deepspeed_json: Mapping[str, Any],
    connection: Connection,
) -> Teacher:
    """The teacher on this rank's device, its backbone where `placement` says; all ranks call it.

    Divided placements take rank 0's values: on other ranks the teacher may be on the meta device. Its final norm is
    small and stays whole. Raises UserError for a backbone that fairscale cannot divide.
    """
    torch.backends.mha.set_fastpath_enabled(False)  # hooks switch it off, too: every placement computes the same
    if placement == "replicated":
        return teacher.to(connection.device)
    inside = set(teacher.backbone.modules())
    share((module for module in teacher.modules() if module not in inside), connection)
    if placement == "zero3":
        divide_frozen(teacher.backbone, deepspeed_json, connection)
    else:
        teacher.backbone = _fully_sharded(teacher.backbone, connection)
    return teacher


def divide_frozen(backbone: nn.Module, deepspeed_json: Mapping[str, Any], connection: Connection) -> None:
    """Divide a network by a ZeRO-3 engine without an optimizer; its own hooks gather its weights from here on.

    Divided beforehand, each parameter keeps its own type, and none gets hpZ's second copy.
    """
    config = frozen_config(deepspeed_json, next(backbone.parameters()).dtype)
    # the weights of a block travel together, not module by module
    config["zero_optimization"]["leaf_module"] = {"names": list(blocks_of(backbone))}
    divide(backbone, config, connection)
    quiet_deepspeed().initialize(model=backbone, config=config)


def frozen_config(deepspeed_json: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The DeepSpeed configuration of a teacher's engine, beside a student's of any ZeRO stage."""
    students = deepspeed_json["zero_optimization"]
    return {
        "train_micro_batch_size_per_gpu": deepspeed_json["train_micro_batch_size_per_gpu"],
        "bf16": {"enabled": dtype == torch.bfloat16},
        "fp16": {"enabled": dtype == torch.float16},
        "timers": {"throughput": {"enabled": False}},
        "zero_optimization": {
            **{key: students[key] for key in GATHERING if key in students},
            "stage": 3,
            "stage3_max_reuse_distance": 0,  # a forward alone: nothing is used twice
            "memory_efficient_linear": False,  # it saves memory in a backward pass, and replaces F.linear for everyone
        },
    }


def _fully_sharded(backbone: nn.Module, connection: Connection) -> nn.Module:
    """A backbone in fairscale's FullyShardedDataParallel, its blocks one by one and then the rest."""
    dtype = _one_type(backbone.parameters(), "parameters")
    blocks = blocks_of(backbone)
    inside = {module for block in blocks.values() for module in block.modules()}
    rest = [module for module in backbone.modules() if module not in inside]
    share(rest, connection)
    for name, block in blocks.items():
        share(block.modules(), connection)
        backbone.set_submodule(name, _wrap(block, list(block.modules()), dtype, connection))
    return _wrap(backbone, rest, dtype, connection).eval()


def _wrap(module: nn.Module, own: Iterable[nn.Module], dtype: torch.dtype, connection: Connection) -> nn.Module:
    """One module divided as one flat parameter of `dtype`, its `own` modules being those not divided before."""
    from fairscale.nn.data_parallel import FullyShardedDataParallel

    buffers = _one_type((buffer for part in own for buffer in part.buffers(recurse=False)), "buffers")
    for part in own:
        for parameter in part.parameters(recurse=False):
            parameter.data = parameter.data.float()  # fairscale takes no bfloat16, but follows a cast afterwards
    sharded = FullyShardedDataParallel(
        module, compute_device=connection.device, buffer_dtype=buffers, disable_reshard_on_root=False
    )
    return sharded._apply(lambda tensor: tensor.to(dtype) if isinstance(tensor, nn.Parameter) else tensor)


def _one_type(tensors: Iterable[Tensor], what: str) -> torch.dtype:
    """The type of all floating-point tensors; float32 where there are none."""
    types = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} or {torch.float32}
    if len(types) > 1:
        raise UserError(
            f"teacher.placement=fairscale: this teacher has {what} of several types "
            f"({', '.join(sorted(map(str, types)))}), which fairscale would make one; use zero3"
        )
    return types.pop()
