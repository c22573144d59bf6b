"""Forwards of the teachers' families in plain torch, written from their papers and original code.

They read the names of the original files, and share nothing with timm, open_clip or fdscale: what the tests compare
the teachers with.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def linear(state: State, name: str, x: Tensor) -> Tensor:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state: State, name: str, x: Tensor, eps: float) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    return (x - mean) / torch.sqrt(variance + eps) * state[f"{name}.weight"] + state[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


# --- projections to q, k and v: (state, the block's name, x) -> 3 of (B, N, C) ---------------------


def packed(weight: str, bias: str, state: State, block: str, x: Tensor) -> tuple[Tensor, ...]:
    return (x @ state[block + weight].T + state[block + bias]).chunk(3, dim=-1)


def apart(names: str, state: State, block: str, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(linear(state, block + names.format(part), x) for part in "qkv")


def eva_packed(state: State, block: str, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x @ state[f"{block}attn.qkv.weight"].T).chunk(3, dim=-1)
    return q + state[f"{block}attn.q_bias"], k, v + state[f"{block}attn.v_bias"]


def eva_apart(state: State, block: str, x: Tensor) -> tuple[Tensor, ...]:
    q, k, v = (x @ state[f"{block}attn.{part}_proj.weight"].T for part in "qkv")
    return q + state[f"{block}attn.q_bias"], k, v + state[f"{block}attn.v_bias"]


def dinov3_packed(state: State, block: str, x: Tensor) -> tuple[Tensor, ...]:
    qkv = x @ state[f"{block}attn.qkv.weight"].T
    if f"{block}attn.qkv.bias" in state:
        qkv = qkv + state[f"{block}attn.qkv.bias"] * state[f"{block}attn.qkv.bias_mask"]
    return qkv.chunk(3, dim=-1)


# --- MLPs: (state, the block's name, x) -> x ------------------------------------------------------


def mlp(first: str, activation: Callable[[Tensor], Tensor], second: str, state: State, block: str, x: Tensor) -> Tensor:
    return linear(state, block + second, activation(linear(state, block + first, x)))


def swiglu(state: State, block: str, x: Tensor) -> Tensor:
    """silu(w1 x) * (w2 x), both in one matrix for DINOv2, normalised for EVA-02, then w3."""
    if f"{block}mlp.w12.weight" in state:
        gate, value = linear(state, f"{block}mlp.w12", x).chunk(2, dim=-1)
    else:
        gate, value = linear(state, f"{block}mlp.w1", x), linear(state, f"{block}mlp.w2", x)
    hidden = gate * torch.sigmoid(gate) * value
    if f"{block}mlp.ffn_ln.weight" in state:
        hidden = norm(state, f"{block}mlp.ffn_ln", hidden, 1e-6)
    return linear(state, f"{block}mlp.w3", hidden)


# --- rotary positions: (state, side of the grid, channels of a head) -> angles (N, channels / 2) ----


def dinov3_angles(state: State, side: int, channels: int) -> Tensor:
    """Patch centres in [-1, 1], turned once per period; first the rows' angles, then the columns'."""
    centres = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(centres, centres, indexing="ij")
    periods = state["rope_embed.periods"]
    return torch.cat([2 * math.pi * axis.flatten()[:, None] / periods for axis in (y, x)], dim=-1)


def eva_angles(state: State, side: int, channels: int) -> Tensor:
    """Patch numbers, stretched to the 16 x 16 grid of pre-training, times powers of 1/10000."""
    numbers = torch.arange(side, dtype=torch.float64) / side * 16
    frequencies = 10000 ** (-torch.arange(0, channels // 2, 2, dtype=torch.float64) / (channels // 2))
    y, x = torch.meshgrid(numbers, numbers, indexing="ij")
    return torch.cat([axis.flatten()[:, None] * frequencies for axis in (y, x)], dim=-1)


def turned(x: Tensor, angles: Tensor, neighbours: bool) -> Tensor:
    """The last tokens' channels turned in pairs: neighbours (EVA), or a channel and the one half a head on (DINOv3)."""
    first, patches = x[..., : -len(angles), :], x[..., -len(angles) :, :]
    pairs = patches.unflatten(-1, (-1, 2) if neighbours else (2, -1))
    real, imaginary = pairs.unbind(-1 if neighbours else -2)
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angles), angles)
    back = torch.stack([product.real, product.imag], dim=-1 if neighbours else -2).flatten(-2)
    return torch.cat([first, back], dim=-2)


# --- the ViT --------------------------------------------------------------------------------------


class ViT(NamedTuple):
    """How a family's ViT differs from another, and its names in the original file."""

    project: Callable[[State, str, Tensor], tuple[Tensor, ...]] = partial(packed, "attn.qkv.weight", "attn.qkv.bias")
    feed: Callable[[State, str, Tensor], Tensor] = partial(mlp, "mlp.fc1", gelu, "mlp.fc2")
    patch: str = "patch_embed.proj"
    cls: str | None = "cls_token"
    positions: str | None = "pos_embed"
    registers: str | None = None
    first_norm: str | None = None
    block: str = "blocks.{}."
    norms: tuple[str, str] = ("norm1", "norm2")
    out: str = "attn.proj"
    inner_norm: str | None = None
    scales: tuple[str, str] | None = None
    post_norm: bool = False  # x + norm(f(x)) for x + f(norm(x))
    last_norm: str = "norm"
    eps: float = 1e-6
    angles: Callable[[State, int, int], Tensor] | None = None
    neighbours: bool = False


CLIP = ViT(
    project=partial(packed, "attn.in_proj_weight", "attn.in_proj_bias"),
    feed=partial(mlp, "mlp.c_fc", quick_gelu, "mlp.c_proj"),
    patch="conv1",
    cls="class_embedding",
    positions="positional_embedding",
    first_norm="ln_pre",
    block="transformer.resblocks.{}.",
    norms=("ln_1", "ln_2"),
    out="attn.out_proj",
    last_norm="ln_post",
    eps=1e-5,
)
SIGLIP = ViT(
    project=partial(apart, "self_attn.{}_proj"),
    feed=partial(mlp, "mlp.fc1", gelu_tanh, "mlp.fc2"),
    patch="embeddings.patch_embedding",
    cls=None,
    positions="embeddings.position_embedding.weight",
    block="encoder.layers.{}.",
    norms=("layer_norm1", "layer_norm2"),
    out="self_attn.out_proj",
    last_norm="post_layernorm",
)
DINOV2 = ViT(scales=("ls1.gamma", "ls2.gamma"))
DINOV3 = DINOV2._replace(
    project=dinov3_packed, positions=None, registers="storage_tokens", eps=1e-5, angles=dinov3_angles
)
FAMILIES = {
    "clip": CLIP,
    "laion": CLIP._replace(feed=partial(mlp, "mlp.c_fc", gelu, "mlp.c_proj")),
    "clip_transformers": SIGLIP._replace(
        feed=partial(mlp, "mlp.fc1", quick_gelu, "mlp.fc2"),
        cls="embeddings.class_embedding",
        first_norm="pre_layrnorm",
        eps=1e-5,
    ),
    "eva_clip_l": ViT(eva_apart, swiglu, inner_norm="attn.inner_attn_ln", angles=eva_angles, neighbours=True),
    "eva_clip_e": ViT(eva_packed, post_norm=True),
    "siglip": SIGLIP,
    "siglip_trunk": ViT(feed=partial(mlp, "mlp.fc1", gelu_tanh, "mlp.fc2"), cls=None),
    "vit": ViT(),
    "dinov2": DINOV2,
    "dinov2_reg": DINOV2._replace(registers="register_tokens"),
    "dinov2_g": DINOV2._replace(feed=swiglu),
    "dinov2_g_reg": DINOV2._replace(feed=swiglu, registers="register_tokens"),
    "dinov3": DINOV3,
    "dinov3_swiglu": DINOV3._replace(feed=swiglu),
}


def vit(family: ViT, state: State, images: Tensor, heads: int) -> Tensor:
    """Normalised images (B, 3, H, W) -> all tokens (B, prefix + N, C) after the final norm."""
    kernel = state[f"{family.patch}.weight"]
    grid = F.conv2d(images, kernel, state.get(f"{family.patch}.bias"), stride=kernel.shape[-1])
    x = embedded(family, state, grid.flatten(2).transpose(1, 2))
    angles = family.angles and family.angles(state, grid.shape[-1], x.shape[-1] // heads)
    index = 0
    while any(key.startswith(family.block.format(index)) for key in state):
        name = family.block.format(index)
        attention = partial(attend, family, state, name, heads=heads, angles=angles)
        x = x + branch(family, state, name, 0, attention, x)
        x = x + branch(family, state, name, 1, partial(family.feed, state, name), x)
        index += 1
    return norm(state, family.last_norm, x, family.eps)


def embedded(family: ViT, state: State, x: Tensor) -> Tensor:
    """The patches behind CLS and registers; registers have no position."""
    if family.cls is not None:
        x = torch.cat([state[family.cls].reshape(1, 1, -1).expand(len(x), -1, -1), x], dim=1)
    if family.positions is not None:
        x = x + state[family.positions]
    if family.registers is not None:
        registers = state[family.registers].expand(len(x), -1, -1)
        x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
    return x if family.first_norm is None else norm(state, family.first_norm, x, family.eps)


def branch(
    family: ViT, state: State, block: str, which: int, function: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    normed = partial(norm, state, block + family.norms[which], eps=family.eps)
    x = normed(function(x)) if family.post_norm else function(normed(x))
    return x if family.scales is None else x * state[block + family.scales[which]]


def attend(family: ViT, state: State, block: str, x: Tensor, heads: int, angles: Tensor | None) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in family.project(state, block, x))
    if angles is not None:
        q, k = (turned(part, angles, family.neighbours) for part in (q, k))
    weights = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1)
    x = (weights @ v).transpose(1, 2).flatten(-2)
    x = x if family.inner_norm is None else norm(state, block + family.inner_norm, x, family.eps)
    return linear(state, block + family.out, x)


# --- Swin v1 --------------------------------------------------------------------------------------


def swin(state: State, images: Tensor, depths: list[int], heads: list[int], window: int) -> Tensor:
    """Normalised images (B, 3, H, W) -> the last stage's tokens (B, N, C) after the final norm; Microsoft's names."""
    kernel = state["patch_embed.proj.weight"]
    x = F.conv2d(images, kernel, state["patch_embed.proj.bias"], stride=kernel.shape[-1]).movedim(1, -1)
    x = norm(state, "patch_embed.norm", x, 1e-5)
    for stage, depth in enumerate(depths):
        for index in range(depth):
            name = f"layers.{stage}.blocks.{index}."
            size = min(window, x.shape[1])
            shift = window // 2 if index % 2 and x.shape[1] > window else 0
            x = x + shifted_attention(state, name, norm(state, f"{name}norm1", x, 1e-5), heads[stage], size, shift)
            x = x + mlp("mlp.fc1", gelu, "mlp.fc2", state, name, norm(state, f"{name}norm2", x, 1e-5))
        if stage + 1 < len(depths):
            merged = torch.cat([x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
            merged = norm(state, f"layers.{stage}.downsample.norm", merged, 1e-5)
            x = merged @ state[f"layers.{stage}.downsample.reduction.weight"].T
    return norm(state, "norm", x, 1e-5).flatten(1, 2)


def shifted_attention(state: State, block: str, x: Tensor, heads: int, window: int, shift: int) -> Tensor:
    side = x.shape[1]
    x = torch.roll(x, (-shift, -shift), (1, 2))
    q, k, v = (part for part in packed("attn.qkv.weight", "attn.qkv.bias", state, block, windows(x, window)))
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(-2, -3) for part in (q, k, v))
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + position_bias(state, block, window)
    x = (torch.softmax(logits + strangers(side, window, shift), dim=-1) @ v).transpose(-2, -3).flatten(-2)
    x = linear(state, f"{block}attn.proj", x)
    rows = x.unflatten(1, (side // window, -1)).unflatten(3, (window, window)).transpose(2, 3)
    return torch.roll(rows.flatten(3, 4).flatten(1, 2), (shift, shift), (1, 2))


def windows(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, windows, tokens of one, C)."""
    x = x.unflatten(2, (-1, window)).unflatten(1, (-1, window)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def position_bias(state: State, block: str, window: int) -> Tensor:
    """The table's row for each pair's offset: (heads, tokens, tokens)."""
    y, x = (axis.flatten() for axis in torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"))
    row = (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1
    return state[f"{block}attn.relative_position_bias_table"][row].movedim(-1, 0)


def strangers(side: int, window: int, shift: int) -> Tensor:
    """-100 between tokens that only the roll made neighbours: (windows, 1, tokens, tokens)."""
    along = (torch.arange(side) >= side - shift).double() if shift else torch.zeros(side).double()
    region = windows((along[:, None] * 2 + along)[None, :, :, None], window)[0, :, None, :, 0]
    return -100.0 * (region[..., :, None] != region[..., None, :])
