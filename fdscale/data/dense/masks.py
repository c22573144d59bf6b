"""Polygons and RLE to masks, as pycocotools draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from faster_coco_eval.mask_api_new_cpp import toUncompressedRLE
from numpy.typing import NDArray

from fdscale.config.errors import UserError


def draw_masks(segmentations: Sequence[Any], height: int, width: int, where: str) -> NDArray[np.uint8]:
    """Masks uint8 (n, height, width) of 0 and 1; each segmentation as the JSON has it: polygons, or one RLE.

    Raises UserError, with `where`, for an RLE that is none, and polygons that reach so far that no memory holds them.
    """
    masks = np.zeros((len(segmentations), height, width), np.uint8)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        try:
            mask[:] = rle.decode(_encoded(segmentation, height, width))
        except (ValueError, RuntimeError, MemoryError) as error:
            raise UserError(f"{where}: a segmentation cannot be decoded ({error!r}); correct it in the JSON") from error
    return masks


def pixels_told(compressed: Mapping[str, Any]) -> int:
    """How many pixels a compressed RLE speaks of; raises ValueError or RuntimeError for a text that is none."""
    (told,) = toUncompressedRLE([compressed])
    return int(sum(told["counts"]))


def _encoded(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    return rle.frPyObjects(segmentation, height, width) if isinstance(segmentation["counts"], list) else segmentation
