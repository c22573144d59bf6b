"""Whole distillation steps, fdscale's beside plain timm's, in turns within one process.

    fdscale bench step [--only PAIR] [--way WAY …] [--also "key=value …"] [--images 8] [--repeats 7] [--fp32]

Pairs: `pairs.py`. Ways: `fdscale` (as a recipe trains), `plain` (timm, eager), `compiled` (the same through
torch.compile), `no engine` (fdscale's networks without DeepSpeed); `--also` adds fdscale with other settings. Nothing
is written without `--output DIR`. Two ways alone, quickly: `--only swinv2_b --way fdscale --way plain`; and what a
setting brings: `--only vit_b16 --way fdscale --also student.drop_path=0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from fdscale.bench.pairs import Pair, by_hand
from fdscale.bench.parts import Row
from fdscale.bench.planned import own_geometry_of, teacher_geometry_of
from fdscale.bench.product import product_step, without_engine
from fdscale.bench.turns import SIDES, products, turns
from fdscale.config.errors import UserError
from fdscale.training.allocator import live_bytes, memory_profile

OURS, PLAIN, COMPILED, NO_ENGINE = WAYS = ("fdscale", "plain", "compiled", "no engine")
WARM_UP = 2  # steps: DeepSpeed makes its buffers in the first, a compiler its code

Step = Callable[[], torch.Tensor]


def step_row(
    pair: Pair,
    ways: Sequence[str],
    images: int,
    repeats: int,
    bf16: bool,
    device: torch.device,
    sides: Mapping[str, Sequence[int]] = SIDES,
) -> Row:
    """Seconds and memory of each way's step of one pair, and of the matrix products in the same turns.

    A way is one of WAYS, or settings (`key=value …`) with which fdscale takes the step.
    """
    settings = pair.settings(images)
    student = own_geometry_of(settings.student)
    size = (images, 3, student.image_size, student.image_size)
    pixels = torch.rand(size, generator=torch.Generator().manual_seed(0)).to(device)
    steps = {way: _step_of(way, pair, pixels, bf16) for way in ways}
    losses = {way: [float(step()) for _ in range(WARM_UP)] for way, step in steps.items()}
    return {
        "images": images,
        "precision": "bf16" if bf16 else "fp32",
        "drop_path": settings.student.drop_path,
        "deepspeed": settings.deepspeed,
        "flops_per_image": 3 * student.flops() + teacher_geometry_of(settings.teacher).flops(),
        "seconds": turns({**steps, **products(device, sides)}, repeats, device),
        "losses": losses,
        "peak_activation_bytes": {} if device.type == "cuda" else {way: peak(step) for way, step in steps.items()},
    }


def _step_of(way: str, pair: Pair, pixels: torch.Tensor, bf16: bool) -> Step:
    settings = pair.settings(len(pixels), *(way.split() if "=" in way else ()))
    if way in (PLAIN, COMPILED):
        return by_hand(settings, pixels, bf16, way == COMPILED)
    return (without_engine if way == NO_ENGINE else product_step)(settings, pixels, bf16)


def peak(step: Step) -> int:
    """Bytes that steps take beyond what is held between them, at most, by the CPU allocator's events.

    The larger of two: where the work of dropped branches is left out, steps differ.
    """
    with memory_profile() as profiler:
        step()
    with memory_profile() as another:
        step()
    return max(live for each in (profiler, another) for _, live in live_bytes(each))


def refuse_without_compiler(ways: Sequence[str]) -> None:
    """Raises UserError where torch.compile would find no C++ compiler."""
    if COMPILED not in ways:
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise UserError(
            "bench step: torch.compile finds no C++ compiler (CXX, g++); install g++, or leave that way out by naming "
            "the others: --way fdscale --way plain (then nothing is said about compiled timm)"
        ) from error
