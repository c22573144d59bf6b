"""The catalogue of GPUs: found whatever the case, an unknown one is told with those like it."""

from __future__ import annotations

import pytest

from fdscale.config.errors import UserError
from fdscale.planning.gpus import GPUS, gpu_called, gpu_named


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


@pytest.mark.parametrize(
    ("driver", "gib", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 79.2, "H100-80GB"),
        ("NVIDIA H100 NVL", 93.1, None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", 9.8, None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 15.6, None),
        ("NVIDIA H200", 139.8, "H200-141GB"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", 79.2, "A100-80GB"),
        ("Tesla V100-SXM2-32GB", 31.7, "V100-32GB"),
        ("NVIDIA GeForce RTX 4090", 23.5, "RTX4090-24GB"),
        ("NVIDIA RTX A6000", 47.4, "A6000-48GB"),
        ("NVIDIA L4", 22.0, "L4-24GB"),
        ("NVIDIA H100 PCIe", 79.2, None),  # three quarters of the others' peak
        ("NVIDIA A10G", 22.0, None),
        ("NVIDIA GeForce GTX 1080", 8.0, None),
    ],
)
def test_a_card_is_known_by_what_its_driver_calls_it(driver: str, gib: float, name: str | None) -> None:
    found = gpu_called(driver, int(gib * 2**30))
    assert (found and found.name) == name
