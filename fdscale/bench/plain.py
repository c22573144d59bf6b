"""A distillation step as one writes it by hand, with timm and torch alone: fdscale's step is held beside it.

Nothing of fdscale's is in here: sizes come in, a function that takes one step goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models.beit import Beit
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Step = Callable[[], Tensor]


class Network(nn.Module):
    """Pixels (B, 3, H, W) in [0, 1] -> tokens (B, N, C), of the student through a linear projector."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: nn.Module, mean: Any = MEAN, std: Any = STD, projector: nn.Module | None = None):
        super().__init__()
        self.backbone, self.projector = backbone, projector or nn.Identity()
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.backbone((pixels - self.mean) / self.std)
        return self.projector(tokens.flatten(1, 2) if tokens.ndim == 4 else tokens)


def vit(size: int, patch: int, width: int, depth: int, heads: int, drop_path: float) -> nn.Module:
    """timm's BEiT with one table of relative positions for all blocks, the official student."""
    return Beit(
        img_size=size,
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=0,
        global_pool="",
        drop_path_rate=drop_path,
        init_values=0.1,
        use_abs_pos_emb=False,
        use_shared_rel_pos_bias=True,
    )


def swin_v2(
    size: int,
    window: int,
    width: int,
    depths: tuple[int, ...],
    heads: tuple[int, ...],
    drop_path: float = 0.0,
) -> nn.Module:
    """timm's SwinV2, up to the final norm."""
    return SwinTransformerV2(
        img_size=size,
        window_size=window,
        embed_dim=width,
        depths=depths,
        num_heads=heads,
        num_classes=0,
        global_pool="",
        drop_path_rate=drop_path,
    )


def clip(model: str, size: int, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    """timm's vision tower of CLIP of that name, every token of it."""
    shape = {"img_size": size, "patch_size": patch, "embed_dim": width, "depth": depth, "num_heads": heads}
    network: nn.Module = timm.create_model(model, num_classes=0, global_pool="", **shape)
    return network


def plain_step(student: Network, teacher: Network, pixels: Tensor, bf16: bool = True, compiled: bool = False) -> Step:
    """One whole step on `pixels`, in bf16 by autocast; with `compiled` both networks through torch.compile."""
    student, teacher = student.to(pixels.device).train(), teacher.to(pixels.device).eval()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.05)
    parameters = list(student.parameters())
    taught, teach = (torch.compile(student), torch.compile(teacher)) if compiled else (student, teacher)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                tokens = teach(pixels).float()
                target = F.layer_norm(tokens, tokens.shape[-1:])
            predicted = taught(pixels)
        loss = F.smooth_l1_loss(predicted.float(), target, beta=2.0)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 3.0)
        optimizer.step()
        return loss.detach()

    return step
