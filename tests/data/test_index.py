from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fdscale.config.errors import UserError
from fdscale.data.images import ImageReader
from fdscale.data.index import build_index, load_index
from fdscale.data.scan import key_hash


def test_index_finds_every_image(write_shards, png):
    long_key = "class/" + "x" * 120  # longer than a plain tar header: a PAX record goes before it
    folder = write_shards(
        [
            {"a.cls": b"3", "a.png": png(0), "a.json": b"{}", "sub/b.JPG": png(1), "sub/b.cls": b" 0\n"},
            {f"{long_key}.png": png(2), "c.seg.png": b"not an image of its own"},
        ]
    )
    build_index(folder)
    index = load_index(folder)
    assert len(index) == 3
    assert [shard.samples for shard in index.shards] == [2, 1]
    assert index.samples["label"].tolist() == [3, 0, -1]
    assert index.samples["key"].tolist() == [key_hash(key) for key in ("a", "sub/b", long_key)]
    for number, row in enumerate(index.samples):
        data = index.shard_path(int(row["shard"])).read_bytes()
        assert data[row["offset"] : row["offset"] + row["size"]] == png(number)
    assert index.name(1) == "s0.tar:sub/b.JPG"
    assert index.name(2).startswith("s1.tar:class/xxx")


def test_key_hash_is_pinned():
    assert key_hash("n01440764/n01440764_10026") == 0x22363D7F1C182FC9


def test_class_names_come_from_the_folder(write_shards, png):
    folder = write_shards([{"a.cls": b"1", "a.png": png(0)}])
    (folder / "classes.json").write_text('["cat", "dog"]')
    assert build_index(folder).classes == ("cat", "dog")
    assert load_index(folder).classes == ("cat", "dog")
    (folder / "classes.json").write_text('["cat"]')
    with pytest.raises(UserError, match=r"label a\.cls .* '1'; allowed: an integer from 0 to 0, the 1 names"):
        build_index(folder)


def test_missing_and_empty_folders(tmp_path: Path):
    for make in (build_index, load_index):
        with pytest.raises(UserError, match=r"nowhere does not exist.*fdscale shards pack"):
            make(tmp_path / "nowhere")
        with pytest.raises(UserError, match=r"holds no \*\.tar"):
            make(tmp_path)


@pytest.mark.parametrize("content", [b"", b"this is no tar" * 100, b"\x1f\x8b gzip" * 200])
def test_a_shard_that_is_no_tar_is_named(write_shards, png, content):
    folder = write_shards([{"a.png": png(0)}])
    (folder / "broken.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.tar is not a whole tar"):
        build_index(folder)
    assert not (folder / "index.json").exists()


@pytest.mark.parametrize("keep", [100, 512, 800, 1024, 1200, 1536, 1700, 2048])
def test_a_truncated_shard_is_refused(write_shards, png, keep):
    assert len(png(0)) <= 512  # header, one block, header, one block, end
    folder = write_shards([{"a.png": png(0), "b.png": png(1)}])
    whole = (folder / "s0.tar").read_bytes()
    (folder / "s0.tar").write_bytes(whole[:keep])
    with pytest.raises(UserError, match=r"s0\.tar is not a whole tar"):
        build_index(folder)


def test_a_damaged_header_in_the_middle_is_refused(write_shards, png):
    folder = write_shards([{"a.png": png(0), "b.png": png(1), "c.png": png(2)}])
    index = build_index(folder)
    data = bytearray((folder / "s0.tar").read_bytes())
    data[int(index.samples["offset"][1]) - 512] ^= 0xFF
    (folder / "s0.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"truncated or damaged at byte"):
        build_index(folder)
    assert index.name(1) == f"s0.tar:key {key_hash('b'):016x}"


def test_a_tar_without_images_is_named(write_shards, png):
    with pytest.raises(UserError, match=r"s1\.tar holds no image; expected members KEY\.\{jpg"):
        build_index(write_shards([{"a.png": png(0)}, {"b.cls": b"1", "b.txt": b"hello"}]))


@pytest.mark.parametrize(
    "shards", [[["a.png"], ["b.png", "a.jpg"]], [["c.png", "a.png", "a.webp"]], [["a.png", "a.png"]]]
)
def test_duplicate_keys_are_named_with_their_shards(write_shards, png, tmp_path, shards):
    if shards == [["a.png", "a.png"]]:
        folder = write_shards([{"a.png": png(0), "z.png": png(0)}])
        data = (folder / "s0.tar").read_bytes()
        a_header = data[:512]
        z_at = data.index(b"z.png")
        (folder / "s0.tar").write_bytes(data[:z_at] + a_header + data[z_at + 512 :])
    else:
        folder = write_shards([dict.fromkeys(names, png(0)) for names in shards])
    with pytest.raises(UserError, match=r"appear twice.*s0\.tar:a\.png and s\d\.tar:a\."):
        build_index(folder)


@pytest.mark.parametrize("label", [b"cat", b"-1", b"1.5", b"", "\N{SUPERSCRIPT TWO}".encode(), b"2147483648"])
def test_a_label_that_is_no_class_number(write_shards, png, label):
    with pytest.raises(UserError, match=r"label b\.cls in shard .*s0\.tar is .*allowed: an integer from 0"):
        build_index(write_shards([{"a.png": png(0), "b.png": png(1), "b.cls": label}]))


def test_load_refuses_what_is_not_as_indexed(write_shards, png):
    folder = write_shards([{"a.png": png(0)}, {"b.png": png(1)}])
    with pytest.raises(UserError, match=rf"has no index\.json.*fdscale shards index {folder}"):
        load_index(folder)
    build_index(folder)
    first = (folder / "s0.tar").read_bytes()
    (folder / "s0.tar").write_bytes(first + b"\0" * 512)
    with pytest.raises(UserError, match=r"s0\.tar has \d+ bytes, its index says \d+"):
        load_index(folder)
    (folder / "s0.tar").unlink()
    with pytest.raises(UserError, match=r"1 indexed shard\(s\) missing from .*: s0\.tar"):
        load_index(folder)
    (folder / "s0.tar").write_bytes(first)
    (folder / "s9.tar").write_bytes(first)
    with pytest.raises(UserError, match=r"1 shard\(s\) in .* are not in its index: s9\.tar"):
        load_index(folder)


def test_load_refuses_a_damaged_index(write_shards, png):
    folder = write_shards([{"a.png": png(0)}, {"b.png": png(1)}])
    build_index(folder)
    text, rows = (folder / "index.json").read_text(), (folder / "samples.npy").read_bytes()
    (folder / "samples.npy").write_bytes(rows[:-5])
    with pytest.raises(UserError, match=r"samples\.npy cannot be read .*fdscale shards index"):
        load_index(folder)
    (folder / "samples.npy").write_bytes(rows)
    (folder / "index.json").write_text(text.replace('"samples": 2', '"samples": 3'))
    with pytest.raises(UserError, match=r"does not belong to its index\.json"):
        load_index(folder)
    (folder / "index.json").write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(UserError, match=r"version 99, allowed: 2"):
        load_index(folder)
    (folder / "index.json").write_text(text[:20])
    with pytest.raises(UserError, match="damaged"):
        load_index(folder)
    (folder / "index.json").write_text(json.dumps({"version": 2, "classes": None}))
    with pytest.raises(UserError, match=r"damaged \(no 'shards' as it should be\)"):
        load_index(folder)


@pytest.mark.parametrize(("field", "value"), [("shard", 7), ("shard", -1), ("offset", -512), ("size", 2**31 - 1)])
def test_a_row_outside_its_shard_is_refused_before_it_is_read(write_shards, png, field, value):
    folder = write_shards([{"a.png": png(0), "b.png": png(1)}])
    build_index(folder)
    rows = np.load(folder / "samples.npy")
    rows[field][1] = value
    np.save(folder / "samples.npy", rows)
    with pytest.raises(UserError, match=r"row \d lies outside its shard; make it again|does not belong to its"):
        ImageReader(load_index(folder)).decode(1)


def test_indexing_again_gives_the_same_files_and_leaves_no_others(write_shards, png):
    folder = write_shards([{"a.png": png(0)}])
    build_index(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    build_index(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert set(before) == {"s0.tar", "index.json", "samples.npy"}


def test_index_and_order_leave_torch_unimported():
    code = "import sys, fdscale.data.index, fdscale.data.order; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
