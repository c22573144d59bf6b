"""Attention with a trained position bias on a CPU, in the precision of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor


def biased_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v of (B, H, N, D), with a bias (H, N, N) or (1, H, N, N).

    No fused kernel of torch's on a CPU gives a bias its gradient: `scaled_dot_product_attention` computes such a one
    in fp32 whatever its inputs are, and casts back and forth. Here the products are those of the inputs' type.
    """
    rows, heads, tokens, width = q.shape
    queries, keys, values = (part.reshape(rows * heads, tokens, width) for part in (q, k, v))
    biases = bias.to(q.dtype).expand(rows, heads, tokens, tokens).reshape(rows * heads, tokens, tokens)
    weights = torch.baddbmm(biases, queries, keys.transpose(1, 2), alpha=width**-0.5).softmax(dim=-1)
    return torch.bmm(weights.to(q.dtype), values).view(q.shape)
