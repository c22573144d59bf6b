"""Where randomness in data comes from: one counter-based generator for each thing that is drawn, whatever the ranks."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from hashlib import blake2b

import numpy as np

WORD = 2**64 - 1
_NAMED, _WORDS = struct.Struct("<5Q"), struct.Struct("<8Q")


class Purpose(IntEnum):
    """What a draw is for: the same numbers are never drawn twice."""

    VIEW = 0
    RANDAUGMENT = 1
    ERASING = 2
    MIXING = 3
    CROP = 4
    COLOURS = 5
    JITTER = 6
    CONTRAST = 7


def generator(seed: int, item: int, time: int, purpose: Purpose) -> np.random.Generator:
    """The generator of an item (a sample key, or a row or block of the global batch) at a time (epoch or step).

    Counter-based: (seed, item) is the Philox key, time and purpose are words of its counter, so nothing overlaps.
    """
    counter = np.array([0, 0, time, purpose], dtype=np.uint64)
    words = np.array([seed & WORD, item & WORD], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=words, counter=counter))


class Draws:
    """A few numbers of an item at a time, for what is drawn with every image: hashes of what they are for, counted.

    To set up NumPy's generator amid decoding, out of cold caches, takes as long as to read the image: 0.1 ms.
    """

    def __init__(self, seed: int, item: int, time: int, purpose: Purpose) -> None:
        self._named = (seed & WORD, item & WORD, time, purpose)
        self._hashes = 0
        self._words: list[int] = []

    def random(self) -> float:
        """A number in [0, 1), one of 2**53."""
        if not self._words:
            digest = blake2b(_NAMED.pack(*self._named, self._hashes)).digest()
            self._hashes += 1
            self._words = list(_WORDS.unpack(digest))
        return (self._words.pop() >> 11) * 2.0**-53

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random()

    def below(self, end: int) -> int:
        """A whole number in [0, end)."""
        return int(end * self.random())


@contextmanager
def global_generators(draw: np.random.Generator) -> Iterator[None]:
    """Let code that draws from Python's and NumPy's global generators draw from `draw`; their state is given back."""
    python, numpy = random.getstate(), np.random.get_state()
    first, second = draw.integers(2**32, size=2).tolist()
    random.seed(first)
    np.random.seed(second)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
