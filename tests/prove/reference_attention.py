"""SwinV2's window attention as it is written down, every intermediate in fp32 and whole: what a fast one is held to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.students.swin_v2 import MAX_LOGIT_SCALE, CosineWindowAttention


def attention(self: CosineWindowAttention, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Arguments and result as of the module's own forward: (windows * B, N, C), `mask` (windows, N, N)."""
    rows, tokens, _ = x.shape
    bias = torch.cat((self.q_bias, self.k_bias.to(self.q_bias.dtype), self.v_bias))
    qkv = F.linear(x, self.qkv.weight, bias).reshape(rows, tokens, 3, self.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    logits = F.normalize(q.float(), dim=-1) @ F.normalize(k.float(), dim=-1).transpose(-2, -1)
    logits = logits * self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp() + self.position_bias()
    if mask is not None:
        by_image = logits.view(-1, mask.shape[0], *logits.shape[1:])
        logits = (by_image + mask.float()[:, None]).view(logits.shape)
    mixed = logits.softmax(dim=-1).to(v.dtype) @ v
    out: Tensor = self.proj(mixed.transpose(1, 2).reshape(rows, tokens, -1))
    return out


@contextmanager
def reference_attention() -> Iterator[None]:
    """Inside, every window attention is computed by `attention`."""
    own = CosineWindowAttention.forward
    CosineWindowAttention.forward = attention  # type: ignore[method-assign]
    try:
        yield
    finally:
        CosineWindowAttention.forward = own  # type: ignore[method-assign]
