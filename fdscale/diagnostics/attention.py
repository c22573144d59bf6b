"""What each block of any network attends to, and where in the image, seen while it runs; its output stays as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from timm.models.hiera import Hiera
from torch import Tensor, nn

from fdscale.blocks import blocks_of
from fdscale.diagnostics.catching import CatchingAttention, weights_first
from fdscale.diagnostics.subjects import Subject
from fdscale.diagnostics.windows import WINDOWED, Grid, block_places, block_regions, grid_places


@dataclass(frozen=True)
class Attention:
    """One block's attention over a batch; of `n` tokens in each of `W` windows (1 where it is global).

    `weights`, fp32 (B, W, H, n, n), are softmaxed over the last axis and the network's own: not to be changed in place.
    `positions`, fp32 (W, n, 2), are the centres (y, x) of the tokens' patches in pixels of the backbone's image; NaN
    for prefix tokens, of which there are `prefix_tokens` before the patches, and for padding. `regions`, int64 (W, n):
    a mask keeps tokens of a window that have different numbers from each other, as in Swin's shifted ones; None where
    there is no mask.
    """

    weights: Tensor
    positions: Tensor
    prefix_tokens: int = 0
    regions: Tensor | None = None


Seen = Callable[[int, Attention], None]


@contextmanager
def watching_attention(subject: Subject, seen: Seen) -> Iterator[None]:
    """Call `seen(block, attention)` for each block of `subject.network` that attends, in every forward inside.

    Blocks are those of `fdscale.blocks.blocks_of`, numbered from 0 over the whole depth. Several attentions of one
    block come as its heads. A block without attention over its tokens gives nothing, and so does one whose tokens
    cannot be placed in the image (windows other than Swin's, pooled maps): there may be no call at all. The network's
    output is the same bit for bit. Raises what `seen` raises.
    """
    watch = _Watch(subject, seen)
    handles = watch.follow()
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        watch.pause()  # an interrupted forward left it entered


@dataclass
class _Running:
    """A block while its forward runs: its number, its input's shape, and what was caught inside it."""

    number: int
    block: nn.Module
    shape: tuple[int, ...]
    caught: list[Tensor] = field(default_factory=list)


@dataclass
class _Image:
    """The batch that goes through the backbone, and the last map on its way."""

    batch: int
    size: Grid
    grid: Grid = (0, 0)
    stride: Grid = (1, 1)

    def stride_of(self, grid: Grid) -> Grid:
        """Pixels from token to token: a map of 7 that is halved is one of 4, at twice the stride."""
        before = self.grid if all(self.grid) else self.size
        ratios = [max(1, round(whole / part)) for whole, part in zip(before, grid, strict=True)]
        self.grid, self.stride = grid, (self.stride[0] * ratios[0], self.stride[1] * ratios[1])
        return self.stride

    def grid_of(self, shape: tuple[int, ...], tokens: int, prefix_tokens: int) -> tuple[Grid, int] | None:
        """The map and the prefix of a block's `tokens`, from its input's shape (B, N, C), (N, B, C) or of a map.

        None where its attention is over something else: channels, or tokens that are no map of the image.
        """
        if len(shape) == 4:
            maps = [(shape[1], shape[2]), (shape[2], shape[3])]  # channels last, first
            return next(((grid, 0) for grid in maps if grid[0] * grid[1] == tokens), None)
        aspect = self.size[0] / self.size[1]
        of_tokens = shape[1] if shape[0] == self.batch else shape[0] if shape[1] == self.batch else None
        for prefix in (prefix_tokens, 0) if tokens == of_tokens else ():
            high, wide = (round((max(tokens - prefix, 0) * ratio) ** 0.5) for ratio in (aspect, 1 / aspect))
            if 0 < high * wide == tokens - prefix:
                return (high, wide), prefix
        return None


class _Watch:
    """Hooks of one network: the mode is entered in its blocks alone, and left in `nn.MultiheadAttention`."""

    def __init__(self, subject: Subject, seen: Seen) -> None:
        self._backbone, self._prefix_tokens, self._seen = subject.backbone, subject.prefix_tokens, seen
        self._mode, self._entered = CatchingAttention(self._catch), False
        self._image: _Image | None = None
        self._running: list[_Running] = []  # innermost last

    def follow(self) -> list[Any]:
        """Register every hook; returns their handles."""
        handles: list[Any] = [self._backbone.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for number, block in enumerate(self._blocks()):
            handles.append(block.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leave, always_call=True))
        for module in self._backbone.modules():
            if isinstance(module, nn.MultiheadAttention):
                handles.append(module.register_forward_pre_hook(self._ask, with_kwargs=True))
                handles.append(module.register_forward_hook(self._go_on, always_call=True))
        return handles

    def _blocks(self) -> list[nn.Module]:
        """All blocks; none of a Hiera, whose tokens come unit by unit and not row by row."""
        return [] if isinstance(self._backbone, Hiera) else list(blocks_of(self._backbone).values())

    def pause(self) -> None:
        """Catch nothing until the next block, or the end of a module that is asked by itself."""
        if self._entered:
            self._mode.__exit__(None, None, None)
        self._entered = False

    def _go_on(self, *_: object) -> None:
        if self._running and not self._entered:
            self._mode.__enter__()
            self._entered = True

    def _catch(self, weights: Tensor) -> None:
        self._running[-1].caught.append(weights)

    def _begin(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        images = _first_tensor(args, kwargs)
        self._image, self._running = _Image(images.shape[0], (images.shape[-2], images.shape[-1])), []

    def _enter(self, number: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._running.append(_Running(number, block, tuple(_first_tensor(args, kwargs).shape)))
        self._go_on()

    def _leave(self, block: nn.Module, args: object, output: object) -> None:
        run = self._running.pop()
        if not self._running:
            self.pause()
        if output is not None:  # an exception is on its way
            self._tell(run)

    def _ask(self, module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._entered:
            weights_first(module, args, kwargs)
            self.pause()

    def _tell(self, run: _Running) -> None:
        if self._image is None:  # a block on its own
            return
        image = self._image
        placed = [found for weights in run.caught if (found := self._place(run, image, weights))]
        if placed:
            _, positions, prefix_tokens, regions = placed[0]
            by_window = [weights.unflatten(0, (-1, len(positions))) for weights, *_ in placed]
            weights = by_window[0] if len(by_window) == 1 else torch.cat(by_window, dim=2)
            device = weights.device
            regions = None if regions is None else regions.to(device)
            self._seen(run.number, Attention(weights, positions.to(device), prefix_tokens, regions))

    def _place(self, run: _Running, image: _Image, weights: Tensor) -> tuple[Tensor, Tensor, int, Tensor | None] | None:
        """Weights by window (B * W, H, n, n), where their tokens are, in pixels (W, n, 2), prefix tokens, regions.

        None where that cannot be told. Our own shifted windows come as heads: (B, W * H, n, n).
        """
        tokens = weights.shape[-1]
        regions = None
        if isinstance(run.block, WINDOWED):
            grid, prefix = (run.shape[1], run.shape[2]), 0
            places, regions = block_places(run.block, grid), block_regions(run.block, grid)
        elif (found := image.grid_of(run.shape, tokens, self._prefix_tokens)) is not None:
            grid, prefix = found
            places = grid_places(grid, prefix)
        else:
            return None
        windows = places.shape[0]
        if windows > 1 and weights.shape[0] == image.batch and weights.shape[1] % windows == 0:
            weights = weights.unflatten(1, (windows, -1)).flatten(0, 1)
        if (weights.shape[0], tokens) != (image.batch * windows, places.shape[1]):
            return None
        return weights, (places + 0.5) * torch.tensor(image.stride_of(grid)), prefix, regions


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return next(given for given in (*args, *kwargs.values()) if isinstance(given, Tensor))
