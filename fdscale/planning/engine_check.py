"""What settings and a DeepSpeed JSON ask of the engine and of the device, and cannot have together."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from fdscale.cluster.gpus import visible_gpus
from fdscale.config.settings import DistillSettings, RunSettings


def engine_problems(settings: RunSettings, deepspeed_json: Mapping[str, Any], here: bool) -> Iterator[str]:
    """Every problem, in words; `here`: the ranks run on this machine, whose GPUs then count."""
    name, checkpointing = settings.student.name, settings.student.activation_checkpointing
    if name.startswith("timm:swinv2") and _enabled(deepspeed_json, "bf16"):
        yield (
            f"student.name: {name} fails under bf16.enabled, which leaves its fp32 coordinates beside "
            "bf16 weights; use torch_autocast in the JSON, or a swinv2_* of our own"
        )
    if checkpointing == "offload" and _enabled(deepspeed_json, "torch_autocast"):
        yield (
            "student.activation_checkpointing=offload gives wrong gradients under torch_autocast: fairscale recomputes "
            "in another precision; use 'blocks', or bf16 in the JSON"
        )
    bf16 = deepspeed_json.get("bf16", {})
    if settings.optim.ema_decay and bf16.get("enabled") and bf16.get("bf16_master_weights_and_grads"):
        yield (
            "optim.ema_decay: an average in bf16 stands still, and bf16.bf16_master_weights_and_grads keeps nothing in "
            "fp32; take one of the two out"
        )
    if here and isinstance(settings, DistillSettings):
        asking = [where for where, (teacher, _) in settings.teachers.items() if teacher.placement == "fairscale"]
        if asking and not _on_gpus():
            yield f"{asking[0]}.placement=fairscale needs CUDA, and no GPU is visible here; use zero3"


def _enabled(deepspeed_json: Mapping[str, Any], key: str) -> bool:
    return bool(deepspeed_json.get(key, {}).get("enabled"))


def _on_gpus() -> bool:
    return os.environ.get("DS_ACCELERATOR") != "cpu" and bool(visible_gpus(os.environ))
