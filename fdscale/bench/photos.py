"""Shards of photographs to measure on, where none are given: views of the two that scikit-learn carries."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from webdataset import TarWriter

from fdscale.config.errors import UserError
from fdscale.data.index import Index, build_index

LONG, SHORT = 500, 375  # pixels: ImageNet's commonest size
QUALITY = 95


def photo_shards(folder: Path, photos: int, shards: int) -> Index:
    """So many JPEGs, 500 x 375 and 375 x 500 pixels at quality 95 (some 90 kB each), in shards with an index.

    Raises UserError where scikit-learn is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    drawn = _photos(photos)
    for shard in range(shards):
        with TarWriter(str(folder / f"{shard:03}.tar"), encoder=False) as writer:
            for number in range(shard * photos // shards, (shard + 1) * photos // shards):
                writer.write({"__key__": f"photo-{number:05}", "jpg": next(drawn), "cls": str(number % 10).encode()})
    return build_index(folder)


def _photos(number: int) -> Iterator[bytes]:
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise UserError('the photos come with scikit-learn: pip install "fdscale[demo]", or name --shards') from error
    originals = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw = np.random.default_rng(0)
    for _ in range(number):
        size = (LONG, SHORT) if draw.random() < 0.75 else (SHORT, LONG)
        yield _jpeg(originals[draw.integers(len(originals))], size, draw)


def _jpeg(original: Image.Image, size: tuple[int, int], draw: np.random.Generator) -> bytes:
    left, top = (
        int(draw.integers(whole - part + 1)) for whole, part in zip(original.size, _within(original, size), strict=True)
    )
    width, height = _within(original, size)
    view = original.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    (view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else view).save(
        stream, "jpeg", quality=QUALITY
    )
    return stream.getvalue()


def _within(original: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
    """The sides of a part of the original, of this shape, which it holds whole."""
    scale = min(1.0, *(whole / part for whole, part in zip(original.size, size, strict=True)))
    return int(size[0] * scale), int(size[1] * scale)
