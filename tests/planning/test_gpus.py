"""The catalogue of GPUs: found whatever the case, an unknown one is told with those like it."""

from __future__ import annotations

import pytest

from fdscale.config.errors import UserError
from fdscale.planning.gpus import GPUS, gpu_named


def test_names_are_found_in_any_case() -> None:
    assert gpu_named("h100-80gb") is GPUS["H100-80GB"]


def test_memory_is_at_most_what_the_name_says() -> None:
    for name, gpu in GPUS.items():
        size = int(name.rpartition("-")[2].removesuffix("GB"))
        assert 0.9 * size < gpu.memory / 2**30 <= size, name
        assert gpu.bf16 > gpu.fp32, name


@pytest.mark.parametrize(
    ("name", "told"), [("A100", "A100-40GB or A100-80GB"), ("H100-80", "H100-80GB"), ("h10-80gb", "'h100-80gb'")]
)
def test_an_unknown_name_is_told_with_the_nearest(name: str, told: str) -> None:
    with pytest.raises(UserError, match=f"did you mean {told}"):
        gpu_named(name)
