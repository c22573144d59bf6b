"""A student: pixels in, tokens out, whatever network is inside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.students.drop_path import divided, use_table
from fdscale.students.from_timm import TIMM_ERRORS, build_timm
from fdscale.students.geometry import Geometry, OwnGeometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.layers import swin_v2_layer, timm_layers, vit_layer
from fdscale.students.offload import offload_activations
from fdscale.students.swin_v2 import SwinV2
from fdscale.students.vit import build_vit
from fdscale.tokens import as_tokens

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Student(nn.Module):
    """A backbone with its input normalisation and its token layout.

    `backbone` maps normalised images (B, 3, H, W) to tokens (B, N, C), or to maps (B, h, w, C) or (B, C, h, w),
    which become tokens row by row. Any nn.Module will do.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        width: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        image_size: int,
        geometry: Geometry | None = None,
        mean: tuple[float, ...] = IMAGENET_MEAN,
        std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.width, self.grid, self.prefix_tokens = width, grid, prefix_tokens
        self.image_size, self.geometry = image_size, geometry
        self.draws = use_table(backbone)
        for module in backbone.modules():
            if getattr(module, "k_bias", None) is not None:
                module.register_forward_pre_hook(_cast_key_bias)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor, drop_path: Tensor | None = None) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1] and drop path draws (sites, B), on the host -> tokens (B, prefix + h*w, C)."""
        self.draws.take(drop_path, pixels.device, divided(self.backbone))
        images = (pixels - self.mean) / self.std
        dtype = next(self.backbone.parameters()).dtype
        # the backbone's own __call__, never forward_features: ZeRO-3 gathers weights around calls only
        return as_tokens(self.backbone(images.to(dtype)), self.width)

    @property
    def drop_path_sites(self) -> int:
        """Rows of the table that drop path reads."""
        return len(self.draws.rates)

    @property
    def discarded_work(self) -> float:
        """The mean share of the samples whose branches are computed and discarded; ViT and SwinV2 can skip them."""
        skips = self.draws.skip_dropped is not False and isinstance(self.geometry, ViTGeometry | SwinV2Geometry)
        return 0.0 if skips or not self.drop_path_sites else sum(self.draws.rates) / self.drop_path_sites

    def undecayed_parameters(self) -> set[str]:
        """Names of the backbone's parameters without weight decay, beyond biases and vectors (official rule)."""
        if isinstance(self.geometry, ViTGeometry | SwinV2Geometry):
            parts = self.geometry.undecayed
            return {name for name, _ in self.backbone.named_parameters() if any(part in name for part in parts)}
        rule = getattr(self.backbone, "no_weight_decay", None)
        return set(rule()) if rule else set()

    def position_bias_parameters(self) -> set[str]:
        """Names of the backbone's relative position bias tables: a shared one, or one per block; SwinV2 has none."""
        return {name for name, _ in self.backbone.named_parameters() if name.endswith("relative_position_bias_table")}

    @property
    def layers(self) -> int:
        """The last layer, that of the head: under layer decay, layer i learns at the rate * decay ** (layers - i)."""
        if isinstance(self.geometry, ViTGeometry | SwinV2Geometry):
            return self.geometry.blocks + 1
        return timm_layers(self.backbone)[1]

    def layer_ids(self) -> dict[str, int]:
        """The backbone's parameter names to their layers, from 0 (the stem) to `layers` (method, section 3).

        timm's networks follow timm's grouping. Raises UserError for a network of one's own that tells no layers.
        """
        names = [name for name, _ in self.backbone.named_parameters()]
        match self.geometry:
            case ViTGeometry() as vit:
                return {name: vit_layer(name, vit.depth) for name in names}
            case SwinV2Geometry() as swin:
                return {name: swin_v2_layer(name, swin.depths) for name in names}
        return timm_layers(self.backbone)[0]


def _cast_key_bias(attention: nn.Module, inputs: object) -> None:
    """timm's zero key bias is a buffer: DeepSpeed leaves it in fp32 beside 16-bit weights, which cannot be mixed."""
    q_bias, k_bias = attention.q_bias, attention.k_bias
    assert isinstance(q_bias, Tensor)
    assert isinstance(k_bias, Tensor)
    attention.k_bias = k_bias.to(q_bias.dtype)


def build_student(geometry: Geometry, drop_path: float = 0.0, seed: int = 0, device: str = "cpu") -> Student:
    """A student from random weights drawn by `seed` alone: equal on every rank."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        match geometry:
            case ViTGeometry():
                backbone: nn.Module = build_vit(geometry, drop_path, device)
            case SwinV2Geometry():
                backbone = _build_swin_v2(geometry, drop_path, device)
            case TimmGeometry():
                return _build_timm(geometry, drop_path, device)
            case OwnGeometry():
                raise UserError("student.name=own: give the network to fdscale.train.distill(settings, student=…)")
    return Student(backbone, geometry.width, geometry.grid, geometry.prefix_tokens, geometry.image_size, geometry)


def _build_swin_v2(geometry: SwinV2Geometry, drop_path: float, device: str) -> SwinV2:
    return SwinV2(
        geometry.image_size,
        geometry.embed_dim,
        geometry.depths,
        geometry.num_heads,
        geometry.window_size,
        geometry.patch_size,
        geometry.extra_norm_period,
        geometry.mlp_ratio,
        drop_path,
        geometry.pretrained_window_sizes,
        device,
    )


def _build_timm(geometry: TimmGeometry, drop_path: float, device: str) -> Student:
    try:
        with torch.device(device):
            backbone: Any = build_timm(geometry, drop_path)
        config = backbone.pretrained_cfg
        prefix_tokens, width = int(getattr(backbone, "num_prefix_tokens", 0)), int(backbone.num_features)
        image_size = geometry.image_size or config["input_size"][-1]
        grid = _grid_of(backbone, image_size, width, prefix_tokens, device)
    except TIMM_ERRORS as error:
        raise UserError(f"student.name: timm's '{geometry.name}' cannot be a student here: {error!r}") from error
    return Student(backbone, width, grid, prefix_tokens, image_size, geometry, config["mean"], config["std"])


@torch.no_grad()
def _grid_of(backbone: nn.Module, image_size: int, width: int, prefix_tokens: int, device: str) -> tuple[int, int]:
    """The token grid, found by one forward of a blank image: timm does not name it for every family."""
    training = backbone.training
    tokens = as_tokens(backbone.eval()(torch.zeros(1, 3, image_size, image_size, device=device)), width)
    backbone.train(training)
    side = round((tokens.shape[1] - prefix_tokens) ** 0.5)
    if side * side + prefix_tokens != tokens.shape[1]:
        raise UserError(f"student.name: the network gives {tokens.shape[1]} tokens, which are no square grid")
    return side, side


def set_activation_checkpointing(student: Student, mode: str) -> None:
    """Recompute each block's activations in the backward pass (`blocks`), or keep them (`none`).

    `offload` recomputes, too, and keeps what goes into a block in the host's memory meanwhile.
    """
    if mode == "offload":
        offload_activations(student.backbone)
    if mode != "blocks":
        return
    if not hasattr(student.backbone, "set_grad_checkpointing"):
        raise UserError("student.activation_checkpointing: this network cannot checkpoint its blocks; use 'none'")
    student.backbone.set_grad_checkpointing(True)  # type: ignore[operator]
