"""Memory that a rank lends its workers for images, again as soon as it has let go of what they put there.

Fresh shared memory costs a worker a page fault every 4 KiB, batch for batch, and its rank one more to look at it: a
twentieth of what decoding costs. Memory that comes round again costs less, and least in large pages.
"""

from __future__ import annotations

import ctypes
import math
import multiprocessing
import os
from dataclasses import dataclass
from itertools import count
from weakref import WeakValueDictionary, finalize

import numpy as np
import torch
from torch import Tensor

from fdscale.data.large_pages import LARGE, gather, shared_memory

_numbers = count()
_lenders: WeakValueDictionary[int, Lender] = WeakValueDictionary()  # workers are forked with what the rank has here
_mine: tuple[Lender, int] | None = None  # in a worker: who lends to it, and which worker it is


class Lender:
    """So many places of so many bytes for each worker, in memory that workers forked from here on share.

    A worker's place is lent from `room_for` until the tensor that the rank was given of it is gone, with all its views.
    The lowest free one is the next: the pages of no more places are touched than are lent at once, and they stay.
    """

    def __init__(self, workers: int, places: int, size: int) -> None:
        self.number, self.places, self.size = next(_numbers), places, size
        self._apart = size if size < LARGE else -(-size // LARGE) * LARGE
        self._memory = shared_memory(workers * places * self._apart)
        self._gathered: set[int] = set()  # places that this process has had put into large pages
        self._lent = multiprocessing.get_context("fork").RawArray(ctypes.c_bool, workers * places)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        _lenders[self.number] = self

    def begin(self, worker: int) -> None:
        """In a worker: `room_for` asks this lender from here on."""
        global _mine
        _mine = (self, worker)

    def take(self, worker: int, shape: tuple[int, ...]) -> Tensor | None:
        """Memory for bytes of this shape that is lent now; None where it is too large, or the rank has them all."""
        if math.prod(shape) > self.size:
            return None
        for place in range(worker * self.places, (worker + 1) * self.places):
            if not self._lent[place]:
                self._lent[place] = True
                self._gather(place)
                start = place * self._apart
                return self._bytes[start : start + math.prod(shape)].view(shape)
        return None

    def _gather(self, place: int) -> None:
        if self.size >= LARGE and place not in self._gathered:
            self._gathered.add(place)
            gather(self._memory, place * self._apart, self._apart)

    def lent(self, images: Tensor) -> Lent | None:
        """Where they lie; None for memory of others."""
        place, offset = divmod(images.data_ptr() - self._bytes.data_ptr(), self._apart)
        if not 0 <= place < len(self._lent):
            return None
        return Lent(self.number, place, tuple(images.shape), images.stride(), offset)

    def received(self, place: int) -> Tensor:
        """In the rank: the bytes at a place, which is given back when nobody looks at them any more."""
        seen = np.frombuffer(self._memory, np.uint8, self.size, place * self._apart)
        finalize(seen, self._give_back, place, os.getpid()).atexit = False
        return torch.from_numpy(seen)

    def _give_back(self, place: int, receiver: int) -> None:
        """A process that was forked meanwhile has the tensor, too, and lets go of it: that is not the rank's doing."""
        if os.getpid() == receiver:
            self._lent[place] = False


@dataclass(frozen=True)
class Lent:
    """Where images lie that a worker hands over: a tensor itself would take a file descriptor and a handshake."""

    lender: int
    place: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def received(self) -> Tensor:
        """In the rank: the images."""
        return _lenders[self.lender].received(self.place).as_strided(self.shape, self.stride, self.offset)


def room_for(shape: tuple[int, ...]) -> Tensor:
    """Memory for bytes of this shape: lent in a worker, unless its rank has them all; else fresh."""
    lent = None if _mine is None else _mine[0].take(_mine[1], shape)
    return torch.empty(shape, dtype=torch.uint8) if lent is None else lent


def handed_over(images: Tensor) -> Tensor | Lent:
    """What a worker sends of its images: where they lie, if that is lent, else themselves."""
    return images if _mine is None else _mine[0].lent(images) or images
