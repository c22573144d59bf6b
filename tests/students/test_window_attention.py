"""Window attention against timm's, in both of its forms: values, gradients, chunks, what is kept, and precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fdscale.students import window_attention
from fdscale.students.swin_v2 import SwinV2Block
from fdscale.students.window_attention import attend_by_hand, attend_fused, windows_of

EXACT = 1e-5
CPU = torch.device("cpu")
FORMS = pytest.mark.parametrize("form", [attend_by_hand, attend_fused], ids=["by hand", "fused"])
sides = st.tuples(st.integers(2, 9), st.integers(2, 9))


def pair(size: tuple[int, int], window: int, shift: int, perturb: Callable[[nn.Module], None]) -> tuple[Any, Any]:
    """A block of ours and timm's of the same weights, none of them at its start."""
    torch.manual_seed(0)
    theirs = SwinTransformerV2Block(8, size, 2, window, shift, dynamic_mask=True)
    perturb(theirs)
    with torch.no_grad():
        theirs.attn.logit_scale.copy_(torch.tensor([0.5, 3.4]).view(2, 1, 1))
    own = SwinV2Block(theirs, extra_norm=False)
    own.init_non_persistent_buffers()
    own.attn.init_non_persistent_buffers()
    own.load_state_dict(theirs.state_dict())
    return own, theirs


def padded_first(block: Any, x: Tensor) -> Tensor:
    """timm's block on a map that is padded before its shift."""
    height, width = x.shape[1:3]
    below, right = -height % block.window_size[0], -width % block.window_size[1]
    attended = block._attn(F.pad(x, (0, 0, 0, right, 0, below)))[:, :height, :width]
    x = x + block.norm1(attended)
    return x + block.norm2(block.mlp(x))


def through(block: Any, x: Tensor, run: Callable[[Any, Tensor], Tensor]) -> dict[str, Tensor]:
    """The output, and the gradients of the input and of every weight."""
    x = x.clone().requires_grad_()
    output = run(block, x)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    found = {name: weight.grad for name, weight in block.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **found}


def assert_close(found: dict[str, Tensor], theirs: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To 1e-5 of `expected`, in fp64; where fp32 cannot hold that, as near as timm's but for chance."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        ours, timms = (float((each[name] - wanted).abs().max()) for each in (found, theirs))
        assert ours <= max(EXACT * max(1.0, float(wanted.abs().max())), 8 * timms), name


@FORMS
@settings(max_examples=25)
@given(size=sides, window=st.integers(2, 5), shifted=st.booleans(), pads_first=st.booleans(), small=st.booleans())
def test_a_block_is_timms_with_its_gradients_on_any_map(
    form: Any, perturbed: Any, size: Any, window: int, shifted: bool, pads_first: bool, small: bool
) -> None:
    own, theirs = pair(size, window, window // 2 if shifted else 0, perturbed)
    own.pads_first = pads_first
    x = torch.randn(2, *size, 8, generator=torch.Generator().manual_seed(window))
    run = padded_first if pads_first else lambda block, x: block(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window_attention, "attend_by_hand", form)
        if small:  # a window at a time, and nothing kept
            for limit in ("CHUNK_BYTES", "KEPT_BYTES", "MASK_BYTES", "GRADIENT_BYTES"):
                patch.setattr(window_attention, limit, 1)
        found = through(own, x, lambda block, x: block(x))
    assert_close(found, through(theirs, x, run), through(copy.deepcopy(theirs).double(), x.double(), run))


@given(
    size=sides, window=st.tuples(st.integers(1, 4), st.integers(1, 4)), shifts=st.tuples(st.booleans(), st.booleans())
)
def test_masks_are_timms(size: Any, window: Any, shifts: Any) -> None:
    window = tuple(min(sides) for sides in zip(window, size, strict=True))
    shift = tuple(side // 2 if by and side < of else 0 for side, by, of in zip(window, shifts, size, strict=True))
    theirs = SwinTransformerV2Block(8, size, 2, window, shift, always_partition=True)
    windows = windows_of(size, window, shift, False, CPU)
    if theirs.attn_mask is None:
        assert not any(windows.kinds)
    else:
        assert torch.equal(windows.masks[list(windows.kinds)], theirs.attn_mask)


def inputs(dtype: torch.dtype, size: tuple[int, int] = (5, 4), heads: int = 2) -> tuple[Any, ...]:
    """Queries, keys and values, scale, table and index of a shifted map in windows of 3x2, and these windows."""
    draw = torch.Generator().manual_seed(3)
    windows = windows_of(size, (3, 2), (1, 1), False, CPU)
    qkv = torch.randn(2 * len(windows.kinds), 6, 3 * heads * 4, generator=draw, dtype=torch.float64)
    table = 16 * torch.rand(15, heads, generator=draw, dtype=torch.float64)
    index = torch.randint(15, (6, 6), generator=draw)
    scale = torch.tensor([2.0, 30.0], dtype=torch.float64).view(2, 1, 1)
    wide = torch.promote_types(dtype, torch.float32)
    return (
        qkv.to(dtype).requires_grad_(),
        scale.to(wide).requires_grad_(),
        table.to(wide).requires_grad_(),
        index,
        windows,
    )


@pytest.mark.parametrize("limits", [{}, {"KEPT_BYTES": 0}, {"CHUNK_BYTES": 1}, {"CHUNK_BYTES": 600, "KEPT_BYTES": 0}])
def test_gradients_are_those_of_finite_differences(limits: dict[str, int], monkeypatch: Any) -> None:
    for name, limit in limits.items():
        monkeypatch.setattr(window_attention, name, limit)
    *tensors, index, windows = inputs(torch.float64)
    assert any(windows.kinds)
    assert torch.autograd.gradcheck(lambda *given: attend_by_hand(*given, index, windows), tensors)


def test_what_is_recomputed_is_what_was_kept(monkeypatch: Any) -> None:
    found = []
    for limit in (2**20, 0):
        monkeypatch.setattr(window_attention, "KEPT_BYTES", limit)
        given = inputs(torch.bfloat16)
        output = attend_by_hand(*given)
        output.float().square().sum().backward()
        found.append([output, *(each.grad for each in given[:3])])
    assert all(torch.equal(kept, recomputed) for kept, recomputed in zip(*found, strict=True))


@FORMS
def test_bf16_is_as_close_to_fp32_as_its_inputs(form: Any) -> None:
    """Against fp64 on the same rounded inputs: within a few roundings of bf16, at a temperature of 1/30, too."""
    exact, found = (form(*inputs(dtype)) for dtype in (torch.float64, torch.bfloat16))
    qkv, *rest = inputs(torch.float64)
    rounded = form(qkv.detach().bfloat16().double(), *rest)
    assert not torch.equal(rounded, exact)
    assert torch.allclose(found.double(), rounded, rtol=0, atol=0.04)
    assert found.dtype is torch.bfloat16


def test_windows_made_while_a_step_is_traced_are_real() -> None:
    windows_of.cache_clear()
    with FakeTensorMode():
        traced = windows_of((4, 4), (2, 2), (1, 1), False, CPU)
    assert type(traced.places) is Tensor
    assert windows_of((4, 4), (2, 2), (1, 1), False, CPU) is traced


@torch.no_grad()
def test_a_position_table_is_made_once_for_its_weights(perturbed: Any) -> None:
    own, _ = pair((4, 4), 2, 0, perturbed)
    own.eval()
    made = []
    own.attn.cpb_mlp.register_forward_hook(lambda *_: made.append(1))
    x = torch.randn(1, 4, 4, 8)
    first = own(x)
    assert torch.equal(own(x), first)
    assert len(made) == 1
    own.attn.cpb_mlp[2].weight.mul_(2)  # whatever changes it in place
    assert not torch.equal(own(x), first)
    own.train()
    own.attn.cpb_mlp[2].weight.data.div_(2)  # as an engine does, unseen by versions
    own.eval()
    assert torch.equal(own(x), first)
    assert len(made) == 3
    own.train()
    assert len([own(x), own(x), *made]) == 2 + 5  # each forward of training makes its own
