"""What the dense programs are fed with: micro batches of crops in training, single images in evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fdscale.data.batches import PADDING, Request
from fdscale.data.dense.ade20k import IGNORED, ScenePairs
from fdscale.data.dense.coco import CocoScenes
from fdscale.data.dense.crops import Cropping, crop_scene
from fdscale.data.dense.jitter import Jitter, Seen, jitter_scene
from fdscale.data.dense.masks import draw_masks
from fdscale.data.holding import note
from fdscale.data.images import BadImage, Decoded, decode_or_next

BLANK = 32  # side in pixels of an image that is padding
AGAIN = "the images are damaged: unpack them again"


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


class SegmentTrain(Dataset[SegmentBatch]):
    """Request -> micro batch of random crops."""

    image_bytes = 0

    def __init__(self, pairs: ScenePairs, cropping: Cropping, seed: int) -> None:
        self._pairs = pairs
        self._cropping = cropping
        self._seed = seed

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, request: Request) -> SegmentBatch:
        where = f"{self._pairs.folder} ({self._pairs.split})"
        decoded = [decode_or_next(self._scene, int(sample), len(self), where, AGAIN) for sample in request.samples]
        keys = [self._pairs.key(found.sample) for found in decoded]
        views = [
            crop_scene(*found.image, key, int(view), self._seed, self._cropping)
            for found, key, view in zip(decoded, keys, request.views, strict=True)
        ]
        images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*views, strict=True))
        return SegmentBatch(images, labels, _key_bits(keys), request.rows, _bad(decoded))

    def close(self) -> None:
        """Nothing stays open between two items."""

    def name(self, sample: int) -> str:
        """Path of a sample's image."""
        return str(self._pairs.image_path(sample))

    def _scene(self, sample: int) -> tuple[Image.Image, NDArray[np.uint8]]:
        note(sample)
        image = self._pairs.image(sample)
        return image, self._pairs.labels(sample, image.size)


class DetectTrain(Dataset[DetectBatch]):
    """Request -> micro batch of jittered views; `scenes` are trainable ones."""

    image_bytes = 0

    def __init__(self, scenes: CocoScenes, jitter: Jitter, seed: int) -> None:
        self._scenes = scenes
        self._jitter = jitter
        self._seed = seed

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, request: Request) -> DetectBatch:
        where = str(self._scenes.images_folder)
        decoded = [decode_or_next(self._image, int(sample), len(self), where, AGAIN) for sample in request.samples]
        views = [
            self._view(found.image, found.sample, int(view)) for found, view in zip(decoded, request.views, strict=True)
        ]
        images = torch.from_numpy(np.stack([view.image for view in views]))
        keys = [self._scenes.key(found.sample) for found in decoded]
        return DetectBatch(images, tuple(map(_objects, views)), _key_bits(keys), request.rows, _bad(decoded))

    def close(self) -> None:
        """Nothing stays open between two items."""

    def name(self, sample: int) -> str:
        """Path of a sample's image."""
        return str(self._scenes.path(sample))

    def _image(self, sample: int) -> Image.Image:
        note(sample)
        return self._scenes.image(sample)

    def _view(self, image: Image.Image, sample: int, view: int) -> Seen:
        scenes = self._scenes
        boxes, labels = scenes.boxes_and_labels(sample)
        masks = None
        if scenes.segmentations is not None:
            where = f"{scenes.annotations}, image id {scenes.image_id(sample)}"
            masks = draw_masks(scenes.segmentations_of(sample), image.height, image.width, where)
        return jitter_scene(image, boxes, labels, masks, scenes.key(sample), view, self._seed, self._jitter)


class SegmentEval(Dataset[SegmentImage]):
    """Request of one sample -> its image and labels as they are stored, or padding."""

    image_bytes = 0

    def __init__(self, pairs: ScenePairs) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, request: Request) -> SegmentImage:
        (number,) = request.samples.tolist()
        bad = []
        try:
            if number != PADDING:
                note(number)
                image = self._pairs.image(number)
                labels = torch.from_numpy(self._pairs.labels(number, image.size))
                return SegmentImage(_channels_first(image), labels, number)
        except BadImage as error:
            bad.append(str(error))
        return SegmentImage(_blank(), torch.full((BLANK, BLANK), IGNORED, dtype=torch.uint8), PADDING, bad)

    def name(self, sample: int) -> str:
        """Path of a sample's image."""
        return str(self._pairs.image_path(sample))

    def close(self) -> None:
        """Nothing stays open between two items."""


class DetectEval(Dataset[DetectImage]):
    """Request of one sample -> its image as it is stored, or padding."""

    image_bytes = 0

    def __init__(self, scenes: CocoScenes) -> None:
        self._scenes = scenes

    def __len__(self) -> int:
        return len(self._scenes)

    def __getitem__(self, request: Request) -> DetectImage:
        (number,) = request.samples.tolist()
        bad = []
        try:
            if number != PADDING:
                note(number)
                return DetectImage(_channels_first(self._scenes.image(number)), self._scenes.image_id(number), number)
        except BadImage as error:
            bad.append(str(error))
        return DetectImage(_blank(), PADDING, PADDING, bad)

    def name(self, sample: int) -> str:
        """Path of a sample's image."""
        return str(self._scenes.path(sample))

    def close(self) -> None:
        """Nothing stays open between two items."""


def _objects(seen: Seen) -> Objects:
    masks = None if seen.masks is None else torch.from_numpy(seen.masks)
    return Objects(torch.from_numpy(seen.boxes), torch.from_numpy(seen.labels), masks)


def _bad(decoded: Sequence[Decoded]) -> list[str]:
    return [found.bad for found in decoded if found.bad]


def _key_bits(keys: Sequence[int]) -> Tensor:
    """uint64 keys as int64 (B,), bit for bit."""
    return torch.from_numpy(np.array(keys, np.uint64).view(np.int64))


def _channels_first(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)))


def _blank() -> Tensor:
    return torch.zeros(3, BLANK, BLANK, dtype=torch.uint8)
