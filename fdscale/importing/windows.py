"""What Swin's buffers and tables tell of windows and image size."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from fdscale.config.errors import UserError
from fdscale.importing.source import Source, StateDict


def stage_depths(tensors: StateDict) -> tuple[int, ...]:
    """Blocks of each stage."""
    blocks = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.")
    found = [(int(m[1]), int(m[2])) for m in map(blocks.match, tensors) if m]
    stages = 1 + max(stage for stage, _ in found)
    return tuple(1 + max((b for s, b in found if s == stage), default=-1) for stage in range(stages))


def with_timms_merging(tensors: StateDict) -> StateDict:
    """The originals name a merging by the stage that it ends, timm by the one that it opens."""
    if not any(key.startswith("layers.0.downsample.") for key in tensors):
        return tensors  # timm's names
    merging = re.compile(r"^layers\.(\d+)\.downsample\.")
    return {merging.sub(lambda m: f"layers.{int(m[1]) + 1}.downsample.", key): value for key, value in tensors.items()}


def image_size_of(source: Source, windows: Sequence[int], patch: int) -> int | None:
    """From the masks of shifted windows, one per window of the map; or from the first window that shrank to its map."""
    masks = [(stage, math.isqrt(mask[0]) * math.isqrt(mask[1])) for stage, mask in _masks(source).items()]
    shrunk = [(stage, window) for stage, window in enumerate(windows) if window < windows[0]]
    for stage, side in [*masks, *shrunk]:
        return side * patch * 2**stage
    return None


def refuse_other_windows(source: Source, windows: Sequence[int], window_size: int, image_size: int, patch: int) -> None:
    """Raises UserError unless these sizes make the windows and masks that the file has."""
    for stage, window in enumerate(windows):
        side = image_size // patch // 2**stage
        mask = _masks(source).get(stage)
        windows_of_map = math.ceil(side / window) ** 2
        if window != min(window_size, side) or (mask and mask[:2] != (windows_of_map, window**2)):
            raise UserError(
                f"{source.path}: window_size={window_size} and image_size={image_size} do not fit stage {stage}, "
                f"whose {side}x{side} map has windows of {window}{f' and masks {mask}' if mask else ''}; "
                "square images and windows can be imported"
            )


def _masks(source: Source) -> dict[int, tuple[int, ...]]:
    """Stage -> the shape (windows, N, N) of its masks."""
    masks = {key: value for key, value in source.buffers.items() if key.endswith(".attn_mask")}
    return {int(key.split(".")[1]): tuple(value.shape) for key, value in masks.items()}
