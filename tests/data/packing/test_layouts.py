"""Which layout a source has."""

from __future__ import annotations

import pytest

from fdscale.cli import main
from fdscale.config.errors import UserError
from fdscale.data.packing.layouts import open_source
from fdscale.data.packing.pack import pack
from tests.data.packing.small import jpeg, tar_bytes


def test_a_folder_with_train_and_val(tmp_path):
    for split in ("train", "val"):
        (tmp_path / "in" / split / "cat").mkdir(parents=True)
        (tmp_path / "in" / split / "cat" / f"{split}.jpg").write_bytes(jpeg(1))
    assert open_source(tmp_path / "in", None, 1).names == ["cat/train.jpg"]
    assert open_source(tmp_path / "in", "val", 1).names == ["cat/val.jpg"]
    with pytest.raises(UserError, match=r"--split val: \S+train has no splits; leave it out"):
        open_source(tmp_path / "in" / "train", "val", 1)


def test_what_is_no_source(tmp_path):
    with pytest.raises(UserError, match=r"nowhere does not exist; give a folder of images or of tars, or a tar"):
        open_source(tmp_path / "nowhere", None, 1)
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    with pytest.raises(UserError, match=r"a\.jpg is neither a folder nor a \.tar"):
        open_source(tmp_path / "a.jpg", None, 1)
    (tmp_path / "empty.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty\.tar is not a whole tar"):
        open_source(tmp_path / "empty.tar", None, 1)


def test_tars_beside_folders_are_not_guessed_about(tmp_path):
    (tmp_path / "in" / "n01440764").mkdir(parents=True)
    (tmp_path / "in" / "n01440764.tar").write_bytes(tar_bytes({"a.jpg": jpeg(1)}))
    with pytest.raises(UserError, match=r"in holds 1 tars and the folder n01440764; allowed: either, alone"):
        open_source(tmp_path / "in", None, 1)


def test_an_output_that_is_taken_is_told_before_anything_is_listed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(UserError, match="is not an empty folder; nothing was written"):
        pack(tmp_path / "nowhere", tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output \S+file/x cannot be written, since \S+file is a file; name another"):
        pack(tmp_path / "nowhere", tmp_path / "file" / "x")


@pytest.mark.parametrize("option", ["--samples-per-shard=0", "--workers=0", "--max-bad-ratio=3", "--seed=-1"])
def test_numbers_out_of_range_are_refused_before_anything_is_read(tmp_path, capsys, option):
    assert main(["shards", "pack", str(tmp_path / "nowhere"), str(tmp_path / "out"), option]) == 2
    assert option.partition("=")[0] in capsys.readouterr().err
