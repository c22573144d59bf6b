"""A teacher's shape and what follows from it: tokens, parameters, arithmetic; nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Value = int | float | list[int]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Blocks:
    """What a ViT has otherwise than the plain one (norm first, learned positions for all tokens, a two-layer MLP)."""

    stem_norm: bool = False  # CLIP: a norm before the first block, and a patch convolution without bias
    positions: Literal["all", "patches", "none"] = "all"  # the tokens that have a learned position
    rotary: bool = False
    biases: int = 3  # of the projections to q, k and v
    inner_norms: bool = False  # EVA-02: further norms inside attention and MLP
    layer_scale: bool = False
    gated: bool = False  # SwiGLU in place of GELU
    multiple: int = 1  # the MLP's hidden width is rounded up to a multiple
    activation: str | None = None  # in timm's words, where timm builds another than the weights were trained with


@dataclass(frozen=True)
class TeacherSpec:
    """A teacher whose shape is known before it is built.

    `depth` and `num_heads` are one number (ViT) or one per stage (Swin, where `embed_dim` is the first
    stage's). `pretrained` is the library's tag, `repository` and `file` where `fdscale fetch` finds the weights;
    all three are empty where no hub has them. `checkpoint_key` names the network to take from a file that holds a
    student and a teacher. `layer` takes the tokens of an earlier block (ViT) or stage (Swin), from 0: width, grid
    and counts are then those up to it.
    """

    source: Literal["timm", "open_clip"]
    model: str
    pretrained: str
    family: Literal["vit", "clip", "eva_clip", "siglip2", "dinov2", "dinov3", "swin"]
    licence: str
    embed_dim: int
    depth: int | tuple[int, ...]
    num_heads: int | tuple[int, ...]
    patch_size: int
    prefix_tokens: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_size: int = 224
    pretrained_size: int = 224  # the image side that the weights' positions were trained at
    mlp_ratio: float = 4.0
    window_size: int | None = None
    checkpoint_key: str = "teacher"
    repository: str = ""
    file: str = ""
    blocks: Blocks = Blocks()
    layer: int | None = None

    @property
    def layers(self) -> int:
        """How many layers `layer` may choose from: blocks of a ViT, stages of a Swin."""
        return len(self.depth) if isinstance(self.depth, tuple) else self.depth

    @property
    def stages(self) -> int:
        """Stages up to the layer taken; a ViT is one."""
        if not isinstance(self.depth, tuple):
            return 1
        return len(self.depth) if self.layer is None else self.layer + 1

    @property
    def has_norm(self) -> bool:
        """Whether a trained norm follows: a ViT's fits every block, a Swin's the last stage only."""
        return self.family != "swin" or self.stages == self.layers

    @property
    def width(self) -> int:
        """Channels of a token, C: each Swin stage doubles them."""
        return self.stage_width(self.stages - 1)

    @property
    def stride(self) -> int:
        """Pixels between neighbouring tokens."""
        return self.patch_size * 2 ** (self.stages - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Tokens (h, w) without the prefix tokens; a Swin stage rounds an odd map up."""
        side = self.stage_side(self.stages - 1)
        return side, side

    def stage_width(self, stage: int) -> int:
        return self.embed_dim * 2**stage

    def stage_side(self, stage: int) -> int:
        return -(-self.image_size // (self.patch_size * 2**stage))

    def hidden(self, width: int) -> int:
        """The MLP's hidden width, behind the gate where there is one."""
        return -(-int(width * self.mlp_ratio) // self.blocks.multiple) * self.blocks.multiple

    def parameters(self) -> int:
        """Parameters of the network up to the layer taken, its norm counted, pooling and classifier not."""
        stem = 3 * self.patch_size**2 * self.embed_dim
        if isinstance(self.depth, tuple):
            body = 3 * self.embed_dim + sum(self._swin_stage_parameters(stage) for stage in range(self.stages))
        else:
            body = self._vit_parameters()
        return stem + body + 2 * self.width * self.has_norm

    def flops(self) -> int:
        """Of one image's forward, 2 for each multiply-accumulate of a matrix product; softmax, norms not counted."""
        stem = 2 * self.stage_side(0) ** 2 * 3 * self.patch_size**2 * self.embed_dim
        if isinstance(self.depth, tuple):
            return stem + sum(self._swin_stage_flops(stage) for stage in range(self.stages))
        tokens = self.grid[0] * self.grid[1] + self.prefix_tokens
        return stem + self._vit_depth() * _block_flops(self, self.width, tokens, tokens, tokens)

    def _vit_depth(self) -> int:
        assert isinstance(self.depth, int)
        return self.depth if self.layer is None else self.layer + 1

    def _vit_parameters(self) -> int:
        """Prefix tokens, positions and blocks; the patch convolution's bias, or the norm that stands for it."""
        c, hidden, blocks = self.embed_dim, self.hidden(self.embed_dim), self.blocks
        tokens = {"all": self.prefix_tokens, "patches": 0, "none": 0}[blocks.positions]
        positions = 0 if blocks.positions == "none" else self.grid[0] * self.grid[1] + tokens
        stem = (2 if blocks.stem_norm else 1) * c + (self.prefix_tokens + positions) * c
        attention = 4 * c * c + (blocks.biases + 1) * c
        mlp = (3 * c * hidden + 2 * hidden if blocks.gated else 2 * c * hidden + hidden) + c
        inner_norms = 2 * c + 2 * hidden if blocks.inner_norms else 0
        return stem + self._vit_depth() * (attention + mlp + inner_norms + (6 if blocks.layer_scale else 4) * c)

    def _swin_stage_parameters(self, stage: int) -> int:
        assert isinstance(self.depth, tuple)
        assert isinstance(self.num_heads, tuple)
        c, hidden = self.stage_width(stage), self.hidden(self.stage_width(stage))
        bias_table = (2 * self._window(stage) - 1) ** 2 * self.num_heads[stage]
        block = 4 * c * c + 4 * c + bias_table + 2 * c * hidden + hidden + c + 4 * c
        merging = 2 * c * c + 4 * c if stage else 0  # a norm of 4(c/2), then 4(c/2) -> c
        return self.depth[stage] * block + merging

    def _swin_stage_flops(self, stage: int) -> int:
        """Of one stage; attention sees a map padded to whole windows."""
        assert isinstance(self.depth, tuple)
        c, side, window = self.stage_width(stage), self.stage_side(stage), self._window(stage)
        padded = (-(-side // window) * window) ** 2
        merging = 2 * side**2 * 2 * c * c if stage else 0
        return self.depth[stage] * _block_flops(self, c, side**2, padded, window**2) + merging

    def _window(self, stage: int) -> int:
        """A stage's window: as the table says, or its whole map where that is smaller."""
        assert self.window_size is not None
        return min(self.window_size, self.image_size // self.patch_size // 2**stage)


def _block_flops(spec: TeacherSpec, width: int, tokens: int, attending: int, attended: int) -> int:
    """Of one block: `attending` tokens are projected, each looks at `attended`; the MLP sees `tokens`."""
    attention = 4 * width * width + 2 * attended * width
    mlp = (3 if spec.blocks.gated else 2) * width * spec.hidden(width)
    return 2 * (attending * attention + tokens * mlp)


@dataclass(frozen=True)
class UnbuiltTeacher:
    """A teacher whose shape only the network tells: `timm:NAME`, a student file, or one's own from Python (`own`)."""

    source: Literal["timm", "student_file", "own"]
    model: str  # timm's name, or the student file's path
    image_size: int | None
    overrides: Mapping[str, Value]
    checkpoint_key: str = "teacher"
    licence: str = "unknown: ask the source"
    layer: int | None = None
    width: None = None
    grid: None = None
    prefix_tokens: None = None
