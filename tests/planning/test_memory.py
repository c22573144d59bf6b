"""Bytes per rank by hand, and the refusal with its arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fdscale.config.errors import UserError
from fdscale.planning.memory import (
    GIB,
    MachineMemory,
    RankMemory,
    machine_memory,
    memory_per_rank,
    refuse_if_it_cannot_fit,
)

P, T, RANKS = 1000, 300, 4
BF16 = {"bf16": {"enabled": True}}


def bytes_per_rank(stage: int, zero: dict[str, Any] | None = None, **config: Any) -> RankMemory:
    return memory_per_rank(P, T, RANKS, {"zero_optimization": {"stage": stage, **(zero or {})}, **config})


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (0, (4 * P, 4 * P, 0, 8 * P)),
        (1, (4 * P, 4 * P, 4 * P // 4, 8 * P // 4)),
        (2, (4 * P, 4 * P // 4, 4 * P // 4, 8 * P // 4)),
        (3, (4 * P // 4, 4 * P // 4, 0, 8 * P // 4)),
    ],
)
def test_fp32(stage: int, expected: tuple[int, int, int, int]) -> None:
    memory = bytes_per_rank(stage)
    assert (memory.weights, memory.gradients, memory.masters, memory.moments) == expected
    assert (memory.teacher, memory.offloaded) == (4 * T, 0)


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
    assert memory.teacher == 2 * T


def test_other_types_of_gradients_masters_and_moments() -> None:
    assert bytes_per_rank(3, **BF16, data_types={"grad_accum_dtype": "fp32"}).gradients == 4 * P // 4
    low = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    memory = bytes_per_rank(3, bf16=low)
    assert (memory.masters, memory.moments) == (2 * P // 4, 4 * P // 4)


def test_offloading_moves_states_to_the_host() -> None:
    memory = bytes_per_rank(3, {"offload_optimizer": {"device": "cpu"}}, **BF16)
    assert (memory.masters, memory.moments, memory.offloaded) == (0, 0, 12 * P // 4)
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    assert bytes_per_rank(3, both, **BF16).offloaded == 14 * P // 4
    disk = bytes_per_rank(3, {"offload_optimizer": {"device": "nvme"}}, **BF16)
    assert (disk.moments, disk.offloaded) == (0, 0)
    assert bytes_per_rank(3, {"offload_optimizer": {"device": "none"}}) == bytes_per_rank(3)


def test_swinv2_g_on_a_laptop_is_refused_with_the_arithmetic() -> None:
    needed = memory_per_rank(2_997_842_944, 0, 2, {"zero_optimization": {"stage": 3}})
    laptop = MachineMemory((), 25_276_514_304)
    has = "needs 22 GiB on each of 2 ranks, 45 GiB on this machine, which has 23"
    with pytest.raises(UserError, match=f"{has}: add nodes, offload, or --smoke"):
        refuse_if_it_cannot_fit(needed, 2, 2, laptop)
    refuse_if_it_cannot_fit(needed, 2, 1, laptop)  # the other rank is on another machine
    refuse_if_it_cannot_fit(needed, 2, 2, MachineMemory((), 46 * GIB))


def test_on_gpus_residents_and_offloaded_are_told_apart() -> None:
    needed = RankMemory(20 * GIB, 0, 0, 0, 0, 15 * GIB)
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
    needed = RankMemory(int(23.4 * GIB), 0, 0, 0, 0, 0)
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
