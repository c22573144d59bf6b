from __future__ import annotations

import io
import os
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from fdscale.config.errors import UserError
from fdscale.data import images
from fdscale.data.augment import Augmentation, augment
from fdscale.data.images import BadImage, ImageReader, decode_or_next, open_shards
from fdscale.data.index import build_index

VIEWS = Augmentation((0.9, 1.0), (0.9, 1.1), "bilinear", 0.0)


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


def test_sixteen_bits_are_scaled_and_not_clipped(write_shards):
    grey = (np.arange(256, dtype=np.uint32) * 257).astype(np.uint16).reshape(16, 16)
    reader = ImageReader(build_index(write_shards([{"a.png": encoded(Image.fromarray(grey), "png")}])))
    decoded = np.asarray(reader.decode(0))
    assert (decoded == (grey >> 8)[..., None]).all()
    reader.close()


def test_of_an_animation_the_first_frame_is_read(write_shards):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    members = {}
    for name, kind in (("a.png", "png"), ("b.webp", "webp")):
        stream = io.BytesIO()
        options = {"lossless": True} if kind == "webp" else {}
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=50, **options)
        members[name] = stream.getvalue()
    reader = ImageReader(build_index(write_shards([members])))
    assert [reader.decode(sample).getpixel((3, 3)) for sample in (0, 1)] == [(255, 0, 0)] * 2
    reader.close()


def test_exif_does_not_turn_an_image(write_shards):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    stream = io.BytesIO()
    Image.new("RGB", (16, 8)).save(stream, "jpeg", exif=exif)
    reader = ImageReader(build_index(write_shards([{"a.jpg": stream.getvalue()}])))
    assert reader.decode(0).size == (16, 8)
    reader.close()


def test_more_pixels_than_a_worker_should_hold_are_refused_before_they_are_decoded(write_shards, monkeypatch):
    monkeypatch.setattr(images, "MOST_PIXELS", 99)
    reader = ImageReader(build_index(write_shards([{"a.png": encoded(Image.new("L", (10, 10)), "png")}])))
    with pytest.raises(BadImage, match=r"a\.png \(DecompressionBombError: 10 x 10 pixels; allowed: 99\)"):
        reader.seen(0, lambda image: pytest.fail("it was opened"))
    reader.close()


@pytest.mark.parametrize("error", [ZeroDivisionError("of mine"), MemoryError(), UserError("a sentence"), TypeError()])
def test_what_fails_in_the_view_is_no_bad_image(write_shards, png, error):
    reader = ImageReader(build_index(write_shards([{"a.png": png(0)}])))

    def view(image: Image.Image) -> None:
        raise error

    with pytest.raises(type(error)) as raised:
        reader.seen(0, view)
    assert raised.value is error
    reader.close()


@pytest.mark.parametrize("method", ["load", "draft", "crop", "resize"])
def test_want_of_memory_replaces_no_image(write_shards, png, monkeypatch, method):
    reader = ImageReader(build_index(write_shards([{"a.png": png(0), "b.png": png(1)}])))

    def failing(*arguments: object, **options: object) -> None:
        raise MemoryError

    for kind in (PngImageFile, Image.Image):
        monkeypatch.setattr(kind, method, failing)
    with pytest.raises(MemoryError):
        decode_or_next(
            lambda sample: reader.seen(sample, lambda image: augment(image, 1, 0, 3, 2, VIEWS)), 0, 2, "", ""
        )
    reader.close()


def test_a_truncated_jpeg_is_bad(write_shards):
    whole = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)), "jpeg")
    reader = ImageReader(build_index(write_shards([{"a.jpg": whole[: len(whole) // 2], "b.jpg": whole}])))
    with pytest.raises(BadImage, match=r"a\.jpg \(OSError: .*truncated"):
        reader.decode(0)
    assert reader.decode(1).size == (64, 64)
    reader.close()


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_bytes_other_than_those_indexed_are_bad(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0), "b.png": png(1)}]))
    times = index.shard_path(0).stat()
    overwrite(index.shard_path(0), int(index.samples["offset"][0]) + 60, b"!")
    os.utime(index.shard_path(0), ns=(times.st_atime_ns, times.st_mtime_ns))  # as a disk that rots
    reader = ImageReader(index)
    with pytest.raises(BadImage, match=r"s0\.tar:a\.png \(its bytes are not those that were indexed\)"):
        reader.decode(0)
    assert reader.decode(1).mode == "RGB"
    reader.close()


def test_a_shard_that_changes_while_it_is_read_ends_in_a_sentence(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0), "b.png": png(1)}]))
    reader = ImageReader(index)
    reader.decode(1)
    os.utime(index.shard_path(0))
    assert reader.decode(0).mode == "RGB"  # touched, and its bytes are the same
    overwrite(index.shard_path(0), int(index.samples["offset"][0]), png(2)[:40])
    with pytest.raises(UserError, match=r"shard .*s0\.tar changed while the run reads it: a\.png is no longer"):
        reader.decode(0)
    os.truncate(index.shard_path(0), 700)
    with pytest.raises(UserError, match=r"s0\.tar changed .*: key [0-9a-f]+ is .* has 700 bytes, had 10240\)"):
        reader.decode(1)
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


def test_shards_take_half_of_the_files_that_a_process_may_open():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for soft, shards in ((300, 150), (before[1], min(1024, before[1] // 2))):
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
            assert open_shards() == shards
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_rows_are_checked_when_a_shard_is_opened_first_and_not_again(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0), "b.png": png(1)}]))
    index = replace(index, samples=index.samples.copy())
    reader = ImageReader(index)
    reader.decode(0)
    index.samples["label"][1] = 5
    reader.close()
    assert reader.decode(0).mode == "RGB"
    reader.close()
    with pytest.raises(UserError, match=r"the rows of shard s0\.tar are damaged"):
        ImageReader(index).decode(0)


def test_a_shard_that_vanished_is_named(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0)}]))
    index.shard_path(0).unlink()
    with pytest.raises(UserError, match=r"cannot read shard .*s0\.tar: .*No such file"):
        ImageReader(index).decode_or_next(0)
