"""From teacher tokens to targets: prefix tokens, token grids, whitening."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.distill.layout import TokenLayout, layout_problems

WHITENING_EPS = 1e-5


@dataclass(frozen=True)
class TargetMaker:
    """Teacher tokens (B, N_t, C_t) -> targets (B, N_s, C_t), fp32, on the student's layout.

    `grid` is `exact`, `pool` (mean over whole cells) or `interpolate` (bilinear); `prefix_tokens` is `keep`
    (both networks have as many), `cls` (the first one of each: registers are left out) or `drop` (the loss sees
    patch tokens alone); `whiten` as in the paper, section 3.
    """

    teacher: TokenLayout
    student: TokenLayout
    grid: str = "exact"
    prefix_tokens: str = "keep"
    whiten: bool = True

    def __post_init__(self) -> None:
        if problems := layout_problems(self.teacher, self.student, self.grid, self.prefix_tokens):
            raise UserError("; ".join(problems))

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        prefix, patches = tokens.float().split([self.teacher.prefix_tokens, self.teacher_patches], dim=1)
        patches = match_grid(patches, self.teacher.grid, self.student.grid, self.grid)
        kept = torch.cat([prefix[:, : self.kept(self.teacher)], patches], dim=1)
        return whiten(kept) if self.whiten else kept

    def kept(self, layout: TokenLayout) -> int:
        """How many of a network's prefix tokens take part in the loss."""
        return {"keep": layout.prefix_tokens, "cls": 1, "drop": 0}[self.prefix_tokens]

    @property
    def tokens(self) -> int:
        """Tokens of an image that take part in the loss, N_s."""
        return self.kept(self.student) + self.student.grid[0] * self.student.grid[1]

    @property
    def teacher_patches(self) -> int:
        return self.teacher.grid[0] * self.teacher.grid[1]

    def of_student(self, tokens: Tensor) -> Tensor:
        """The student tokens (B, N, C) that have a target."""
        prefix, kept = self.student.prefix_tokens, self.kept(self.student)
        if kept == prefix:
            return tokens
        return torch.cat([tokens[:, :kept], tokens[:, prefix:]], dim=1) if kept else tokens[:, prefix:]


def whiten(tokens: Tensor) -> Tensor:
    """Each token to zero mean and unit variance over its channels: a LayerNorm without affine, eps 1e-5."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=WHITENING_EPS)


def match_grid(patches: Tensor, grid: tuple[int, int], wanted: tuple[int, int], how: str) -> Tensor:
    """Patch tokens (B, h*w, C) on `grid` -> (B, h'*w', C) on `wanted`, by `pool` or `interpolate`."""
    if grid == wanted:
        return patches
    maps = patches.transpose(1, 2).unflatten(2, grid)
    if how == "pool":
        resized = F.avg_pool2d(maps, (grid[0] // wanted[0], grid[1] // wanted[1]))
    else:
        resized = F.interpolate(maps, size=wanted, mode="bilinear", align_corners=False, antialias=True)
    return resized.flatten(2).transpose(1, 2)
