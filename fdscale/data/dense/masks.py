"""Polygons and RLE to masks, as pycocotools draws them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from fdscale.config.errors import UserError


def draw_masks(segmentations: Sequence[Any], height: int, width: int, where: str) -> NDArray[np.uint8]:
    """Masks uint8 (n, height, width) of 0 and 1; each segmentation as the JSON has it: polygons, or one RLE.

    Raises UserError, with `where`, for an RLE that is none.
    """
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        try:
            mask[:] = rle.decode(_encoded(segmentation, height, width))
        except (ValueError, RuntimeError) as error:
            raise UserError(f"{where}: a segmentation cannot be decoded ({error}); correct it in the JSON") from error
    return masks


def _encoded(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
