"""Where in the image the tokens of a block's windows are, the cyclic shift undone, and which of them are masked."""

from __future__ import annotations

import torch
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

WINDOWED = (SwinTransformerBlock, SwinTransformerV2Block, SwinTransformerV2CrBlock)  # ours is a SwinTransformerV2Block

Grid = tuple[int, int]


def block_places(block: nn.Module, grid: Grid) -> Tensor:
    """Rows and columns on its map of the tokens of a `WINDOWED` block's windows, as `window_places`."""
    return window_places(grid, *_window_and_shift(block), bool(getattr(block, "pads_first", False)))


def block_regions(block: nn.Module, grid: Grid) -> Tensor:
    """Which tokens of a `WINDOWED` block's windows its mask lets see each other, as `window_regions`."""
    return window_regions(grid, *_window_and_shift(block))


def _window_and_shift(block: nn.Module) -> tuple[Grid, Grid]:
    window, shift = block.window_size, block.shift_size  # the block's own: where one window covers the map, both shrank
    assert isinstance(window, tuple)
    assert isinstance(shift, tuple)
    return window, shift


def window_places(grid: Grid, window: Grid, shift: Grid, pads_first: bool) -> Tensor:
    """Rows and columns on a map (h, w) of its windows' tokens: fp32 (W, n, 2), NaN for padding.

    Windows come row by row, and so do the tokens in each, as in Swin Transformer (arXiv 2103.14030, section 3.2). The
    map is rolled by `-shift`, then padded below and on the right to whole windows; with `pads_first` it is padded,
    then rolled.
    """
    rows, columns = (_along(*sizes, pads_first) for sizes in zip(grid, window, shift, strict=True))
    places = _in_windows(rows, columns)
    return places.masked_fill(places.isnan().any(dim=-1, keepdim=True), torch.nan)


def window_regions(grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """Which tokens of a window the mask of a shifted map lets see each other: int64 (W, n), a number for each region.

    The roll puts what left the map above and on the left beside what is below and on the right: the last `shift` rows
    and columns of the map in whole windows, padding included, are masked from the others (Swin, section 3.2).
    """
    rows, columns = (_regions_along(*sizes) for sizes in zip(grid, window, shift, strict=True))
    down, across = _in_windows(rows, columns).unbind(dim=-1)
    return 2 * down + across


def _in_windows(rows: Tensor, columns: Tensor) -> Tensor:
    """Of tokens down (windows, h) and across (windows, w): pairs of both, (W, h*w, 2)."""
    shape = (len(rows), len(columns), rows.shape[1], columns.shape[1])
    pairs = torch.stack((rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)), dim=-1)
    return pairs.reshape(len(rows) * len(columns), -1, 2)


def _along(length: int, window: int, shift: int, pads_first: bool) -> Tensor:
    """Along one side, where each token of each window is on the map: fp32 (windows, window), NaN for padding."""
    padded = torch.full((-(-length // window) * window,), torch.nan)
    padded[:length] = torch.arange(length)
    rolled = padded if pads_first else padded[:length]
    padded[: len(rolled)] = rolled.roll(-shift)
    return padded.view(-1, window)


def _regions_along(length: int, window: int, shift: int) -> Tensor:
    """Along one side, whether each token of each window is among the last `shift`: int64 (windows, window)."""
    padded = -(-length // window) * window
    return (torch.arange(padded) >= padded - shift).long().view(-1, window)


def grid_places(grid: Grid, prefix_tokens: int) -> Tensor:
    """Rows and columns of the tokens of a block without windows: fp32 (1, prefix + h*w, 2), NaN for prefix tokens."""
    whole = window_places(grid, grid, (0, 0), pads_first=False)
    return torch.cat((torch.full((1, prefix_tokens, 2), torch.nan), whole), dim=1)
