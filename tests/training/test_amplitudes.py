"""Amplitudes of the residual stream, on real students whose blocks have been perturbed out of the identity."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fdscale.students.geometry import SwinV2Geometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.training.amplitudes import Amplitudes

GEOMETRIES = {
    "vit": ViTGeometry(16, 3, 2, patch_size=8, image_size=32),
    "swin": SwinV2Geometry(16, (1, 2, 2), (2, 2, 4), window_size=4, image_size=64, extra_norm_period=2),
}


def student(name: str) -> Student:
    found = build_student(GEOMETRIES[name])
    torch.manual_seed(1)
    for parameter in found.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return found


def outputs(network: nn.Module) -> dict[str, list[torch.Tensor]]:
    """What the blocks of each list give, by the list's name."""
    seen: dict[str, list[torch.Tensor]] = {}
    for name, module in network.named_modules():
        if name.rpartition(".")[0].endswith("blocks"):
            module.register_forward_hook(
                lambda _, __, output, name=name: seen.setdefault(name.rpartition(".")[0], []).append(output.detach())
            )
    return seen


@pytest.mark.parametrize(("name", "stages"), [("vit", 1), ("swin", 3)])
@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
def test_the_largest_of_each_stage_over_all_micro_batches(name: str, stages: int, checkpointing: str) -> None:
    network = student(name)
    set_activation_checkpointing(network, checkpointing)
    expected, amplitudes = outputs(network.backbone), Amplitudes(network.backbone)
    with amplitudes.watching(True):
        for seed in (0, 1):
            pixels = torch.rand(2, 3, *[network.image_size] * 2, generator=torch.Generator().manual_seed(seed))
            network(pixels).square().mean().backward()
    found = amplitudes.terms()
    largest = [max(float(output.abs().max()) for output in of_stage) for of_stage in expected.values()]
    assert {name: float(value) for name, value in found.items()} == {
        f"residual_amplitude/{stage}": value for stage, value in enumerate(largest)
    }
    assert len(found) == stages
    assert amplitudes.terms() == {}, "told once"


def test_a_scaled_weight_raises_it_there() -> None:
    network = student("swin")
    amplitudes, pixels = Amplitudes(network.backbone), torch.rand(2, 3, 64, 64)
    before, after = ({}, {})
    for found in (before, after):
        with amplitudes.watching(True):
            network(pixels)
        found |= amplitudes.terms()
        network.backbone.layers[2].blocks[0].norm2.weight.data *= 1e4
    assert after["residual_amplitude/1"] == before["residual_amplitude/1"]
    assert after["residual_amplitude/2"] > 100 * before["residual_amplitude/2"]


def test_what_a_step_that_was_left_out_has_seen_is_forgotten() -> None:
    network = student("vit")
    amplitudes, pixels = Amplitudes(network.backbone), torch.rand(1, 3, 32, 32)
    with amplitudes.watching(True):
        network(pixels * torch.inf)
    with amplitudes.watching(True):
        network(pixels)
    assert torch.isfinite(amplitudes.terms()["residual_amplitude/0"])


def test_unwatched_steps_evaluation_and_networks_without_blocks_tell_nothing() -> None:
    network = student("vit")
    amplitudes, pixels = Amplitudes(network.backbone), torch.rand(1, 3, 32, 32)
    with amplitudes.watching(False):
        network(pixels)
    network.eval()
    with amplitudes.watching(True):
        network(pixels)
    assert amplitudes.terms() == {}
    assert Amplitudes(nn.Linear(2, 2)).terms() == Amplitudes().terms() == {}
