"""GPUs by the names that `--gpu` takes: memory and peak arithmetic, as their makers publish them; torch-free."""

from __future__ import annotations

import re
from dataclasses import dataclass

from fdscale.config.errors import UserError, nearest

CPU = "cpu"


@dataclass(frozen=True)
class Gpu:
    """`memory` in bytes; dense peaks in FLOP/s: `bf16` of the tensor cores, `fp32` of the ordinary ones."""

    name: str
    memory: int
    bf16: float
    fp32: float


def _gpu(name: str, gib: float, bf16_tflops: float, fp32_tflops: float) -> Gpu:
    return Gpu(name, int(gib * 2**30), bf16_tflops * 1e12, fp32_tflops * 1e12)


# Memory as CUDA reports it where that is known to be less than the name says; peaks without sparsity, from data sheets.
_ROWS = (
    _gpu("V100-32GB", 31.7, 125.0, 15.7),  # fp16: it has no bf16
    _gpu("A10-24GB", 22.0, 125.0, 31.2),
    _gpu("RTX3090-24GB", 23.6, 71.0, 35.6),
    _gpu("RTX4090-24GB", 23.5, 165.2, 82.6),
    _gpu("L4-24GB", 22.0, 121.0, 30.3),
    _gpu("A6000-48GB", 47.4, 154.8, 38.7),
    _gpu("L40S-48GB", 44.4, 362.0, 91.6),
    _gpu("A100-40GB", 39.4, 312.0, 19.5),
    _gpu("A100-80GB", 79.1, 312.0, 19.5),
    _gpu("H100-80GB", 79.1, 989.0, 67.0),
    _gpu("H100-94GB", 93.0, 989.0, 67.0),
    _gpu("H200-141GB", 139.8, 989.0, 67.0),
    _gpu("B200-180GB", 178.0, 2250.0, 75.0),
)
GPUS: dict[str, Gpu] = {row.name: row for row in _ROWS}


def gpu_named(name: str) -> Gpu:
    """A GPU of the table, whatever the case of its letters; raises UserError with the nearest name."""
    by_lower = {known.lower(): gpu for known, gpu in GPUS.items()}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    alike = [known for known in GPUS if known.lower().startswith(name.lower())]
    hint = f"; did you mean {' or '.join(alike)}?" if alike else nearest(name.lower(), by_lower)
    raise UserError(f"--gpu: unknown GPU {name!r}{hint}; known: {', '.join(GPUS)}, or {CPU}")


def gpu_called(device: str, memory: int) -> Gpu | None:
    """The GPU that a driver calls `NVIDIA A100-SXM4-80GB`, by model and nearest memory; None for an unknown one.

    Other forms of a model are slower than the table's and count as unknown: an H100 for PCIe slots, a part of a GPU
    (MIG), a laptop's.
    """
    if re.search(r"H100 (PCIe|NVL)|MIG|Laptop", device):
        return None
    name = device.replace("RTX ", "RTX").replace("RTXA", "A")
    models = {known: gpu for known, gpu in GPUS.items() if re.search(rf"\b{known.split('-')[0]}\b", name)}
    return min(models.values(), key=lambda gpu: abs(gpu.memory - memory), default=None)
