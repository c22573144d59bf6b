"""Weights of another image size or window, fitted to a student: only what depends on positions changes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from timm.layers.pos_embed import resample_abs_pos_embed
from timm.layers.pos_embed_rel import resize_rel_pos_bias_table
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry, file_geometry
from fdscale.students.student import Student

logger = logging.getLogger(__name__)

TABLE, POSITIONS = "relative_position_bias_table", "pos_embed"
CLS_ROWS = 3  # of a ViT's bias table, behind those of its patches


def resized(state: Mapping[str, Tensor], student: Student, weights: Path) -> dict[str, Tensor]:
    """The state of the file `weights` for this student, as timm resizes it; the log says from what to what.

    A ViT's bias tables are interpolated on BEiT's geometric grid (linearly: SciPy has lost the cubic `interp2d`),
    absolute positions bicubically; rows of prefix tokens stay. A SwinV2 computes its biases: its coordinates keep the
    windows that its geometry names. Tensors of the right shape are returned as they are. Raises UserError for positions
    that do not come from a square.
    """
    wanted = {name: tensor.shape for name, tensor in student.backbone.state_dict().items()}
    changed = [name for name, value in state.items() if name in wanted and value.shape != wanted[name]]
    positions = [name for name in changed if name.endswith((TABLE, POSITIONS))]
    fitted = {name: _fitted(name, state[name], student, weights) for name in positions}
    logger.info("%s", _told(student, weights, len(fitted)))
    return {**state, **fitted}


def _fitted(name: str, value: Tensor, student: Student, weights: Path) -> Tensor:
    grid, prefix = student.grid, student.prefix_tokens
    is_table = name.endswith(TABLE)
    side = round((len(value) - CLS_ROWS if is_table else value.shape[1] - prefix) ** 0.5)
    if side**2 != (len(value) - CLS_ROWS if is_table else value.shape[1] - prefix):
        raise UserError(f"{weights}: {name} {tuple(value.shape)} is of no square grid, and cannot be resized")
    if not is_table:
        return resample_abs_pos_embed(value, list(grid), num_prefix_tokens=prefix)
    rows = (2 * grid[0] - 1) * (2 * grid[1] - 1) + CLS_ROWS
    return resize_rel_pos_bias_table(value, grid, (rows, value.shape[1]))


def _told(student: Student, weights: Path, tensors: int) -> str:
    held, ours = file_geometry(weights), student.geometry
    if isinstance(held, SwinV2Geometry) and isinstance(ours, SwinV2Geometry):
        windows = f", coordinates as of windows {list(ours.coordinate_windows)}"
        was, is_ = f"window {held.window_size}", f"window {ours.window_size}"
        return f"{weights}: {held.image_size} px, {was}, taken for {ours.image_size} px, {is_}{windows}"
    assert isinstance(held, ViTGeometry | TimmGeometry)
    size = held.image_size or "its own"
    return f"{weights}: {size} px taken for {student.image_size} px: {tensors} tensors of positions resized"
