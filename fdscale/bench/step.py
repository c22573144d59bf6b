"""Whole distillation steps, fdscale's beside plain timm's, in turns, each way in a process of its own.

    fdscale bench step [--only PAIR] [--way WAY …] [--also "key=value …"] [--images 8] [--repeats 7] [--fp32]

Pairs: `pairs.py`. Ways: `fdscale` (as a recipe trains), `plain` (timm, eager), `compiled` (the same through
torch.compile), `compiled as a rank` (with what `connect` sets in the process of each of our ranks), `no engine`
(fdscale's networks without DeepSpeed); `--also` adds fdscale with other settings. Nothing is written without
`--output DIR`. Two ways alone, quickly: `--only swinv2_b --way fdscale --way plain`; and what a setting brings:
`--only vit_b16 --way fdscale --also student.drop_path=0`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import torch

from fdscale.bench.beside import Beside
from fdscale.bench.pairs import Pair, by_hand
from fdscale.bench.parts import Row
from fdscale.bench.planned import own_geometry_of, teacher_geometry_of
from fdscale.bench.product import product_step, without_engine
from fdscale.bench.turns import SIDES, products, seconds_of, turns
from fdscale.cluster.ranks import rank_from_environment
from fdscale.config.errors import UserError
from fdscale.training.allocator import live_bytes, memory_profile
from fdscale.training.engine import connect

OURS, PLAIN, COMPILED, AS_RANK, NO_ENGINE = WAYS = ("fdscale", "plain", "compiled", "compiled as a rank", "no engine")
WARM_UP = 2  # steps: DeepSpeed makes its buffers in the first, a compiler its code


@dataclass(frozen=True)
class Step:
    """One way of taking a step, and where it is taken."""

    take: Callable[[], torch.Tensor]
    device: torch.device


def step_row(
    pair: Pair,
    ways: Sequence[str],
    images: int,
    repeats: int,
    bf16: bool,
    sides: Mapping[str, Sequence[int]] = SIDES,
) -> Row:
    """Seconds and memory of each way's step of one pair, and of the matrix products in the same turns.

    A way is one of WAYS, or settings (`key=value …`) with which fdscale takes the step. RuntimeError where one fails.
    """
    settings = pair.settings(images)
    student = own_geometry_of(settings.student)
    with ExitStack() as stack:
        steps, losses = {}, {}
        for way in ways:
            steps[way] = stack.enter_context(Beside(partial(step_of, way, pair, images, bf16)))
            losses[way] = steps[way].ask(_warmed)  # one after the other: compilers take every core
        rates = stack.enter_context(Beside(partial(_products, sides)))
        asked = {way: partial(step.ask, _seconds) for way, step in steps.items()}
        asked |= {name: partial(rates.ask, partial(_seconds_of_product, name)) for name in rates.ask(list)}
        return {
            "images": images,
            "precision": "bf16" if bf16 else "fp32",
            "drop_path": settings.student.drop_path,
            "deepspeed": settings.deepspeed,
            "flops_per_image": 3 * student.flops() + teacher_geometry_of(settings.teacher).flops(),
            "seconds": turns(asked, repeats),
            "losses": losses,
            "peak_activation_bytes": {way: found for way, step in steps.items() if (found := step.ask(_peak))},
        }


def step_of(way: str, pair: Pair, images: int, bf16: bool) -> Step:
    """In a process of its own: the step of that way."""
    by_timm = way in (PLAIN, COMPILED, AS_RANK)
    bare = way in (PLAIN, COMPILED)
    device = _device() if bare else connect(rank_from_environment(os.environ)).device
    settings = pair.settings(images, *(way.split() if "=" in way else ()))
    side = own_geometry_of(settings.student).image_size
    pixels = torch.rand(images, 3, side, side, generator=torch.Generator().manual_seed(0)).to(device)
    if by_timm:
        return Step(by_hand(settings, pixels, bf16, way != PLAIN), device)
    return Step((without_engine if way == NO_ENGINE else product_step)(settings, pixels, bf16), device)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu" else "cpu")


def _products(sides: Mapping[str, Sequence[int]]) -> dict[str, Callable[[], object]]:
    return products(_device(), sides)


def _seconds_of_product(name: str, found: Mapping[str, Callable[[], object]]) -> float:
    return seconds_of(found[name], _device())


def _seconds(step: Step) -> float:
    return seconds_of(step.take, step.device)


def _warmed(step: Step) -> list[float]:
    return [float(step.take()) for _ in range(WARM_UP)]


def _peak(step: Step) -> int:
    return 0 if step.device.type == "cuda" else peak(step.take)


def peak(step: Callable[[], torch.Tensor]) -> int:
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
    if not {COMPILED, AS_RANK} & set(ways):
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
