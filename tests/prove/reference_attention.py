"""SwinV2's shifted window attention as the paper writes it down, every intermediate in fp32 and whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import window_partition, window_reverse
from torch import Tensor

from fdscale.students.swin_v2 import MAX_LOGIT_SCALE, SwinV2Block

MASKED = -100.0


def shifted(block: Any, x: Tensor) -> Tensor:
    """A block's attention of tokens (B, h, w, C): shifted, in windows, and back; windows divide the map."""
    size, (down, right) = (x.shape[1], x.shape[2]), block.shift_size
    windows = window_partition(torch.roll(x, (-down, -right), (1, 2)), block.window_size).flatten(1, 2)
    mixed = attention(block.attn, windows, mask_of(block, size)).unflatten(1, block.window_size)
    return torch.roll(window_reverse(mixed, block.window_size, size), (down, right), (1, 2))


def mask_of(block: Any, size: tuple[int, int]) -> Tensor:
    """(windows, N, N): MASKED between tokens that the shift alone brought together."""
    bands = [torch.zeros(side) for side in size]
    for band, window, shift in zip(bands, block.window_size, block.shift_size, strict=True):
        if shift:
            band[-window:-shift], band[-shift:] = 1, 2
    regions = (3 * bands[0][:, None] + bands[1])[None, :, :, None]
    own = window_partition(regions, block.window_size).flatten(1)
    return torch.where(own[:, None] == own[:, :, None], 0.0, MASKED)


def attention(attn: Any, x: Tensor, mask: Tensor) -> Tensor:
    """Scaled cosine attention inside windows (B * windows, N, C) (SwinV2, section 3.3), logits in fp32."""
    rows, tokens, _ = x.shape
    bias = torch.cat((attn.q_bias, attn.k_bias.to(attn.q_bias.dtype), attn.v_bias))
    qkv = F.linear(x, attn.qkv.weight, bias).reshape(rows, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    logits = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).transpose(-2, -1)
    logits = logits * attn.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp() + attn.position_bias()
    logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
    mixed = logits.softmax(dim=-1).to(v.dtype) @ v
    out: Tensor = attn.proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))
    return out


@contextmanager
def reference_attention() -> Iterator[None]:
    """Inside, every block's attention is `shifted`."""
    own = SwinV2Block._attn
    SwinV2Block._attn = shifted  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        SwinV2Block._attn = own  # type: ignore[method-assign]
