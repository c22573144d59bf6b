"""Necks: what makes a network's maps the maps of strides 4, 8, 16, 32 that dense heads are built for.

A hierarchical network (SwinV2) has such maps and gets one LayerNorm for each. A plain one (ViT) has a single
stride: `SimplePyramid` makes all maps from its last one (ViTDet, arXiv 2203.16527, section 3), `RescaledLayers`
takes four of its layers and brings each to one stride (BEiT's UperNet, with LayerNorm where that has BatchNorm:
one or two images per GPU give no statistics).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from timm.layers import LayerNorm2dFp32
from torch import Tensor, nn

STRIDES = (4, 8, 16, 32)


class StageNorms(nn.Module):
    """Maps (B, C_i, h_i, w_i) -> the same shapes, each after a LayerNorm of its own.

    `final`, where the network has one, gives the last of them its weights: they are the same, under a new name.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], final: nn.Module | None) -> None:
        super().__init__()
        self.channels, self.strides = tuple(channels), tuple(strides)
        self.norms = nn.ModuleList(LayerNorm2dFp32(width, eps=1e-5) for width in channels)
        if isinstance(final, nn.LayerNorm):
            last: Any = self.norms[-1]
            last.weight, last.bias, last.eps = final.weight, final.bias, final.eps

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [norm(features) for norm, features in zip(self.norms, maps, strict=True)]


class SimplePyramid(nn.Module):
    """The last map (B, C, h, w) of a plain network with this `stride` -> four maps of `channels`, strides 4 to 32.

    Transposed convolutions, which halve the channels, or a pooling; then convolutions 1x1 and 3x3, a LayerNorm
    after each, as in ViTDet.
    """

    def __init__(self, width: int, stride: int, channels: int = 256) -> None:
        super().__init__()
        self.channels, self.strides = (channels,) * len(STRIDES), STRIDES
        self.levels = nn.ModuleList(_level(width, octaves, channels) for octaves in _octaves(stride))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(maps[-1]) for level in self.levels]


class RescaledLayers(nn.Module):
    """Four maps (B, C, h, w) of a plain network with this `stride` -> the same channels, strides 4 to 32."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.channels, self.strides = (width,) * len(STRIDES), STRIDES
        self.levels = nn.ModuleList(
            nn.Sequential(*_rescaled([width] * (max(octaves, 0) + 1), octaves)) for octaves in _octaves(stride)
        )

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return [level(features) for level, features in zip(self.levels, maps, strict=True)]


def official_layers(depth: int) -> tuple[int, ...]:
    """The layers, from 0, that BEiT's UperNet takes: [3, 5, 7, 11] of 12, [7, 11, 15, 23] of 24."""
    return tuple(max(depth * sixths // 6 - 1, 0) for sixths in (2, 3, 4, 6))


def _octaves(stride: int) -> list[int]:
    """How often each level doubles the map's sides; negative: halves them."""
    return [round(math.log2(stride / level)) for level in STRIDES]


def _level(width: int, octaves: int, channels: int) -> nn.Sequential:
    widths = [width // 2**step for step in range(max(octaves, 0) + 1)]
    return nn.Sequential(
        *_rescaled(widths, octaves),
        nn.Conv2d(widths[-1], channels, 1, bias=False),
        LayerNorm2dFp32(channels),
        nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        LayerNorm2dFp32(channels),
    )


def _rescaled(widths: Sequence[int], octaves: int) -> list[nn.Module]:
    """Doublings from each width to the next, with a norm and a GELU between them; or a pooling; or nothing."""
    if octaves < 0:
        return [nn.MaxPool2d(2**-octaves, ceil_mode=True)]  # an odd map's last row is kept
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [LayerNorm2dFp32(before), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(before, after, 2, stride=2))
    return layers
