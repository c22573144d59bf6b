"""SwinV2's shifted window attention as functions of tensors: exact, and small in memory traffic.

Tokens are shifted, padded and cut into windows by one gather, and brought back by another; a shift's masks are four
small patterns, whatever the number of windows. The attention has two forms of equal results. `attend_by_hand`
computes and differentiates it chunk by chunk, so that no tensor of all windows' logits exists; it keeps the
probabilities for the backward pass, in the type of the values, or computes them again where an image has many.
`attend_fused` is torch's `scaled_dot_product_attention`: on CUDA, and without gradients.

In fp32 whatever the type of the tokens: the position bias (log-spaced coordinates and values up to 16 need more than
8 bits), queries and keys of length 1, logits and softmax (a logit of 100 is 0.25 off in bf16). In the tokens' type,
with sums in fp32: probabilities times values, and the products of the backward pass. `attend_fused` rounds queries and
keys of length 1 to it, and where CUDA's kernel takes no fp32 bias also the bias.

This file needs torch alone: an export of a student with extra norms carries a copy of it.
Source: Swin Transformer V2 (arXiv 2111.09883), sections 3.2-3.4.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd.function import once_differentiable

MASKED = -100.0  # Swin adds it to the logits of tokens that the shift alone brought together
SHORTEST = 1e-12  # of a query or key that is divided by its length: F.normalize's
MIDDLE = 8.0  # of the bias, which lies between 0 and 16: around 0 it is rounded less, and a softmax does not see it
CHUNK_BYTES = 16 * 2**20  # of fp32 logits at a time: less is slower for its many calls, more holds more
KEPT_BYTES = 64 * 2**20  # of probabilities that a block keeps of an image
MASK_BYTES = 64 * 2**20  # of masked biases at a time in `attend_fused`
GRADIENT_BYTES = 512 * 2**20  # of a bias's gradient at a time there: CUDA's kernel makes one for each window

Size = tuple[int, int]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The meta device, on which shapes and operations are counted, has no autocast to leave."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


class Windows:
    """How a map (h, w) is cut into W windows of N tokens each, row by row.

    `places`, int64 (W * N,): the map's token at each place, h * w for padding; `back`, int64 (h * w,): the place of
    each token. `masks`, fp32 (4, N, N), are added to logits; `kinds` says which by window, 0 where none is needed.
    """

    def __init__(self, places: Tensor, back: Tensor, masks: Tensor, kinds: tuple[int, ...]) -> None:
        self.places, self.back, self.masks, self.kinds = places, back, masks, kinds

    @property
    def moves(self) -> bool:
        """Whether the windows' order is another one than the map's."""
        return len(self.kinds) > 1 or len(self.places) != len(self.back)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # kept ones serve training too,
@unset_fake_temporarily()  # and real steps after a traced one
def windows_of(size: Size, window: Size, shift: Size, pads_first: bool, device: torch.device) -> Windows:
    """The windows of a map (h, w), rolled by `-shift`, then padded below and on the right to whole windows.

    With `pads_first` it is padded, then rolled: opposite edges of a padded map see each other.
    """
    rows, columns = (_along(*sides, pads_first) for sides in zip(size, window, shift, strict=True))
    cells = (rows[:, None] * size[1] + columns).masked_fill((rows[:, None] < 0) | (columns < 0), size[0] * size[1])
    high, wide = (len(side) // cut for side, cut in zip((rows, columns), window, strict=True))
    places = cells.view(high, window[0], wide, window[1]).transpose(1, 2).flatten()
    back = torch.empty(size[0] * size[1] + 1, dtype=torch.int64)
    back[places] = torch.arange(len(places))
    last = (high - 1 if shift[0] else high, wide - 1 if shift[1] else wide)
    kinds = tuple(2 * (row == last[0]) + (column == last[1]) for row in range(high) for column in range(wide))
    return Windows(places.to(device), back[:-1].to(device), _masks(window, shift).to(device), kinds)


def _along(length: int, window: int, shift: int, pads_first: bool) -> Tensor:
    """The row or column at each place along one side, -1 for padding."""
    padded = torch.full((-(-length // window) * window,), -1)
    padded[:length] = torch.arange(length)
    rolled = padded if pads_first else padded[:length]
    padded[: len(rolled)] = rolled.roll(-shift)
    return padded


def _masks(window: Size, shift: Size) -> Tensor:
    """What is added where a window lies at no edge of a rolled map, at the right one, at the lower one, at both."""
    down, across = (torch.arange(side) >= side - by for side, by in zip(window, shift, strict=True))
    regions = [(2 * below * down[:, None] + right * across).flatten() for below in (0, 1) for right in (0, 1)]
    return torch.stack([(region[:, None] != region) * MASKED for region in regions])


class _Moved(torch.autograd.Function):
    """Tokens (B, n, C) taken in the order of `index`, zeros for an index of n; `inverse` brings gradients back."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _taken(tokens, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _taken(gradient, inverse), None, None


def _taken(tokens: Tensor, index: Tensor) -> Tensor:
    if len(index) > tokens.shape[1]:
        tokens = F.pad(tokens, (0, 0, 0, 1))
    return tokens.index_select(1, index)


def into_windows(x: Tensor, windows: Windows) -> Tensor:
    """A map (B, h, w, C) -> (B * W, N, C)."""
    tokens = x.flatten(1, 2)
    if windows.moves:
        tokens = _Moved.apply(tokens, windows.places, windows.back)
    return tokens.reshape(-1, windows.masks.shape[-1], x.shape[-1])


def out_of_windows(tokens: Tensor, windows: Windows, size: Size) -> Tensor:
    """(B * W, N, C) -> the map (B, h, w, C) that they were cut from."""
    tokens = tokens.reshape(-1, len(windows.places), tokens.shape[-1])
    if windows.moves:
        tokens = _Moved.apply(tokens, windows.back, windows.places)
    return tokens.unflatten(1, size)


def position_bias(table: Tensor, index: Tensor) -> Tensor:
    """The bias (H, N, N) of each pair of tokens, from a table (distances, H) by the `index` (N, N) of distances."""
    return table.t().index_select(1, index.flatten()).view(-1, *index.shape)


def attend(qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, windows: Windows, training: bool) -> Tensor:
    """Cosine attention inside each window: queries, keys and values (B * W, N, 3 * C) -> (B * W, N, C).

    `scale` (H, 1, 1) multiplies the cosines, `table` (distances, H) holds the position bias: both fp32. Gradients
    reach all three, once (there is no second derivative).
    """
    inputs = (qkv, scale, table)
    differentiated = training or (torch.is_grad_enabled() and any(each.requires_grad for each in inputs))
    form = attend_by_hand if differentiated and qkv.device.type in ("cpu", "meta") else attend_fused
    with without_autocast(qkv.device):
        return form(qkv, scale, table, index, windows)


def attend_fused(qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, windows: Windows) -> Tensor:
    """`attend` by torch's kernels; a shift's masks go in as heads: each window has its own, each image the same."""
    heads = len(scale)
    parts = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = F.normalize(parts[:2].to(scale.dtype), dim=-1, eps=SHORTEST)
    q, k, v, bias = (q * scale).to(qkv.dtype), k.to(qkv.dtype), parts[2], position_bias(table, index) - MIDDLE
    if q.device.type != "cpu" or bias.requires_grad:  # CUDA's kernels take a bias of their own type alone
        bias = bias.to(q.dtype)
    if not any(windows.kinds):
        at_once = max(1, GRADIENT_BYTES // bias.nbytes) if bias.requires_grad else len(q)
        split = zip(q.split(at_once), k.split(at_once), v.split(at_once), strict=True)
        return _joined([_fused(*part, bias=bias).flatten(2) for part in split], dim=0)
    by_window = [each.unflatten(0, (-1, len(windows.kinds))) for each in (q, k, v)]
    at_once, outputs = max(1, MASK_BYTES // bias.nbytes), []
    for first in range(0, len(windows.kinds), at_once):
        part = slice(first, first + at_once)
        masked = bias + windows.masks[list(windows.kinds[part]), None].to(bias.dtype)
        q, k, v = (each[:, part].flatten(1, 2) for each in by_window)
        found = _fused(q, k, v, masked.flatten(0, 1))
        outputs.append(found.unflatten(2, (-1, heads)).transpose(1, 2).flatten(3))
    return _joined(outputs, dim=1).flatten(0, 1)


def _fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """(rows, N, H, d) of (rows, H, N, d)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0).transpose(1, 2)


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def attend_by_hand(qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, windows: Windows) -> Tensor:
    """`attend` chunk by chunk, for CPUs."""
    return _ByHand.apply(qkv, scale, table, index, windows, torch.is_grad_enabled())


class _ByHand(torch.autograd.Function):
    """The attention with a backward pass of its own; `differentiated` False keeps nothing for it.

    It keeps queries and keys of length 1, the factors that made them so, and values, in place of `qkv`.
    """

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, scale: Tensor, table: Tensor, index: Tensor, windows: Windows, differentiated: bool
    ) -> Tensor:
        bias, (rows, tokens, width), heads = position_bias(table, index), qkv.shape, len(scale)
        by_head = (rows, heads, tokens, width // 3 // heads)
        units, factors = scale.new_empty(2, *by_head), scale.new_empty(2, *by_head[:-1], 1)
        output, values, kept = qkv.new_empty(rows, tokens, heads, by_head[-1]), qkv.new_empty(by_head), None
        if differentiated and len(windows.kinds) * heads * tokens**2 * qkv.itemsize <= KEPT_BYTES:
            kept = qkv.new_empty(rows, heads, tokens, tokens)
        for part in _chunks(rows, bias, windows):
            _prepare(qkv[part], units[:, part], factors[:, part], values[part])
            found = _probabilities(units[:, part], scale, bias, windows, part.start)
            weights = found.to(qkv.dtype) if kept is None else kept[part].copy_(found)
            output[part] = (weights.flatten(0, 1) @ values[part].flatten(0, 1)).view_as(values[part]).transpose(1, 2)
        ctx.save_for_backward(units, factors, values, scale, table, index, kept)
        ctx.windows = windows
        return output.flatten(2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        units, factors, values, scale, table, index, kept = ctx.saved_tensors
        with without_autocast(gradient.device):
            bias = position_bias(table, index)
            of_bias, of_scale = torch.zeros_like(bias), torch.zeros_like(scale)
            of_qkv = values.new_empty(*gradient.shape[:2], 3, *values.shape[1::2])
            for part in _chunks(len(values), bias, ctx.windows):
                given = units[:, part]
                if kept is None:
                    weights = _probabilities(given, scale, bias, ctx.windows, part.start).to(values.dtype)
                else:
                    weights = kept[part]
                arrived = gradient[part].unflatten(-1, (len(scale), -1)).transpose(1, 2).contiguous()
                of_logits, of_values = _before_softmax(arrived, weights, values[part])
                of_bias += of_logits.sum(0)
                of_units = _before_product(of_logits, given.to(values.dtype)).to(scale.dtype)
                along = (of_units * given).sum(-1, keepdim=True)
                of_scale += along[0].sum((0, 2))[:, None]
                parts = of_qkv[part].permute(2, 0, 3, 1, 4)
                parts[:2] = of_units.addcmul_(given, along, value=-1).mul_(factors[:, part] * scale)
                parts[2] = of_values
            of_table = table.new_zeros(table.shape[::-1]).index_add_(1, index.flatten(), of_bias.flatten(1)).t()
        return of_qkv.flatten(2), of_scale, of_table, None, None, None


def _chunks(rows: int, bias: Tensor, windows: Windows) -> Iterator[slice]:
    """Windows whose logits are computed at a time: with masks a part of an image's, of equal size, or whole images."""
    at_once = max(1, CHUNK_BYTES // bias.nbytes)
    whole = len(windows.kinds)
    if any(windows.kinds):
        at_once = at_once // whole * whole or max(part for part in range(1, at_once + 1) if whole % part == 0)
    for first in range(0, rows, at_once):
        yield slice(first, min(first + at_once, rows))


def _prepare(qkv: Tensor, units: Tensor, factors: Tensor, values: Tensor) -> None:
    """Write queries and keys of length 1 (2, rows, H, N, d), what made them so, and values, of (rows, N, 3 * C)."""
    parts = qkv.unflatten(-1, (3, values.shape[1], -1)).permute(2, 0, 3, 1, 4)
    units.copy_(parts[:2])
    torch.linalg.vector_norm(units, dim=-1, keepdim=True, out=factors)
    units.mul_(factors.clamp_min_(SHORTEST).reciprocal_())
    values.copy_(parts[2])


def _probabilities(units: Tensor, scale: Tensor, bias: Tensor, windows: Windows, first: int) -> Tensor:
    """The softmaxed logits (rows, H, N, N) of rows that begin with window `first`."""
    queries, keys = units[0] * scale, units[1]
    logits = (queries.flatten(0, 1) @ keys.flatten(0, 1).transpose(1, 2)).view(-1, *bias.shape)
    logits += bias
    whole = len(windows.kinds)
    part = min(len(logits), whole)
    for place in range(part if any(windows.kinds) else 0):
        if kind := windows.kinds[(first + place) % whole]:
            logits[place::part] += windows.masks[kind]
    return torch.softmax(logits, dim=-1, out=logits)


def _before_softmax(arrived: Tensor, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of logits (rows, H, N, N) and of values (rows, H, N, d), from that of the attention's output."""
    output, given, by = (each.flatten(0, 1) for each in (weights, arrived, values))
    of_values = output.transpose(1, 2) @ given
    of_weights = given @ by.transpose(1, 2)
    of_logits = torch._softmax_backward_data(of_weights, output, -1, weights.dtype)
    return of_logits.view_as(weights), of_values.view_as(values)


def _before_product(of_logits: Tensor, units: Tensor) -> Tensor:
    """Gradients of queries and keys (2, rows, H, N, d) of length 1, but for the scale."""
    (queries, keys), given, found = units.flatten(1, 2), of_logits.flatten(0, 1), torch.empty_like(units)
    torch.bmm(given, keys, out=found[0].flatten(0, 1))
    torch.bmm(given.transpose(1, 2), queries, out=found[1].flatten(0, 1))
    return found
