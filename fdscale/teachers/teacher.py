"""A teacher: a frozen network that takes pixels as everyone has them and gives tokens in float32."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.spec import TeacherSpec, UnbuiltTeacher
from fdscale.tokens import as_tokens


class Float32LayerNorm(nn.LayerNorm):
    """A LayerNorm that computes in float32 whatever its input's and its weights' dtype."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> Float32LayerNorm:
        """The same parameters, in float32, in a new module."""
        new = cls(list(norm.normalized_shape), norm.eps, norm.elementwise_affine, norm.bias is not None)
        new.load_state_dict(norm.state_dict())
        return new

    def forward(self, input: Tensor) -> Tensor:
        weight = None if self.weight is None else self.weight.float()
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(input.float(), self.normalized_shape, weight, bias, self.eps)


class Teacher(nn.Module):
    """A frozen backbone with its own input statistics, its final norm apart, and its token layout.

    `backbone` is any nn.Module that maps normalised images (B, 3, H, W) to tokens (B, N, C), or to maps
    (B, h, w, C) or (B, C, h, w), which become tokens row by row; N counts the prefix tokens, which come
    first. `final_norm` is applied in float32; None where the backbone has it inside. `rounded_norm` rounds its
    output to the backbone's precision, as the official implementation does (method, section 1.4). `mean`, `std`
    are for pixels in [0, 1]; `image_size` is the side in pixels. The module stays in eval mode, needs no
    gradient, and `.train()` does not wake it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: nn.Module,
        *,
        width: int,
        grid: tuple[int, int],
        prefix_tokens: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
        final_norm: nn.Module | None = None,
        after_norm: bool = True,
        rounded_norm: bool = False,
    ) -> None:
        super().__init__()
        self.backbone, self.final_norm = backbone, final_norm
        self.after_norm, self.rounded_norm = after_norm, rounded_norm
        self.width, self.grid, self.prefix_tokens, self.image_size = width, grid, prefix_tokens, image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.register_buffer("scale", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("shift", torch.empty(3, 1, 1), persistent=False)
        self._fill_statistics()
        self.requires_grad_(False).eval()

    @torch.no_grad()  # not inference_mode: its tensors cannot be saved for the student's backward pass
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in [0, 1], any H and W -> tokens (B, prefix + h*w, C) float32."""
        # the backbone's precision is its weights', also inside the student's autocast
        with torch.autocast(pixels.device.type, enabled=False):
            images = self.prepare(pixels)
            # the backbone's own __call__: a partitioned teacher gathers its weights around calls only
            raw = as_tokens(self.backbone(images), self.width)
            tokens = raw.float()
            if self.final_norm is not None and self.after_norm:
                tokens = self.final_norm(tokens)
                tokens = tokens.to(raw.dtype) if self.rounded_norm else tokens
        return tokens.float()

    def prepare(self, pixels: Tensor) -> Tensor:
        """The backbone's input: resized where the size differs, normalised in float32, then cast.

        Resized as officially: bilinear, not antialiased, corners not aligned.
        """
        pixels, size = pixels.float(), (self.image_size, self.image_size)
        if tuple(pixels.shape[-2:]) != size:
            pixels = F.interpolate(pixels, size, mode="bilinear", align_corners=False)
        images = torch.addcmul(self.shift, pixels, self.scale)
        weight = next(self.backbone.parameters(), None)
        return images if weight is None else images.to(weight.dtype)

    def train(self, mode: bool = True) -> Teacher:
        """Stays in eval mode: dropout and drop path are the student's alone."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Teacher:
        super()._apply(fn, recurse)
        self._fill_statistics()  # a cast to half precision must not round the input statistics
        return self

    def _fill_statistics(self) -> None:
        device = self.scale.device
        std = torch.tensor(self.std, dtype=torch.float64)
        shift = -torch.tensor(self.mean, dtype=torch.float64) / std
        self.scale = (1 / std).float().view(3, 1, 1).to(device)
        self.shift = shift.float().view(3, 1, 1).to(device)


def build_teacher(
    spec: TeacherSpec | UnbuiltTeacher,
    weights: str,
    *,
    after_norm: bool = True,
    rounded_norm: bool = False,
    dtype: torch.dtype = torch.float32,
    checkpoint_key: str | None = None,
    device: str = "cpu",
) -> Teacher:
    """The teacher of `teacher_geometry`, its backbone in `dtype` and its final norm in float32; downloads nothing.

    `weights`: "random" (drawn from a fixed seed, so every rank and every resumed run has the same), or a file in
    its original layout. `checkpoint_key` chooses "student" or "teacher" in a file that holds both (None: the
    table's choice). On the device "meta" it has shapes only, and its weights must be "random". The caller's random
    state is left alone. Raises UserError where a file cannot be read, its keys do not fit, or a setting does not.
    """
    assert device != "meta" or weights == "random", "a file's weights have values"
    with torch.random.fork_rng(devices=[]), torch.device("meta") if device == "meta" else nullcontext():
        torch.manual_seed(0)
        teacher = _build(spec, weights, checkpoint_key or spec.checkpoint_key)
    _refuse_no_norm(teacher, spec.model, after_norm, rounded_norm)
    teacher.after_norm, teacher.rounded_norm = after_norm, rounded_norm
    _cast(teacher.backbone, dtype)
    return teacher.to(device)


def _refuse_no_norm(teacher: Teacher, model: str, after_norm: bool, rounded_norm: bool) -> None:
    if teacher.final_norm is None and not after_norm:
        raise UserError(f"teacher.after_norm=false: {model} has no final norm that can be left out")
    if teacher.final_norm is None and rounded_norm:
        raise UserError(f"teacher.rounded_norm=true: {model} has no final norm apart from it; leave it out")
    if rounded_norm and not after_norm:
        raise UserError("teacher.rounded_norm=true, but teacher.after_norm=false leaves that norm out; set one of them")


def _cast(backbone: nn.Module, dtype: torch.dtype) -> None:
    """The network to `dtype`, but for its rotary embedding: rounded angles would move the positions."""
    rope = getattr(backbone, "rope", None)
    if isinstance(rope, nn.Module):
        backbone.register_module("rope", None)
    backbone.to(dtype)
    if isinstance(rope, nn.Module):
        backbone.register_module("rope", rope)


def _build(spec: TeacherSpec | UnbuiltTeacher, weights: str, key: str) -> Teacher:
    if isinstance(spec, UnbuiltTeacher):
        if spec.source == "own":
            raise UserError("teacher.name=own: give the network to fdscale.train.distill(settings, teacher=…)")
        assert spec.source == "timm", "fdscale.build makes a teacher of a student file"
        from fdscale.teachers.from_timm import any_timm_teacher

        return any_timm_teacher(spec, weights, key)
    if spec.source == "open_clip":
        from fdscale.teachers.from_open_clip import open_clip_teacher

        return open_clip_teacher(spec, weights, key)
    from fdscale.teachers.from_timm import timm_teacher

    return timm_teacher(spec, weights, key)
