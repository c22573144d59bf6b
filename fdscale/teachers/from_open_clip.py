"""CLIP teachers that open_clip builds: the vision tower alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import nn

from fdscale.config.errors import UserError
from fdscale.teachers.layouts import to_open_clip
from fdscale.teachers.spec import TeacherSpec
from fdscale.teachers.teacher import Float32LayerNorm, Teacher
from fdscale.teachers.weights import load_strictly, read_state_dict


def open_clip_teacher(spec: TeacherSpec, weights: str, checkpoint_key: str) -> Teacher:
    """A CLIP teacher of the table. Raises UserError where its weights do not fit."""
    tower = _tower(spec)
    if weights != "random":
        grid = spec.grid if spec.image_size != spec.pretrained_size else None
        state = to_open_clip(read_state_dict(Path(weights), checkpoint_key), grid)
        load_strictly(tower, state, Path(weights), f"open_clip's {spec.model}")
    if spec.layer is not None:
        tower.transformer.resblocks = tower.transformer.resblocks[: spec.layer + 1]
    norm = Float32LayerNorm.of(tower.ln_post)
    tower.ln_post = nn.Identity()
    return Teacher(
        tower,
        final_norm=norm,
        width=spec.width,
        grid=spec.grid,
        prefix_tokens=spec.prefix_tokens,
        mean=spec.mean,
        std=spec.std,
        image_size=spec.image_size,
    )


def _tower(spec: TeacherSpec) -> Any:
    """The vision tower, whose own call gives all tokens, CLS first; the text tower is let go at once."""
    device = torch.get_default_device()  # open_clip moves what it built to a device of its own choice
    try:
        tower = open_clip.create_model(spec.model, device=device, vision_cfg=_vision(spec)).visual
    except Exception as error:  # open_clip's layers raise whatever torch does
        raise UserError(f"teacher.geometry: open_clip cannot build {spec.model} ({error})") from error
    tower.proj = None
    return tower


def _vision(spec: TeacherSpec) -> dict[str, Any]:
    """The table's shape in open_clip's words; without pooling, a call returns every token."""
    assert isinstance(spec.num_heads, int)
    return {
        "image_size": spec.image_size,
        "patch_size": spec.patch_size,
        "width": spec.embed_dim,
        "layers": spec.depth,
        "head_width": spec.embed_dim // spec.num_heads,
        "mlp_ratio": spec.mlp_ratio,
        "pool_type": "none",
    }
