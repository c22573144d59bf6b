"""What is opened by its size and colours alone gives what Pillow gives of it, or is left to Pillow."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.ImageFile import ImageFile

from fdscale.data.images import FORMATS, open_image, to_rgb
from fdscale.data.jpeg import PlainJpeg

NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8))
EXIF = Image.Exif()
EXIF[0x0112] = 6  # a quarter turn, which is not made


def jpeg(image: Image.Image, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "jpeg", **options)
    return stream.getvalue()


PLAIN = {
    "as Pillow writes it": jpeg(NOISE),
    "every pixel's colour": jpeg(NOISE, quality=95, subsampling=0),
    "grey": jpeg(NOISE.convert("L")),
    "progressive": jpeg(NOISE, progressive=True),
    "restarts": jpeg(NOISE, restart_marker_rows=1),
    "all that stands beside": jpeg(NOISE, exif=EXIF, icc_profile=bytes(range(256)), comment=b"\xff\xd9", dpi=(72, 72)),
}
OTHER = {
    "four colours": jpeg(NOISE.convert("CMYK")),
    "filled up between markers": PLAIN["as Pillow writes it"].replace(b"\xff\xdb", b"\xff\xff\xdb", 1),
}


def by_pillow(data: bytes) -> ImageFile:
    return Image.open(io.BytesIO(data), formats=FORMATS)


def seen(image: ImageFile) -> tuple[tuple[int, int], bytes]:
    return image.size, to_rgb(image).tobytes()


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_ones_are_decoded_as_by_pillow_whole_and_reduced(kind: str) -> None:
    opened, pillows = open_image(io.BytesIO(PLAIN[kind])), by_pillow(PLAIN[kind])
    assert isinstance(opened, PlainJpeg)
    assert (opened.format, opened.mode, opened.size) == ("JPEG", pillows.mode, pillows.size)
    assert seen(opened) == seen(pillows)
    reduced, pillows = open_image(io.BytesIO(PLAIN[kind])), by_pillow(PLAIN[kind])
    for image in (reduced, pillows):
        image.draft(image.mode, (10, 6))
    assert reduced.size == (10, 6)
    assert seen(reduced) == seen(pillows)


@pytest.mark.parametrize("kind", OTHER)
def test_others_are_left_to_pillow(kind: str) -> None:
    opened = open_image(io.BytesIO(OTHER[kind]))
    assert not isinstance(opened, PlainJpeg)
    assert seen(opened) == seen(by_pillow(OTHER[kind]))


def outcome(data: bytes, plain: bool) -> Any:
    """The pixels, or None where it is no image."""
    try:
        return seen(open_image(io.BytesIO(data)) if plain else by_pillow(data))
    except Exception:  # PIL raises anything on garbage
        return None


@given(st.sampled_from(sorted(PLAIN)), st.integers(2, 600), st.sampled_from("=+-"), st.integers(0, 255))
def test_a_damaged_header_comes_to_the_same(kind: str, place: int, how: str, byte: int) -> None:
    data = bytearray(PLAIN[kind])
    data[place : place + (how != "+")] = b"" if how == "-" else bytes([byte])
    assert outcome(bytes(data), plain=True) == outcome(bytes(data), plain=False)


def ended(data: bytes, bottom: int, times: int, early: bool) -> tuple[Any, int]:
    """The pixels above `bottom` and how many rows were decoded, at a reduced scale; or the error."""
    try:
        image = open_image(io.BytesIO(data))
        image.draft(image.mode, (max(1, image.width // times), max(1, image.height // times)))
        if early and isinstance(image, PlainJpeg):
            image.end_below(bottom)
        image.load()
    except Exception as error:  # PIL raises anything on garbage
        return type(error).__name__, 0
    return image.crop((0, 0, image.width, -(-bottom // times))).tobytes(), image.height


PHOTO = NOISE.resize((90, 120), Image.Resampling.BICUBIC)


@given(st.integers(1, 90), st.integers(1, 120), st.integers(0, 2), st.integers(5, 95), st.booleans(), st.data())
def test_rows_are_those_of_the_whole_image(
    width: int, height: int, subsampling: int, quality: int, grey: bool, data: st.DataObject
) -> None:
    image = (PHOTO.convert("L") if grey else PHOTO).crop((0, 0, width, height))
    bottom, times = data.draw(st.integers(1, height)), data.draw(st.sampled_from([1, 2, 4, 8]))
    file = jpeg(image, quality=quality, subsampling=subsampling)
    assert ended(file, bottom, times, early=True)[0] == ended(file, bottom, times, early=False)[0]


@pytest.mark.parametrize(("subsampling", "rows"), [(0, 40), (1, 40), (2, 48)])
def test_few_rows_are_decoded_beyond(subsampling: int, rows: int) -> None:
    file = jpeg(PHOTO, subsampling=subsampling)
    assert ended(file, 33, 1, early=True)[1] == rows
    assert ended(file, 33, 2, early=True)[1] == rows // 2
    assert ended(file, 119, 1, early=True)[1] == PHOTO.height


@pytest.mark.parametrize("how", ["progressive", "restart_marker_rows"])
def test_rows_that_lie_apart_are_decoded_whole(how: str) -> None:
    assert ended(jpeg(PHOTO, **{how: 1}), 1, 1, early=True)[1] == PHOTO.height


@given(
    st.integers(1, 120),
    st.lists(st.tuples(st.integers(2, 10**6), st.integers(0, 255) | st.just(255)), max_size=3),
    st.none() | st.integers(2, 10**6),
)
def test_damage_below_is_met_all_the_same(bottom: int, flips: list[tuple[int, int]], end: int | None) -> None:
    data = bytearray(jpeg(PHOTO, quality=60))
    for place, byte in flips:
        data[2 + place % (len(data) - 2)] = byte
    file = bytes(data[: None if end is None else end % len(data)])
    assert ended(file, bottom, 1, early=True)[0] == ended(file, bottom, 1, early=False)[0]
