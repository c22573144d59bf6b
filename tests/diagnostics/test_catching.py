"""Attention is caught however it is spelled; what was computed stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.diagnostics.catching import CatchingAttention, weights_first

LOGITS = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
Q, K, V = torch.randn(3, 2, 4, 6, 8, generator=torch.Generator().manual_seed(1))
BIAS = torch.randn(1, 4, 6, 6, generator=torch.Generator().manual_seed(2))


def caught_in(compute: Callable[[], Any]) -> tuple[Any, list[Tensor]]:
    caught: list[Tensor] = []
    with CatchingAttention(caught.append):
        return compute(), caught


@pytest.mark.parametrize(
    "spelled",
    [
        lambda x: x.softmax(dim=-1),
        lambda x: x.softmax(-1),
        lambda x: x.softmax(3),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: torch.softmax(x, -1),
        lambda x: torch.softmax(input=x, dim=3),
        lambda x: torch.special.softmax(x, -1),
        lambda x: F.softmax(x, dim=-1),
        lambda x: nn.Softmax(dim=-1)(x),
    ],
)
def test_every_spelling_of_softmax_is_caught_once(spelled: Callable[[Tensor], Tensor]) -> None:
    result, caught = caught_in(lambda: spelled(LOGITS))
    assert len(caught) == 1
    assert torch.equal(caught[0], result)
    assert torch.equal(result, LOGITS.softmax(-1))


@pytest.mark.parametrize(
    "other",
    [
        lambda: LOGITS.softmax(1),
        lambda: LOGITS.softmax(-2),
        lambda: LOGITS[..., :3].softmax(-1),
        lambda: LOGITS[0].softmax(-1),
        lambda: LOGITS.log_softmax(-1),
        lambda: F.scaled_dot_product_attention(Q[:, :, :2], K, V),
    ],
)
def test_what_is_no_square_attention_is_left(other: Callable[[], Tensor]) -> None:
    assert caught_in(other)[1] == []


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"attn_mask": BIAS},
        {"attn_mask": BIAS.expand(2, -1, -1, -1) > -1},
        {"is_causal": True},
        {"scale": 0.7},
        {"attn_mask": BIAS, "scale": 2.0},
    ],
    ids=["plain", "bias", "allowed", "causal", "scale", "both"],
)
def test_attention_that_torch_fuses_is_that_which_mixes_its_values(given: dict[str, Any]) -> None:
    result, caught = caught_in(lambda: F.scaled_dot_product_attention(Q, K, V, **given))
    assert torch.equal(result, F.scaled_dot_product_attention(Q, K, V, **given))
    assert len(caught) == 1
    torch.testing.assert_close(caught[0] @ V, result, atol=1e-6, rtol=0)


def test_keys_shared_by_heads_are_repeated() -> None:
    few_k, few_v = K[:, :2], V[:, :2]
    result, caught = caught_in(lambda: F.scaled_dot_product_attention(Q, few_k, few_v, enable_gqa=True))
    torch.testing.assert_close(caught[0] @ few_v.repeat_interleave(2, 1), result, atol=1e-6, rtol=0)


@pytest.mark.parametrize("autocast", [False, True])
def test_of_16_bits_the_attention_is_fp32_all_the_same(autocast: bool) -> None:
    q, k, v = (x.bfloat16() for x in (Q, K, V))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, fused = caught_in(lambda: F.scaled_dot_product_attention(q, k, v))
        _, plain = caught_in(lambda: ((q @ k.transpose(-2, -1)) * 8**-0.5).softmax(-1))
    expected = (q.float() @ k.float().transpose(-2, -1) * 8**-0.5).softmax(-1)
    torch.testing.assert_close(fused[0], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(plain[0], expected, atol=1e-2, rtol=0)
    for weights in (*fused, *plain):
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 6), atol=1e-6, rtol=0)


@pytest.mark.parametrize("need_weights", [False, True])
def test_a_call_of_torchs_multi_head_attention_is_caught_by_head(need_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    tokens = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        _, caught = caught_in(lambda: weights_first(module, (tokens, tokens, tokens), {"need_weights": need_weights}))
        expected = module(tokens, tokens, tokens, average_attn_weights=False)[1]
    assert len(caught) == 1
    assert torch.equal(caught[0], expected)
    module.train()  # no fused path to compare with: through the function alone
    with torch.no_grad():
        given = {"need_weights": need_weights}
        (mixed, told), caught = caught_in(lambda: module(tokens, tokens, tokens, **given))
        plain, averaged = module(tokens, tokens, tokens, **given)
    assert torch.equal(caught[0], expected)
    assert torch.equal(mixed, plain)
    assert (told is None) == (averaged is None)
    assert told is None or torch.equal(told, averaged)


def test_gradients_go_through_what_is_caught_and_not_into_it() -> None:
    logits = LOGITS.clone().requires_grad_()
    result, caught = caught_in(lambda: logits.softmax(-1))
    assert result.requires_grad
    assert not caught[0].requires_grad
