from __future__ import annotations

import json
import os

import numpy as np
import pytest

from fdscale.cli import main
from fdscale.config.errors import UserError
from fdscale.data.index import build_index, load_index, read_index
from fdscale.data.remote import transfer
from fdscale.data.remote.cache import Cache
from fdscale.data.verify import verify


def faults_of(folder, workers: int = 1) -> list[str]:
    return [str(fault) for fault in verify(read_index(folder), workers).faults]


@pytest.fixture
def folder(write_shards, png):
    shards = [{f"{shard}{n}.{kind}": data for n in range(3) for kind, data in (("png", png(n)), ("cls", b"%d" % n))}
              for shard in "abc"]  # fmt: skip
    built = write_shards(shards)
    build_index(built)
    return built


def overwrite(path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_good_shards_have_no_faults(folder, capsys):
    found = verify(load_index(folder))
    assert (found.samples, found.shards, found.faults) == (9, 3, ())
    assert main(["shards", "verify", str(folder)]) == 0
    assert "9 images in 3 shards: all of them good" in capsys.readouterr().out


def test_images_that_are_bad_are_named_whether_they_changed_or_never_were_any(write_shards, png):
    folder = write_shards([{"a.png": png(0), "b.png": b"bad"}, {"c.png": png(1), "d.png": png(2)}])
    index = build_index(folder)
    overwrite(folder / "s1.tar", int(index.samples["offset"][2]) + 50, b"!!")
    first, second, third = faults_of(folder)
    assert first.startswith("s0.tar:b.png (UnidentifiedImageError: cannot identify")
    assert second.startswith("s1.tar (SHA-256 ")
    assert third == "s1.tar:c.png (its bytes are not those that were indexed)"


@pytest.mark.parametrize("workers", [1, 3])
def test_shards_that_disagree_with_the_index_are_named_with_the_samples(folder, png, workers):
    whole = (folder / "s0.tar").read_bytes()
    overwrite(folder / "s0.tar", whole.index(b"a1.cls") + 512, b"7")
    os.truncate(folder / "s1.tar", 3000)
    (folder / "s2.tar").unlink()
    (folder / "s9.tar").write_bytes(whole)
    faults = faults_of(folder, workers)
    assert faults[0].startswith("s9.tar (not in the index; make it again: fdscale shards index ")
    assert faults[1].startswith("s0.tar (SHA-256 ")
    assert faults[2] == "s0.tar:a1.png (label 7, indexed 1)"
    assert faults[3].startswith("s1.tar (shard ")
    assert faults[4] == "s1.tar:b1.png (outside of the shard)"
    assert faults[-1] == "s2.tar (missing)"


def test_damaged_rows_are_told_and_the_images_still_decoded(folder):
    rows = np.load(folder / "samples.npy")
    rows["label"][4] = 9
    np.save(folder / "samples.npy", rows)
    (fault,) = faults_of(folder)
    assert fault.startswith("s1.tar (its rows in the index are damaged; make it again: fdscale shards index ")


def test_samples_that_came_or_went(write_shards, png):
    folder = write_shards([{"a.png": png(0), "b.png": png(1)}])
    build_index(folder)
    data = (folder / "s0.tar").read_bytes()
    index_files = [(folder / name).read_bytes() for name in ("index.json", "samples.npy")]
    header = bytearray(data[1024 : 1024 + 512])
    assert header.startswith(b"b.png")
    header[0:1] = b"c"
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    overwrite(folder / "s0.tar", 1024, bytes(header))
    assert index_files == [(folder / name).read_bytes() for name in ("index.json", "samples.npy")]
    told = [fault.partition(":")[2] for fault in faults_of(folder)[1:]]
    assert "c.png (in the shard, and not indexed)" in told
    assert any("indexed, and no longer in the shard" in line for line in told)


@pytest.mark.parametrize("name", ["../outside.tar", "/dev/zero", "s0\0.tar", ".tar/"])
def test_an_index_that_names_another_file_is_refused(folder, name):
    (folder.parent / "outside.tar").write_bytes((folder / "s0.tar").read_bytes())
    manifest = json.loads((folder / "index.json").read_text())
    manifest["shards"][0]["name"] = name
    (folder / "index.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"index\.json is damaged \(no 'name' as it should be\)"):
        verify(read_index(folder), 1)


def test_the_command_fails_and_lists_all_that_is_wrong(write_shards, png, tmp_path, capsys):
    folder = write_shards([{f"{n:02d}.png": b"bad" for n in range(25)} | {"x.png": png(0)}])
    build_index(folder)
    assert main(["shards", "verify", str(folder), "--list", str(tmp_path / "bad.txt")]) == 1
    out = capsys.readouterr().out
    assert "s0.tar:00.png (UnidentifiedImageError" in out
    assert "5 more: --list FILE writes them all" in out
    assert "26 images in 1 shard: 25 bad images, 0 bad shards" in out
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 25


def test_shards_behind_a_url_are_fetched_and_verified(write_shards, png, tmp_path, capsys):
    folder = write_shards([{"a.png": png(0), "b.png": b"bad"}, {"c.png": png(1), "d.png": png(2)}, {"e.png": png(3)}])
    build_index(folder)
    options = ["--cache", str(tmp_path / "cache"), "--workers", "2"]
    assert main(["shards", "verify", folder.as_uri(), *options]) == 1
    out = capsys.readouterr().out
    assert out.startswith("s0.tar:b.png (UnidentifiedImageError")
    assert "5 images in 3 shards: 1 bad image, 0 bad shards" in out


def test_a_shard_that_cannot_be_fetched_is_named_and_the_others_verified(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "WAITS", ())
    overwrite(folder / "s1.tar", 600, b"!!")
    index = load_index(folder.as_uri(), Cache(tmp_path / "cache", 2**30))
    (fault,) = verify(index, 1).faults
    assert (fault.shard, fault.member) == ("s1.tar", None)
    assert "not those that were indexed" in fault.reason
    assert len(list((tmp_path / "cache").glob("*/*.tar"))) == 2


def test_info_of_a_url_is_that_of_its_folder(folder, tmp_path, capsys):
    told = []
    for options in ([str(folder)], [f"pipe:cat {folder}/{{}}", "--cache", str(tmp_path / "cache"), "--allow-pipe"]):
        assert main(["shards", "info", *options, "--json"]) == 0
        told.append(json.loads(capsys.readouterr().out))
    assert told[0] == told[1]


@pytest.mark.parametrize("command", ["info", "verify"])
def test_what_a_url_wants_is_named(tmp_path, capsys, command):
    assert main(["shards", command, "https://host/in1k"]) == 2
    assert "--cache DIR" in "".join(capsys.readouterr())
    assert main(["shards", command, f"pipe:touch {tmp_path}/ran {{}}", "--cache", str(tmp_path / "cache")]) == 2
    assert "--allow-pipe" in "".join(capsys.readouterr())
    assert not (tmp_path / "ran").exists()


def test_without_an_index_it_says_how_to_make_one(write_shards, png, capsys):
    folder = write_shards([{"a.png": png(0)}])
    for command in ("verify", "info"):
        assert main(["shards", command, str(folder)]) == 2
        assert f"fdscale shards index {folder}" in "".join(capsys.readouterr()).replace("\n", " ")


def test_images_that_were_not_checked_are_counted(folder, capsys):
    (folder / "s2.tar").unlink()
    assert main(["shards", "verify", str(folder)]) == 1
    assert "9 images in 3 shards: 0 bad images, 1 bad shard, 3 images not checked" in capsys.readouterr().out


def test_a_folder_that_does_not_exist_is_told_as_such(tmp_path, capsys):
    assert main(["shards", "verify", str(tmp_path / "nope")]) == 2
    assert "nope does not exist" in "".join(capsys.readouterr()).replace("\n", " ")
