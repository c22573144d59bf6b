"""Every measure of attention is that of plain loops, of real networks and of any attention; and its known answers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fdscale.blocks import blocks_of
from fdscale.config.errors import UserError
from fdscale.diagnostics.attention import Attention, watching_attention
from fdscale.diagnostics.attention_measures import UNITS, AttentionMeasures
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject
from fdscale.diagnostics.windows import block_places, block_regions, grid_places, window_places, window_regions
from tests.diagnostics import attending, brute_force
from tests.diagnostics.brute_force import Key, Place
from tests.diagnostics.test_attention import FAMILIES, by_hand
from tests.diagnostics.test_windows import KINDS, built


def by_key(rows: list[Measurement], layer: int = 0) -> dict[Key, float | None]:
    return {(row.measure, row.head): row.value for row in rows if row.layer == layer}


def assert_same(found: dict[Key, float | None], expected: dict[Key, float]) -> None:
    assert set(found) == set(expected)
    for key, value in expected.items():
        if math.isnan(value):  # no region has two patches
            assert found[key] is None
            continue
        assert found[key] == pytest.approx(value, abs=1e-5, rel=0), key


def measured(attention: Attention) -> dict[Key, float | None]:
    measures = AttentionMeasures()
    measures.update(0, attention)
    return by_key(measures.rows("any"))


def of_grid(weights: Tensor, height: int, width: int, stride: float = 8) -> Attention:
    """Attention (H, n, n) of one image over a whole map."""
    return Attention(weights[None, None].float(), (grid_places((height, width), 0) + 0.5) * stride)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_measure_of_a_network_is_that_of_plain_loops(family: str) -> None:
    subject, measures = FAMILIES[family](), AttentionMeasures()
    with (
        torch.no_grad(),
        attending.inputs_of_blocks(subject) as given_tokens,
        watching_attention(subject, measures.update),
    ):
        for images in (attending.pixels(2), attending.pixels(1, seed=8)):
            subject.tokens(images)
    rows = measures.rows("a network")
    for number, tokens in given_tokens.items():
        by_image = [by_hand(subject, number, brute_force.array(image)) for image in tokens]
        maps, (_, places, regions) = [maps for maps, *_ in by_image], by_image[0]
        assert_same(by_key(rows, number), brute_force.measures(maps, places, subject.prefix_tokens, regions))
    assert {row.images for row in rows} == {3}
    assert {row.model for row in rows} == {"a network"}
    assert all(row.unit == UNITS[row.measure] and row.reason is None for row in rows)


@st.composite
def attentions(draw: st.DrawFn) -> Attention:
    """Any attention: over a map with prefix tokens, or in windows that are shifted and padded, masked or not."""
    height, width = draw(st.integers(1, 4)), draw(st.integers(2, 4))
    images, heads = draw(st.integers(1, 3)), draw(st.integers(2, 3))
    prefix = draw(st.integers(0, 2))
    regions = None
    if draw(st.booleans()):
        places = grid_places((height, width), prefix)
    else:
        window, shift, prefix = (draw(st.integers(2, 3)),) * 2, (draw(st.integers(0, 1)), draw(st.integers(0, 1))), 0
        places = window_places((height, width), window, shift, draw(st.booleans()))
        regions = window_regions((height, width), window, shift) if draw(st.booleans()) else None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    sharpness = draw(st.sampled_from([0.3, 2.0, 10.0]))
    shape = (images, len(places), heads, places.shape[1], places.shape[1])
    logits = torch.randn(shape, generator=generator) * sharpness
    if regions is not None:
        logits -= 100.0 * (regions[:, None, :, None] != regions[:, None, None, :])
    return Attention(logits.softmax(-1), (places + 0.5) * draw(st.sampled_from([1, 16, 24.9])), prefix, regions)


@settings(max_examples=60)
@given(attention=attentions())
def test_every_measure_of_any_attention_is_that_of_plain_loops(attention: Attention) -> None:
    places: list[list[Place]] = [
        [None if math.isnan(y) else (y, x) for y, x in window] for window in attention.positions.tolist()
    ]
    images = [[window.double().numpy() for window in image] for image in attention.weights]
    regions = None if attention.regions is None else attention.regions.tolist()
    expected = brute_force.measures(images, places, attention.prefix_tokens, regions)
    assert_same(measured(attention), expected)


@settings(max_examples=20)
@given(attention=attentions(), split=st.integers(0, 3))
def test_it_does_not_matter_in_which_batches_images_come(attention: Attention, split: int) -> None:
    measures = AttentionMeasures()
    for weights in (attention.weights[:split], attention.weights[split:]):
        measures.update(0, replace(attention, weights=weights))
    assert by_key(measures.rows("any")) == measured(attention)


def test_identity_attention_sees_nothing_but_itself() -> None:
    found = measured(of_grid(torch.eye(12).expand(2, -1, -1), 3, 4))
    for head in range(2):
        assert found["attention_distance", head] == 0
        assert found["attention_entropy", head] == 0
        assert found["attention_information", head] == pytest.approx(1)
    assert found["attention_diagonality", None] == 1
    assert found["attention_offset_share", None] == pytest.approx(1)


@pytest.mark.parametrize(("height", "width", "stride"), [(1, 5, 16), (3, 4, 8), (7, 7, 32)])
def test_uniform_attention_is_as_far_as_two_random_patches_are(height: int, width: int, stride: int) -> None:
    offsets = itertools.product(range(1 - height, height), range(1 - width, width))
    expected = sum((height - abs(y)) * (width - abs(x)) * stride * math.hypot(y, x) for y, x in offsets)
    patches = height * width
    found = measured(of_grid(torch.full((2, patches, patches), 1 / patches), height, width, stride))
    for head in range(2):
        assert found["attention_distance", head] == pytest.approx(expected / patches**2, rel=1e-6)
        assert found["attention_entropy", head] == pytest.approx(math.log(patches), rel=1e-6)
        assert found["attention_information", head] == pytest.approx(0, abs=1e-6)
    assert found["attention_diagonality", None] == pytest.approx(0, abs=1e-6)
    assert found["attention_column_share", None] == found["attention_offset_share", None] == 0
    assert found["head_similarity", None] == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", [14, 10])  # of whole windows, and padded
def test_uniform_attention_under_a_blocks_own_mask_is_as_uniform_as_without(kind: str, side: int) -> None:
    block = built(kind, (side, side), (7, 7), (3, 3))
    mask = block.get_attn_mask(device="cpu", dtype=torch.float32)
    weights = mask[None, :, None].expand(-1, -1, 2, -1, -1).softmax(-1)
    grid = (side, side)
    found = measured(Attention(weights, block_places(block, grid) + 0.5, regions=block_regions(block, grid)))
    assert found["attention_diagonality", None] == pytest.approx(0, abs=1e-6)
    assert found["attention_information", 0] == found["attention_information", 1] == pytest.approx(0, abs=1e-6)
    assert found["attention_column_share", None] == found["attention_offset_share", None] == 0
    assert found["head_similarity", None] == pytest.approx(1)


def test_heads_are_as_alike_as_their_maps() -> None:
    one = torch.rand(9, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    assert measured(of_grid(one.expand(3, -1, -1), 3, 3))["head_similarity", None] == pytest.approx(1)
    apart = torch.stack((torch.eye(9), torch.eye(9).roll(1, 1)))
    assert measured(of_grid(apart, 3, 3))["head_similarity", None] == 0
    mixed = torch.cat((apart, apart[:1]))  # one pair of three is the same
    assert measured(of_grid(mixed, 3, 3))["head_similarity", None] == pytest.approx(1 / 3)


def test_one_key_for_all_queries_tells_nothing_of_them() -> None:
    column = torch.eye(9)[4].expand(2, 9, 9)
    found = measured(of_grid(column, 3, 3))
    assert found["attention_information", 0] == 0
    assert found["attention_column_share", None] == pytest.approx(1)


def test_what_goes_to_prefix_tokens_is_told_apart_from_what_goes_to_patches() -> None:
    weights = torch.zeros(1, 1, 2, 5, 5)
    weights[..., 0] = 0.75  # to the prefix token; the rest to the patch itself
    weights[0, 0, 0, 1:, 1:] += 0.25 * torch.eye(4)
    weights[0, 0, 1, 1:, 1:] += 0.25 / 4
    found = measured(Attention(weights, (grid_places((2, 2), 1) + 0.5) * 8, prefix_tokens=1))
    assert found["attention_on_prefix", 0] == found["attention_on_prefix", 1] == 0.75
    assert found["attention_distance", 0] == 0
    assert found["attention_distance", 1] == pytest.approx((8 + 8 + 8 * math.sqrt(2)) / 4)


def test_maps_are_the_means_over_images_and_heads_of_patches_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 1, 3, 5, 5, generator=generator).softmax(-1)
    measures = AttentionMeasures()
    measures.update(4, Attention(weights, (grid_places((2, 2), 1) + 0.5) * 8, prefix_tokens=1))
    patches = weights[..., 1:, 1:].double().numpy()
    expected = (patches / patches.sum(-1, keepdims=True)).mean(axis=(0, 2))
    assert list(measures.maps()) == [4]
    np.testing.assert_allclose(measures.maps()[4], expected, atol=1e-7)


def test_maps_of_padded_windows_say_where_there_is_nothing() -> None:
    places = window_places((3, 3), (2, 2), (0, 0), pads_first=False)
    measures = AttentionMeasures()
    measures.update(0, Attention(torch.full((1, 4, 2, 4, 4), 0.25), places))
    found = measures.maps()[0]
    assert found.shape == (4, 4, 4)
    assert np.isnan(found).sum(axis=(1, 2)).tolist() == [0, 12, 12, 15]
    assert np.nansum(found, axis=(1, 2)).tolist() == [4, 2, 2, 1]


def test_memory_is_the_same_for_one_image_and_for_many() -> None:
    measures, attention = AttentionMeasures(), of_grid(torch.eye(9).expand(2, -1, -1), 3, 3)

    def held() -> int:
        sums = measures._blocks[0]
        return sum(value.numel() for value in vars(sums).values() if isinstance(value, Tensor))

    measures.update(0, attention)
    once = held()
    for _ in range(10):
        measures.update(0, attention)
    assert held() == once
    assert all(not isinstance(value, list | dict) for value in vars(measures._blocks[0]).values())


@pytest.mark.parametrize("build", [attending.vit, attending.swin_v2, attending.open_clip])
def test_nan_weights_are_told_by_layer_and_the_layers_before_are_measured(build: Callable[[], Subject]) -> None:
    subject, measures = build(), AttentionMeasures()
    next(iter(list(blocks_of(subject.backbone).values())[1].parameters())).fill_(torch.nan)
    with torch.no_grad(), watching_attention(subject, measures.update):
        subject.tokens(attending.pixels(2))
    rows = measures.rows("broken")
    assert all(row.value is not None and row.reason is None for row in rows if row.layer == 0)
    broken = [row for row in rows if row.layer]
    assert broken
    for row in broken:
        assert row.value is None
        assert f"layer {row.layer}: attention is not a number (NaN)" in str(row.reason)


def test_one_head_of_nan_leaves_the_others_told() -> None:
    weights = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(0)).softmax(-1)
    weights[1, 3, 3] = torch.nan
    found = measured(of_grid(weights, 3, 3))
    assert found["attention_distance", 0] is not None
    assert found["attention_information", 0] is not None
    assert found["attention_distance", 1] is found["attention_entropy", 1] is found["attention_information", 1] is None
    assert found["attention_diagonality", None] is found["head_similarity", None] is None


def test_a_network_without_attention_says_why_there_is_nothing() -> None:
    rows = AttentionMeasures().rows("a ConvNet")
    assert [row.measure for row in rows] == list(UNITS)
    assert all(row.value is None and row.layer is None and "ConvNet" in str(row.reason) for row in rows)


def test_blocks_that_gave_nothing_are_told_where_others_did() -> None:
    """PVT's blocks attend to a map that is pooled to fewer keys, but for the last stage's two."""
    subject = attending.timm_network("pvt_v2_b0")
    measures, plain = AttentionMeasures(len(blocks_of(subject.backbone))), AttentionMeasures()

    def update(block: int, attention: Attention) -> None:
        for each in (measures, plain):
            each.update(block, attention)

    with torch.no_grad(), watching_attention(subject, update):
        subject.tokens(attending.pixels(2, (64, 64)))
    rows = measures.rows("pvt")
    told = [row for row in rows if row.measure == "attention"]
    assert [(row.layer, row.value, row.images) for row in told] == [(number, None, 0) for number in range(6)]
    assert all("not seen in this block" in str(row.reason) for row in told)
    assert [row for row in rows if row not in told] == plain.rows("pvt")


def test_a_network_without_attention_is_told_once_however_many_blocks_it_has() -> None:
    assert AttentionMeasures(12).rows("a ConvNet") == AttentionMeasures().rows("a ConvNet")


def test_one_head_and_one_patch_have_no_one_to_be_compared_with() -> None:
    measures = AttentionMeasures()
    measures.update(0, of_grid(torch.ones(1, 1, 1), 1, 1))
    rows = {row.measure: row for row in measures.rows("small")}
    assert rows["attention_distance"].value == rows["attention_entropy"].value == 0
    assert rows["head_similarity"].reason == "one head alone has no other to be like"
    for measure in (
        "attention_information",
        "attention_diagonality",
        "attention_column_share",
        "attention_offset_share",
    ):
        assert rows[measure].value is None
        assert rows[measure].reason == "a window of one patch has no other to look at"


def test_images_of_another_size_are_refused_with_the_block() -> None:
    measures = AttentionMeasures()
    measures.update(3, of_grid(torch.eye(9).expand(2, -1, -1), 3, 3))
    with pytest.raises(UserError, match=r"block 3: attention over 4 tokens in each of 1 windows came after 9 in 1"):
        measures.update(3, of_grid(torch.eye(4).expand(2, -1, -1), 2, 2))
    assert {row.images for row in measures.rows("any")} == {1}


def test_a_row_that_gives_patches_nothing_counts_as_no_attention() -> None:
    weights = torch.zeros(1, 1, 2, 5, 5)
    weights[..., 0] = 1
    found = measured(Attention(weights, (grid_places((2, 2), 1) + 0.5) * 8, prefix_tokens=1))
    assert found["attention_on_prefix", 0] == 1
    assert found["attention_distance", 0] == found["attention_entropy", 0] == found["attention_information", 0] == 0
