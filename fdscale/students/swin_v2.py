"""SwinV2 up to SwinV2-G, on timm's: the published extra norms, the paper's initialisation, fp32 attention logits.

This file needs torch and timm alone: an export of a student with extra norms carries a copy of it.
Sources: Swin Transformer V2 (arXiv 2111.09883), sections 3.2-3.5, and the official feature-distillation code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block, WindowAttention
from torch import Tensor, nn

from fdscale.students.window_attention import (
    Windows,
    attend,
    into_windows,
    out_of_windows,
    position_bias,
    windows_of,
    without_autocast,
)

POSITION_BIAS_HIDDEN = 512
MAX_LOGIT_SCALE = math.log(100.0)  # SwinV2 clamps the temperature at 0.01
RESIDUAL_NORM_WEIGHT = 1e-5  # blocks start as (almost) the identity; timm starts at 0, which has no gradient path


class Linear32(nn.Linear):
    """A linear layer that computes in fp32 whatever its weights' type and the surrounding autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with without_autocast(input.device):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(input.float(), self.weight.float(), bias)


class CosineWindowAttention(WindowAttention):
    """timm's SwinV2 window attention with logits, position bias and softmax in fp32.

    Under `bf16.enabled` the engine casts parameters alone: the log-spaced coordinates stay fp32, so the
    position bias network must compute in fp32 too. `pretrained_window` (h, w) normalises the coordinates where
    it is not 0.
    """

    def __init__(
        self, dim: int, window_size: tuple[int, int], num_heads: int, pretrained_window: tuple[int, int] = (0, 0)
    ) -> None:
        super().__init__(dim, window_size, num_heads, pretrained_window_size=pretrained_window)
        hidden = POSITION_BIAS_HIDDEN
        self.cpb_mlp = nn.Sequential(Linear32(2, hidden), nn.ReLU(), Linear32(hidden, num_heads, bias=False))

        self._table: tuple[object, Tensor] | None = None  # of what weights, and the table

    def position_bias(self) -> Tensor:
        """The continuous relative position bias, fp32 (H, N, N), in (0, 16)."""
        return position_bias(self.position_table(), self.relative_position_index)

    def position_table(self) -> Tensor:
        """The position bias of each distance, fp32 (distances, H); in evaluation computed once for its weights."""
        weights = list(self.cpb_mlp.parameters())
        divided = any(hasattr(weight, "ds_id") for weight in weights)  # ZeRO-3's ranks must gather them together
        if divided or self.training or (torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)):
            return self._new_table()
        held = [*weights, self.relative_coords_table]
        key = [(each.untyped_storage()._cdata, 0 if each.is_inference() else each._version) for each in held]
        if self._table is None or self._table[0] != key:
            with torch.inference_mode(False), torch.no_grad():
                self._table = (key, self._new_table())
        return self._table[1]

    def _new_table(self) -> Tensor:
        return 16 * torch.sigmoid(self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads))

    def train(self, mode: bool = True) -> CosineWindowAttention:
        """As every module's; weights may have changed in ways that only training knows."""
        self._table = None
        return super().train(mode)

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """Attention inside each window: (B * W, N, C) -> the same shape."""
        bias = torch.cat((self.q_bias, self.k_bias.to(self.q_bias.dtype), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, bias)
        scale = self.logit_scale.float().clamp(max=MAX_LOGIT_SCALE).exp()
        return self.proj(
            attend(qkv, scale, self.position_table(), self.relative_position_index, windows, self.training)
        )


class SwinV2Block(SwinTransformerV2Block):
    """timm's residual post-norm block, with an optional norm on the main branch after both residual sums."""

    pads_first = False  # as timm, which exports are read with; at the size that it is built for nothing is padded

    def __init__(self, like: SwinTransformerV2Block, extra_norm: bool) -> None:
        super().__init__(
            like.dim,
            like.input_resolution,
            like.num_heads,
            like.window_size,
            like.target_shift_size,  # of a larger map: where one window covers this map, its own is 0
            mlp_ratio=like.mlp_ratio,
            drop_path=getattr(like.drop_path1, "drop_prob", 0.0),
        )
        self.attn = CosineWindowAttention(
            like.dim, like.attn.window_size, like.num_heads, like.attn.pretrained_window_size
        )
        self.enorm = nn.LayerNorm(like.dim) if extra_norm else nn.Identity()  # the official name

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, h, w, C) -> the same shape."""
        x = _residual(self.drop_path1, x, lambda x: self.norm1(self._attn(x)))
        tokens = _residual(self.drop_path2, x.flatten(1, 2), lambda x: self.norm2(self.mlp(x)))
        return self.enorm(tokens.view_as(x))

    def _attn(self, x: Tensor) -> Tensor:
        """timm's; with `pads_first` a map that the windows do not divide is padded before it is shifted, not after.

        So do the official dense networks: after the shift, opposite edges of a padded map see each other.
        """
        size = (x.shape[1], x.shape[2])
        windows = windows_of(size, self.window_size, self.shift_size, self.pads_first, x.device)
        return out_of_windows(self.attn(into_windows(x, windows), windows), windows, size)

    def _init_buffers(self) -> None:
        """No mask is held: timm's has the logits' size but for the heads."""


def _residual(drop_path: nn.Module, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """x + branch(x) with stochastic depth, by the drop path's own rule where it has one (it may leave rows out)."""
    own: Any = getattr(drop_path, "residual", None)
    return own(x, branch) if own is not None else x + drop_path(branch(x))


class SwinV2(SwinTransformerV2):
    """SwinV2 with an extra norm after every `extra_norm_period`-th block of each stage (0: none).

    Images (B, 3, H, W), normalised, -> maps (B, H/32, W/32, 8C) after the final norm.
    Built on the meta device and initialised once: a 3-billion-parameter network is not drawn twice.
    """

    def __init__(
        self,
        img_size: int,
        embed_dim: int,
        depths: tuple[int, ...],
        num_heads: tuple[int, ...],
        window_size: int,
        patch_size: int = 4,
        extra_norm_period: int = 0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        pretrained_window_sizes: tuple[int, ...] = (),
        device: str | torch.device = "cpu",
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                img_size,
                patch_size,
                num_classes=0,
                global_pool="",
                embed_dim=embed_dim,
                depths=tuple(depths),
                num_heads=tuple(num_heads),
                window_size=window_size,
                mlp_ratio=mlp_ratio,
                drop_path_rate=drop_path_rate,
                pretrained_window_sizes=tuple(pretrained_window_sizes) or (0,) * len(depths),
            )
            self._use_own_blocks(extra_norm_period)
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.init_buffers()
            self.init_weights()

    def _use_own_blocks(self, period: int) -> None:
        for stage in self.layers:
            for index, block in enumerate(stage.blocks):
                stage.blocks[index] = SwinV2Block(block, extra_norm=bool(period) and (index + 1) % period == 0)

    def init_buffers(self) -> None:
        """Compute every buffer (coordinates, indices, masks): none of them is in a state dict."""
        if not hasattr(WindowAttention, "init_non_persistent_buffers"):
            raise ImportError(
                f"timm {timm.__version__} leaves SwinV2's coordinates undefined: install timm 1.0.31 or newer"
            )
        for module in self.modules():
            if hasattr(module, "init_non_persistent_buffers"):
                module.init_non_persistent_buffers()

    def init_weights(self, needs_reset: bool = True) -> None:
        """The paper's initialisation, from torch's CPU generator (official `swin_transformer_v2.py`).

        Linear and convolution weights: truncated normal, std 0.02; the l-th block's `proj` and `fc2` divided by
        sqrt(2 l); residual norms' weights 1e-5; logit scale log 10.
        """
        if self.norm.weight.is_meta:  # timm's constructor asks too early
            return
        self.apply(_init_module)
        blocks = [block for stage in self.layers for block in stage.blocks]
        for number, block in enumerate(blocks, start=1):
            _init_block(block, number)


@torch.no_grad()
def _init_module(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02)  # torch's: timm's returns -100 sigma now and then
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)


@torch.no_grad()
def _init_block(block: SwinV2Block, number: int) -> None:
    nn.init.constant_(block.attn.logit_scale, math.log(10.0))
    nn.init.zeros_(block.attn.q_bias)
    nn.init.zeros_(block.attn.v_bias)
    for norm in (block.norm1, block.norm2):
        nn.init.constant_(norm.weight, RESIDUAL_NORM_WEIGHT)
    for layer in (block.attn.proj, block.mlp.fc2):
        layer.weight.div_(math.sqrt(2.0 * number))


def load(folder: str | Path, **changes: object) -> SwinV2:
    """The exported student in `folder` (`config.json`, `model.safetensors`), with its head, in evaluation mode."""
    from safetensors.torch import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    model = SwinV2(**{**config["model_args"], **changes})
    if config["num_classes"]:
        model.reset_classifier(config["num_classes"], "avg")
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    return model.eval()
