"""The rate of every step and the two parameter groups, as in the official implementation."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.scheduler import CosineLRScheduler
from torch import nn

from fdscale.training.optim import Schedule, adamw, layer_scales, parameter_groups

# CLIP-B, 300 epochs of 625 steps at a global batch of 2048: rates for 512 images, times four
CLIP_B = Schedule(total_steps=187_500, warmup_steps=6_250, peak=1.2e-3, start=2e-6, end=2e-5)


@pytest.mark.parametrize(
    ("index", "rate"), [(0, 2.0e-6), (3_125, 6.01e-4), (6_250, 1.2e-3), (96_875, 6.1e-4), (187_499, 2.0e-5)]
)
def test_the_official_schedule(index: int, rate: float) -> None:
    assert CLIP_B.at(index) == pytest.approx(rate, rel=1e-6)


@given(st.integers(0, 300), st.integers(1, 500), st.data())
def test_it_is_timms_cosine_with_a_warmup_prefix(warmup: int, cosine: int, data: st.DataObject) -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    timms = CosineLRScheduler(
        optimizer,
        t_initial=cosine,
        lr_min=0.01,
        warmup_t=warmup,
        warmup_lr_init=0.001,
        warmup_prefix=True,
        t_in_epochs=False,
        cycle_limit=1,
    )
    index = data.draw(st.integers(0, warmup + cosine))
    timms.step_update(index)
    ours = Schedule(warmup + cosine, warmup, peak=0.5, start=0.001, end=0.01)
    assert ours.at(index) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)


def test_a_line_is_mmsegs_poly_under_its_warmup() -> None:
    """PolyLR of power 1 from the first step; LinearLR leads up to where it is by then."""
    line = Schedule(total_steps=1000, warmup_steps=100, peak=1.0, start=0.0, end=0.0, decay="linear")
    assert [line.at(index) for index in (100, 500, 1000)] == pytest.approx([0.9, 0.5, 0.0])
    assert line.at(50) == pytest.approx(0.5 * 0.95)
    assert Schedule(1000, 0, peak=1.0, end=0.2, decay="linear").at(500) == pytest.approx(0.6)
    assert [line.for_step(step) for step in (0, 1, 999)] == pytest.approx([0.0, 0.01 * 0.999, 0.001])  # not one behind


def test_milestones_are_detectron2s_multi_step() -> None:
    steps = Schedule(1000, 100, peak=1.0, decay="milestones", milestones=(0.8, 0.9))
    assert [steps.at(index) for index in (50, 100, 799, 800, 899, 900, 999)] == pytest.approx(
        [0.5, 1.0, 1.0, 0.1, 0.1, 0.01, 0.01]
    )


def test_an_update_runs_one_behind_so_the_first_two_agree() -> None:
    assert CLIP_B.for_step(0) == CLIP_B.for_step(1) == 2e-6
    assert [CLIP_B.for_step(step) for step in (2, 6_251, 96_876)] == [CLIP_B.at(i) for i in (1, 6_250, 96_875)]
    assert CLIP_B.for_step(6_251) == CLIP_B.peak


@given(st.integers(1, 400), st.integers(0, 400), st.integers(-5, 1000))
def test_every_rate_lies_between_the_ends(total: int, warmup: int, step: int) -> None:
    schedule = Schedule(total, warmup, peak=1.0, start=0.125, end=0.25)
    assert 0.125 <= schedule.for_step(step) <= 1.0


# as officially scaled: fine-tuning of CLIP-B at 0.65, its stem, a block in the middle, the head
SCALES = (0.65**13, 0.65**6, 1.0)


@pytest.mark.parametrize("index", [0, 6_250, 12_500, 37_500, 62_499])
def test_layer_decay_scales_the_peak_alone_as_officially(index: int) -> None:
    """The official scheduler is timm's over groups whose rates are scaled; start and end are the same for all."""
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 5e-3 * scale} for scale in SCALES]
    optimizer = torch.optim.SGD(groups, lr=5e-3)
    timms = CosineLRScheduler(
        optimizer,
        t_initial=50_000,
        lr_min=1e-6,
        warmup_t=12_500,
        warmup_lr_init=1e-6,
        warmup_prefix=True,
        t_in_epochs=False,
        cycle_limit=1,
    )
    timms.step_update(index)
    ours = Schedule(62_500, 12_500, peak=5e-3, start=1e-6, end=1e-6)
    expected = [group["lr"] for group in optimizer.param_groups]
    assert [ours.of_group(scale).at(index) for scale in SCALES] == pytest.approx(expected, rel=1e-9)


def test_layer_decay_can_scale_all_of_the_schedule() -> None:
    schedule = Schedule(40, 10, peak=1.0, start=0.1, end=0.2, scaled="all")
    for index in range(41):
        assert schedule.of_group(0.25).at(index) == pytest.approx(0.25 * schedule.at(index))
    assert dataclasses.replace(schedule, scaled="peak").of_group(0.25).at(0) == 0.1


def test_a_group_at_scale_1_has_the_schedule_itself() -> None:
    for scaled in ("peak", "all"):
        schedule = dataclasses.replace(CLIP_B, scaled=scaled)
        assert schedule.of_group(1.0) == schedule


def test_the_end_is_reached_and_kept() -> None:
    schedule = Schedule(10, 0, peak=1.0, end=0.25)
    assert schedule.at(0) == 1.0
    assert schedule.at(5) == pytest.approx(0.625)
    assert schedule.at(10) == schedule.at(11) == 0.25


def test_rates_fall_after_the_warmup_and_rise_before() -> None:
    schedule = Schedule(40, 10, peak=1.0, start=0.1, end=0.2)
    rates = [schedule.at(index) for index in range(41)]
    rising, falling = rates[:11], rates[10:]
    assert rising == sorted(set(rising))
    assert falling == sorted(set(falling), reverse=True)
    assert math.isclose(rates[5], 0.55)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 3), nn.LayerNorm(3)
        self.table = nn.Parameter(torch.ones(5, 2))  # a matrix: decayed unless it is named
        self.cls_token = nn.Parameter(torch.ones(1, 1, 3))
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def names_of(network: nn.Module, groups: list[dict[str, Any]]) -> list[set[str]]:
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [{names[id(parameter)] for parameter in group["params"]} for group in groups]


def test_vectors_biases_and_named_parameters_are_not_decayed() -> None:
    network = Network()
    groups = parameter_groups(network, 0.05, {"cls_token"})
    assert names_of(network, groups) == [
        {"linear.weight", "table"},
        {"linear.bias", "norm.weight", "norm.bias", "cls_token"},
    ]
    assert [(group["weight_decay"], group["lr_scale"]) for group in groups] == [(0.05, 1.0), (0.0, 1.0)]


def test_each_scale_has_its_two_groups_stem_first() -> None:
    network = Network()
    scales = layer_scales({"linear.weight": 0, "linear.bias": 0, "cls_token": 0, "table": 2, "norm.bias": 3}, 3, 0.5)
    assert scales == {"linear.weight": 0.125, "linear.bias": 0.125, "cls_token": 0.125, "table": 0.5, "norm.bias": 1.0}
    groups = parameter_groups(network, 0.05, {"cls_token"}, scales)
    assert names_of(network, groups) == [
        {"linear.weight"},
        {"linear.bias", "cls_token"},
        {"table"},
        {"norm.weight", "norm.bias"},  # the one that is not named learns with the head
    ]
    assert [(group["lr_scale"], group["weight_decay"]) for group in groups] == [
        (0.125, 0.05),
        (0.125, 0.0),
        (0.5, 0.05),
        (1.0, 0.0),
    ]


def test_names_are_compared_whole() -> None:
    network = Network()
    assert "table" in names_of(network, parameter_groups(network, 0.05, {"tab", "le", "linear.table"}))[0]


def test_a_bias_of_two_dimensions_is_a_bias() -> None:
    network = nn.Sequential(nn.Linear(2, 2))
    network[0].bias = nn.Parameter(torch.ones(1, 2))
    assert names_of(network, parameter_groups(network, 0.05, ()))[1] == {"0.bias"}


def test_an_empty_group_is_left_out() -> None:
    assert len(parameter_groups(nn.LayerNorm(4), 0.05, ())) == 1
    assert parameter_groups(nn.LayerNorm(4).requires_grad_(False), 0.05, ()) == []


def test_decay_shrinks_the_decayed_group_alone() -> None:
    network = Network()
    optimizer = adamw(parameter_groups(network, 0.5, {"cls_token"}), 0.1, (0.9, 0.999), 1e-8)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert torch.allclose(network.table, torch.full((5, 2), 0.95))
    assert torch.equal(network.cls_token, torch.ones(1, 1, 3))
    assert torch.equal(network.frozen, torch.ones(2, 2))


def test_adamw_takes_the_recipes_numbers() -> None:
    optimizer = adamw(parameter_groups(nn.Linear(2, 2), 0.05, ()), 0.125, (0.5, 0.75), 1e-3)
    assert {(group["lr"], group["betas"], group["eps"]) for group in optimizer.param_groups} == {
        (0.125, (0.5, 0.75), 1e-3)
    }
