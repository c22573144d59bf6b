"""Tars of class tars: read where they lie, equal to folders, and no way out of them."""

from __future__ import annotations

import tarfile
from pathlib import Path

import numpy as np
import pytest

from fdscale.config.errors import UserError
from fdscale.data.packing.pack import pack
from fdscale.data.packing.tars import tar_of_class_tars
from fdscale.data.scan import key_hash
from tests.data.packing.small import WNIDS, contents, jpeg, link, packed, tar_bytes


def test_however_it_came_it_becomes_the_same_shards(train_folder, class_tars, tmp_path):
    """Keys, numbers and order: so the same image draws the same augmentation."""
    index = pack(train_folder, tmp_path / "of_folder", 4)
    assert key_hash(f"{WNIDS[0]}/{WNIDS[0]}_16") in index.samples["key"].tolist()
    (tmp_path / "fall11_whole.tar").write_bytes(tar_bytes(dict(reversed(class_tars.items()))))
    (tmp_path / "tars").mkdir()
    for name, data in class_tars.items():
        (tmp_path / "tars" / name).write_bytes(data)
    pack(tmp_path / "fall11_whole.tar", tmp_path / "of_tar", 4)
    pack(tmp_path / "tars", tmp_path / "of_tars", 4)
    assert contents(tmp_path / "of_folder") == contents(tmp_path / "of_tar") == contents(tmp_path / "of_tars")
    assert index.classes == WNIDS


def test_bytes_are_kept_whatever_they_are(train_folder, train_images, tmp_path):
    found = packed(pack(train_folder, tmp_path / "out", 100))
    expected = {
        f"{wnid}/{name.removesuffix('JPEG')}jpeg": (data, label)
        for label, (wnid, images) in enumerate(train_images.items())
        for name, data in images.items()
    }
    assert found == expected


def test_members_that_lead_out_and_links_are_left_out_by_name(tmp_path):
    members = {f"n01440764_{i}.JPEG": jpeg(i) for i in range(4)} | {
        "../escape.JPEG": jpeg(10),
        "/etc/absolute.JPEG": jpeg(11),
        "a/../../b.JPEG": jpeg(12),
        "soft": link("soft.JPEG", "/etc/passwd"),
        "hard": link("hard.JPEG", "n01440764_0.JPEG", tarfile.LNKTYPE),
        "device": link("device.JPEG", "", tarfile.CHRTYPE),
        "./n01440764_4.JPEG": jpeg(4),
        "n01440764/n01440764_5.JPEG": jpeg(5),
        "notes.txt": b"no image",
        "bad\x1b[31m\n": link("bad\x1b[31m\n.JPEG", "x"),
    }
    path = tmp_path / "whole.tar"
    path.write_bytes(tar_bytes({"n01440764.tar": tar_bytes(members), "../n01443537.tar": tar_bytes({"x.JPEG": b"x"})}))
    with pytest.raises(UserError, match=r"8 of 14 images are left out"):
        pack(path, tmp_path / "out", 4)
    index = pack(path, tmp_path / "out", 4, max_bad_ratio=0.9)
    assert set(packed(index)) == {f"n01440764/n01440764_{i}.jpeg" for i in range(6)}
    told = (tmp_path / "out" / "left_out.txt").read_text()
    assert "\x1b" not in told
    assert len(told.splitlines()) == 8
    for line in ("../n01443537.tar: its name leads out", "soft.JPEG: a link to /etc/passwd", "device.JPEG: a sparse"):
        assert line in told
    assert {path.name for path in tmp_path.iterdir()} == {"whole.tar", "out"}


@pytest.mark.parametrize("damage", ["cut", "header", "no end"])
def test_a_damaged_inner_tar_is_named(class_tars, tmp_path, damage):
    data = class_tars["n01443537.tar"]
    broken = {
        "cut": data[:2000],
        "header": data[:1536] + b"\xff" * 512 + data[2048:],
        "no end": data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 512) * 512, b"\0"),
    }[damage]
    (tmp_path / "whole.tar").write_bytes(tar_bytes(class_tars | {"n01443537.tar": broken}))
    with pytest.raises(UserError, match=r"whole\.tar:n01443537\.tar is not a whole tar .*; download or copy it again"):
        pack(tmp_path / "whole.tar", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()


def test_compressed_tars_are_refused_with_the_command_that_unpacks(class_tars, tmp_path):
    (tmp_path / "in").mkdir()
    for source in (tmp_path / "in" / "fall11_whole.tar.gz", tmp_path / "in"):
        (tmp_path / "in" / "fall11_whole.tar.gz").write_bytes(b"\x1f\x8b")
        with pytest.raises(UserError, match=r"gzip -dc \S+/fall11_whole\.tar\.gz > \S+/fall11_whole\.tar$"):
            pack(source, tmp_path / "out")
    (tmp_path / "inner.tar").write_bytes(tar_bytes({"n01440764.tar.gz": b"\x1f\x8b"}))
    with pytest.raises(UserError, match=r"inner\.tar:n01440764\.tar\.gz is compressed"):
        pack(tmp_path / "inner.tar", tmp_path / "out")


def test_two_tars_of_one_class_and_none(class_tars, tmp_path):
    path = tmp_path / "whole.tar"
    path.write_bytes(tar_bytes({"a/n01440764.tar": class_tars["n01440764.tar"], **class_tars}))
    with pytest.raises(UserError, match=r"holds two tars of class n01440764"):
        pack(path, tmp_path / "out")
    path.write_bytes(tar_bytes({"n01440764.tar": tar_bytes({"x.txt": b""})}))
    with pytest.raises(UserError, match=r"whole\.tar holds no image in 1 tars of classes"):
        pack(path, tmp_path / "out")


def test_images_are_listed_in_the_order_of_whole_names(tmp_path):
    """Of classes where one name begins another, too."""
    (tmp_path / "w.tar").write_bytes(tar_bytes({f"{c}.tar": tar_bytes({"1.png": b"x"}) for c in ("cat", "cat-big")}))
    files = tar_of_class_tars(tmp_path / "w.tar", 1)
    assert files.names == sorted(files.names) == ["cat-big/1.png", "cat/1.png"]
    assert (files.classes, files.rows["label"].tolist()) == (("cat", "cat-big"), [1, 0])


def test_a_listed_image_is_small(train_folder, class_tars, tmp_path):
    (tmp_path / "w.tar").write_bytes(tar_bytes(class_tars))
    files = tar_of_class_tars(tmp_path / "w.tar", 1)
    assert files.rows.dtype.itemsize == 32
    part = files.part(np.array([3, 0]))
    assert [part.read(i).data for i in (0, 1)] == [files.read(i).data for i in (3, 0)]
    assert len(part.names) == 2
    assert part.classes is None


def test_a_tar_beside_is_not_followed(class_tars, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "n01440764.tar").write_bytes(class_tars["n01440764.tar"])
    (tmp_path / "in" / "n01440764.tar").symlink_to(Path("../n01440764.tar"))
    with pytest.raises(UserError, match=r"in/n01440764\.tar leads out of \S+in to \S+"):
        pack(tmp_path / "in", tmp_path / "out")
