"""Attention caught where it is computed, however it is spelled, without a change to what is computed."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SOFTMAXES = (F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax)


class CatchingAttention(TorchFunctionMode):
    """While entered, hands on each square attention (rows, H, n, n) that is computed, fp32 and without gradient.

    What the functions return is untouched. It sees `scaled_dot_product_attention`, softmax over the last of four axes,
    and `multi_head_attention_forward`; a network's `nn.MultiheadAttention` needs `weights_first` before it, and the
    mode left during it: a mode that is entered keeps it from its fused path, whose numbers differ.
    """

    def __init__(self, caught: Callable[[Tensor], None]) -> None:
        super().__init__()
        self._caught = caught

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.multi_head_attention_forward:
            return self._through_heads(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._hand_on(_scaled_dot_product(*args, **kwargs))
        elif func in SOFTMAXES and _over_last(*args, **kwargs):
            self._hand_on(_softmaxed(result, *args, **kwargs))
        return result

    def _through_heads(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        per_head = {**kwargs, "need_weights": True, "average_attn_weights": False}
        told = func(*args, **per_head)
        self._hand_on(told[1].float())
        return told if kwargs == per_head else func(*args, **kwargs)  # without weights it takes another path

    def _hand_on(self, weights: Tensor) -> None:
        if weights.ndim == 4 and weights.shape[-1] == weights.shape[-2]:
            self._caught(weights.detach())


@torch.no_grad()
def weights_first(module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Run a module once for its attention alone, under a `CatchingAttention`."""
    given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs)
    given.arguments.update(need_weights=True, average_attn_weights=False)
    nn.MultiheadAttention.forward(*given.args, **given.kwargs)


def _over_last(input: Tensor, dim: int | None = None, *_: Any, **__: Any) -> bool:
    return input.ndim == 4 and dim in (-1, 3)


def _softmaxed(result: Tensor, input: Tensor, *_: Any, **__: Any) -> Tensor:
    """The result where it is fp32; else computed again, as rows of 16 bits do not sum to 1."""
    return result if result.dtype == torch.float32 else input.detach().float().softmax(dim=-1)


@torch.no_grad()
def _scaled_dot_product(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What torch documents that `F.scaled_dot_product_attention` softmaxes, in fp32: (..., H, n, keys)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], dim=-3)
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    with torch.autocast(query.device.type, enabled=False):
        logits = query.float() @ key.float().transpose(-2, -1) * scale
        if attn_mask is None:
            return logits.softmax(dim=-1)
        masked = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return masked.softmax(dim=-1)
