"""The ViT student's geometry: width, grid, parameters and floating point operations, without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

POSITION_BIASES = ("shared", "per_block")


@dataclass(frozen=True)
class ViTGeometry:
    """A BEiT-like ViT with relative position biases (method: table 7, official `vision_transformer.py`).

    `position_bias`: one table `shared` by all blocks (distillation), or one `per_block` (official fine-tuning).
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int
    image_size: int = 224
    init_values: float = 0.1
    mlp_ratio: float = 4.0
    position_bias: str = "shared"

    family: ClassVar[str] = "vit"
    prefix_tokens: ClassVar[int] = 1
    undecayed: ClassVar[tuple[str, ...]] = ("cls_token", "pos_embed")  # the bias tables *are* decayed, officially

    @property
    def width(self) -> int:
        return self.embed_dim

    @property
    def stride(self) -> int:
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.patch_size
        return side, side

    @property
    def blocks(self) -> int:
        return self.depth

    @property
    def hidden(self) -> int:
        """Channels inside a block's MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    def parameters(self) -> int:
        """Trainable parameters of the backbone, projector and head not counted."""
        c = self.embed_dim
        attention = 4 * c * c + 3 * c
        block = attention + 2 * c * self.hidden + self.hidden + c + 6 * c  # two norms, two LayerScale vectors
        stem = 3 * self.patch_size**2 * c + 2 * c  # with the CLS token
        table = ((2 * self.grid[0] - 1) * (2 * self.grid[1] - 1) + 3) * self.num_heads
        tables = table * (self.depth if self.position_bias == "per_block" else 1)
        return stem + tables + self.depth * block + 2 * c

    def flops(self) -> int:
        """Floating point operations of one image's forward, two per multiply-accumulate of the matrix products."""
        c, patches = self.embed_dim, self.grid[0] * self.grid[1]
        tokens = patches + 1
        block = tokens * (4 * c * c + 2 * c * self.hidden) + 2 * tokens**2 * c
        return 2 * (patches * 3 * self.patch_size**2 * c + self.depth * block)

    def problems(self) -> list[str]:
        """What does not fit together, one sentence each."""
        found = []
        if self.embed_dim % self.num_heads:
            found.append(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.image_size % self.patch_size:
            found.append(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.position_bias not in POSITION_BIASES:
            found.append(f"position_bias {self.position_bias!r} is none of {', '.join(POSITION_BIASES)}")
        return found
