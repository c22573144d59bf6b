"""Bytes per rank by hand, and the refusal with its arithmetic."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fdscale.config.errors import UserError
from fdscale.planning.engine_rules import EngineRules, engine_rules
from fdscale.planning.memory import (
    GIB,
    MachineMemory,
    RankMemory,
    machine_memory,
    memory_per_rank,
    refuse_if_it_cannot_fit,
    teacher_bytes,
)
from fdscale.planning.placement import PLACEMENTS

P, T, RANKS = 1000, 300, 4
BF16 = {"bf16": {"enabled": True}}


def bytes_per_rank(stage: int, zero: dict[str, Any] | None = None, **config: Any) -> RankMemory:
    return memory_per_rank(P, T, RANKS, {"zero_optimization": {"stage": stage, **(zero or {})}, **config})


def rules(stage: int, **config: Any) -> EngineRules:
    return engine_rules({"zero_optimization": {"stage": stage}, **config})


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (4 * P, 4 * P, 0, 8 * P)),
        (1, (4 * P, 4 * P, 4 * P // 4, 8 * P // 4)),
        (2, (4 * P, 4 * P // 4, 4 * P // 4, 8 * P // 4)),
        (3, (4 * P // 4, 4 * P // 4, 4 * P // 4, 8 * P // 4)),  # a copy that DeepSpeed means not to make
    ],
)
def test_fp32(stage: int, expected: tuple[int, int, int, int]) -> None:
    memory = bytes_per_rank(stage)
    assert (memory.weights, memory.gradients, memory.masters, memory.moments) == expected
    assert (memory.teacher, memory.offloaded) == (T, 0)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (2 * P, 2 * P, 4 * P, 8 * P)),
        (1, (2 * P, 2 * P, 4 * P // 4, 8 * P // 4)),
        (2, (2 * P, 2 * P // 4, 4 * P // 4, 8 * P // 4)),
        (3, (2 * P // 4, 2 * P // 4, 4 * P // 4, 8 * P // 4)),
    ],
)
def test_bf16_with_fp32_masters(stage: int, expected: tuple[int, int, int, int]) -> None:
    memory = bytes_per_rank(stage, **BF16)
    assert (memory.weights, memory.gradients, memory.masters, memory.moments) == expected


def test_other_types_of_gradients_masters_and_moments() -> None:
    assert bytes_per_rank(3, **BF16, data_types={"grad_accum_dtype": "fp32"}).gradients == 4 * P // 4
    low = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    memory = bytes_per_rank(3, bf16=low)
    assert (memory.masters, memory.moments) == (2 * P // 4, 4 * P // 4)


def test_offloading_moves_states_to_the_host() -> None:
    memory = bytes_per_rank(3, {"offload_optimizer": {"device": "cpu"}}, **BF16)
    assert (memory.masters, memory.moments, memory.gradients) == (0, 0, 0)
    assert memory.offloaded == 18 * P // 4  # with the fp32 gradient, and the bf16 one that is accumulated
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert bytes_per_rank(3, both, **BF16).offloaded == 20 * P // 4
    disk = bytes_per_rank(3, {"offload_optimizer": {"device": "nvme"}}, **BF16)
    assert (disk.moments, disk.offloaded) == (0, 0)
    assert bytes_per_rank(3, {"offload_optimizer": {"device": "none"}}) == bytes_per_rank(3)


def test_swinv2_g_on_a_laptop_is_refused_with_the_arithmetic() -> None:
    needed = memory_per_rank(2_997_842_944, 0, 2, {"zero_optimization": {"stage": 3}})
    laptop = MachineMemory((), 25_276_514_304)
    has = "needs 28 GiB on each of 2 ranks, 56 GiB on this machine, which has 23"
    with pytest.raises(UserError, match=f"{has}: add nodes, offload, or --smoke"):
        refuse_if_it_cannot_fit(needed, 2, 2, laptop)
    refuse_if_it_cannot_fit(needed, 2, 1, MachineMemory((), 29 * GIB))  # the other rank is on another machine
    refuse_if_it_cannot_fit(needed, 2, 2, MachineMemory((), 57 * GIB))


def test_on_gpus_residents_and_offloaded_are_told_apart() -> None:
    needed = RankMemory(weights=20 * GIB, offloaded=15 * GIB)
    refuse_if_it_cannot_fit(needed, 8, 4, MachineMemory((24 * GIB,) * 4, 64 * GIB))
    with pytest.raises(UserError, match="20 GiB on each GPU, which has 16"):
        refuse_if_it_cannot_fit(needed, 8, 4, MachineMemory((24 * GIB, 16 * GIB, 24 * GIB, 24 * GIB), 64 * GIB))
    with pytest.raises(UserError, match="40 GiB on each GPU, which has 24"):
        refuse_if_it_cannot_fit(needed, 8, 4, MachineMemory((24 * GIB,) * 2, 64 * GIB))
    with pytest.raises(UserError, match="60 GiB on this machine's host memory, which has 32"):
        refuse_if_it_cannot_fit(needed, 8, 4, MachineMemory((24 * GIB,) * 4, 32 * GIB))


def test_machine_memory_respects_the_container(tmp_path: Path) -> None:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:        8000 kB\nMemFree: 1 kB\n")
    assert machine_memory(tmp_path).host == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup/user/job"
    group.mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/user/job\n")
    (group / "memory.max").write_text("max\n")
    assert machine_memory(tmp_path).host == 8000 * 1024
    (group.parent / "memory.max").write_text("1000000\n")
    assert machine_memory(tmp_path).host == 1_000_000
    old = tmp_path / "sys/fs/cgroup/memory/job"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("500000\n")
    (tmp_path / "proc/self/cgroup").write_text("4:memory:/job\n0::/user/job\n")
    assert machine_memory(tmp_path).host == 500_000


def test_rounding_does_not_hide_what_is_missing() -> None:
    needed = RankMemory(weights=int(23.4 * GIB))
    with pytest.raises(UserError, match=r"23\.40 GiB on this machine, which has 23\.30"):
        refuse_if_it_cannot_fit(needed, 1, 1, MachineMemory((), int(23.3 * GIB)))


def test_gpus_are_those_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '1024, GPU-a, Disabled\\n2048, GPU-b, Disabled\\n[N/A], GPU-c, [N/A]\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2")
    machine = machine_memory()
    assert machine.gpus == (2 * GIB, machine.host)


def test_this_machine_has_memory() -> None:
    assert machine_memory().host > GIB // 4


def test_each_tensor_is_padded_to_the_ranks_and_small_ones_stay_whole() -> None:
    zero = {"stage": 3, "stage3_param_persistence_threshold": 10, "reduce_bucket_size": 100}
    memory = memory_per_rank([7, 1001], 0, RANKS, {"zero_optimization": zero, **BF16})
    assert memory.weights == 2 * (2 + 251)
    assert memory.persistent == 2 * 7
    assert memory.buckets == 2 * 100
    alone = memory_per_rank([7, 1001], 0, 1, {"zero_optimization": zero, **BF16})
    assert (alone.weights, alone.persistent) == (2 * 1008, 0)


def test_a_moving_average_is_one_more_fp32_number_of_the_partition() -> None:
    config = {"zero_optimization": {"stage": 3}, **BF16}
    assert memory_per_rank(P, 0, RANKS, config, ema=True).ema == 4 * P // RANKS
    assert memory_per_rank(P, 0, RANKS, {"zero_optimization": {"stage": 0}}, ema=True).ema == 4 * P
    offloading = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}, **BF16}
    with_it, without = (memory_per_rank(P, 0, RANKS, offloading, ema=kept) for kept in (True, False))
    assert (with_it.ema, with_it.offloaded - without.offloaded) == (0, 4 * P // RANKS)


def test_a_teacher_by_placement() -> None:
    config = {"zero_optimization": {"stage": 1, "stage3_param_persistence_threshold": 10}, **BF16}
    of = partial(teacher_bytes, [7, 1001], ranks=RANKS, rules=engine_rules(config))
    assert [of(placement=placement) for placement in PLACEMENTS] == [2 * 1008, 2 * (253 + 7), 2 * 253]
    assert rules(1).frozen == 4
    assert rules(1, torch_autocast={"enabled": True}).frozen == 2


def test_who_keeps_the_states() -> None:
    accumulating = {"data_types": {"grad_accum_dtype": "fp32"}}
    assert [rules(stage).keeper for stage in range(4)] == ["ddp", "zero12", "zero12", "zero3"]
    assert rules(1, **BF16, **accumulating).keeper == "bf16"
    assert rules(2, **BF16, **accumulating).keeper == "zero12"
    assert (rules(2, **BF16, **accumulating).compact, rules(2, **BF16).compact) == (True, False)


def test_a_ranks_part_of_a_machine() -> None:
    assert MachineMemory((80, 40), 1000).of_rank(2) == 40
    assert MachineMemory((80, 40), 1000).of_rank(4) == 20
    assert MachineMemory((), 1000).of_rank(4) == 250
