"""Rank and likeness of patch tokens: by brute force in NumPy, with known answers, and of every layout of blocks."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from fdscale.diagnostics.features import FeatureMeasures, watching_tokens
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject
from fdscale.students.geometry import TimmGeometry
from fdscale.students.student import Student, build_student
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import build_teacher
from tests.diagnostics.networks import pixels, subject_of, walked


def measured(subject: Subject, *batches: Tensor) -> list[Measurement]:
    measures = FeatureMeasures()
    with watching_tokens(subject, measures.update):
        for batch in batches:
            subject.tokens(batch)
    return measures.rows(subject.name)


def of_tokens(*batches: Tensor) -> dict[str, Measurement]:
    measures = FeatureMeasures()
    for batch in batches:
        measures.update(0, batch)
    return {row.measure: row for row in measures.rows("own")}


def brute_rank(tokens: NDArray[np.float64]) -> float:
    """RankMe by a singular value decomposition of all tokens (S, C)."""
    values = np.linalg.svd(tokens - tokens.mean(axis=0), compute_uv=False)
    shares = [value / values.sum() for value in values if value > 1e-12 * values[0]]
    return math.exp(-sum(share * math.log(share) for share in shares))


def brute_similarity(images: NDArray[np.float64]) -> float:
    """Every pair of different tokens of every image (B, N, C)."""
    means = []
    for tokens in images:
        pairs = [(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
        means.append(np.mean([a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]))
    return float(np.mean(means))


@pytest.mark.parametrize("family", ["beit", "vit", "swin_v2"])
def test_every_layer_is_what_numpy_finds_of_all_images_at_once(family: str) -> None:
    subject = subject_of(family)
    rows = measured(subject, pixels(3), pixels(2, seed=1))
    layers = walked(subject, torch.cat([pixels(3), pixels(2, seed=1)]))
    assert [(row.layer, row.measure) for row in rows] == [
        (layer, measure) for layer in range(len(layers)) for measure in ("feature_rank", "token_similarity")
    ]
    assert {row.images for row in rows} == {5}
    for row, other, tokens in zip(rows[::2], rows[1::2], layers, strict=True):
        assert row.value == pytest.approx(brute_rank(tokens.reshape(-1, tokens.shape[-1])), rel=1e-5)
        assert other.value == pytest.approx(brute_similarity(tokens), abs=1e-5)


def test_a_teachers_last_layer_is_after_its_final_norm() -> None:
    tiny = {"embed_dim": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "image_size": 32}
    subject = Subject("teacher", build_teacher(teacher_geometry("dino_vit_b16", overrides=tiny), "random"))
    seen: dict[int, Tensor] = {}
    with watching_tokens(subject, seen.__setitem__):
        tokens = subject.tokens(pixels(2))
    assert list(seen) == [0, 1, 2]
    assert torch.equal(seen[2], tokens[:, 1:])
    assert not torch.equal(seen[1], seen[2])


def test_watching_changes_nothing_and_ends() -> None:
    subject, seen = subject_of("beit"), []
    alone = subject.tokens(pixels(2))
    with watching_tokens(subject, lambda layer, tokens: seen.append(layer)):
        assert torch.equal(subject.tokens(pixels(2)), alone)
    subject.tokens(pixels(2))
    assert seen == [0, 1, 2, 3]


class Blocks(nn.Module):
    """A network whose one block gives what it is told to give, and which itself gives (B, 4, 5)."""

    def __init__(self, block: nn.Module, given: object) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block])
        self.last = nn.Linear(1, 1)
        block.register_forward_hook(lambda *_: given)

    def forward(self, images: Tensor) -> Tensor:
        self.blocks[0](images)
        return torch.zeros(len(images), 4, 5)


def shown(given: object, block: nn.Module | None = None, prefix_tokens: int = 0) -> Tensor:
    network = Blocks(block or nn.Identity(), given)
    grid = (2, 2) if prefix_tokens == 0 else (1, 4 - prefix_tokens)
    subject = Subject("own", Student(network, 5, grid, prefix_tokens, 32))
    seen: dict[int, Tensor] = {}
    with watching_tokens(subject, seen.__setitem__):
        subject.tokens(pixels(2))
    return seen[0]


def test_whatever_a_block_gives_becomes_tokens_row_by_row() -> None:
    tokens, wide = torch.rand(2, 9, 5), torch.rand(2, 9, 3)
    maps, as_wide = tokens.view(2, 3, 3, 5), wide.view(2, 3, 3, 3)
    channels_first = maps.permute(0, 3, 1, 2)
    assert torch.equal(shown(tokens), tokens)
    assert torch.equal(shown(maps), tokens)
    assert torch.equal(shown(channels_first), tokens)
    assert torch.equal(shown(as_wide), wide)
    assert torch.equal(shown(as_wide.permute(0, 3, 1, 2), nn.Conv2d(3, 3, 1)), wide)
    assert torch.equal(shown((tokens, [3, 3])), tokens)
    assert torch.equal(shown((torch.rand(18, 4, 2), tokens)), tokens)  # TNT: pixels of each patch first
    assert torch.equal(shown(tokens, prefix_tokens=2), tokens[:, 2:])


def test_blocks_before_a_late_cls_token_lose_no_patch() -> None:
    geometry = TimmGeometry("cait_xxs24_224", 32, {"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8})
    seen: dict[int, Tensor] = {}
    subject = Subject("cait", build_student(geometry).eval())
    with watching_tokens(subject, seen.__setitem__):
        assert subject.tokens(pixels(1)).shape == (1, 17, 16)
    assert {layer: tuple(tokens.shape) for layer, tokens in seen.items()} == {0: (1, 16, 16), 1: (1, 16, 16)}


def test_a_network_without_blocks_still_has_an_output() -> None:
    subject = Subject("resnet", build_student(TimmGeometry("test_resnet", 64)).eval())
    rows = measured(subject, torch.rand(3, 3, 64, 64))
    assert [(row.measure, row.layer) for row in rows] == [("feature_rank", 0), ("token_similarity", 0)]


@settings(max_examples=25)
@given(used=st.integers(1, 6), scale=st.floats(1e-3, 1e3), shift=st.floats(-1e2, 1e2), seed=st.integers(0, 99))
def test_the_rank_of_tokens_spread_evenly_over_some_dimensions_is_their_number(
    used: int, scale: float, shift: float, seed: int
) -> None:
    """Wherever they lie, however long, and however the space is turned."""
    axes = torch.eye(6, dtype=torch.float64)[:used]
    turned, _ = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    tokens = torch.cat([axes, -axes]) @ turned * scale + shift
    assert of_tokens(tokens[None, :used], tokens[None, used:])["feature_rank"].value == pytest.approx(used, rel=1e-6)


def test_rounding_fills_no_dimension() -> None:
    """Two used of 512: in each of the others is 1e-8 of them, and so much together that it would show."""
    axes = torch.randn(2, 512, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    tokens = torch.cat([axes, -axes])[None]
    assert of_tokens(tokens)["feature_rank"].value == pytest.approx(brute_rank(tokens[0].numpy()), rel=1e-6)


def test_a_mean_far_larger_than_what_varies_costs_no_digits() -> None:
    tokens = torch.randn(4, 9, 12, generator=torch.Generator().manual_seed(0)).double()
    far = tokens + 1e5
    found = of_tokens(far[:1], far[1:])["feature_rank"].value
    assert found == pytest.approx(brute_rank(tokens.reshape(-1, 12).numpy()), rel=1e-5)


def test_likeness_has_known_answers() -> None:
    one = torch.rand(1, 1, 5) + 0.1
    assert of_tokens(one.repeat(2, 7, 1) * torch.rand(2, 7, 1))["token_similarity"].value == pytest.approx(1)
    assert of_tokens(torch.eye(5)[None])["token_similarity"].value == pytest.approx(0)
    assert of_tokens(torch.cat([one, -one], dim=1))["token_similarity"].value == pytest.approx(-1)
    assert of_tokens(torch.cat([one, -one, 0 * one], dim=1))["token_similarity"].value == pytest.approx(-1 / 3)


def test_what_has_no_value_has_a_reason() -> None:
    cases: dict[str, tuple[Any, str, str]] = {
        "same": (torch.rand(1, 1, 5).repeat(3, 4, 1), "feature_rank", "all tokens are the same"),
        "rounded": (torch.full((3, 4, 5), 7.0) + torch.rand(3, 4, 5) * 1e-6, "feature_rank", "all tokens are the same"),
        "zero": (torch.zeros(3, 4, 5), "feature_rank", "all tokens are the same"),
        "one": (torch.rand(3, 1, 5), "token_similarity", "an image has one token"),
        "nan": (torch.full((3, 4, 5), math.nan), "feature_rank", "the tokens are not finite"),
        "also": (torch.full((3, 4, 5), math.nan), "token_similarity", "the tokens are not finite"),
        "one is infinite": (
            torch.cat([torch.rand(2, 4, 5), torch.full((1, 4, 5), math.inf)]).split(1),
            "token_similarity",
            "the tokens are not finite",
        ),
        "infinite": (torch.full((3, 4, 5), math.inf), "token_similarity", "the tokens are not finite"),
    }
    for tokens, measure, reason in cases.values():
        row = of_tokens(*(tokens if isinstance(tokens, tuple) else [tokens]))[measure]
        assert (row.value, row.reason) == (None, reason)
