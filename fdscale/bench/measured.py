"""What each part of the GPU benchmark runs and measures, on the product's own networks, engine and placements."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from fdscale.bench.pairs import by_hand
from fdscale.bench.parts import Ceiling, Forward, Row, TrainingStep, config_of
from fdscale.bench.planned import first_micro_batch, own_geometry_of, planned
from fdscale.bench.product import product_step
from fdscale.build.networks import prepare_teacher
from fdscale.config.settings import DistillSettings
from fdscale.training.engine import Connection
from fdscale.training.sharding import place

WARM_UP, REPEATS = 3, 7  # DeepSpeed records the order of modules in its first steps


def ceiling(part: Ceiling, device: torch.device) -> Row:
    """TFLOP/s of the best of some square bf16 products, each the median of timings of ten products."""
    by_side = {}
    for side in part.sides:
        a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        seconds = median_seconds(lambda a=a, b=b, out=out: [torch.mm(a, b, out=out) for _ in range(10)], device)  # type: ignore[misc]
        by_side[str(side)] = 10 * 2 * side**3 / seconds / 1e12
    return {"tflops": max(by_side.values()), "tflops_by_side": by_side}


def median_seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median wall-clock of some runs after a warm-up, with nothing of the device's work outstanding around each."""
    times = []
    for _ in range(WARM_UP):
        run()
    for _ in range(REPEATS):
        wait_for(device)
        began = time.perf_counter()
        run()
        wait_for(device)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait_for(device: torch.device) -> None:
    """Until nothing of the device's work is outstanding."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def training_step(part: TrainingStep, micro_batch: int | None, connection: Connection) -> Row:
    """Images/s and memory of a distillation step; `{"out_of_memory": micro batch}` where it does not fit."""
    device = connection.device
    cuda = device.type == "cuda"
    if micro_batch is None:
        micro_batch = first_micro_batch(part, torch.cuda.get_device_properties(device).total_memory) if cuda else 2
    try:
        measured = _measured_plain if part.plain else _measured
        told = planned(part, micro_batch, cuda)
        if part.plain:  # the plan is fdscale's
            told = {name: figure for name, figure in told.items() if not name.startswith("planned")}
        return {"micro_batch": micro_batch, **told, **measured(part, micro_batch, device)}
    except torch.OutOfMemoryError as error:
        return {"out_of_memory": micro_batch, "told": str(error).splitlines()[0]}


def _measured(part: TrainingStep, rows: int, device: torch.device) -> Row:
    settings = part.settings(rows)
    return _timed(product_step(settings, _pixels(settings, rows, device), bf16=True), rows, device)


def _measured_plain(part: TrainingStep, rows: int, device: torch.device) -> Row:
    settings = part.settings(rows)
    step = by_hand(settings, _pixels(settings, rows, device), bf16=True, compiled=device.type == "cuda")
    return _timed(step, rows, device)


def _pixels(settings: DistillSettings, rows: int, device: torch.device) -> Tensor:
    side = own_geometry_of(settings.student).image_size
    return torch.rand(rows, 3, side, side, device=device)


def _timed(step: Callable[[], Tensor], rows: int, device: torch.device) -> Row:
    losses = [step()]  # what building needed at its peak is not what a step needs
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(lambda: losses.append(step()), device)
    first, last = float(losses[0]), float(losses[-1])
    speed = {"step_seconds": seconds, "images_per_second": rows / seconds}
    return {**speed, "first_loss": first, "last_loss": last, **_memory(device)}


def _memory(device: torch.device) -> Row:
    """Bytes between steps and at the peak of one, as torch's CUDA allocator counts them; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {
        "held_bytes": torch.cuda.memory_allocated(device),
        "peak_bytes": torch.cuda.max_memory_allocated(device),
        "reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def forward(part: Forward, connection: Connection) -> Row:
    """Time and memory of a placed teacher's forward, and a hash of its tokens: every placement gives the same."""
    device, config = connection.device, config_of(part.rows)
    teacher = prepare_teacher(part.teacher, "random", torch.bfloat16)
    weights = sum(p.numel() * p.element_size() for p in teacher.parameters())
    pixels = torch.rand(
        part.rows, 3, teacher.image_size, teacher.image_size, generator=torch.Generator().manual_seed(0)
    )
    pixels = pixels.to(device)
    teacher = place(teacher, part.placement, config, connection)
    tokens = teacher(pixels)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = median_seconds(lambda: teacher(pixels), device)
    return {
        "images_per_second": part.rows / seconds,
        "forward_seconds": seconds,
        "weight_bytes": weights,
        "tokens_sha256": hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest(),
        **_memory(device),
    }
