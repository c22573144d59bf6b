"""A tiny ImageNet, as real files in the layouts in which it is published."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from PIL import Image

from tests.data.packing.small import WNIDS, jpeg, tar_bytes


@pytest.fixture(scope="session")
def train_images() -> dict[str, dict[str, bytes]]:
    """WNID -> file name -> bytes, with ImageNet's quirks: a CMYK JPEG, and a PNG that is called .JPEG."""
    images = {w: {f"{w}_{10 * i + 6}.JPEG": jpeg(100 * n + i) for i in range(5)} for n, w in enumerate(WNIDS)}
    stream = io.BytesIO()
    Image.new("RGB", (5, 6), "red").save(stream, "png")
    images[WNIDS[2]] |= {f"{WNIDS[2]}_7.JPEG": jpeg(7, "CMYK"), f"{WNIDS[2]}_8.JPEG": stream.getvalue()}
    return images


@pytest.fixture
def train_folder(tmp_path: Path, train_images: dict[str, dict[str, bytes]]) -> Path:
    """A folder of class folders."""
    for wnid, images in train_images.items():
        (tmp_path / "folder" / wnid).mkdir(parents=True)
        for name, data in images.items():
            (tmp_path / "folder" / wnid / name).write_bytes(data)
    return tmp_path / "folder"


@pytest.fixture(scope="session")
def class_tars(train_images: dict[str, dict[str, bytes]]) -> dict[str, bytes]:
    """`nXXXXXXXX.tar` -> its bytes."""
    return {f"{wnid}.tar": tar_bytes(images) for wnid, images in train_images.items()}
