"""CLIP teachers that open_clip builds: the vision tower alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import nn

from fdscale.config.errors import UserError
from fdscale.teachers.table import TeacherSpec
from fdscale.teachers.teacher import Float32LayerNorm, Teacher
from fdscale.teachers.weights import StateDict, clip_vision, load_strictly, read_state_dict


def open_clip_teacher(spec: TeacherSpec, weights: str | None, checkpoint_key: str, after_norm: bool) -> Teacher:
    """A CLIP teacher of the table. Raises UserError where its weights cannot be had or do not fit."""
    tower = _tower(spec, weights)
    if weights not in (None, "random"):
        path = Path(str(weights))
        state = clip_vision(read_state_dict(path, checkpoint_key))
        if spec.image_size != spec.pretrained_size:
            state = _resampled(state, spec.grid)
        load_strictly(tower, state, path, f"open_clip's {spec.model}")
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
        after_norm=after_norm,
    )


def _tower(spec: TeacherSpec, weights: str | None) -> Any:
    """The vision tower, whose own call gives all tokens, CLS first; the text tower is let go at once."""
    pretrained = spec.pretrained if weights is None else None
    try:
        tower = open_clip.create_model(spec.model, pretrained=pretrained, vision_cfg=_vision(spec)).visual
    except Exception as error:  # the hub's clients share no base class of their errors
        if weights is None:
            raise UserError(
                f"teacher.weights: open_clip cannot fetch {spec.model} from the hub ({error}); "
                "pass teacher.weights=FILE with a downloaded copy, or teacher.weights=random for a trial"
            ) from error
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


def _resampled(state: StateDict, grid: tuple[int, int]) -> StateDict:
    """Positions fitted to another image size by timm's bicubic resampling, as for the timm teachers."""
    positions = state.get("positional_embedding")
    if positions is None or len(positions) == grid[0] * grid[1] + 1:
        return state
    return {**state, "positional_embedding": resample_abs_pos_embed(positions[None], list(grid))[0]}
