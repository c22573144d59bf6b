"""Which box is to find which object: boxes matched, drawn, and what they are taught."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.ops import box_iou

if TYPE_CHECKING:
    from fdscale.data.dense.batches import Objects


@dataclass(frozen=True)
class Matched:
    """The n boxes of one image, and what each is to find.

    `boxes` fp32 (n, 4); `labels` (n,) from 0, background: the number of classes; `objects` (n,): which object, 0 for
    background; `targets` (n, 4): that object's box.
    """

    boxes: Tensor
    labels: Tensor
    objects: Tensor
    targets: Tensor

    def at(self, index: Tensor) -> Matched:
        """The boxes of an index or mask alone."""
        return Matched(self.boxes[index], self.labels[index], self.objects[index], self.targets[index])


def with_area(objects: Objects) -> Objects:
    """Without the objects whose boxes have no area: those would match every anchor, and teach an infinite width."""
    boxes = objects.boxes.float()
    kept = has_area(boxes)
    if kept.all():
        return objects  # all masks of an image are large: they are not copied for nothing
    masks = None if objects.masks is None else objects.masks[kept]
    return replace(objects, boxes=boxes[kept], labels=objects.labels[kept], masks=masks)


def has_area(boxes: Tensor) -> Tensor:
    """Bool (...): which boxes (..., 4) are wider and higher than nothing."""
    return (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])


def by_box(numbers: Tensor) -> Tensor:
    """(n, 4 * k) -> (n, k, 4), for no rows at all, too."""
    return numbers.unflatten(1, (numbers.shape[1] // 4, 4))


def match(boxes: Tensor, objects: Objects, overlap: float, background: int) -> Matched:
    """Each box (n, 4) with the object that it overlaps most, background where that is less than `overlap`."""
    if not len(objects.boxes):
        none = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        return Matched(boxes, torch.full_like(none, background), none, torch.zeros_like(boxes))
    most, which = box_iou(objects.boxes, boxes).max(dim=0)
    labels = torch.where(most >= overlap, objects.labels[which], background)
    return Matched(boxes, labels, which, objects.boxes[which])


def drawn(matched: Matched, number: int, positives: float, background: int) -> Matched:
    """At most `number` of an image's boxes, at most that share `positives`; from torch's global generator."""
    sampler = BalancedPositiveNegativeSampler(number, positives)
    chosen = sampler([(matched.labels != background).long()])
    return matched.at((chosen[0][0] | chosen[1][0]).bool())


def box_losses(logits: Tensor, offsets: Tensor, matched: Sequence[Matched], coder: BoxCoder) -> tuple[Tensor, Tensor]:
    """Cross entropy and L1 of a stage, both means over all N boxes of the micro batch; 0 where there are none.

    `logits` (N, classes + 1), `offsets` (N, 4), or (N, 4 * classes) with those of each class.
    """
    background, number = logits.shape[1] - 1, max(len(logits), 1)
    together = Matched(*(torch.cat(part) for part in zip(*(_parts(own) for own in matched), strict=True)))
    loss_class = F.cross_entropy(logits, together.labels, reduction="sum") / number
    positive = torch.where(together.labels != background)[0]
    own = together.at(positive)
    by_class = by_box(offsets)
    told = by_class[positive, own.labels if by_class.shape[1] > 1 else 0]
    wanted = coder.encode_single(own.targets, own.boxes)
    return loss_class, (told - wanted).abs().sum() / number


def _parts(matched: Matched) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return matched.boxes, matched.labels, matched.objects, matched.targets
