"""Where a run saves other tensors than a trace on fake CPU tensors would: two rules; for fake tensors alone.

1. Attention on a CUDA device. With a bias that needs a gradient (the relative position bias of ViT students) a CPU
   runs unfused and saves the probabilities, B x H x N x N. CUDA's memory-efficient kernel saves the log-sum-exp,
   B x H x N in fp32, beside q, k, v, its output and the bias, whose rows are padded to a multiple of 8 elements; its
   backward makes the bias's gradient in full, B x H x N x N with rows padded to 16, to be summed over the batch
   (PyTorch's `transformers/cuda/attention_backward.cu`). Without such a bias both devices run fused. SwinV2's window
   attention, which a CPU does by hand, is that kernel's on CUDA.
2. Linear layers under ZeRO-3. DeepSpeed replaces `F.linear` (`memory_efficient_linear`, on by default): the input and
   the weight are saved as they are given, so no 16-bit copies are kept under torch_autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.students import attention as students
from fdscale.students import window_attention

PADDED_BIAS_ROW, PADDED_GRADIENT_ROW = 8, 16  # elements
Count = Callable[[int], None]  # of floating point operations, which nothing else sees here


class EfficientAttention(torch.autograd.Function):
    """Shapes and saved tensors of the memory-efficient kernel: q (B, H, N, D), k and v (B, H, M, D), bias to them."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, count: Count) -> Tensor:
        rows, heads, queries, _ = q.shape
        padded = -(-bias.shape[-1] // PADDED_BIAS_ROW) * PADDED_BIAS_ROW
        kept = bias if padded == bias.shape[-1] else bias.new_empty(*bias.shape[:-1], padded)
        output = q.new_empty(rows, heads, queries, v.shape[-1])
        log_sum_exp = q.new_empty(rows, heads, queries, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, kept, output, log_sum_exp)
        ctx.bias_shape, ctx.count = bias.shape, count
        ctx.product = 2 * rows * heads * queries * k.shape[2] * q.shape[3]
        count(2 * ctx.product)  # logits, and their weighted sum of v
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        q, k, v, kept, _, _ = ctx.saved_tensors
        padded = -(-k.shape[2] // PADDED_GRADIENT_ROW) * PADDED_GRADIENT_ROW
        whole = kept.new_empty(*q.shape[:3], padded)[..., : k.shape[2]]
        ctx.count(5 * ctx.product)  # the logits again, and the gradients of probabilities, q, k and v
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), whole.sum_to_size(ctx.bias_shape), None


class ZeRO3Linear(torch.autograd.Function):
    """A linear layer that saves what it was given, as DeepSpeed's `runtime/zero/linear.py`."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(input, weight)
        ctx.bias_type = None if bias is None else bias.dtype
        output = input.matmul(weight.t())
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        input, weight = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.t().matmul(input.reshape(-1, input.shape[-1]).to(flat.dtype))
        of_bias = None if ctx.bias_type is None else flat.sum(0).to(ctx.bias_type)
        return gradient.matmul(weight.to(gradient.dtype)).to(input.dtype), of_weight.to(weight.dtype), of_bias


@contextmanager
def attention_as_on_cuda(count: Count) -> Iterator[None]:
    """Run attention with a trained bias as CUDA does, inside; `count` is told its operations."""
    original = F.scaled_dot_product_attention

    def unfused(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        return attention(query, key, value, bias)

    def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **how: Any) -> Tensor:
        if attn_mask is None or not attn_mask.requires_grad:
            return original(query, key, value, attn_mask, **how)
        return EfficientAttention.apply(query, key, value, attn_mask, count)

    with (
        _replaced(F, "scaled_dot_product_attention", attention),
        _replaced(students, "biased_attention", unfused),
        _replaced(window_attention, "attend_by_hand", window_attention.attend_fused),
    ):
        yield


@contextmanager
def linear_as_in_zero3() -> Iterator[None]:
    """Run `F.linear` as DeepSpeed's ZeRO-3 does, inside."""

    def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return ZeRO3Linear.apply(input, weight, bias)

    with _replaced(F, "linear", linear):
        yield


@contextmanager
def _replaced(module: ModuleType, name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    original = getattr(module, name)
    setattr(module, name, function)
    try:
        yield
    finally:
        setattr(module, name, original)
