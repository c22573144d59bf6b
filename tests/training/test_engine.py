"""DeepSpeed changes nothing about the numbers: stages, activation checkpointing, precision, depth, drop path."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.config.deepspeed_json import load_deepspeed_json
from fdscale.data.batches import Batch
from fdscale.distill.distiller import Distiller, Lesson
from fdscale.distill.layout import TokenLayout
from fdscale.distill.targets import TargetMaker
from fdscale.students.drop_path import drop_path_rows
from fdscale.students.geometry import STUDENTS, Geometry, SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.engine import Connection, compute_dtype, connect, full_state, set_learning_rate, start_engine
from fdscale.training.loop import train_step
from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups

SWIN = SwinV2Geometry(16, (2, 1), (2, 4), window_size=4, image_size=32, extra_norm_period=2)
VIT = ViTGeometry(32, 3, 4, patch_size=8, image_size=32)
TINY_GIANT = dataclasses.replace(
    STUDENTS["swinv2_g"], embed_dim=8, num_heads=(1, 2, 4, 8), window_size=2, image_size=64
)
LEAN = {  # nothing stays resident: tiny networks would hide what sharding breaks
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
WIDTH, GLOBAL_BATCH = 24, 8
FEW = 3  # steps: in ZeRO-3's first one it records what the later ones follow


def perturbed_student(geometry: Geometry, drop_path: float, checkpointing: str) -> Student:
    """At its start every SwinV2 block is almost the identity, and a parity test would prove nothing."""
    student = build_student(geometry, drop_path, seed=1)
    set_activation_checkpointing(student, checkpointing)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return student


def distiller_of(geometry: Geometry, drop_path: float, checkpointing: str) -> tuple[Distiller, Student]:
    student = perturbed_student(geometry, drop_path, checkpointing)
    layout = TokenLayout(student.grid, student.prefix_tokens)
    torch.manual_seed(3)
    return Distiller(student, student.width, [Lesson("teacher", WIDTH, TargetMaker(layout, layout))], beta=2.0), student


def data_of_step(student: Student, step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = student.grid[0] * student.grid[1] + student.prefix_tokens
    pixels = torch.rand(GLOBAL_BATCH, 3, student.image_size, student.image_size, generator=generator)
    return pixels, torch.randn(GLOBAL_BATCH, tokens, WIDTH, generator=generator)


def engine_config(stage: int, micro_batch: int, leaves: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    zero = {"stage": stage, **(LEAN if stage == 3 else {}), **({"leaf_module": {"classes": leaves}} if leaves else {})}
    return {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": zero, **more}


def curve(
    connection: Connection,
    geometry: Geometry,
    config: dict[str, Any],
    steps: int,
    drop_path: float = 0.3,
    checkpointing: str = "none",
    layer_decay: float = 1.0,
    looked_at: int | None = None,
) -> dict[str, Any]:
    """Losses over all ranks, the gradient norms, the rates, and the student's weights after step `looked_at` or all."""
    distiller, student = distiller_of(geometry, drop_path, checkpointing)
    scales = layer_scales(student.layer_ids(), student.layers, layer_decay)
    groups = parameter_groups(
        distiller,
        0.05,
        {f"student.backbone.{name}" for name in student.undecayed_parameters()},
        {f"student.backbone.{name}": scale for name, scale in scales.items()},
    )
    world, micro = connection.rank.world_size, config["train_micro_batch_size_per_gpu"]
    accumulation = GLOBAL_BATCH // (world * micro)
    engine = start_engine(distiller, adamw(groups, 1e-3, (0.9, 0.999), 1e-8), config, accumulation, clip=0.1)

    def terms(engine: Any, batch: Batch, step: int) -> dict[str, Tensor]:
        pixels, target = (tensor[batch.rows] for tensor in data_of_step(student, step))
        draws = drop_path_rows(0, step, student.drop_path_sites, GLOBAL_BATCH, batch.rows)
        return engine(pixels, [target], draws)

    starts = [connection.rank.rank * accumulation * micro + i * micro for i in range(accumulation)]
    unused = torch.zeros(micro)
    batches = [Batch(unused, unused, unused, slice(start, start + micro), []) for start in starts]
    losses, norms, weights = [], [], {}
    schedule = Schedule(steps, 0, peak=1e-3, start=1e-3, end=1e-3)
    for step in range(steps):
        set_learning_rate(engine, schedule, step)
        loss = train_step(engine, terms, batches, step)["loss"].clone()
        torch.distributed.all_reduce(loss)
        losses.append(float(loss) / world)
        norms.append(float(engine.get_global_grad_norm() or 0.0))  # stage 0 has none
        if step + 1 == (looked_at or steps):
            weights = full_state(engine, student.backbone, wanted=connection.rank.is_main)
    rates = [(group["lr_scale"], group["lr"]) for group in engine.optimizer.param_groups]
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    unfinished = [type(module).__name__ for module in FWD_MODULE_STACK if module in set(student.modules())]
    leaves = sum(getattr(module, "_z3_leaf", False) for module in distiller.modules())
    engine.destroy()
    return {
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "rates": rates,
        "leaves": leaves,
        "unfinished": unfinished,
    }


def largest_difference(a: list[float], b: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@pytest.fixture(scope="module")
def plain(two_ranks: Any) -> Callable[[Geometry], dict[str, Any]]:
    """Twenty steps of ZeRO-3 on two ranks, with the weights after three; what other runs are held against."""
    return functools.cache(
        lambda geometry: two_ranks(curve, geometry, engine_config(3, 4), 20, 0.3, "none", 1.0, FEW)[0]
    )


Plain = Callable[[Geometry], dict[str, Any]]


def assert_equal_to_the_bit(found: dict[str, Any], plain: dict[str, Any]) -> None:
    """A run of few steps is the beginning of the plain one."""
    assert found["losses"] == plain["losses"][:FEW]
    assert found["norms"] == plain["norms"][:FEW]
    assert found["weights"].keys() == plain["weights"].keys()
    assert all(torch.equal(found["weights"][name], plain["weights"][name]) for name in plain["weights"])


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
def test_every_zero_stage_gives_the_same_twenty_losses(geometry: Geometry, plain: Plain, two_ranks: Any) -> None:
    curves = [two_ranks(curve, geometry, engine_config(stage, 4), 20)[0]["losses"] for stage in (0, 1, 2)]
    assert curves[0][-1] < curves[0][0]
    assert max(largest_difference(curves[0], other) for other in (*curves[1:], plain(geometry)["losses"])) <= 1e-5


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
@pytest.mark.parametrize("checkpointing", ["blocks", "offload"])
def test_activation_checkpointing_is_bit_equal(
    checkpointing: str, geometry: Geometry, plain: Plain, two_ranks: Any
) -> None:
    recomputed = two_ranks(curve, geometry, engine_config(3, 4), FEW, 0.3, checkpointing)[0]
    assert_equal_to_the_bit(recomputed, plain(geometry))


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_leaf_modules_of_the_shipped_jsons_change_no_bit(
    checkpointing: str, geometry: SwinV2Geometry | ViTGeometry, plain: Plain, two_ranks: Any
) -> None:
    leaves = load_deepspeed_json("laptop")["zero_optimization"]["leaf_module"]["classes"]
    assert plain(geometry)["leaves"] == 0
    gathered_at_once = two_ranks(curve, geometry, engine_config(3, 4, tuple(leaves)), FEW, 0.3, checkpointing)[0]
    assert gathered_at_once["leaves"] >= geometry.blocks
    assert gathered_at_once["unfinished"] == []
    assert_equal_to_the_bit(gathered_at_once, plain(geometry))


def test_under_layer_decay_every_zero_stage_moves_each_layer_at_its_rate(two_ranks: Any) -> None:
    before = dict(perturbed_student(VIT, 0.0, "none").backbone.state_dict())
    found = [two_ranks(curve, VIT, engine_config(stage, 4), 1, 0.0, "none", 0.5)[0] for stage in (0, 1, 2, 3)]
    ids = perturbed_student(VIT, 0.0, "none").layer_ids()
    for outcome in found:
        assert dict(outcome["rates"]) == {0.5**power: pytest.approx(1e-3 * 0.5**power) for power in range(5)}
        for name, layer in ids.items():
            moved = (outcome["weights"][name] - before[name]).abs()
            decayed = 0.05 * 1e-3 * 0.5 ** (4 - layer) * before[name].abs().max()
            assert float(moved.max()) == pytest.approx(1e-3 * 0.5 ** (4 - layer), abs=float(decayed) + 1e-7), name


def test_accumulation_on_one_rank_and_on_two_computes_the_same(plain: Plain, one_rank: Any, two_ranks: Any) -> None:
    for ranks in one_rank, two_ranks:
        accumulated = ranks(curve, SWIN, engine_config(3, 2), FEW)[0]["losses"]
        assert largest_difference(accumulated, plain(SWIN)["losses"][:FEW]) <= 1e-5


def test_bf16_trains_swin_v2_close_to_fp32(plain: Plain, two_ranks: Any) -> None:
    rounded = two_ranks(curve, SWIN, engine_config(3, 4, bf16={"enabled": True}), 6)[0]["losses"]
    assert 0 < largest_difference(plain(SWIN)["losses"][:6], rounded) <= 2e-3


def gradients_where_much_is_dropped(
    connection: Connection, geometry: Geometry, leaves: tuple[str, ...], mode: str, skip_dropped: bool
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Whole gradients of three steps of one image a rank, and how many samples each drop path site kept in each."""
    from deepspeed.utils import safe_get_full_grad

    distiller, student = distiller_of(geometry, 0.9, mode)
    student.draws.skip_dropped = skip_dropped
    standing = torch.optim.SGD(distiller.parameters(), lr=0.0)
    engine = start_engine(distiller, standing, engine_config(3, 1, leaves), 1, clip=0.0)
    gradients, kept, rank = {}, [], connection.rank.rank
    for step in range(FEW):  # the second one follows what the first one recorded
        pixels, target = (tensor[rank : rank + 1] for tensor in data_of_step(student, step))
        draws = drop_path_rows(0, step, student.drop_path_sites, connection.rank.world_size, slice(rank, rank + 1))
        engine.backward(engine(pixels, [target], draws)["loss"])
        kept.append(student.draws.counts)
        gradients |= {
            f"{step} {name}": safe_get_full_grad(weight).clone() for name, weight in distiller.named_parameters()
        }
        engine.step()
    engine.destroy()
    return gradients, kept


@pytest.mark.parametrize("geometry", [SWIN, VIT], ids=["swin_v2", "vit"])
@pytest.mark.parametrize("in_leaves", [False, True], ids=["layers", "leaves"])
@pytest.mark.parametrize("mode", ["none", "blocks"])
def test_ranks_that_keep_different_samples_stay_together(
    geometry: Geometry, in_leaves: bool, mode: str, two_ranks: Any
) -> None:
    """Nothing of a ZeRO-3 network stays: a rank that left a module out would leave the other one waiting."""
    leaves = load_deepspeed_json("laptop")["zero_optimization"]["leaf_module"]["classes"] if in_leaves else ()
    (skipped, kept), (_, kept_beside) = two_ranks(gradients_where_much_is_dropped, geometry, tuple(leaves), mode, True)
    (discarded, _), _ = two_ranks(gradients_where_much_is_dropped, geometry, tuple(leaves), mode, False)
    assert kept != kept_beside
    assert [0] * len(kept[0]) in kept + kept_beside
    for name, expected in discarded.items():
        assert torch.allclose(skipped[name], expected, rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("bf16", [False, True], ids=["stage 0", "bf16, stage 1"])
def test_one_rank_that_reduces_nothing_computes_what_two_do(bf16: bool, one_rank: Any, two_ranks: Any) -> None:
    config = engine_config(1, 4, bf16={"enabled": True}, **FP32_SUMS) if bf16 else engine_config(0, 4)
    alone, together = (ranks(curve, VIT, config, FEW)[0]["losses"] for ranks in (one_rank, two_ranks))
    assert largest_difference(alone, together) <= (2e-3 if bf16 else 1e-5)


def test_bf16_gradients_added_at_once_are_the_same_sums(two_ranks: Any) -> None:
    late, at_once = (
        two_ranks(
            curve, VIT, engine_config(1, 2, bf16={"enabled": True, "immediate_grad_update": chosen}, **FP32_SUMS), FEW
        )[0]
        for chosen in (False, True)
    )
    assert_equal_to_the_bit(at_once, late)


def test_the_true_depths_of_swin_v2_g_take_three_zero_3_steps(two_ranks: Any) -> None:
    assert TINY_GIANT.depths == (2, 2, 42, 4)
    # the reuse scan of step 2 is quadratic in the number of modules within this many elements
    zero = {"stage": 3, "stage3_max_reuse_distance": 0}
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": zero}
    found = two_ranks(curve, TINY_GIANT, config, 3)[0]
    assert all(torch.tensor(found["losses"]).isfinite())
    assert len(found["weights"]) == 879


def test_the_teachers_type_follows_the_json() -> None:
    assert compute_dtype({"bf16": {"enabled": True}}) is torch.bfloat16
    assert compute_dtype({"bf16": {"enabled": False}}) is torch.float32
    assert compute_dtype({"torch_autocast": {"enabled": True, "dtype": "float16"}}) is torch.float16
    assert compute_dtype({"torch_autocast": {"enabled": True}}) is torch.bfloat16


def connected_again(connection: Connection) -> tuple[bool, int]:
    before = len(os.listdir("/proc/self/task"))
    again = [connect(connection.rank) for _ in range(3)]
    return all(one.control is connection.control for one in again), len(os.listdir("/proc/self/task")) - before


def test_a_process_that_connects_for_each_of_its_runs_gathers_no_threads(two_ranks: Any) -> None:
    assert two_ranks(connected_again) == [(True, 0), (True, 0)]


def tiny_numbers(connection: Connection) -> tuple[float, str | None]:
    return float((torch.full((64,), 1e-38) * 1e-3).max()), os.environ.get("THP_MEM_ALLOC_ENABLE")


def test_a_cpu_rank_loses_no_time_on_tiny_numbers_and_small_pages(one_rank: Any) -> None:
    """1e-41 is no normal float: a CPU takes a hundred times as long for one."""
    assert one_rank(tiny_numbers) == [(0.0, "1")]
