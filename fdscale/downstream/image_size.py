"""Images of any size for networks that were built for one.

SwinV2: each block's window and shift follow from its map's size, as if the network had been built for it; the window
is the trained one, smaller only where the map is, and the continuous position bias stays normalised by the trained
one (log-CPB transfer). A map that the windows do not divide is padded with zeros inside the block, before it is shifted
(our own blocks: timm's `swinv2_*` shift first), and masks are made for each forward: kept ones would be of another
size, and large.

ViT with relative position biases: the table of the trained grid is resampled as timm does for checkpoints of another
size, in each forward and with its gradient; its parameter keeps its shape. The CLS token's three rows are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from timm.layers import resize_rel_pos_bias_table
from timm.models.beit import Beit, gen_relative_position_index
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fdscale.config.errors import UserError

Size = tuple[int, int]
WINDOWED = (SwinTransformerV2, SwinTransformerV2Cr)
CLS_ROWS = 3  # of a table, its last: to the CLS token, from it, its own


def accept_any_size(backbone: nn.Module, trained: Size, window_size: int | None) -> Callable[[Size], None]:
    """Let a network take images of any whole number of patches.

    Returns what must be told each image size (h, w) before the forward; that forward's backward must come before
    the next size. `window_size` replaces SwinV2's trained windows. Raises UserError where there are none.
    A network that cannot is left as it is, and a size other than `trained` then raises UserError.
    """
    if window_size is not None and (window_size < 1 or not isinstance(backbone, WINDOWED)):
        raise UserError(
            f"window_size={window_size}: allowed are sizes from 1, and windows are SwinV2's; the student is a "
            f"{type(backbone).__name__}"
        )
    if isinstance(backbone, WINDOWED):
        return _any_windows(backbone, window_size)
    if isinstance(backbone, Beit) and backbone.pos_embed is None:
        return _any_grid(backbone)
    if getattr(backbone, "dynamic_img_size", not hasattr(backbone, "patch_embed")):  # ConvNets take any
        return _nothing_to_do
    return partial(_refuse_another, type(backbone).__name__, trained)


def _nothing_to_do(size: Size) -> None:
    pass


def _refuse_another(network: str, trained: Size, size: Size) -> None:
    if size != trained:
        raise UserError(
            f"images of {size[0]}x{size[1]} in whole patches: this {network} takes {trained[0]}x{trained[1]} alone; "
            "crop or pad them to that, set student.image_size, or student.geometry.dynamic_img_size=true where the "
            "network has it"
        )


def _any_windows(backbone: Any, window_size: int | None) -> Callable[[Size], None]:
    stages: Any = backbone.layers if isinstance(backbone, SwinTransformerV2) else backbone.stages
    trained = tuple(stage.blocks[0].window_size for stage in stages)
    backbone.patch_embed.strict_img_size = False
    for block in (block for stage in stages for block in stage.blocks):
        block.dynamic_mask, block.attn_mask, block.pads_first = True, None, True
        if getattr(block.attn, "pretrained_window_size", (1, 1))[0] == 0:  # timm's word for the window itself
            block.attn.pretrained_window_size = block.window_size
    windows = Windows(backbone, trained)
    windows.use(window_size)
    return windows


class Windows:
    """A SwinV2's windows and shifts for images of the size that it is called with; no parameter changes."""

    def __init__(self, backbone: Any, trained: tuple[Any, ...]) -> None:
        self._backbone, self._trained = backbone, trained
        self._size: Size = tuple(backbone.patch_embed.img_size)
        self._windows = trained

    def __call__(self, size: Size) -> None:
        if size != self._size:
            self._set(size, self._windows)

    def use(self, window_size: int | None) -> None:
        """Other windows from here on; None: the trained ones."""
        windows = self._trained if window_size is None else (window_size,) * len(self._trained)
        if windows != self._windows:
            self._set(self._size, windows)

    def _set(self, size: Size, windows: tuple[Any, ...]) -> None:
        self._backbone.set_input_size(size, window_size=windows)
        self._size, self._windows = size, windows


class Grid:
    """The patches (h, w) of the images in flight, shared by what needs to know them."""

    def __init__(self, size: Size) -> None:
        self.size = size


def _any_grid(backbone: Beit) -> Callable[[Size], None]:
    """Replaces how the biases are made, not the modules that own the tables: ZeRO-3 gathers around their calls."""
    grid = Grid(tuple(backbone.patch_embed.grid_size))
    backbone.patch_embed.strict_img_size = False
    if (shared := backbone.rel_pos_bias) is not None:
        shared.forward = partial(position_bias, shared, grid)
    for block in backbone.blocks:
        if block.attn.relative_position_bias_table is not None:
            block.attn._get_rel_pos_bias = partial(position_bias, block.attn, grid)
    return partial(_set_grid, grid, backbone.patch_embed.patch_size)


def _set_grid(grid: Grid, patch: Size, size: Size) -> None:
    grid.size = (size[0] // patch[0], size[1] // patch[1])


def position_bias(owner: Any, grid: Grid) -> Tensor:
    """The bias (heads, N, N) between the N tokens of a grid and its CLS token, from the owner's table."""
    table, trained = owner.relative_position_bias_table, tuple(owner.window_size)
    if grid.size != trained:
        table = resampled(table, trained, grid.size)
    index = _index(grid.size, table.device)
    return table[index.view(-1)].view(*index.shape, -1).permute(2, 0, 1).contiguous()


def resampled(table: Tensor, trained: Size, size: Size) -> Tensor:
    """The table (rows, heads) of a grid `trained` for a grid `size`, timm's values, with a gradient."""
    height, width = (2 * side - 1 for side in trained)
    rows, columns = (_weights(trained, size, axis, table.device) for axis in (0, 1))
    inner = table[:-CLS_ROWS].float().view(height, width, -1)
    # sums, not a product of matrices, which autocast would round to 16 bits
    tall = (rows[:, :, None, None] * inner).sum(dim=1)
    whole = (columns[:, :, None] * tall[:, None]).sum(dim=2).flatten(0, 1)
    return torch.cat((whole.to(table.dtype), table[-CLS_ROWS:]))


@lru_cache(maxsize=8)
@torch.inference_mode(False)  # kept ones serve training too,
@unset_fake_temporarily()  # and real steps after a traced one
def _weights(trained: Size, size: Size, axis: int, device: torch.device) -> Tensor:
    """The weights (new, old) of old distances for new ones along one axis: timm's resampling treats each apart."""
    old, new = (tuple(2 * side - 1 for side in grid) for grid in (trained, size))
    unit = torch.eye(old[axis])  # as heads: one for each old distance, constant along the other axis
    table = (unit[:, None] if axis == 0 else unit[None]).expand(*old, -1).flatten(0, 1)
    wanted = resize_rel_pos_bias_table(table, size, (new[0] * new[1], old[axis]), old_window_size=trained)
    return wanted.view(*new, -1).select(1 - axis, 0).clone().to(device)


@lru_cache(maxsize=2)  # 134 MB for 64x64 patches
@torch.inference_mode(False)
@unset_fake_temporarily()
def _index(size: Size, device: torch.device) -> Tensor:
    return gen_relative_position_index(size, device=device)
