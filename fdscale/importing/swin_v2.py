"""SwinV2: official feature distillation, SimMIM and Microsoft, with extra norms and other pre-training windows."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.importing.found import Found, Overrides, mlp_ratio, refuse_unknown, settled
from fdscale.importing.source import Source, StateDict
from fdscale.importing.windows import image_size_of, refuse_other_windows, stage_depths, with_timms_merging
from fdscale.students.geometry import SwinV2Geometry

OVERRIDES = ("window_size", "image_size", "pretrained_window_sizes", "normalisation")
NO_COORDINATES = (
    "it holds no coordinates of the position bias: taken as normalised by its own windows; add "
    "pretrained_window_sizes=[…] if it was pre-trained with others"
)


def read_swin_v2(source: Source, overrides: Overrides) -> Found:
    """A SwinV2 student. Windows, image size and pre-training windows are read off the file's buffers."""
    refuse_unknown(overrides, OVERRIDES, source.path)
    depths = stage_depths(source.tensors)
    width, _, patch, _ = source.shape("patch_embed.proj.weight", 4)
    windows = _windows(source, len(depths))
    read = {"window_size": max(windows, default=None), "image_size": image_size_of(source, windows, patch)}
    window_size, image_size = settled(read, overrides, source.path)
    refuse_other_windows(source, windows, window_size, image_size, patch)
    pretrained, notes = _pretrained_windows(source, windows, overrides)
    geometry = SwinV2Geometry(
        width,
        depths,
        tuple(source.shape(f"layers.{stage}.blocks.0.attn.logit_scale", 3)[0] for stage in range(len(depths))),
        window_size,
        image_size,
        patch,
        _extra_norm_period(source, depths),
        mlp_ratio(source.shape("layers.0.blocks.0.mlp.fc1.weight", 2)[0], width),
        pretrained,
    )
    return Found("SwinV2", geometry, _timms_names(source.tensors), notes=notes)


def _timms_names(tensors: StateDict) -> StateDict:
    return {key.replace(".rpe_mlp.", ".cpb_mlp."): value for key, value in with_timms_merging(tensors).items()}


def _of_stages(source: Source, buffer: str, stages: int) -> list[Tensor]:
    """A buffer of each stage's first block; empty unless every stage has it."""
    found = [source.buffers.get(f"layers.{stage}.blocks.0.attn.{buffer}") for stage in range(stages)]
    whole = [value for value in found if value is not None]
    return whole if len(whole) == stages else []


def _windows(source: Source, stages: int) -> list[int]:
    """The side of each stage's windows, by the index of its pairs of tokens (w^2, w^2); empty where there is none."""
    return [math.isqrt(index.shape[0]) for index in _of_stages(source, "relative_position_index", stages)]


def _pretrained_windows(
    source: Source, windows: Sequence[int], overrides: Overrides
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The windows that normalise each stage's coordinates, () where they are its own; and what to say about it."""
    given = overrides.get("pretrained_window_sizes")
    if given is not None and not (isinstance(given, list | tuple) and all(type(window) is int for window in given)):
        raise UserError(f"{source.path}: got pretrained_window_sizes={given!r}, allowed: one whole number per stage")
    tables = _of_stages(source, "relative_coords_table", len(windows))
    if not tables:
        return tuple(given or ()), () if given else (NO_COORDINATES,)
    found = tuple(_pretrained_window(table) for table in tables)
    if given is not None and tuple(given) != found:
        raise UserError(f"{source.path}: pretrained_window_sizes={given} was given, its tables say {list(found)}")
    _refuse_other_coordinates(source, windows, found)
    return (() if found == tuple(windows) else found), ()


def _refuse_other_coordinates(source: Source, windows: Sequence[int], pretrained: Sequence[int]) -> None:
    stages = [coordinates(*sizes) for sizes in zip(windows, pretrained, strict=True)]
    tables = {key: value for key, value in source.buffers.items() if key.endswith(".relative_coords_table")}
    for key, table in tables.items():
        stage = int(key.split(".")[1])
        fits = stage < len(stages) and table.shape == stages[stage].shape
        if not fits or not torch.allclose(table.float(), stages[stage], atol=1e-3):
            raise UserError(
                f"{source.path}: {key} is no table of SwinV2's log-spaced coordinates; it cannot be imported"
            )


def _pretrained_window(table: Tensor) -> int:
    """From the largest coordinate, log2(8 (w - 1) / (p - 1) + 1) / 3: p, the window that normalises it."""
    last, largest = (table.shape[1] - 1) // 2, float(table.max())
    return round(8 * last / (2 ** (3 * largest) - 1)) + 1 if last and largest > 0 else last + 1


def coordinates(window: int, pretrained: int) -> Tensor:
    """SwinV2's log-spaced coordinates (1, 2w - 1, 2w - 1, 2) (section 3.3): sign * log2(8 |d| / (p - 1) + 1) / 3."""
    offsets = torch.arange(1 - window, window, dtype=torch.float32) * 8 / max(pretrained - 1, 1)
    spaced = offsets.sign() * torch.log2(offsets.abs() + 1) / 3
    return torch.stack(torch.meshgrid(spaced, spaced, indexing="ij"), dim=-1)[None]


def _extra_norm_period(source: Source, depths: tuple[int, ...]) -> int:
    """k, where every k-th block of a stage and no other has an extra norm (official `enorm`); 0 for none."""
    extra = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.enorm\.weight")
    found = {(int(m[1]), int(m[2])) for m in map(extra.match, source.tensors) if m}
    if not found:
        return 0
    period = 1 + min(block for _, block in found)
    wanted = {(stage, b) for stage, depth in enumerate(depths) for b in range(depth) if (b + 1) % period == 0}
    if found != wanted:
        places = ", ".join(f"layers.{stage}.blocks.{block}" for stage, block in sorted(found)[:4])
        raise UserError(f"{source.path}: extra norms after {places} follow no period; they cannot be imported")
    return period
