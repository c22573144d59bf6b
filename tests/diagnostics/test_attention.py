"""What is seen of each block is the attention that it computes, at its places, and watching changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from fdscale.blocks import blocks_of
from fdscale.diagnostics.attention import Attention, watching_attention
from fdscale.diagnostics.subjects import Subject
from tests.diagnostics import attending, brute_force
from tests.diagnostics.brute_force import Array, Place, Region

Seen = dict[int, list[Attention]]


def watched(subject: Subject, images: Tensor) -> tuple[Tensor, Seen]:
    seen: Seen = {}
    with torch.no_grad(), watching_attention(subject, lambda block, it: seen.setdefault(block, []).append(it)):
        return subject.tokens(images), seen


def grid_places(side: int, prefix: int, stride: float) -> list[list[Place]]:
    patches = [((y + 0.5) * stride, (x + 0.5) * stride) for y in range(side) for x in range(side)]
    return [[None] * prefix + patches]


def by_hand(
    subject: Subject, number: int, tokens: Array
) -> tuple[list[Array], list[list[Place]], list[list[Region]] | None]:
    """One image's attention of one block by window (H, n, n), its tokens' places in pixels, and their regions."""
    block: Any = list(blocks_of(subject.backbone).values())[number]
    if subject.name == "open_clip":
        return [brute_force.clip_attention(block, tokens)], grid_places(4, 1, 8), None
    if subject.name == "beit":
        holder: Any = subject.backbone.rel_pos_bias or block.attn
        table = brute_force.array(holder.relative_position_bias_table)
        return [brute_force.beit_attention(block, tokens, table, 4)], grid_places(4, 1, 8), None
    if subject.name.endswith("swin_v2"):
        maps, places, regions = brute_force.swin_v2_attention(block, tokens, getattr(block, "pads_first", False))
        stride = 32 / len(tokens)
        pixels: list[list[Place]] = [
            [at and ((at[0] + 0.5) * stride, (at[1] + 0.5) * stride) for at in window] for window in places
        ]
        return maps, pixels, regions
    return [brute_force.vit_attention(block, tokens)], grid_places(4, 1, 8), None


FAMILIES: dict[str, Callable[[], Subject]] = {
    "beit, shared bias": attending.beit,
    "beit, bias per block": lambda: attending.beit("per_block"),
    "vit": attending.vit,
    "open_clip": attending.open_clip,
    "swin_v2, shifted": attending.swin_v2,
    "swin_v2, padded after its shift": lambda: attending.swin_v2(window_size=3),
    "swin_v2, padded before its shift": lambda: attending.swin_v2(pads_first=True, window_size=3),
    "swin_v2, one window": lambda: attending.swin_v2(window_size=8),
    "timm's swin_v2": attending.timm_swin_v2,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_places_are_those_of_plain_loops(family: str) -> None:
    subject, images = FAMILIES[family](), attending.pixels(2)
    with attending.inputs_of_blocks(subject) as given:
        _, seen = watched(subject, images)
    assert list(seen) == list(given) == list(range(len(blocks_of(subject.backbone))))
    for number, (attention,) in seen.items():
        for image in range(2):
            maps, places, _ = by_hand(subject, number, brute_force.array(given[number][image]))
            np.testing.assert_allclose(attention.weights[image].numpy(), np.stack(maps), atol=1e-5, rtol=0)
        expected = np.array([[at or (np.nan, np.nan) for at in window] for window in places])
        np.testing.assert_array_equal(attention.positions.numpy(), expected)
        assert attention.prefix_tokens == subject.prefix_tokens
        assert float(attention.weights.std(dim=-1).mean()) > 0.01  # not uniform


def timm_of(name: str, prefix_tokens: int = 0, **arguments: Any) -> Callable[[], Subject]:
    return lambda: attending.timm_network(name, prefix_tokens, **arguments)


OTHERS: dict[str, Callable[[], Subject]] = {
    "swin v1": timm_of("swin_tiny_patch4_window7_224", **attending.TINY_SWIN),
    "swin v2 cr": timm_of("swinv2_cr_tiny_224", **attending.TINY_SWIN),
    "dinov3": timm_of("vit_small_patch16_dinov3", 5, **attending.TINY_VIT),
    "eva": timm_of("eva02_tiny_patch14_224", 1, **attending.TINY_VIT),
    "registers": timm_of("vit_small_patch14_reg4_dinov2", 5, **attending.TINY_VIT),
    "siglip": timm_of("vit_base_patch16_siglip_224", **attending.TINY_VIT),
    "clip": timm_of("vit_base_patch16_clip_224", 1, **attending.TINY_VIT),
    "query and key normed": lambda: attending.vit(qk_norm=True),
    "stages": timm_of("levit_128s", img_size=64),
}


@pytest.mark.parametrize("family", [*FAMILIES, *OTHERS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_networks_output_is_the_same_bit_for_bit(family: str, dtype: torch.dtype) -> None:
    subject = (FAMILIES | OTHERS)[family]()
    subject.backbone.to(dtype)
    images = attending.pixels(2, (subject.image_size, subject.image_size))
    with torch.no_grad():
        plain = subject.tokens(images)
    found, seen = watched(subject, images)
    assert torch.equal(found, plain)
    assert sorted(seen) == [
        number for number, block in enumerate(blocks_of(subject.backbone).values()) if "downsample" not in str(block)
    ]
    for (attention,) in seen.values():
        assert attention.weights.dtype == torch.float32
        sums = attention.weights.sum(dim=-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), atol=0.02 if family == "open_clip" else 1e-5, rtol=0)
        places = attention.positions[~attention.positions.isnan()]
        assert 0 < float(places.min()) <= float(places.max()) < subject.image_size


def test_attention_that_a_network_does_not_fuse_is_the_same() -> None:
    fused, plain = attending.vit(), attending.vit()
    for module in plain.backbone.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    (_, one), (_, other) = (watched(subject, attending.pixels(2)) for subject in (fused, plain))
    for (first,), (second,) in zip(one.values(), other.values(), strict=True):
        torch.testing.assert_close(first.weights, second.weights, atol=1e-6, rtol=0)


def test_images_that_are_not_square_have_rows_of_another_length() -> None:
    subject = attending.vit(dynamic_img_size=True)
    _, seen = watched(subject, attending.pixels(1, (16, 48)))
    positions = seen[0][0].positions
    assert positions.shape == (1, 1 + 2 * 6, 2)
    assert positions[0, 1:].tolist() == [[y, x] for y in (4, 12) for x in (4, 12, 20, 28, 36, 44)]


def test_a_map_of_odd_size_that_is_halved_has_twice_the_stride() -> None:
    arguments = {"img_size": 56, "embed_dim": 8, "depths": (1, 1, 1), "num_heads": (1, 1, 1), "window_size": 7}
    subject = attending.timm_network("swin_tiny_patch4_window7_224", **arguments)  # maps of 14, 7 and 4
    seen: list[Attention] = []
    with torch.no_grad(), watching_attention(subject, lambda _, attention: seen.append(attention)):
        for images in (1, 2):  # each forward begins anew
            subject.tokens(attending.pixels(images, (56, 56)))
    assert [attention.positions[0, 0].tolist() for attention in seen] == [[2, 2], [4, 4], [8, 8]] * 2
    assert [attention.positions[-1, -1].tolist() for attention in seen] == [[54, 54], [52, 52], [56, 56]] * 2


def test_two_attentions_of_one_block_come_as_its_heads() -> None:
    _, seen = watched(attending.vit(block_fn=ParallelThingsBlock), attending.pixels(3))
    assert [attention.weights.shape for (attention,) in seen.values()] == [(3, 1, 4, 17, 17)] * 2


@pytest.mark.parametrize(
    ("name", "arguments", "size"),
    [
        ("test_convnext", {}, 32),
        ("test_resnet", {}, 32),
        (
            "xcit_nano_12_p16_224",
            {"img_size": 32, "embed_dim": 64, "depth": 2, "cls_attn_layers": 1},
            32,
        ),  # 16 channels
        ("hiera_tiny_224", {}, 224),
    ],
)
def test_networks_without_attention_from_patch_to_patch_are_never_seen(
    name: str, arguments: dict[str, Any], size: int
) -> None:
    backbone = timm.create_model(name, num_classes=0, global_pool="", **arguments)
    subject, images = attending.student(backbone), attending.pixels(1, (size, size))
    found, seen = watched(subject, images)
    assert seen == {}
    with torch.no_grad():
        assert torch.equal(found, subject.tokens(images))


def test_attention_over_as_many_channels_as_images_is_not_seen() -> None:
    arguments = {"img_size": 32, "embed_dim": 64, "depth": 2, "cls_attn_layers": 1}  # heads of 16 channels, 4 patches
    subject = attending.timm_network("xcit_nano_12_p16_224", **arguments)
    assert watched(subject, attending.pixels(16))[1] == {}


def test_as_many_images_as_tokens_are_seen_all_the_same() -> None:
    for subject in (attending.vit(), attending.open_clip()):
        _, seen = watched(subject, attending.pixels(17))
        assert [attention.weights.shape for (attention,) in seen.values()] == [(17, 1, 2, 17, 17)] * 2


def test_tokens_that_are_no_map_of_the_image_are_not_placed() -> None:
    four_unknown = attending.timm_network("vit_tiny_patch16_224", 0, reg_tokens=3, **attending.TINY_VIT)
    assert watched(four_unknown, attending.pixels(1))[1] == {}  # 16 + 4 tokens are no 4 x 5 of a square image
    known = attending.timm_network("vit_tiny_patch16_224", 4, reg_tokens=3, **attending.TINY_VIT)
    assert list(watched(known, attending.pixels(1))[1]) == [0, 1]


def test_two_networks_that_are_watched_at_once_are_told_apart() -> None:
    one, other = attending.open_clip(), attending.vit()
    images = attending.pixels(2)
    first: Seen = {}
    with torch.no_grad():
        plain = one.tokens(images), other.tokens(images)
        with watching_attention(one, lambda block, it: first.setdefault(block, []).append(it)):
            found, second = watched(other, images)
            again = one.tokens(images)
    assert torch.equal(again, plain[0])
    assert torch.equal(found, plain[1])
    assert [len(calls) for calls in (*first.values(), *second.values())] == [1, 1, 1, 1]


class Pooled(nn.Module):
    """A ViT whose tokens go through one more attention, which is no block's."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.num_features = attending.vit().backbone, 24
        self.pool = nn.MultiheadAttention(24, 2, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.trunk(images)
        return self.pool(tokens, tokens, tokens, need_weights=False)[0]


def test_attention_outside_of_blocks_is_neither_seen_nor_changed() -> None:
    subject, images = attending.student(Pooled(), prefix_tokens=1), attending.pixels(2)
    seen: list[int] = []
    with torch.no_grad():
        plain = subject.tokens(images)
        with watching_attention(subject, lambda block, _: seen.append(block)):
            assert torch.equal(subject.tokens(images), plain)
            assert _get_current_function_mode_stack() == []
    assert seen == [0, 1]


def hooks_of(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("inside", ["attn", "mlp"])
@pytest.mark.parametrize("build", [attending.open_clip, attending.vit])
def test_a_forward_that_fails_leaves_nothing_behind(
    build: Callable[[], Subject], inside: str, error: type[BaseException]
) -> None:
    subject = build()
    blocks: list[Any] = list(blocks_of(subject.backbone).values())
    before = hooks_of(subject.network)

    def fail(*_: object) -> None:
        raise error("on purpose")

    seen: Seen = {}
    with (
        pytest.raises(error, match="on purpose"),
        torch.no_grad(),
        watching_attention(subject, lambda block, it: seen.setdefault(block, []).append(it)),
        getattr(blocks[1], inside).register_forward_pre_hook(fail),  # after the watcher's own
    ):
        subject.tokens(attending.pixels(1))
    assert list(seen) == [0]
    assert _get_current_function_mode_stack() == []
    assert hooks_of(subject.network) == before
    assert list(watched(subject, attending.pixels(1))[1]) == [0, 1]


def test_a_forward_that_failed_is_over_for_those_that_follow() -> None:
    subject, seen = attending.vit(), []
    with torch.no_grad(), watching_attention(subject, lambda block, _: seen.append(block)):
        blocks: Any = subject.backbone.blocks
        with (
            pytest.raises(RuntimeError),
            blocks[1].mlp.register_forward_pre_hook(lambda *_: torch.zeros(3) @ torch.zeros(4)),
        ):
            subject.tokens(attending.pixels(1))
        torch.zeros(1, 1, 3, 3).softmax(-1)  # nobody's
        assert _get_current_function_mode_stack() == []
        subject.tokens(attending.pixels(1))
    assert seen == [0, 0, 1]


def test_what_the_listener_raises_comes_out_and_leaves_nothing_behind() -> None:
    subject = attending.vit()

    def refuse(block: int, attention: Attention) -> None:
        raise ValueError(f"not block {block}")

    with pytest.raises(ValueError, match="not block 0"), watching_attention(subject, refuse):
        subject.tokens(attending.pixels(1))
    assert _get_current_function_mode_stack() == []


def test_blocks_that_run_outside_of_their_network_are_not_seen() -> None:
    subject = attending.vit()
    seen: Seen = {}
    with torch.no_grad(), watching_attention(subject, lambda block, it: seen.setdefault(block, []).append(it)):
        subject.backbone.blocks[0](torch.zeros(1, 17, 24))  # type: ignore[index,operator]
    assert seen == {}
