from __future__ import annotations

import io
import os

import numpy as np
import pytest
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data import images
from fdscale.data.images import BadImage, ImageReader
from fdscale.data.index import build_index


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_every_mode_becomes_rgb(write_shards):
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    members = {
        "a.png": encoded(grey, "png"),
        "b.png": encoded(grey.convert("P"), "png"),
        "c.jpg": encoded(grey.convert("CMYK"), "jpeg"),
        "d.webp": encoded(grey.convert("RGBA"), "webp"),
    }
    reader = ImageReader(build_index(write_shards([members])))
    assert {reader.decode(sample).mode for sample in range(4)} == {"RGB"}
    assert np.array_equal(np.asarray(reader.decode(0))[..., 1], np.asarray(grey))
    reader.close()


@pytest.fixture
def bomb() -> bytes:
    return encoded(Image.new("1", (14000, 14000)), "png")  # 196 M pixels in 24 kB: above PIL's limit


def test_bad_images_are_named_with_the_reason(write_shards, png, bomb):
    members = {"a.png": png(0)[:200], "b.jpg": b"no image", "c.png": bomb, "d.png": b"", "e.png": png(1)}
    reader = ImageReader(build_index(write_shards([members])))
    for sample, message in enumerate((r"s0\.tar:a\.png \(", "UnidentifiedImageError", "Bomb", r"d\.png")):
        with pytest.raises(BadImage, match=message):
            reader.decode(sample)
    assert reader.decode(4).mode == "RGB"
    reader.close()


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(x) print\n%%EOF\n"


def test_postscript_is_no_image_whatever_it_is_called(write_shards):
    assert Image.open(io.BytesIO(POSTSCRIPT)).format == "EPS"  # PIL alone would hand it to Ghostscript
    reader = ImageReader(build_index(write_shards([{"a.jpg": POSTSCRIPT}])))
    with pytest.raises(BadImage, match=r"s0\.tar:a\.jpg \(UnidentifiedImageError"):
        reader.decode(0)
    reader.close()


def test_a_bad_image_is_replaced_by_the_next_good_one_also_past_the_end(write_shards, png):
    members = {"a.png": png(0), "b.png": b"bad", "c.png": b"bad", "d.png": png(3), "e.png": b"bad"}
    reader = ImageReader(build_index(write_shards([members])))
    results = [reader.decode_or_next(sample) for sample in range(5)]
    assert [result.sample for result in results] == [0, 3, 3, 3, 0]
    bad = [result.bad and result.bad.split(" ")[0] for result in results]
    assert bad == [None, "s0.tar:b.png", "s0.tar:c.png", None, "s0.tar:e.png"]
    reader.close()


def test_a_data_set_without_any_good_image_ends_in_an_error(write_shards):
    reader = ImageReader(build_index(write_shards([{"a.png": b"bad", "b.png": b"bad"}])))
    with pytest.raises(UserError, match=r"no image can be decoded in .* from s0\.tar:b\.png .*tried 2"):
        reader.decode_or_next(1)
    reader.close()


def test_few_shards_stay_open_and_close_closes_them(write_shards, png, monkeypatch):
    monkeypatch.setattr(images, "OPEN_SHARDS", 2)
    index = build_index(write_shards([{f"{number}.png": png(number)} for number in range(5)]))
    reader, before = ImageReader(index), open_files()
    for sample in (0, 1, 2, 3, 4, 0, 4, 2):
        assert reader.decode(sample).size == Image.open(io.BytesIO(png(sample))).size
        assert open_files() <= before + 2
    reader.close()
    assert open_files() == before
    assert reader.decode(3).mode == "RGB"
    reader.close()


def test_a_shard_that_vanished_is_named(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0)}]))
    index.shard_path(0).unlink()
    with pytest.raises(UserError, match=r"cannot read shard .*s0\.tar: .*No such file"):
        ImageReader(index).decode_or_next(0)
