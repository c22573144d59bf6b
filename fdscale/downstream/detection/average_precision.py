"""COCO's average precision of boxes and masks, by faster-coco-eval, whose numbers are pycocotools'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fdscale.config.errors import UserError

Detection = Mapping[str, Any]
NAMES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")  # the first six of COCO's statistics
KINDS = {"box": ("bbox", "bbox"), "mask": ("segm", "segmentation")}


def coco_metrics(
    annotations: Path | Mapping[str, Any], detections: Sequence[Detection], image_ids: Sequence[int], masks: bool
) -> dict[str, float]:
    """`box_ap`, `box_ap50`, `box_ap75`, `box_ap_small`, `_medium`, `_large` in [0, 1], and with `masks` `mask_ap` etc.

    `annotations`: COCO's JSON, or what it holds. A detection has `image_id`, `category_id`, `score`, `bbox` [x, y, w,
    h], and `segmentation`, run lengths, where masks are judged. `image_ids`: the images that were looked at. What no
    object speaks for, as small ones where there are none, is left out. Raises UserError for a JSON that is none.
    """
    from faster_coco_eval import COCO

    try:
        truth = COCO(str(annotations) if isinstance(annotations, Path) else _copied(annotations))
    except (OSError, ValueError, KeyError, AssertionError) as error:
        raise UserError(f"{annotations}: not annotations as COCO has them: {error!r}") from error
    found: dict[str, float] = {}
    for kind in ("box", "mask") if masks else ("box",):
        numbers = _statistics(truth, kind, detections, image_ids)
        found |= {f"{kind}_{name}": value for name, value in zip(NAMES, numbers, strict=True) if value >= 0}
    return found


def _statistics(truth: Any, kind: str, detections: Sequence[Detection], image_ids: Sequence[int]) -> list[float]:
    """COCO's first six statistics; -1 where nothing speaks for one.

    Each kind gets its own shape alone: with a box beside it a mask would be as large as that.
    """
    from faster_coco_eval import COCOeval_faster

    by, shape = KINDS[kind]
    keys = ("image_id", "category_id", "score", shape)
    results = truth.loadRes([{key: each[key] for key in keys} for each in detections])
    judge = COCOeval_faster(truth, results, by, print_function=lambda *_: None)
    judge.params.imgIds = sorted(image_ids)
    judge.evaluate()
    judge.accumulate()
    judge.summarize()
    return [float(value) for value in judge.stats[: len(NAMES)]]


def _copied(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """The library writes into what it is given."""
    return {
        key: [dict(each) for each in value] if isinstance(value, list) else value for key, value in annotations.items()
    }
