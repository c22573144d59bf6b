"""One micro batch: what the loaders hand out, and the two data sets whose items are whole micro batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fdscale.data.augment import Augmentation, augment, centre_crop
from fdscale.data.holding import note
from fdscale.data.images import AGAIN, BadImage, ImageReader, decode_or_next
from fdscale.data.index import Index
from fdscale.data.lending import Lent, handed_over, room_for
from fdscale.data.mixture import Mixture

PADDING = -1  # in Request.samples: a row without a sample
PADDING_LABEL = -2

Shown = tuple[int, int, str | None]  # label and key of what is seen, and the name of a bad image that it stands in for


@dataclass(frozen=True)
class Batch:
    """One micro batch of B images, as a person sees them; nothing is normalised yet.

    `images` uint8 (B, 3, H, W), channels last in memory; `labels` int64 (B,), -1 unknown, -2 padding
    (evaluation only); `keys` int64 (B,), the bit pattern of the uint64 sample key, always on the CPU, since they name
    samples and enter no computation; `rows`: which rows of the step's global batch these are; `bad`: names of the
    undecodable samples met here (in training each is replaced by the next decodable one, label and key included).
    """

    images: Tensor
    labels: Tensor
    keys: Tensor
    rows: slice
    bad: list[str]

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes each tensor would take a file descriptor and a handshake: the small ones go as they are."""
        return _received, (handed_over(self.images), self.labels.numpy(), self.keys.numpy(), self.rows, self.bad)

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


def _received(
    images: Tensor | Lent, labels: NDArray[np.int64], keys: NDArray[np.int64], rows: slice, bad: list[str]
) -> Batch:
    images = images.received() if isinstance(images, Lent) else images
    return Batch(images, torch.from_numpy(labels), torch.from_numpy(keys), rows, bad)


@dataclass(frozen=True)
class Request:
    """One micro batch to read: sample numbers (B,), the view to draw of each (B,), their rows of the global batch."""

    samples: NDArray[np.int64]
    views: NDArray[np.int64]
    rows: slice


class TrainBatches(Dataset[Batch]):
    """Request -> augmented micro batch; the views of a sample repeat after so many `views` (None: never)."""

    def __init__(
        self, mixture: Mixture, image_size: int, augmentation: Augmentation, seed: int, views: int | None = None
    ) -> None:
        self._mixture = mixture
        self._readers = [ImageReader(index) for index in mixture.indices]
        self._image_size = image_size
        self._augmentation = augmentation
        self._seed = seed
        self._views = views

    @property
    def image_bytes(self) -> int:
        return 3 * self._image_size**2

    def __getitem__(self, request: Request) -> Batch:
        views = request.views if self._views is None else request.views % self._views
        numbers = (*self._mixture.located(request.samples), views, request.samples)
        images = room_for((len(request.samples), self._image_size, self._image_size, 3))
        rows = zip(images.flatten(1).numpy(), *(column.tolist() for column in numbers), strict=True)
        shown = [self._show(row.data, *each) for row, *each in rows]
        labels = np.array([label for label, _, _ in shown])
        keys = np.array([key for _, key, _ in shown], np.uint64)
        return _batch(images.permute(0, 3, 1, 2), labels, keys, request.rows, [bad for _, _, bad in shown if bad])

    def name(self, sample: int) -> str:
        """`SHARD:MEMBER` of a sample."""
        (place,), (own,) = self._mixture.located(np.array([sample]))
        return self._readers[place].index.name(int(own))

    def close(self) -> None:
        """Let go of the open shards."""
        for reader in self._readers:
            reader.close()

    def _show(self, row: memoryview, place: int, own: int, view: int, sample: int) -> Shown:
        """Fill a row with one view of a sample; the label and key of what is seen, and the name of a bad one.

        The sample is number `own` of the index at `place`, or the next decodable one there. Its pixels are let go of
        here: the next image is decoded into the same memory, which is still in the processor's caches.
        """
        reader = self._readers[place]
        try:
            return *self._fill(row, reader, own, sample, view), None
        except BadImage:
            return self._replace(row, reader, own, sample, view)

    def _fill(self, row: memoryview, reader: ImageReader, own: int, sample: int, view: int) -> tuple[int, int]:
        """Short, and with few calls: amid decoding, nothing of this is in the processor's caches."""
        note(sample)
        *_, label, key, _ = stored = reader.stored(own)
        with reader.opened(own, stored) as image:
            pixels = augment(image, key, view, self._seed, self._image_size, self._augmentation)
        row[:] = pixels.tobytes()
        return label, key

    def _replace(self, row: memoryview, reader: ImageReader, own: int, sample: int, view: int) -> Shown:
        """The same of the next decodable sample, and the name of the bad one."""

        def fill(candidate: int) -> tuple[int, int]:
            with reader.naming(candidate):
                return self._fill(row, reader, candidate, sample - own + candidate, view)

        (label, key), _, bad = decode_or_next(fill, own, len(reader.index), str(reader.index.folder), AGAIN)
        return label, key, bad


class EvalBatches(Dataset[Batch]):
    """Request -> centre-cropped micro batch; padding and undecodable rows are zero images with label -2."""

    def __init__(self, index: Index, image_size: int, interpolation: Literal["bilinear", "bicubic"]) -> None:
        self.reader = ImageReader(index)
        self._image_size = image_size
        self._interpolation = interpolation

    @property
    def image_bytes(self) -> int:
        return 3 * self._image_size**2

    def __getitem__(self, request: Request) -> Batch:
        size, bad = self._image_size, []
        images = room_for((len(request.samples), size, size, 3)).zero_().permute(0, 3, 1, 2)
        labels = np.full(len(images), PADDING_LABEL, np.int64)
        keys = np.zeros(len(images), np.uint64)
        for row in np.flatnonzero(request.samples != PADDING):
            try:
                sample = int(request.samples[row])
                note(sample)
                images.numpy()[row] = centre_crop(self.reader.decode(sample), size, self._interpolation)
                labels[row], keys[row] = self.reader.index.samples[["label", "key"]][sample]
            except BadImage as error:
                bad.append(str(error))
        return _batch(images, labels, keys, request.rows, bad)

    def name(self, sample: int) -> str:
        """`SHARD:MEMBER` of a sample."""
        return self.reader.index.name(sample)

    def close(self) -> None:
        """Let go of the open shards."""
        self.reader.close()


def _batch(
    images: Tensor,
    labels: NDArray[np.integer],
    keys: NDArray[np.uint64],
    rows: slice,
    bad: list[str],
) -> Batch:
    """`images` (B, 3, H, W) with the rest as tensors; uint64 keys keep their bits as int64."""
    key_bits = np.ascontiguousarray(keys).astype(np.uint64).view(np.int64)
    return Batch(
        images,
        torch.from_numpy(labels.astype(np.int64)),
        torch.from_numpy(key_bits),
        rows,
        bad,
    )
