"""Measured bytes: the allocator's events in order, storages once each."""

from __future__ import annotations

import torch
from torch import nn

from fdscale.training.allocator import held_storages, live_bytes, memory_profile, peak_of_step

KIB = 1024


def test_live_bytes_rise_and_fall_with_tensors() -> None:
    with memory_profile() as profiler:
        first = torch.empty(256 * KIB, dtype=torch.uint8)
        second = torch.empty(512 * KIB, dtype=torch.uint8)
        del first
        third = torch.empty(128 * KIB, dtype=torch.uint8)
        del second, third
    sizes = [live // KIB for _, live in live_bytes(profiler)]
    assert sizes == [256, 768, 512, 640, 128, 0]


def test_what_is_older_than_the_profile_stays_out_of_it() -> None:
    old = torch.empty(64 * KIB, dtype=torch.uint8)
    with memory_profile() as profiler:
        del old
        torch.empty(16 * KIB, dtype=torch.uint8)
    assert [live // KIB for _, live in live_bytes(profiler)] == [16, 0]


def test_a_step_is_what_is_held_and_what_comes_on_top() -> None:
    module = nn.Linear(256, 256, bias=False)
    optimizer = torch.optim.AdamW(module.parameters())
    module(torch.ones(1, 256)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    with peak_of_step(torch.device("cpu"), module, optimizer) as peak:
        extra = torch.empty(4096 * KIB, dtype=torch.uint8)
        del extra
    held = 3 * 256 * 256 * 4  # the weight and two moments
    assert held + 4096 * KIB <= peak.size < held + 4096 * KIB + 2048


def test_storages_count_once_wherever_they_are_held() -> None:
    base = torch.zeros(1000)
    module = nn.Module()
    module.register_buffer("view", base[10:20])
    module.kept = {"list": [base, base.view(10, 100)], "other": (torch.zeros(10),)}
    assert sorted(held_storages(module).values()) == [40, 4000]
