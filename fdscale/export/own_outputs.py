"""fdscale's own outputs for a few images at several sizes: what an export is compared with."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fdscale.build.networks import as_pixels
from fdscale.config.errors import UserError
from fdscale.data.images import ImageReader
from fdscale.data.index import Index
from fdscale.export.finished import HEAD, NEW_NORM, Finished
from fdscale.students.files import load_weights
from fdscale.students.geometry import Geometry, OwnGeometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student

Size = tuple[int, int]
logger = logging.getLogger(__name__)

BATCH = 2
FACTORS = ((3, 4), (3, 2), (1, 2))  # of the trained size: there most windows of a SwinV2 still fit


def sizes_of(geometry: Geometry) -> list[Size]:
    """The trained size and five others (height, width): smaller, larger, a step of the grid larger, and not square.

    A timm network that takes no other size than its own has that one alone.
    """
    assert not isinstance(geometry, OwnGeometry), "its student has no file"
    size, step = _size_and_step(geometry)
    if step == 0:
        return [(size, size)]
    scaled = [size * up // down for up, down in FACTORS if size * up % (down * step) == 0]
    larger = [size + steps * step for steps in (1, 3, 5, 7)]
    squares = list(dict.fromkeys([side for side in scaled if side >= 2 * step] + larger))[:4]
    return [*((side, side) for side in [size, *squares]), (size, size + 2 * step)]


def _size_and_step(geometry: ViTGeometry | SwinV2Geometry | TimmGeometry) -> Size:
    """The trained size and the stride of the grid; 0 for a network that takes one size alone."""
    if not isinstance(geometry, TimmGeometry):
        return geometry.image_size, geometry.stride
    student = build_student(geometry, device="meta")
    backbone: Any = student.backbone
    fixed = backbone.pretrained_cfg.get("fixed_input_size", False)
    return student.image_size, 0 if fixed else student.image_size // student.grid[0]


def sample_images(sizes: Sequence[Size], shown: Index | None) -> tuple[dict[Size, Tensor], str]:
    """Two images at each size, uint8 (2, 3, H, W), and what they are: the run's own, else drawn from a fixed seed."""
    images = [] if shown is None else _read(shown)
    told = "images of the run's shards" if images else "images drawn from a fixed seed"
    images = images or [_drawn(seed) for seed in range(BATCH)]
    batches = {size: np.stack([np.asarray(_fitted(image, size)) for image in images]) for size in sizes}
    return {size: torch.from_numpy(batch).permute(0, 3, 1, 2).contiguous() for size, batch in batches.items()}, told


def _read(shown: Index) -> list[Image.Image]:
    """Two images of these shards; none where only their index is left."""
    try:
        reader = ImageReader(shown)
        images = [reader.decode_or_next(sample).image for sample in (0, len(shown) // 2)]
        reader.close()
    except (UserError, OSError) as error:
        logger.warning("the run's images are left out: %s", error)
        return []
    return images


def _fitted(image: Image.Image, size: Size) -> Image.Image:
    return image.resize((size[1], size[0]), Image.Resampling.BICUBIC)


def _drawn(seed: int) -> Image.Image:
    """Smooth colours with finer and fainter detail on top, as in photographs."""
    draw, picture = np.random.default_rng(seed), np.full((256, 256, 3), 127.5)
    for cells, strength in ((4, 60.0), (16, 30.0), (64, 15.0)):
        noise = draw.normal(0, 1, (cells, cells, 3)).clip(-2, 2)
        layer = Image.fromarray(((noise + 2) * 63).astype(np.uint8)).resize((256, 256), Image.Resampling.BICUBIC)
        picture += strength * (np.asarray(layer) / 63.0 - 2)
    return Image.fromarray(picture.clip(0, 255).astype(np.uint8))


@torch.no_grad()
def own_outputs(finished: Finished, images: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """Tokens (B, N, C) of a student or logits (B, classes) of a classifier, under the images' names; and the width."""
    student = build_student(finished.geometry).eval()
    load_weights(student, finished.weights)
    head = load_file(finished.head.weights) if finished.head else None
    outputs = {}
    for name, batch in images.items():
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="timm")  # on how it indexes while it interpolates
            _resize(student, finished, (batch.shape[-2], batch.shape[-1]))
        pixels = as_pixels(batch)
        outputs[name] = (student(pixels) if head is None else _logits(student, head, pixels)).contiguous()
    return outputs, student.width


def _resize(student: Student, finished: Finished, size: Size) -> None:
    """Fit a student to an image size: a SwinV2 keeps its windows, a ViT's position biases are interpolated."""
    geometry, backbone = finished.geometry, student.backbone
    assert isinstance(backbone, nn.Module)
    resize: Any = getattr(backbone, "set_input_size", None)
    if isinstance(geometry, SwinV2Geometry):
        resize(img_size=size, window_size=geometry.window_size)
    elif isinstance(geometry, ViTGeometry):
        resize(img_size=(geometry.image_size, geometry.image_size))
        load_weights(student, finished.weights)  # from the trained tables, not from interpolated ones
        resize(img_size=size)


def _logits(student: Student, head: Mapping[str, Tensor], pixels: Tensor) -> Tensor:
    """What a classifier computes: the mean of the patch tokens, a new norm where it has one, the linear head."""
    backbone: Any = student.backbone
    norm, new = getattr(backbone, "norm", None), f"{NEW_NORM}weight" in head
    if new:
        backbone.norm = nn.Identity()
    pooled = student(pixels)[:, student.prefix_tokens :].float().mean(dim=1)
    if new:
        assert isinstance(norm, nn.LayerNorm)
        backbone.norm = norm
        pooled = F.layer_norm(
            pooled, pooled.shape[-1:], head[f"{NEW_NORM}weight"], head.get(f"{NEW_NORM}bias"), norm.eps
        )
    return F.linear(pooled, head[f"{HEAD}weight"], head[f"{HEAD}bias"])
