"""Which images are looked at: a spread of distinct ones, the same in the same batches for every image size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fdscale.data.batches import EvalBatches, Request
from fdscale.data.index import load_index
from fdscale.diagnostics.sample import batches_by_size, evenly_spread

CPU = torch.device("cpu")


@given(samples=st.integers(1, 5000), wanted=st.integers(1, 400), seed=st.integers(0, 9))
def test_a_sample_is_spread_evenly_and_takes_none_twice(samples: int, wanted: int, seed: int) -> None:
    chosen = np.sort(evenly_spread(samples, wanted, seed))
    count = min(samples, wanted)
    assert len(np.unique(chosen)) == len(chosen) == count
    assert chosen[0] >= 0
    assert chosen[-1] < samples
    part = samples / count
    assert (np.abs(chosen - (np.arange(count) + 0.5) * part) <= part + 1).all()


def test_a_sample_is_the_same_each_time_and_mixed() -> None:
    first, again, other = (evenly_spread(1000, 50, seed).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert first != sorted(first)


@pytest.mark.parametrize("workers", [0, 2])
def test_sizes_are_read_in_step_as_evaluation_reads_them(digits: Path, workers: int) -> None:
    index = load_index(digits)
    chosen = evenly_spread(len(index), 10)
    seen = list(batches_by_size(index, chosen, [32, 16, 32], 4, workers, CPU))
    assert [list(batches) for batches in seen] == [[16, 32]] * 3
    for side in (16, 32):
        whole = EvalBatches(index, side, "bicubic")[Request(chosen, np.zeros_like(chosen), slice(0, 10))]
        assert torch.equal(torch.cat([batches[side].images for batches in seen]), whole.images)
        assert torch.equal(torch.cat([batches[side].labels for batches in seen]), whole.labels)
        assert torch.equal(torch.cat([batches[side].keys for batches in seen]), whole.keys)


def test_an_image_that_cannot_be_decoded_is_left_out_of_all_sizes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import io
    import tarfile

    from fdscale.data.index import build_index

    stream = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(stream, "png")
    with tarfile.open(tmp_path / "only.tar", "w") as tar:
        for number, data in enumerate([stream.getvalue(), stream.getvalue()[:40], stream.getvalue()]):
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with caplog.at_level("WARNING", "fdscale"):
        (batches,) = batches_by_size(build_index(tmp_path), np.array([2, 1, 0]), [8, 16], 3, 0, CPU)
    assert [batches[side].images.shape[0] for side in (8, 16)] == [2, 2]
    assert caplog.text.count("cannot be decoded") == 1
