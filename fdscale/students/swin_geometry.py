"""The SwinV2 student's geometry: width, grid, parameters and floating point operations, without torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

POSITION_BIAS_HIDDEN = 512  # hidden width of SwinV2's continuous position bias network


@dataclass(frozen=True)
class SwinV2Geometry:
    """A SwinV2; `extra_norm_period` k > 0 adds a LayerNorm after every k-th block of a stage (SwinV2, section 3.5).

    `pretrained_window_sizes`, one per stage, are the windows by which the position bias's coordinates are
    normalised, where a network was pre-trained with others (0, or none at all: by the window itself).
    """

    embed_dim: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    window_size: int
    image_size: int = 256
    patch_size: int = 4
    extra_norm_period: int = 0
    mlp_ratio: float = 4.0
    pretrained_window_sizes: tuple[int, ...] = ()

    family: ClassVar[str] = "swin_v2"
    prefix_tokens: ClassVar[int] = 0
    undecayed: ClassVar[tuple[str, ...]] = ("cpb_mlp", "logit_scale", "relative_position_bias_table")

    @property
    def width(self) -> int:
        return self.stage_width(len(self.depths) - 1)

    @property
    def stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def grid(self) -> tuple[int, int]:
        side = self.image_size // self.stride
        return side, side

    @property
    def blocks(self) -> int:
        return sum(self.depths)

    def stage_width(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    def stage_side(self, stage: int) -> int:
        """Tokens along each side of a stage's map."""
        return self.image_size // self.patch_size // 2**stage

    @property
    def coordinate_windows(self) -> tuple[int, ...]:
        """Each stage's window by which the position bias's coordinates are normalised."""
        own = (min(self.window_size, self.stage_side(stage)) for stage in range(len(self.depths)))
        return self.pretrained_window_sizes or tuple(own)

    def after(self, held: SwinV2Geometry) -> SwinV2Geometry:
        """This geometry for the weights of one of another size or window: coordinates stay normalised as they learned.

        `pretrained_window_sizes` that are given stay as they are.
        """
        if self.pretrained_window_sizes or self.coordinate_windows == held.coordinate_windows:
            return self
        return replace(self, pretrained_window_sizes=held.coordinate_windows)

    def parameters(self) -> int:
        """Trainable parameters of the backbone, projector and head not counted."""
        c = self.embed_dim
        stem = 3 * self.patch_size**2 * c + 3 * c
        stages = sum(self._stage_parameters(stage) for stage in range(len(self.depths)))
        return stem + stages + 2 * self.width

    def _stage_parameters(self, stage: int) -> int:
        c, heads, depth = self.stage_width(stage), self.num_heads[stage], self.depths[stage]
        hidden = int(c * self.mlp_ratio)
        attention = 4 * c * c + 3 * c + heads + POSITION_BIAS_HIDDEN * (3 + heads)
        block = attention + 2 * c * hidden + hidden + c + 4 * c
        merging = 2 * c * c + 2 * c if stage else 0  # 4(c/2) -> c, then a norm
        extra_norms = depth // self.extra_norm_period if self.extra_norm_period else 0
        return depth * block + merging + extra_norms * 2 * c

    def flops(self) -> int:
        """Floating point operations of one image's forward, two per multiply-accumulate of the matrix products.

        The position bias networks are left out: they run once per forward, whatever the batch.
        """
        stem = self.stage_side(0) ** 2 * 3 * self.patch_size**2 * self.embed_dim
        return 2 * (stem + sum(self._stage_products(stage) for stage in range(len(self.depths))))

    def _stage_products(self, stage: int) -> int:
        c, side = self.stage_width(stage), self.stage_side(stage)
        window = min(self.window_size, side)  # a window shrinks to its map
        block = 4 * c * c + 2 * c * int(c * self.mlp_ratio) + 2 * window**2 * c
        merging = 2 * c * c if stage else 0
        return side**2 * (self.depths[stage] * block + merging)

    def problems(self) -> list[str]:
        """What does not fit together, one sentence each."""
        if len(self.depths) != len(self.num_heads):
            return [f"depths {list(self.depths)} and num_heads {list(self.num_heads)} differ in length"]
        found = []
        if self.pretrained_window_sizes and len(self.pretrained_window_sizes) != len(self.depths):
            windows = list(self.pretrained_window_sizes)
            found.append(f"depths {list(self.depths)} and pretrained_window_sizes {windows} differ in length")
        if any(window < 1 for window in self.pretrained_window_sizes):
            found.append(f"pretrained_window_sizes {list(self.pretrained_window_sizes)}: allowed are sizes from 1")
        if self.image_size % self.stride:
            found.append(f"image_size {self.image_size} is not a multiple of the stride {self.stride}")
        for stage, heads in enumerate(self.num_heads):
            side = self.stage_side(stage)
            if self.stage_width(stage) % heads:
                found.append(f"stage {stage}: width {self.stage_width(stage)} is not a multiple of {heads} heads")
            if side > self.window_size and side % self.window_size:
                found.append(f"stage {stage}: window_size {self.window_size} does not divide its {side}x{side} map")
        return found
