from __future__ import annotations

import sys

import numpy as np
import pytest

from fdscale.config.errors import UserError
from fdscale.data.images import ImageReader
from fdscale.data.packing.digits import pack_digits


def test_digits(tmp_path):
    train, test = (pack_digits(tmp_path / split, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1348, 449)
    assert len(train.shards) == len(test.shards) == 4
    assert train.classes == tuple("0123456789")
    assert not set(train.samples["key"].tolist()) & set(test.samples["key"].tolist())
    assert np.bincount(test.samples["label"]).min() > 30
    from sklearn.datasets import load_digits

    digits = load_digits()
    assert test.samples["label"].tolist() == digits.target[3::4].tolist()
    reader = ImageReader(test)
    pixels = np.asarray(reader.decode(5), dtype=float)
    reader.close()
    assert pixels.shape == (32, 32, 3)
    blocks = pixels[..., 0].reshape(8, 4, 8, 4).mean((1, 3))
    assert np.corrcoef(blocks.ravel(), digits.images[5 * 4 + 3].ravel())[0, 1] > 0.95


def test_digits_without_scikit_learn(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'pip install "fdscale\[demo\]"'):
        pack_digits(tmp_path / "out", "train")
