"""One micro batch: what the loaders hand out, and the two data sets whose items are whole micro batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fdscale.data.augment import Augmentation, augment, centre_crop
from fdscale.data.images import BadImage, ImageReader
from fdscale.data.index import Index

PADDING = -1  # in Request.samples: a row without a sample
PADDING_LABEL = -2


@dataclass(frozen=True)
class Batch:
    """One micro batch of B images, as a person sees them; nothing is normalised yet.

    `images` uint8 (B, 3, H, W); `labels` int64 (B,), -1 unknown, -2 padding (evaluation only); `keys` int64
    (B,), the bit pattern of the uint64 sample key, always on the CPU, since they name samples and enter no
    computation; `rows`: which rows of the step's global batch these are; `bad`: names of the undecodable samples
    met here (in training each is replaced by the next decodable one,
    label and key included).
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    rows: slice
    bad: list[str]

    @property
    def valid(self) -> Tensor:
        """Bool (B,): False for padding rows."""
        return self.labels != PADDING_LABEL

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (called by DataLoader)."""
        return replace(self, images=self.images.pin_memory(), labels=self.labels.pin_memory())

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device; the copy overlaps with computation where the memory is pinned."""
        images, labels = (tensor.to(device, non_blocking=True) for tensor in (self.images, self.labels))
        return replace(self, images=images, labels=labels)


@dataclass(frozen=True)
class Request:
    """One micro batch to read: sample numbers (B,), the view to draw, their rows of the global batch."""

    samples: NDArray[np.int64]
    view: int
    rows: slice


class TrainBatches(Dataset[Batch]):
    """Request -> augmented micro batch."""

    def __init__(self, index: Index, image_size: int, augmentation: Augmentation, seed: int) -> None:
        self.reader = ImageReader(index)
        self._image_size = image_size
        self._augmentation = augmentation
        self._seed = seed

    def __getitem__(self, request: Request) -> Batch:
        decoded = [self.reader.decode_or_next(int(sample)) for sample in request.samples]
        rows = self.reader.index.samples[[image.sample for image in decoded]]
        views = [
            augment(image.image, int(key), request.view, self._seed, self._image_size, self._augmentation)
            for image, key in zip(decoded, rows["key"], strict=True)
        ]
        bad = [image.bad for image in decoded if image.bad]
        return _batch(np.stack(views), rows["label"], rows["key"], request.rows, bad)

    def close(self) -> None:
        """Let go of the open shards."""
        self.reader.close()


class EvalBatches(Dataset[Batch]):
    """Request -> centre-cropped micro batch; padding and undecodable rows are zero images with label -2."""

    def __init__(self, index: Index, image_size: int, interpolation: Literal["bilinear", "bicubic"]) -> None:
        self.reader = ImageReader(index)
        self._image_size = image_size
        self._interpolation = interpolation

    def __getitem__(self, request: Request) -> Batch:
        size, bad = self._image_size, []
        images = np.zeros((len(request.samples), 3, size, size), np.uint8)
        labels = np.full(len(images), PADDING_LABEL, np.int64)
        keys = np.zeros(len(images), np.uint64)
        for row in np.flatnonzero(request.samples != PADDING):
            try:
                sample = int(request.samples[row])
                images[row] = centre_crop(self.reader.decode(sample), size, self._interpolation)
                labels[row], keys[row] = self.reader.index.samples[["label", "key"]][sample]
            except BadImage as error:
                bad.append(str(error))
        return _batch(images, labels, keys, request.rows, bad)

    def close(self) -> None:
        """Let go of the open shards."""
        self.reader.close()


def _batch(
    images: NDArray[np.uint8],
    labels: NDArray[np.integer],
    keys: NDArray[np.uint64],
    rows: slice,
    bad: list[str],
) -> Batch:
    """`images` (B, 3, H, W) or one (3, H, W) per row, to tensors; uint64 keys keep their bits as int64."""
    key_bits = np.ascontiguousarray(keys).astype(np.uint64).view(np.int64)
    return Batch(
        torch.from_numpy(images),
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(key_bits),
        rows,
        bad,
    )
