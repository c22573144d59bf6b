"""A student as the backbone of a dense task: images of any size in, maps of strides 4, 8, 16, 32 out.

A dense network owns a `Backbone` and gives its maps to a head (UperNet, Mask2Former, FPN with RoI heads), which
reads `channels` and `strides`. Three parts:

- the student, whose network now gives the maps of its stages or layers instead of tokens;
- `image_size.py`: windows and position biases for the size of the images at hand;
- a neck, `pyramid.py`: a norm per stage (SwinV2), or what makes four strides of one (ViT).

The student's final norm: SwinV2's becomes the norm of the last map, a ViT's is dropped (as in ViTDet and BEiT's
UperNet), so that no parameter is left without a gradient. The student gives no tokens any more: load its weights
first.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.downstream.image_size import Windows, accept_any_size
from fdscale.downstream.pyramid import STRIDES, RescaledLayers, SimplePyramid, StageNorms, official_layers
from fdscale.students.drop_path import divided
from fdscale.students.student import Student

STUDENT = "student.backbone."  # before the names of the student's parameters


class Backbone(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1], of any size -> maps (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).

    The last cells of a map may reach beyond the image: it is padded there with its mean colour. `plain` says how a
    network of one stride gets four: a "pyramid" of its last layer (each map `pyramid_channels` wide), or four "layers"
    rescaled, those with these `indices` (None: BEiT's). A patch of 14 pixels sees 16, resized, so that strides stay
    powers of two. `window_size` replaces SwinV2's trained windows. Raises UserError for a network without maps.
    """

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def __init__(
        self,
        student: Student,
        plain: Literal["pyramid", "layers"] = "pyramid",
        pyramid_channels: int = 256,
        indices: tuple[int, ...] | None = None,
        window_size: int | None = None,
    ) -> None:
        super().__init__()
        network: Any = student.backbone
        widths, strides = _stages(network)
        self.student, trained = student, (student.image_size,) * 2
        final = getattr(network, "norm", None)
        self.cell = self.seen = _cell(network, strides)
        if strides[0] != strides[-1]:
            taken: Any = min(len(STRIDES), len(strides))
            self.neck: nn.Module = StageNorms(widths[-taken:], strides[-taken:], final)
        else:
            self.cell = 2 ** round(math.log2(self.seen))
            taken, self.neck = _plain_neck(plain, len(strides), widths[0], self.cell, pyramid_channels, indices)
        self.channels, self.strides = self.neck.channels, self.neck.strides  # type: ignore[assignment]
        _give_maps(network, taken)
        self._resize = accept_any_size(network, trained, window_size)
        self._window_size = window_size

    def forward(self, pixels: Tensor, drop_path: Tensor | None = None) -> tuple[Tensor, ...]:
        """Pixels (B, 3, H, W) in [0, 1] and draws (sites, B) of drop path, on the host -> maps, finest first."""
        student = self.student
        student.draws.take(drop_path, pixels.device, divided(student.backbone))
        images = self._whole_cells((pixels - student.mean) / student.std)
        self._resize((images.shape[-2], images.shape[-1]))
        dtype = next(student.backbone.parameters()).dtype
        maps = self.neck(student.backbone(images.to(dtype)))
        sizes = [[math.ceil(side / stride) for side in pixels.shape[-2:]] for stride in self.strides]
        return tuple(found[..., :h, :w].contiguous() for found, (h, w) in zip(maps, sizes, strict=True))

    @contextmanager
    def windows(self, window_size: int | None) -> Iterator[None]:
        """Inside, SwinV2 has other windows (None: the same); raises UserError where there are none."""
        if window_size is None:
            yield
            return
        windows = self._windows_of(window_size)
        windows.use(window_size)
        try:
            yield
        finally:
            windows.use(self._window_size)

    def _windows_of(self, window_size: int) -> Windows:
        if isinstance(self._resize, Windows):
            return self._resize
        network = type(self.student.backbone).__name__
        raise UserError(f"window_size={window_size}: windows are SwinV2's; the student is a {network}")

    def layer_ids(self) -> dict[str, int]:
        """All parameter names to layers, from 0 (the stem) to `layers`, that of the neck as of every head."""
        known = {STUDENT + name: layer for name, layer in self.student.layer_ids().items()}
        return {name: known.get(name, self.layers) for name, _ in self.named_parameters()}

    @property
    def layers(self) -> int:
        """The last layer, the neck's and the head's."""
        return self.student.layers

    def _whole_cells(self, images: Tensor) -> Tensor:
        """Images padded below and to the right to whole cells, each of which becomes what the network sees of it."""
        height, width = images.shape[-2:]
        images = F.pad(images, (0, -width % self.cell, 0, -height % self.cell))
        if self.seen == self.cell:
            return images
        size = [side // self.cell * self.seen for side in images.shape[-2:]]
        return F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)


def _stages(network: Any) -> tuple[list[int], list[int]]:
    """Channels and strides of the maps that timm says a network has."""
    if not (hasattr(network, "forward_intermediates") and hasattr(network, "feature_info")):
        raise UserError(
            f"student.name: {type(network).__name__} cannot be the backbone of a dense task: it has no "
            "forward_intermediates() and feature_info, as timm's networks have"
        )
    told = list(network.feature_info)
    return [int(stage["num_chs"]) for stage in told], [int(stage["reduction"]) for stage in told]


def _cell(network: Any, strides: list[int]) -> int:
    """What an image's sides must be multiples of: SwinV2 pads its maps itself, a ConvNet drops what is left over."""
    patch = getattr(getattr(network, "patch_embed", None), "patch_size", None)
    return int(patch[0]) if patch is not None else strides[-1]


def _plain_neck(
    plain: str, depth: int, width: int, stride: int, channels: int, indices: tuple[int, ...] | None
) -> tuple[tuple[int, ...], nn.Module]:
    """The layers whose maps are taken of a network of one stride, and the neck for them."""
    if plain == "pyramid":
        return (depth - 1,), SimplePyramid(width, stride, channels)
    taken = official_layers(depth) if indices is None else indices
    if len(taken) != len(STRIDES) or list(taken) != sorted(set(taken)) or not 0 <= taken[0] <= taken[-1] < depth:
        raise UserError(
            f"indices={list(taken)}: allowed are {len(STRIDES)} of 0 to {depth - 1}, in rising order, each once"
        )
    return taken, RescaledLayers(width, stride)


def _give_maps(network: Any, taken: Any) -> None:
    """Drop what comes after the last map, and let a call of the network return maps (B, C, h, w).

    A call, because ZeRO-3 gathers a module's own parameters (CLS token, position embedding) around its calls; those
    of one that is not called it finds when they are read, in the first step, and counts them to the caller.
    """
    network.prune_intermediate_layers(taken, prune_norm=True)
    network.forward = partial(network.forward_intermediates, indices=taken, output_fmt="NCHW", intermediates_only=True)
