from __future__ import annotations

import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import zlib
from dataclasses import replace
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


@pytest.mark.parametrize(
    ("field", "value"), [("shard", 7), ("shard", -1), ("offset", -512), ("size", 2**31 - 1), ("size", -1)]
)
def test_a_row_outside_its_shard_is_refused_before_it_is_read(write_shards, png, field, value):
    index = build_index(write_shards([{"a.png": png(0), "b.png": png(1), "c.png": png(2)}]))
    rows = np.array(index.samples[:2])
    rows[field][1] = value
    reader = ImageReader(replace(index, samples=rows))  # some of the rows
    assert reader.decode(0).mode == "RGB"
    with pytest.raises(UserError, match=r"row 1 lies outside its shard; make it again"):
        reader.decode(1)
    reader.close()


@pytest.mark.parametrize(("field", "value"), [("label", 5), ("key", 1), ("offset", 512), ("crc", 0)])
def test_damaged_rows_are_noticed_with_the_first_image_of_their_shard(write_shards, png, field, value):
    folder = write_shards([{"a.png": png(0), "b.png": png(1)}, {"c.png": png(2), "d.png": png(3)}])
    build_index(folder)
    rows = np.load(folder / "samples.npy")
    rows[field][3] = value
    np.save(folder / "samples.npy", rows)
    reader = ImageReader(load_index(folder))
    assert reader.decode(0).mode == "RGB"
    with pytest.raises(UserError, match=r"samples\.npy: the rows of shard s1\.tar are damaged; make it again"):
        reader.decode(2)
    reader.close()


def test_rows_are_counted_by_shard_of_all_and_of_some(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0)}, {"b.png": png(1), "c.png": png(2)}, {"d.png": png(3)}]))
    assert index.starts.tolist() == [0, 1, 3, 4]
    assert replace(index, samples=index.samples[[0, 2]]).starts.tolist() == [0, 1, 2, 2]
    assert replace(index, samples=index.samples[[3]]).starts.tolist() == [0, 0, 0, 1]


def tar_of(folder: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / "s.tar", "w") as tar:
        for info, data in members:
            info.size = info.size or len(data)
            tar.addfile(info, io.BytesIO(data) if info.isreg() else None)
    return folder


def info_of(name: str, **fields: int | str | bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


@pytest.mark.parametrize("name", ["../a.png", "/etc/a.png", "a/../../b.png", "../readme.txt", "x/.."])
def test_names_that_lead_out_are_refused(tmp_path, png, name):
    folder = tar_of(tmp_path / "f", (info_of("good.png"), png(0)), (info_of(name), png(1)))
    with pytest.raises(UserError, match=rf"s\.tar: member {re.escape(name)} leads out of the folder"):
        build_index(folder)


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}, r"b\.png is a link to /etc/passwd"),
        ({"type": tarfile.LNKTYPE, "linkname": "a.png"}, r"b\.png is a link to a\.png"),
        ({"type": tarfile.FIFOTYPE}, r"b\.png is a sparse or special file"),
    ],
)
def test_links_and_special_files_among_the_images_are_refused(tmp_path, png, fields, why):
    folder = tar_of(tmp_path / "f", (info_of("a.png"), png(0)), (info_of("b.png", **fields), b""))
    with pytest.raises(UserError, match=why):
        build_index(folder)


def test_other_links_and_folders_are_no_samples(tmp_path, png):
    link = info_of("latest", type=tarfile.SYMTYPE, linkname="a.png")
    folder = tar_of(
        tmp_path / "f", (info_of("d", type=tarfile.DIRTYPE), b""), (link, b""), (info_of("d/a.png"), png(0))
    )
    assert len(build_index(folder)) == 1


@pytest.mark.parametrize("name", ["negative.png", "negative.cls", "negative.txt"])
def test_a_negative_size_is_refused_by_name(tmp_path, png, name):
    block = bytearray(info_of(name).tobuf(tarfile.GNU_FORMAT))
    block[124:136] = b"\xff" * 10 + b"\xfe\x00"  # base 256: -512, which leads back to this very header
    block[148:156] = b"%06o\0 " % (256 + sum(block[:148]) + sum(block[156:]))
    folder = tar_of(tmp_path / "f", (info_of("a.png"), png(0)))
    path = folder / "s.tar"
    path.write_bytes(path.read_bytes()[:1024] + bytes(block) + bytes(10240))
    with pytest.raises(UserError, match=rf"shard .*s\.tar .*{re.escape(name)} .*-512 bytes"):
        build_index(folder)


def test_a_huge_member_is_refused_by_name_before_it_is_read(tmp_path, png):
    header = info_of("huge.png", size=300 * 2**20).tobuf()
    folder = tar_of(tmp_path / "f", (info_of("a.png"), png(0)))
    with (folder / "s.tar").open("r+b") as file:
        file.seek(1024)
        file.write(header)
        file.truncate(1536 + 300 * 2**20)
    with pytest.raises(UserError, match=r"member huge\.png has 314572800 bytes; allowed: 268435456"):
        build_index(folder)


def test_a_long_name_of_gigabytes_is_not_read(tmp_path, png):
    folder = tar_of(tmp_path / "f", (info_of("a.png"), png(0)))
    with (folder / "s.tar").open("r+b") as file:
        file.seek(1024)
        file.write(info_of("long", type=tarfile.GNUTYPE_LONGNAME, size=2**33).tobuf(tarfile.GNU_FORMAT))
        file.truncate(2**33 + 4096)  # sparse
    with pytest.raises(UserError, match=r"s\.tar is not a whole tar file \(a header of 8589934592 bytes"):
        build_index(folder)


def test_two_tars_in_one_file_are_refused(write_shards, png):
    folder = write_shards([{"a.png": png(0)}, {"b.png": png(1)}])
    with (folder / "s0.tar").open("ab") as file:
        file.write((folder / "s1.tar").read_bytes())
    with pytest.raises(
        UserError, match=r"s0\.tar is not a whole tar file \(it ends at byte \d+, but something follows"
    ):
        build_index(folder)


def test_labels_that_contradict_each_other_are_refused(tmp_path, png):
    members = [(info_of("a.png"), png(0)), (info_of("a.cls"), b"1"), (info_of("a.cls"), b"2")]
    with pytest.raises(UserError, match=r"label a\.cls appears twice in shard .*s\.tar, and differs"):
        build_index(tar_of(tmp_path / "f", *members))


def test_names_in_messages_are_whole_and_printable(tmp_path, png):
    long, odd = "d" * 150 + "/" + "x" * 120, "esc\x1b[31m\n\udcff"
    index = build_index(tar_of(tmp_path / "f", (info_of(f"{long}.png"), png(0)), (info_of(f"{odd}.png"), png(1))))
    assert index.name(0) == f"s.tar:{long}.png"
    assert index.name(1) == "s.tar:esc1b[31m0aff.png"


def test_the_checksum_is_of_the_images_bytes(write_shards, png):
    index = build_index(write_shards([{"a.png": png(0), "b.png": png(1)}]))
    assert index.samples["crc"].tolist() == [zlib.crc32(png(0)), zlib.crc32(png(1))]
    assert index.shards[0].sha256 == hashlib.sha256(index.shard_path(0).read_bytes()).hexdigest()


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
