"""Necks: strides and channels, what is official, where the student's final norm goes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.downstream.pyramid import RescaledLayers, SimplePyramid, StageNorms, official_layers


def maps(channels: int, height: int, width: int, count: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, channels, height, width, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("stride", "sides"), [(8, (10, 5, 3, 2)), (16, (20, 10, 5, 3)), (32, (40, 20, 10, 5))])
def test_a_pyramid_has_four_strides_whatever_the_networks(stride: int, sides: tuple[int, ...]) -> None:
    pyramid = SimplePyramid(32, stride, channels=12)
    found = pyramid(maps(32, 5, 5))
    assert [tuple(level.shape) for level in found] == [(2, 12, side, side) for side in sides]
    assert (pyramid.strides, pyramid.channels) == ((4, 8, 16, 32), (12, 12, 12, 12))
    sum(level.square().sum() for level in found).backward()
    assert [name for name, p in pyramid.named_parameters() if p.grad is None] == []


def test_the_pyramid_of_a_patch_of_16_is_vitdets() -> None:
    """detectron2's SimpleFeaturePyramid: what stands at each level, widths of the transposed convolutions."""
    shapes = [
        [tuple(module.weight.shape) for module in level if hasattr(module, "weight")]
        for level in SimplePyramid(32, 16, channels=12).levels
    ]
    after = [(12,), (12, 12, 3, 3), (12,)]
    assert shapes[0] == [(32, 16, 2, 2), (16,), (16, 8, 2, 2), (12, 8, 1, 1), *after]
    assert shapes[1] == [(32, 16, 2, 2), (12, 16, 1, 1), *after]
    assert shapes[2] == shapes[3] == [(12, 32, 1, 1), *after]


def test_rescaled_layers_are_each_its_own_map() -> None:
    neck, given = RescaledLayers(8, 16), maps(8, 4, 6, count=4)
    found = neck(given)
    assert [tuple(level.shape[2:]) for level in found] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert torch.equal(found[2], given[2])
    assert torch.equal(found[3], F.max_pool2d(given[3], 2))


def test_a_single_layer_is_pooled_with_its_odd_rows() -> None:
    given = maps(8, 5, 3, count=4)
    assert RescaledLayers(8, 16)(given)[3].shape == (2, 8, 3, 2)


@pytest.mark.parametrize(("depth", "expected"), [(12, (3, 5, 7, 11)), (24, (7, 11, 15, 23)), (40, (12, 19, 25, 39))])
def test_layers_are_beits(depth: int, expected: tuple[int, ...]) -> None:
    assert official_layers(depth) == expected


def test_each_stage_has_its_norm_and_the_last_is_the_students() -> None:
    final, given = nn.LayerNorm(16, eps=0.1), [*maps(8, 4, 4), *maps(16, 2, 2)]
    nn.init.normal_(final.weight)
    neck = StageNorms((8, 16), (4, 8), final)
    first, last = neck(given)
    torch.testing.assert_close(first.permute(0, 2, 3, 1), F.layer_norm(given[0].permute(0, 2, 3, 1), (8,)))
    torch.testing.assert_close(last.permute(0, 2, 3, 1), final(given[1].permute(0, 2, 3, 1)))
    assert neck.norms[-1].weight is final.weight  # a divided weight has no values here to copy
