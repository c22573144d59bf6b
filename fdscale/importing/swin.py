"""Swin, the first: Microsoft's, SimMIM's and EsViT's names become timm's."""

from __future__ import annotations

import math

from fdscale.config.errors import UserError
from fdscale.importing.found import Found, Overrides, mlp_ratio, refuse_unknown, settled
from fdscale.importing.source import Source
from fdscale.importing.windows import image_size_of, refuse_other_windows, stage_depths, with_timms_merging
from fdscale.students.geometry import TimmGeometry

TABLE = "layers.{}.blocks.0.attn.relative_position_bias_table"
OVERRIDES = ("image_size", "normalisation")


def read_swin(source: Source, overrides: Overrides) -> Found:
    """timm's SwinTransformer with the checkpoint's numbers; windows come from the bias tables."""
    refuse_unknown(overrides, OVERRIDES, source.path)
    depths = stage_depths(source.tensors)
    width, _, patch, _ = source.shape("patch_embed.proj.weight", 4)
    tables = [source.shape(TABLE.format(stage), 2) for stage in range(len(depths))]
    windows = [_window(source, rows) for rows, _ in tables]
    (image_size,) = settled({"image_size": image_size_of(source, windows, patch)}, overrides, source.path)
    refuse_other_windows(source, windows, windows[0], image_size, patch)
    arguments = {
        "embed_dim": width,
        "depths": depths,
        "num_heads": tuple(heads for _, heads in tables),
        "window_size": windows[0],
        "patch_size": patch,
        "mlp_ratio": mlp_ratio(source.shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0], width),
    }
    geometry = TimmGeometry("swin_base_patch4_window7_224", image_size, arguments)
    return Found("Swin", geometry, with_timms_merging(source.tensors))


def _window(source: Source, rows: int) -> int:
    """The side of a window whose table has (2w - 1)^2 rows."""
    side = math.isqrt(rows)
    if side**2 != rows or side % 2 == 0:
        raise UserError(f"{source.path}: a bias table of {rows} rows is of no square window; it cannot be imported")
    return (side + 1) // 2
