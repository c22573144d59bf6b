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
    _refuse_other_coordinates(student, weights)
    wanted = {name: tensor.shape for name, tensor in student.backbone.state_dict().items()}
    changed = [name for name, value in state.items() if name in wanted and value.shape != wanted[name]]
    positions = [name for name in changed if name.endswith((TABLE, POSITIONS))]
    fitted = {name: _fitted(name, state[name], student, weights) for name in positions}
    logger.info("%s", _told(student, weights, len(fitted)))
    return {**state, **fitted}


def _refuse_other_coordinates(student: Student, weights: Path) -> None:
    """timm's own SwinV2 normalises its coordinates by the window at hand, not by the one that the weights learned."""
    ours = student.geometry
    coordinates = any(hasattr(module, "relative_coords_table") for module in student.backbone.modules())
    if isinstance(ours, TimmGeometry) and coordinates and file_geometry(weights) != ours:
        raise UserError(
            f"student.resize: timm's {ours.name} would read {weights} by other coordinates at another size; take it "
            "through `fdscale import` and student.name=student_file, which keep them"
        )


def _fitted(name: str, value: Tensor, student: Student, weights: Path) -> Tensor:
    grid, is_table = student.grid, name.endswith(TABLE)
    wanted = student.backbone.state_dict()[name]
    prefix = 0 if is_table else wanted.shape[1] - grid[0] * grid[1]  # of DeiT III's positions none
    patches = len(value) - CLS_ROWS if is_table else value.shape[1] - prefix
    if round(patches**0.5) ** 2 != patches:
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
