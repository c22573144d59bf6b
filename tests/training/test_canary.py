"""Teachers that are not what they were: one bit in memory, one wrong number, one rank of two; in all placements."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fdscale.config.errors import StartAgain
from fdscale.training.canary import CHUNK, Canary, fingerprint, odd_numbers, odd_ones, storage_of
from fdscale.training.engine import Connection
from fdscale.training.sharding import place

PLACEMENTS = ("replicated", "zero3", "fairscale")
WEIGHT, NUMBER = "a bit of a weight", "a number of a product"


def sharding_tests() -> Any:
    """The tests of placements, which know how fairscale runs without a GPU."""
    name = "sharding_tests"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "test_sharding.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def flip(tensor: Tensor, bit: int) -> None:
    """Flip one bit in the middle of a tensor's memory."""
    raw = tensor.detach().view(-1).view(torch.uint8)
    raw[len(raw) // 2] ^= 1 << bit


def largest(teacher: Any) -> Tensor:
    return max((tensor for _, tensor in storage_of(teacher)), key=torch.numel)


def told(check: Any, *arguments: Any) -> str | None:
    try:
        check(*arguments)
    except StartAgain as error:
        return str(error)
    return None


def watched(connection: Connection, placement: str, folder: str, persistent: bool, dtype: torch.dtype) -> list[Any]:
    """What the canary says untouched, after a flipped bit on rank 1, and after a wrong product on rank 0."""
    tests, rank = sharding_tests(), connection.rank.rank
    config = {**tests.JSON, "zero_optimization": {"stage": 3, **({} if persistent else tests.LEAN)}}
    with tests.fairscale_without_cuda() if placement == "fairscale" else contextlib.nullcontext():
        name = "clip_vit_b16"
        teacher = place(tests.teacher_named(name, dtype), placement, config, connection)
        bird = Canary({"teacher": teacher}, {"teacher": placement}, connection, "a chip", Path(folder) / "canary.json")
        teacher(tests.pixels_of(connection, name))
        found = [told(bird.check, 4)]
        for bit in (0, 7):  # the lowest of a mantissa or, in bfloat16, elsewhere
            if rank == 1:
                flip(largest(teacher), bit)
            found.append(told(bird.check, 5))
            if rank == 1:
                flip(largest(teacher), bit)
        found.append(told(bird.check, 6))
        if rank == 0:
            handle = teacher.final_norm.register_forward_hook(
                lambda _, __, output: output.index_fill(1, torch.tensor([3]), 0.25)
            )
        found.append(told(bird.check, 7))
        if rank == 0:
            handle.remove()
        found.append(told(bird.check, 8))
    return found


@pytest.mark.parametrize(
    ("placement", "persistent", "dtype"),
    [*((placement, False, torch.float32) for placement in PLACEMENTS), ("zero3", True, torch.bfloat16)],
)
def test_the_rank_is_named_whose_teacher_changed(
    placement: str, persistent: bool, dtype: torch.dtype, tmp_path: Path, two_ranks: Any
) -> None:
    for untouched, low, high, restored, wrong, again in two_ranks(watched, placement, str(tmp_path), persistent, dtype):
        assert (untouched, restored, again) == (None, None, None)
        for flipped in (low, high):
            assert flipped.startswith("step 5: rank 1 on ")
            assert "rank 0" not in flipped
            assert "the weights of teacher have changed in its memory" in flipped
        assert wrong.startswith("step 7: rank 0 on ")
        assert "rank 1" not in wrong
        assert "the features of teacher are others" in wrong


def started(connection: Connection, folder: str, wrong_on: list[int], chip: str = "a chip") -> str | None:
    """A start of a run, on which some ranks compute wrongly; `chip`: rank 1's."""
    tests = sharding_tests()
    teacher = place(tests.teacher_named("clip_vit_b16"), "replicated", tests.JSON, connection)
    if connection.rank.rank in wrong_on:
        teacher.final_norm.register_forward_hook(lambda _, __, output: output + 1e-3)
    file, here = Path(folder) / "canary.json", chip if connection.rank.rank == 1 else "a chip"
    return told(lambda: Canary({"teacher": teacher}, {"teacher": "replicated"}, connection, here, file))


def test_a_start_is_compared_with_the_runs_first(tmp_path: Path, two_ranks: Any) -> None:
    differ = two_ranks(started, str(tmp_path), [1])
    assert differ[0] == differ[1]
    assert "which of them is wrong cannot be told" in differ[0]
    assert not (tmp_path / "canary.json").exists()
    assert two_ranks(started, str(tmp_path), []) == [None, None]
    first = json.loads((tmp_path / "canary.json").read_text())
    assert two_ranks(started, str(tmp_path), []) == [None, None]
    for rank in (0, 1):
        for text in two_ranks(started, str(tmp_path), [rank]):
            assert f"differ between the ranks, of the same weights and pixels: rank {rank} on " in text
            assert f"rank {1 - rank}" not in text
    assert json.loads((tmp_path / "canary.json").read_text()) == first
    assert two_ranks(started, str(tmp_path), [0, 1]) == [None, None]  # on all alike: another library; recorded anew
    assert json.loads((tmp_path / "canary.json").read_text())["features"] != first["features"]
    (tmp_path / "canary.json").write_text(json.dumps({**first, "conditions": {**first["conditions"], "torch": "1"}}))
    assert two_ranks(started, str(tmp_path), []) == [None, None]
    assert json.loads((tmp_path / "canary.json").read_text()) == first


def restless(connection: Connection, folder: str, ranks: list[int]) -> tuple[str | None, bool]:
    """A start with a teacher whose features are others each time on these ranks."""
    tests, count = sharding_tests(), itertools.count()
    teacher = place(tests.teacher_named("clip_vit_b16"), "replicated", tests.JSON, connection)
    if connection.rank.rank in ranks:
        teacher.final_norm.register_forward_hook(lambda _, __, output: output + next(count))
    arguments = ({"teacher": teacher}, {"teacher": "replicated"}, connection, "a chip", Path(folder) / "canary.json")
    birds: list[Canary] = []
    return told(lambda: birds.append(Canary(*arguments))), any(bird.probing for bird in birds)


def test_features_that_never_repeat_are_not_compared_but_a_minoritys_are_told(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(restless, str(tmp_path), [0, 1]) == [(None, False)] * 2
    for text, _ in two_ranks(restless, str(tmp_path), [1]):
        assert "are others each time on rank 1 on" in text


def test_on_several_chips_features_are_not_compared(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(started, str(tmp_path), [1], "another chip") == [None, None]
    assert not (tmp_path / "canary.json").exists()


def test_every_single_bit_counts() -> None:
    weights = odd_numbers(torch.device("cpu"))
    for dtype, size in ((torch.float32, 7), (torch.bfloat16, 5), (torch.bool, 3), (torch.int64, 1)):
        tensor = torch.ones(size, dtype=dtype)
        before, raw = int(fingerprint(tensor, weights)), tensor.view(torch.uint8)
        for byte in range(len(raw)):
            for bit in range(8):
                raw[byte] ^= 1 << bit
                assert int(fingerprint(tensor, weights)) != before
                raw[byte] ^= 1 << bit
        assert int(fingerprint(tensor, weights)) == before


def test_large_and_oddly_placed_tensors_too() -> None:
    weights = odd_numbers(torch.device("cpu"))
    large = torch.arange(4 * CHUNK + 3, dtype=torch.float32)  # three chunks, and a tail
    before = int(fingerprint(large, weights))
    for place_of in (0, 2 * CHUNK - 1, 2 * CHUNK, 4 * CHUNK + 2):
        flip(large[place_of : place_of + 1], 0)
        assert int(fingerprint(large, weights)) != before
        flip(large[place_of : place_of + 1], 0)
    assert int(fingerprint(large[1:].clone(), weights)) == int(fingerprint(large[1:], weights))
    assert int(fingerprint(torch.empty(0), weights)) == 0
    swapped = large.clone()
    swapped[[4, 9]] = large[[9, 4]]
    assert int(fingerprint(swapped, weights)) != before


def test_the_minority_is_named() -> None:
    same = {f"rank {rank}": "x" for rank in range(4)}
    assert odd_ones(same, None) == ""
    assert odd_ones(same, "y") == ""
    assert odd_ones({**same, "rank 2": "y"}, None) == "rank 2"
    assert odd_ones({**same, "rank 2": "y", "rank 3": "y"}, "y") == "rank 0, rank 1"
    assert odd_ones({**same, "rank 2": "y", "rank 3": "y"}, "z").endswith("cannot be told")
