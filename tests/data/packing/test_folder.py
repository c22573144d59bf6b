from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.packing.pack import pack
from tests.data.packing.small import packed


@pytest.fixture
def class_folders(tmp_path: Path, png) -> Path:
    source = tmp_path / "source"
    for number in range(7):
        folder = source / ("dog" if number % 2 else "cat/inner")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"i{number}.PNG").write_bytes(png(number))
    (source / "README.txt").write_text("no image")
    (source / ".thumbnails").mkdir()
    (source / ".thumbnails/t.png").write_bytes(png(0))
    return source


def test_class_folders_give_sorted_labels_and_keep_the_bytes(class_folders, png, tmp_path):
    index = pack(class_folders, tmp_path / "out", samples_per_shard=3)
    assert index.classes == ("cat", "dog")
    assert [shard.samples for shard in index.shards] == [3, 3, 1]
    expected = {f"cat/inner/i{n}.png": (png(n), 0) for n in (0, 2, 4, 6)}
    assert packed(index) == expected | {f"dog/i{n}.png": (png(n), 1) for n in (1, 3, 5)}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *(f"shard-{number:05d}.tar" for number in range(3)),
        "index.json",
        "samples.npy",
        "classes.json",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"}


def test_webdataset_reads_what_is_packed(class_folders, png, tmp_path):
    pack(class_folders, tmp_path / "out", samples_per_shard=99)
    samples = list(webdataset.WebDataset(str(tmp_path / "out/shard-00000.tar"), shardshuffle=False))
    assert {sample["__key__"]: (sample["png"], sample["cls"]) for sample in samples}["dog/i3"] == (
        png(3),
        b"1",
    )


def test_a_flat_folder_has_no_labels_and_other_formats_become_png(tmp_path, png):
    source = tmp_path / "source"
    source.mkdir()
    Image.open(io.BytesIO(png(2))).save(source / "a.b.webp")
    bitmap = Image.open(io.BytesIO(png(1)))
    bitmap.save(source / "c.bmp")
    index = pack(source, tmp_path / "out", samples_per_shard=10)
    assert index.classes is None
    found = packed(index)
    assert found["a_b.webp"] == ((source / "a.b.webp").read_bytes(), -1)
    decoded = Image.open(io.BytesIO(found["c.png"][0]))
    assert (decoded.format, np.asarray(decoded).tolist()) == ("PNG", np.asarray(bitmap).tolist())


def test_packing_twice_gives_the_same_bytes(class_folders, tmp_path):
    pack(class_folders, tmp_path / "one", samples_per_shard=4)
    pack(class_folders, tmp_path / "two", samples_per_shard=4)
    pack(class_folders, tmp_path / "other", samples_per_shard=4, seed=1)
    one, two, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two", "other")
    )
    assert one == two
    assert one != other


@pytest.mark.parametrize("taken", ["shard-00000.tar", "index.json", "notes.txt"])
def test_an_output_that_holds_anything_is_left_as_it_is(class_folders, tmp_path, taken):
    output = tmp_path / "out"
    output.mkdir()
    (output / taken).write_text("mine")
    with pytest.raises(UserError, match=r"out (already holds shards|is not an empty folder); nothing was written"):
        pack(class_folders, output, samples_per_shard=3)
    assert {path.name: path.read_text() for path in output.iterdir()} == {taken: "mine"}


def test_an_empty_output_folder_is_filled(class_folders, tmp_path):
    (tmp_path / "out").mkdir()
    assert len(pack(class_folders, tmp_path / "out", samples_per_shard=3)) == 7


@pytest.mark.parametrize("target", ["file", "folder"])
def test_links_out_of_the_source_are_refused(class_folders, tmp_path, png, target):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.png").write_bytes(png(9))
    link = class_folders / "dog" / ("link.png" if target == "file" else "link")
    link.symlink_to(outside / "secret.png" if target == "file" else outside)
    with pytest.raises(UserError, match=r"link"):
        pack(class_folders, tmp_path / "out", samples_per_shard=3)
    assert not (tmp_path / "out").exists()


def test_a_link_inside_the_source_is_packed(class_folders, tmp_path, png):
    (class_folders / "dog/again.png").symlink_to(class_folders / "cat/inner/i2.PNG")
    found = packed(pack(class_folders, tmp_path / "out", samples_per_shard=30))
    assert found["dog/again.png"] == (png(2), 1)


def test_two_images_of_one_key_are_named(class_folders, tmp_path, png):
    (class_folders / "dog/i1.jpg").write_bytes(png(1))
    (class_folders / "dog/i3.jpg").write_bytes(png(1))
    told = r"i1\.PNG and .* would both have the key 'dog/i1'; 1 more have the key of another one: dog/i3\.jpg; rename"
    with pytest.raises(UserError, match=told):
        pack(class_folders, tmp_path / "out", samples_per_shard=3)


def test_files_of_other_suffixes_and_of_none_are_counted(class_folders, tmp_path, png, caplog):
    for name in ("bare", "jpg", "dot."):
        (class_folders / "dog" / name).write_bytes(png(0))
    assert len(pack(class_folders, tmp_path / "out", samples_per_shard=3)) == 7
    assert "files that are not images are left out: 4 (3 without suffix, 1 txt)" in caplog.text


def test_a_folder_of_folders_of_tars_says_which_to_name(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "0.tar").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"in holds no image, but tars in 2 sub-folders \(a, b\); name .* such as \S+in/a$"
    ):
        pack(tmp_path / "in", tmp_path / "out", 3)


def test_sources_that_cannot_be_packed(class_folders, tmp_path, png):
    output = tmp_path / "out"
    with pytest.raises(UserError, match="nowhere does not exist"):
        pack(tmp_path / "nowhere", output, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds no image among 0 files; allowed: jpg, jpeg"):
        pack(tmp_path / "empty", output, 3)
    with pytest.raises(UserError, match="samples_per_shard is 0"):
        pack(class_folders, output, 0)
    (class_folders / "stray.png").write_bytes(png(8))
    with pytest.raises(UserError, match=r"holds 1 images itself and 7 in sub-folders"):
        pack(class_folders, output, 3)
    assert not output.exists()


def test_postscript_is_not_decoded_whatever_it_is_called(class_folders, tmp_path):
    (class_folders / "dog/broken.bmp").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n")
    with pytest.raises(UserError, match=r"1 of 8 images .* dog/broken\.bmp: no image of a known format"):
        pack(class_folders, tmp_path / "out", samples_per_shard=1)


@pytest.mark.parametrize(("suffix", "side"), [("png", 9_500), ("tif", 13_000)])
def test_more_pixels_than_training_reads_are_left_out_before_they_are_decoded(class_folders, tmp_path, suffix, side):
    options = {"compression": "group4"} if suffix == "tif" else {}
    Image.new("1", (side, side)).save(class_folders / f"dog/large.{suffix}", **options)
    with pytest.raises(UserError, match=rf"1 of 8 images .*large\.{suffix}: DecompressionBombError: {side} x {side}"):
        pack(class_folders, tmp_path / "out", samples_per_shard=1)


def test_want_of_memory_leaves_no_image_out(class_folders, tmp_path, monkeypatch):
    def failing(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(Image.Image, "convert", failing)
    Image.new("RGB", (4, 4)).save(class_folders / "dog/plain.bmp")
    with pytest.raises(MemoryError):
        pack(class_folders, tmp_path / "out", samples_per_shard=1)


def test_a_held_out_split_is_numbered_as_its_training_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A synset that is missing there moves no number; one that is not known is refused."""
    for split, names in (("train", "abcd"), ("val", "bd"), ("odd", "bz")):
        for name in names:
            (tmp_path / split / name).mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{split}.png")
    train = pack(tmp_path / "train", tmp_path / "train.tars", 10)
    val = pack(tmp_path / "val", tmp_path / "val.tars", 10, classes_of=train.folder)
    assert val.classes == train.classes == ("a", "b", "c", "d")
    assert sorted(val.samples["label"].tolist()) == [1, 3]
    assert "no images of a, c; the other classes keep their numbers" in caplog.text
    with pytest.raises(UserError, match=r"odd has class folders that .*train\.tars does not know: z; remove or rename"):
        pack(tmp_path / "odd", tmp_path / "odd.tars", 10, classes_of=train.folder)
    flat = pack(tmp_path / "train" / "a", tmp_path / "flat.tars", 10)
    with pytest.raises(UserError, match=r"flat\.tars name no classes"):
        pack(tmp_path / "val", tmp_path / "other.tars", 10, classes_of=flat.folder)
