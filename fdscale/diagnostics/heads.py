"""Classifiers of subjects: the one that a run left beside its student, or a linear one fitted to the features."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from fdscale.build.result import NEW_NORM
from fdscale.config.errors import UserError
from fdscale.students.files import read_weights
from fdscale.students.student import Student
from fdscale.students.swin_v2 import Linear32
from fdscale.teachers.teacher import Float32LayerNorm
from fdscale.training.linear import Features, best_linear

WEIGHT = "head.weight"


class PooledNormHead(nn.Sequential):
    """A classifier with a norm of its own behind the pooling: it is given tokens without the final norm before it."""


@contextmanager
def without_final_norm(backbone: nn.Module) -> Iterator[None]:
    """Inside, the network gives the tokens that its final `norm` is given; afterwards it has it again."""
    norm = backbone.norm
    backbone.norm = nn.Identity()
    try:
        yield
    finally:
        backbone.norm = norm


def run_head(student: Student, file: Path) -> nn.Module:
    """The classifier in `file`, a run's `classifier.safetensors`, for the student of the student file beside it.

    Maps the mean of the patch tokens (B, C) to logits (B, classes), fp32, as the run's own. Where the file has a norm
    after pooling, which the student file has as its final norm, it is a `PooledNormHead`. Raises UserError for a file
    that is no classifier, or one of another student.
    """
    held = read_weights(file)
    if WEIGHT not in held:
        raise UserError(f"{file}: no classifier's file: it has no {WEIGHT}; name the one beside the student's file")
    parts: dict[str, nn.Module] = {"head": Linear32(student.width, len(held[WEIGHT]))}
    new_norm = any(name.startswith(NEW_NORM) for name in held)
    if new_norm:
        parts = {NEW_NORM.rstrip("."): _norm_like_the_final(student, file), **parts}
    head = (PooledNormHead if new_norm else nn.Sequential)(OrderedDict(parts))
    try:
        head.load_state_dict(held)
    except RuntimeError as error:  # other names or shapes
        raise UserError(f"{file}: not the classifier of a student of width {student.width}: {error}") from error
    return head.eval().requires_grad_(False)


def _norm_like_the_final(student: Student, file: Path) -> Float32LayerNorm:
    norm = getattr(student.backbone, "norm", None)
    if not isinstance(norm, nn.LayerNorm):
        raise UserError(
            f"{file}: its {NEW_NORM}* takes the place of a final LayerNorm, which this student has not; "
            "load the student file beside it"
        )
    return Float32LayerNorm(student.width, eps=norm.eps, bias=norm.bias is not None)


def fitted_head(features: Tensor, labels: Tensor) -> nn.Linear:
    """A linear classifier fitted to features (S, C), fp32, and their labels (S,), as `fdscale probe` fits it.

    Standardised, L-BFGS, the penalty chosen by every tenth row; standardisation is then folded into the layer, which
    has as many classes as the highest label says. It takes memory of a hundred times its weights.
    """
    known = Features(features, labels, torch.arange(len(labels), device=labels.device))
    mean, deviation = known.standard()
    layer, _ = best_linear(known.by((mean, deviation)), int(labels.max()) + 1)
    with torch.no_grad():
        layer.weight.div_(deviation)
        layer.bias.sub_(layer.weight @ mean)
    return layer.eval().requires_grad_(False)
