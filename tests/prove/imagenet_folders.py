"""ImageNet's layout in miniature: `train` and `val`, a folder for each synset, JPEGs of many sizes inside."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SYNSETS = (
    *("n01440764", "n01443537", "n01484850", "n01491361", "n01494475"),
    *("n01496331", "n01498041", "n01514668", "n01514859", "n01518878"),
)


def render(folder: Path) -> None:
    """The 1,797 handwritten digits as coloured JPEGs, every 4th in `val`; the n-th synset shows the digit n."""
    values, labels = load_digits(return_X_y=True)
    for number, (digit, label) in enumerate(zip(values, labels, strict=True)):
        split = "val" if number % 4 == 3 else "train"
        name = f"ILSVRC2012_val_{number:08d}.JPEG" if split == "val" else f"{SYNSETS[label]}_{number}.JPEG"
        place = folder / split / SYNSETS[label]
        place.mkdir(parents=True, exist_ok=True)
        _photo(digit.reshape(8, 8), np.random.default_rng(number)).save(place / name, quality=90)


def _photo(digit: np.ndarray, draw: np.random.Generator) -> Image.Image:
    """Light ink on a dark ground, 90 to 130 pixels a side, with some noise."""
    height, width = (int(side) for side in draw.integers(90, 131, 2))
    ink = Image.fromarray(np.rint(digit * (255 / 16)).astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )
    share = np.asarray(ink, np.float32)[..., None] / 255
    light, dark = draw.uniform(180, 255, 3), draw.uniform(0, 60, 3)
    pixels = dark + (light - dark) * share + draw.normal(0, 4, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
