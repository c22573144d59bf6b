"""Existing WebDataset tars, packed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from fdscale.config.errors import UserError
from fdscale.data.packing.pack import pack
from tests.data.packing.small import jpeg, link, packed, tar_bytes


def tars(folder: Path, *shards: dict) -> Path:
    folder.mkdir()
    for number, members in enumerate(shards):
        (folder / f"s-{number}.tar").write_bytes(tar_bytes(members))
    return folder


def test_images_and_labels_are_shuffled_over_all_of_them(tmp_path, caplog):
    shards = [
        {f"a/{n}.cls": str(n % 3).encode(), f"a/{n}.JPG": jpeg(n), f"a/{n}.json": b"{}", f"a/{n}.seg.png": b"mask"}
        for n in range(12)
    ]
    source = tars(tmp_path / "in", *[dict(item for s in shards[i : i + 4] for item in s.items()) for i in (0, 4, 8)])
    (source / "s-0.tar").write_bytes(tar_bytes({"./b.png": jpeg(50)} | shards[0] | shards[1] | shards[2] | shards[3]))
    (source / "classes.json").write_text('["cat", "dog", "eel"]')
    index = pack(source, tmp_path / "out", 5)
    assert packed(index) == {f"a/{n}.jpg": (jpeg(n), n % 3) for n in range(12)} | {"b.png": (jpeg(50), -1)}
    assert index.classes == ("cat", "dog", "eel")
    first = [index.name(i).partition(":")[2] for i in range(5)]
    assert not all(name in {"b.png", "a/0.jpg", "a/1.jpg", "a/2.jpg", "a/3.jpg"} for name in first)
    assert "files that are not images are left out: 24 (12 json, 12 seg.png)" in caplog.text
    assert packed(pack(source / "s-1.tar", tmp_path / "one", 5)) == {
        f"a/{n}.jpg": (jpeg(n), n % 3) for n in range(4, 8)
    }


def test_what_shards_may_not_hold(tmp_path):
    output = tmp_path / "out"
    source = tars(tmp_path / "one", {"a.jpg": jpeg(1), "a.cls": b"cat"})
    with pytest.raises(UserError, match=r"label \S+s-0\.tar:a\.cls is 'cat'; allowed: an integer from 0$"):
        pack(source, output)
    (source / "s-0.tar").write_bytes(tar_bytes({"a.jpg": jpeg(1), "a.cls": b"1"}))
    (source / "classes.json").write_text('["cat"]')
    with pytest.raises(
        UserError, match=r"label \S+ is '1'; allowed: an integer from 0 to 0, the 1 names in classes\.json"
    ):
        pack(source, output)
    with pytest.raises(UserError, match=r"s-0\.tar:x/a\.jpg and s-1\.tar:x/a\.png would both have the key 'x/a'"):
        pack(tars(tmp_path / "twice", {"x/a.jpg": jpeg(1)}, {"x/a.png": jpeg(1)}), output)
    with pytest.raises(UserError, match=r"holds no image in 1 tars; expected members KEY\.jpg"):
        pack(tars(tmp_path / "none", {"a.txt": b""}), output)
    with pytest.raises(UserError, match=r"2 of 3 images are left out.*\.\./b\.jpg: its name leads.*c\.jpg: a link"):
        pack(tars(tmp_path / "out_of", {"a.jpg": jpeg(1), "../b.jpg": jpeg(2), "c": link("c.jpg", "/x")}), output)
    cut = tars(tmp_path / "cut", {"a.jpg": jpeg(1), "b.jpg": jpeg(2)})
    data = (cut / "s-0.tar").read_bytes()
    (cut / "s-0.tar").write_bytes(data + data)
    with pytest.raises(
        UserError, match=r"cut/s-0\.tar is not a whole tar \(it ends at byte \d+, but something follows"
    ):
        pack(cut, output)
    (cut / "s-0.tar").write_bytes(data[:1900])
    with pytest.raises(UserError, match=r"cut/s-0\.tar is not a whole tar"):
        pack(cut, output)
    assert not output.exists()


def test_images_that_webdatasets_rule_leaves_out_are_named(tmp_path):
    source = tars(tmp_path / "in", {"a.jpg": jpeg(1), "r.left.jpg": jpeg(2)})
    with pytest.raises(UserError, match=r"1 of 2 images are left out.*r\.left\.jpg: a key ends at the first dot"):
        pack(source, tmp_path / "out")
    assert len(pack(source, tmp_path / "out", max_bad_ratio=0.5)) == 1
    (source / "s-0.tar").write_bytes(tar_bytes({"x.v0.jpg": jpeg(1)}))
    with pytest.raises(UserError, match=r"holds no image in 1 tars.*; x\.v0\.jpg: a key ends at the first dot"):
        pack(source, tmp_path / "other")


def test_classes_without_labels_are_told(tmp_path, caplog):
    for names in (["0.tar", "1.tar"], ["cat.tar", "dog.tar"]):
        source = tmp_path / names[0]
        source.mkdir()
        for number, name in enumerate(names):
            (source / name).write_bytes(tar_bytes({f"{number}.jpg": jpeg(number)}))
        pack(source, tmp_path / f"out-{names[0]}")
    assert "0.tar: no image has" not in caplog.text
    assert "cat.tar: no image has a label KEY.cls; if its tars (cat.tar, dog.tar) are classes, put them" in caplog.text
    (tmp_path / "all.tar").write_bytes(tar_bytes({"n1/a.jpg": jpeg(1), "n2/b.jpg": jpeg(2)}))
    pack(tmp_path / "all.tar", tmp_path / "out")
    assert "all.tar: no image has a label KEY.cls; if its folders (n1, n2) are classes, unpack" in caplog.text
