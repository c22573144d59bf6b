"""What torch writes is on the disk byte for byte, and its hash is known without reading it again."""

from __future__ import annotations

import errno
import hashlib
import os
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fdscale.training.hashed_file import BLOCK, PIECE, HashedFile, save_hashed

SIZES = st.sampled_from([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, PIECE - 1, PIECE, PIECE + 1]) | st.integers(0, 3 * BLOCK)


@pytest.mark.parametrize("folder", [None, "/dev/shm"], ids=["past the page cache", "in memory"])
@settings(max_examples=25)
@given(sizes=st.lists(SIZES, max_size=6))
def test_every_byte_arrives_however_it_is_cut(
    folder: str | None, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(folder, f"fdscale_{os.getpid()}") if folder else tmp_path_factory.getbasetemp() / "hashed"
    parts = [os.urandom(size) for size in sizes]
    try:
        with HashedFile(path) as file:
            for part in parts:
                assert file.write(part) == len(part)
        content = b"".join(parts)
        assert path.read_bytes() == content
        assert file.size == len(content)
        assert file.sha256.hexdigest() == hashlib.sha256(content).hexdigest()
    finally:
        path.unlink(missing_ok=True)


def test_torch_reads_what_was_saved(tmp_path: Path) -> None:
    value = {"weights": torch.randn(1_500_000), "step": 3, "shared": None}
    value["shared"] = value["weights"]
    told = save_hashed(value, tmp_path / "saved.pt")
    assert told == {
        "size": (tmp_path / "saved.pt").stat().st_size,
        "sha256": hashlib.sha256((tmp_path / "saved.pt").read_bytes()).hexdigest(),
    }
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "saved.pt", mmap=mmap, weights_only=True)
        assert torch.equal(loaded["weights"], value["weights"])
        assert loaded["shared"].data_ptr() == loaded["weights"].data_ptr()
    assert torch.serialization.get_crc32_options()


def test_a_file_that_is_there_is_written_anew(tmp_path: Path) -> None:
    (tmp_path / "saved.pt").write_bytes(bytes(100_000))
    assert save_hashed({}, tmp_path / "saved.pt")["size"] == (tmp_path / "saved.pt").stat().st_size < 100_000


def test_a_full_disk_is_an_os_error_and_leaves_no_descriptor(tmp_path: Path) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = len(os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * PIECE, unlimited[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            save_hashed(torch.zeros(PIECE), tmp_path / "saved.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert caught.value.errno == errno.EFBIG
    assert len(os.listdir("/proc/self/fd")) == before
