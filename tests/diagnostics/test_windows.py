"""Windows' tokens are where blocks take them from: what timm's own shift, padding and partition do to coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

from fdscale.diagnostics.windows import block_places, block_regions, grid_places, window_places, window_regions
from fdscale.students.swin_v2 import SwinV2Block

KINDS = ("v1", "v2", "cr", "ours", "ours, pads first")
sides = st.integers(1, 9)


class Recorder(nn.Module):
    """In the place of a block's attention: keeps the windows that it is given."""

    def forward(self, windows: Tensor, mask: Tensor | None = None) -> Tensor:
        self.windows = windows
        return windows


def built(kind: str, grid: tuple[int, int], window: tuple[int, int], shift: tuple[int, int]) -> Any:
    if kind == "v1":
        return SwinTransformerBlock(2, grid, 1, window_size=window, shift_size=shift)
    if kind == "cr":
        return SwinTransformerV2CrBlock(2, 1, grid, window, shift)
    stock = SwinTransformerV2Block(2, grid, 1, window, shift)
    if kind == "v2":
        return stock
    own = SwinV2Block(stock, extra_norm=False)
    own.pads_first = kind.endswith("first")
    return own


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(grid=st.tuples(sides, sides), window=st.tuples(st.integers(2, 5), st.integers(2, 5)), shifted=st.booleans())
def test_places_are_where_the_block_takes_its_tokens_from(
    kind: str, grid: tuple[int, int], window: tuple[int, int], shifted: bool
) -> None:
    block = built(kind, grid, window, (window[0] // 2, window[1] // 2) if shifted else (0, 0))
    block.attn = Recorder()
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    coordinates = torch.stack((rows, columns), dim=-1).float() + 1  # 0 is padding
    attend = getattr(block, "_attn", None) or block._shifted_window_attn
    with torch.no_grad():
        attend(coordinates[None])
    places = block_places(block, grid)
    torch.testing.assert_close((places + 1).nan_to_num(), block.attn.windows, rtol=0, atol=0)
    assert torch.equal(places.isnan().any(dim=-1), (block.attn.windows == 0).all(dim=-1))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(grid=st.tuples(sides, sides), window=st.tuples(st.integers(2, 5), st.integers(2, 5)), shifted=st.booleans())
def test_regions_are_what_the_blocks_mask_keeps_apart(
    kind: str, grid: tuple[int, int], window: tuple[int, int], shifted: bool
) -> None:
    block = built(kind, grid, window, (window[0] // 2, window[1] // 2) if shifted else (0, 0))
    regions, mask = block_regions(block, grid), block.get_attn_mask(device="cpu", dtype=torch.float32)
    apart = regions[:, :, None] != regions[:, None]
    assert apart.shape[:2] == block_places(block, grid).shape[:2]
    assert torch.equal(apart, torch.zeros_like(apart) if mask is None else mask != 0)


def test_regions_of_a_whole_map_are_neighbours_in_the_image() -> None:
    """Without padding, tokens of a window see each other where the image has them within its windows' reach."""
    places, regions = window_places((14, 14), (7, 7), (3, 3), False), window_regions((14, 14), (7, 7), (3, 3))
    near = ((places[:, :, None] - places[:, None]).abs() < 7).all(dim=-1)
    assert torch.equal(near, regions[:, :, None] == regions[:, None])


@given(grid=st.tuples(sides, sides), window=sides, shift=st.integers(0, 4), pads_first=st.booleans())
def test_every_token_is_in_one_window_once(grid: tuple[int, int], window: int, shift: int, pads_first: bool) -> None:
    places = window_places(grid, (window, window), (shift % window, shift % window), pads_first)
    found = places[~places.isnan().any(dim=-1)]
    assert sorted(map(tuple, found.tolist())) == [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    assert places.shape == (-(-grid[0] // window) * -(-grid[1] // window), window**2, 2)


def test_prefix_tokens_come_first_and_have_no_place() -> None:
    places = grid_places((2, 3), prefix_tokens=2)
    assert places.shape == (1, 8, 2)
    assert bool(places[0, :2].isnan().all())
    assert places[0, 2:].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
