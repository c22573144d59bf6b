"""The UCI handwritten digits that scikit-learn carries, as shards to try everything with; no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.index import Index
from fdscale.data.packing.shards import write_shards
from fdscale.data.packing.sources import Sample, png
from fdscale.data.scan import key_hash

DIGIT_SHARDS = 4
DIGIT_SIZE = 32


def pack_digits(output: str | Path, split: Literal["train", "test"]) -> Index:
    """Pack the UCI handwritten digits (8x8, 10 classes) as 32x32 RGB PNGs: every 4th is test, the rest train.

    1,348 or 449 images in 4 shards. Raises UserError where scikit-learn, which carries them, is missing.
    """
    assert split in ("train", "test"), split
    values, labels = _digits()
    chosen = np.array([i for i in range(len(values)) if (i % 4 == 3) == (split == "test")])
    digits = Digits(f"the digits: {len(chosen):,} images, {split}", chosen, values[chosen], labels[chosen])
    return write_shards(digits, Path(output), -(-len(chosen) // DIGIT_SHARDS), seed=None)


def _digits() -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """All digits as scikit-learn's `load_digits` gives them; read from its file, as importing it takes a second."""
    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise UserError('the digits come with scikit-learn: pip install "fdscale[demo]"')
    table = np.loadtxt(Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    return table[:, :-1], table[:, -1].astype(np.int64)


@dataclass(frozen=True)
class Digits:
    """Digits as a source: their numbers (N,), ink 0..16 of their 64 pixels (N, 64), and labels (N,)."""

    about: str
    numbers: NDArray[np.int64]
    values: NDArray[np.float64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...] | None = tuple("0123456789")
    left_out: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.numbers)

    def name(self, number: int) -> str:
        return f"digit-{self.numbers[number]:04d}"

    def read(self, number: int) -> Sample:
        name = self.name(number)
        return Sample(name, name, "png", _digit_png(self.values[number]), int(self.labels[number]))

    def fingerprint(self) -> NDArray[np.uint64]:
        return np.array([key_hash(f"{self.name(i)} {self.values[i].tolist()}") for i in range(len(self))], np.uint64)

    def part(self, numbers: NDArray[np.int64]) -> Digits:
        return replace(
            self, numbers=self.numbers[numbers], values=self.values[numbers], labels=self.labels[numbers], classes=None
        )


def _digit_png(values: NDArray[np.float64]) -> bytes:
    """Ink 0..16 of 64 pixels to a PNG."""
    grey = np.rint(values.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    return png(Image.fromarray(grey).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))
