"""What the dense programs are fed with: micro batches of crops in training, single images in evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fdscale.data.batches import PADDING


@dataclass(frozen=True)
class SegmentBatch:
    """One micro batch of B crops with side S, as a person sees them; nothing is normalised yet.

    `images` uint8 (B, 3, S, S); `labels` uint8 (B, S, S), 255 ignored; `keys` int64 (B,), the bit pattern of the
    uint64 sample key, always on the CPU; `rows`: which rows of the step's global batch these are; `bad`: names of
    the undecodable images met here, each of them replaced by the next decodable one.
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    rows: slice
    bad: list[str]

    def pin_memory(self) -> SegmentBatch:
        """The same batch in page-locked memory (called by DataLoader)."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> SegmentBatch:
        """The same batch on a device; the copy overlaps with computation where the memory is pinned."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)


@dataclass(frozen=True)
class Objects:
    """The n objects of one crop with side S; n may be 0.

    `boxes` fp32 (n, 4): x1, y1, x2, y2 in pixels of the crop; `labels` int64 (n,) from 0; `masks` uint8 (n, S, S) of
    0 and 1, or None where the data set has none.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor | None

    def pin_memory(self) -> Objects:
        """The same objects in page-locked memory."""
        masks = None if self.masks is None else self.masks.pin_memory()
        return Objects(self.boxes.pin_memory(), self.labels.pin_memory(), masks)

    def to(self, device: torch.device) -> Objects:
        """The same objects on a device."""
        masks = None if self.masks is None else self.masks.to(device, non_blocking=True)
        return Objects(self.boxes.to(device, non_blocking=True), self.labels.to(device, non_blocking=True), masks)


@dataclass(frozen=True)
class DetectBatch:
    """One micro batch of B crops: `images` uint8 (B, 3, S, S), `objects` of each; else as `SegmentBatch`."""

    images: Tensor
    objects: tuple[Objects, ...]
    keys: Tensor
    rows: slice
    bad: list[str]

    def pin_memory(self) -> DetectBatch:
        """The same batch in page-locked memory (called by DataLoader)."""
        return replace(self, images=self.images.pin_memory(), objects=tuple(own.pin_memory() for own in self.objects))

    def to(self, device: torch.device) -> DetectBatch:
        """The same batch on a device; the copy overlaps with computation where the memory is pinned."""
        images = self.images.to(device, non_blocking=True)
        return replace(self, images=images, objects=tuple(own.to(device) for own in self.objects))


@dataclass(frozen=True)
class SegmentImage:
    """One image of an evaluation as it was decoded: `image` uint8 (3, h, w), `labels` uint8 (h, w), 255 ignored.

    `number` is its place in the data set, -1 for padding: a small blank image that is not counted, which also stands
    for an image that cannot be decoded, named in `bad`.
    """

    image: Tensor
    labels: Tensor
    number: int
    bad: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """False for padding."""
        return self.number != PADDING

    def pin_memory(self) -> SegmentImage:
        """The same image in page-locked memory (called by DataLoader)."""
        return replace(self, image=self.image.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> SegmentImage:
        """The same image on a device."""
        image, labels = (tensor.to(device, non_blocking=True) for tensor in (self.image, self.labels))
        return replace(self, image=image, labels=labels)


@dataclass(frozen=True)
class DetectImage:
    """One image of an evaluation as it was decoded: `image` uint8 (3, h, w), `image_id` of the JSON (-1: padding).

    `number` and `bad` as in `SegmentImage`; the truth is read from the JSON by whoever judges.
    """

    image: Tensor
    image_id: int
    number: int
    bad: list[str] = field(default_factory=list)

    @property
    def valid(self) -> bool:
        """False for padding."""
        return self.number != PADDING

    def pin_memory(self) -> DetectImage:
        """The same image in page-locked memory (called by DataLoader)."""
        return replace(self, image=self.image.pin_memory())

    def to(self, device: torch.device) -> DetectImage:
        """The same image on a device."""
        return replace(self, image=self.image.to(device, non_blocking=True))
