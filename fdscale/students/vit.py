"""The ViT student: timm's Beit with relative position biases, shared or per block, and the paper's initialisation."""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from timm.models.beit import Attention, Beit, Block
from torch import Tensor, nn

from fdscale.students import attention
from fdscale.students.drop_path import add_branch
from fdscale.students.geometry import ViTGeometry


class ViTAttention(Attention):
    """timm's attention, which trains its position bias on a CPU without leaving the precision of its inputs."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) and a position bias (H, N, N) -> tokens of the same shape."""
        rows, tokens, _ = x.shape
        qkv = F.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
        q, k, v = qkv.view(rows, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        bias = shared_rel_pos_bias if self.relative_position_bias_table is None else self._get_rel_pos_bias()
        assert bias is not None, "a student's blocks have a position bias, shared or their own"
        if self.training and x.device.type == "cpu":
            attended = attention.biased_attention(q, k, v, bias)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, bias)
        return self.proj(attended.transpose(1, 2).reshape(x.shape))


class ViTBlock(Block):
    """timm's block, whose branches are computed for the samples alone that drop path keeps."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """Tokens (B, N, C) and a position bias (H, N, N) -> tokens of the same shape."""

        def attend(tokens: Tensor) -> Tensor:
            return _scaled(self.gamma_1, self.attn(self.norm1(tokens), shared_rel_pos_bias=shared_rel_pos_bias))

        x = add_branch(self.drop_path1, x, attend)
        return add_branch(self.drop_path2, x, lambda tokens: _scaled(self.gamma_2, self.mlp(self.norm2(tokens))))


def _scaled(gamma: Tensor | None, branch: Tensor) -> Tensor:
    return branch if gamma is None else gamma * branch


def build_vit(geometry: ViTGeometry, drop_path: float, device: str = "cpu") -> Beit:
    """A ViT whose forward returns all tokens (B, 1 + h*w, C) after the final norm (method, section 1.2)."""
    with torch.device(device):
        backbone = Beit(
            img_size=geometry.image_size,
            patch_size=geometry.patch_size,
            num_classes=0,
            global_pool="",
            embed_dim=geometry.embed_dim,
            depth=geometry.depth,
            num_heads=geometry.num_heads,
            mlp_ratio=geometry.mlp_ratio,
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            init_values=geometry.init_values,
            use_abs_pos_emb=False,
            use_rel_pos_bias=geometry.position_bias == "per_block",
            use_shared_rel_pos_bias=geometry.position_bias == "shared",
        )
    for block in backbone.blocks:
        block.__class__, block.attn.__class__ = ViTBlock, ViTAttention  # built anew they would draw their weights anew
    if device != "meta":
        init_weights(backbone)
    return backbone


@torch.no_grad()
def init_weights(backbone: Beit) -> None:
    """The official initialisation, from torch's CPU generator.

    Linear layers, the patch convolution and the CLS token: normal, std 0.02, cut at one sigma; then the i-th
    block's `proj` and `fc2` divided by sqrt(2 i). Position biases start at zero.
    """
    for module in backbone.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            _cut_normal(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _cut_normal(backbone.cls_token)
    for number, block in enumerate(backbone.blocks, start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            layer.weight.div_(math.sqrt(2.0 * number))


def _cut_normal(weight: torch.Tensor) -> None:
    nn.init.trunc_normal_(weight, std=0.02, a=-0.02, b=0.02)
