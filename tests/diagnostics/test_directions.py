"""Directions: scaled filter by filter, the same whoever else is drawn; and weights that come back bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fdscale.diagnostics.directions import filter_normalised, moving, numbered_direction
from fdscale.students.geometry import TimmGeometry
from fdscale.students.student import build_student
from tests.diagnostics.networks import pixels, subject_of


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4), nn.Linear(5, 6), nn.Linear(6, 2, bias=False))


@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
def test_each_filter_has_the_norm_of_what_it_moves(family: str) -> None:
    module = subject_of(family).backbone
    found = filter_normalised(module, torch.Generator().manual_seed(7))
    drawn = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        weight = parameter.double().numpy()
        if weight.ndim < 2 or weight.size == len(weight):
            assert name not in found
            continue
        noise = torch.randn(parameter.shape, generator=drawn).double().numpy()
        expected = np.stack(
            [row * np.sqrt((own**2).sum() / (row**2).sum()) for row, own in zip(noise, weight, strict=True)]
        )
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5)


def test_vectors_stay_whatever_their_shape() -> None:
    module = subject_of("swin_v2").backbone
    still = {name for name, _ in module.named_parameters()} - filter_normalised(module, torch.Generator()).keys()
    assert {name.rpartition(".")[2] for name in still} == {"bias", "weight", "q_bias", "v_bias", "logit_scale"}
    assert all("norm" in name for name in still if name.endswith(".weight"))


def test_filters_of_zeros_stay_zeros() -> None:
    module = nn.Linear(3, 2)
    nn.init.zeros_(module.weight)
    assert not filter_normalised(module, torch.Generator())["weight"].any()


def test_a_numbered_direction_is_its_own() -> None:
    module = network()
    first, again, second, other = (numbered_direction(module, *at) for at in ((1, 0), (1, 0), (1, 1), (2, 0)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    for different in (second, other):
        assert not any(torch.equal(first[name], different[name]) for name in first)


def test_moving_is_along_all_directions_from_where_it_began() -> None:
    module = network()
    one, two = numbered_direction(module, 0, 0), numbered_direction(module, 0, 1)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    with moving(module, [one, two]) as move:
        move(5.0, 5.0)
        move(0.5, -2.0)
        for name, value in module.named_parameters():
            expected = before[name] + (0.5 * one[name] - 2 * two[name] if name in one else 0)
            torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7)


def stopped_on_the_way(module: nn.Module) -> None:
    with moving(module, [numbered_direction(module, 0, 0)]) as move:
        move(0.3)
        raise KeyboardInterrupt


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_weights_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    module = network().to(dtype)
    with torch.no_grad():
        module[2].weight[0, 0] = -0.0
    before = {name: value.detach().clone() for name, value in module.named_parameters()}

    def same() -> bool:
        found = dict(module.named_parameters())
        return all(before[name].view(torch.uint8).equal(found[name].detach().view(torch.uint8)) for name in before)

    with moving(module, [numbered_direction(module, 0, 0)]) as move:
        move(0.3)
        assert not same()
    assert same()
    with pytest.raises(KeyboardInterrupt):
        stopped_on_the_way(module)
    assert same()


def test_biases_that_a_network_remembers_move_too_and_come_back() -> None:
    """LeViT keeps what it looked up in evaluation mode."""
    student = build_student(TimmGeometry("levit_128s")).eval().requires_grad_(False)
    images = pixels(1).repeat(1, 1, 7, 7)
    for name, parameter in student.named_parameters():
        if "attention_biases" in name:
            nn.init.normal_(parameter)
    before = student(images)
    biases: dict[str, Tensor] = {
        name: torch.ones_like(value) for name, value in student.named_parameters() if "attention_biases" in name
    }
    alone: dict[str, Any] = {name: torch.randn_like(value) for name, value in biases.items()}
    with moving(student, [alone]) as move:
        move(1.0)
        assert not torch.allclose(student(images), before)
    assert torch.equal(student(images), before)
