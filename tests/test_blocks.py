"""Blocks are found in every family, each once, and cover what is heavy."""

from __future__ import annotations

import pytest
import timm
import torch

from fdscale.blocks import blocks_of


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vit_tiny_patch16_224", 12),
        ("beit_base_patch16_224", 12),
        ("eva02_tiny_patch14_224", 12),
        ("vit_small_patch16_dinov3_qkvb.lvd1689m", 12),
        ("swin_tiny_patch4_window7_224", 12),
        ("swinv2_cr_tiny_224", 12),
        ("convnext_atto", 12),
    ],
)
def test_every_block_is_found_once(name: str, count: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name, num_classes=0)
    blocks = blocks_of(network)
    assert len(blocks) == len(set(blocks.values())) == count
    assert all(network.get_submodule(dotted) is block for dotted, block in blocks.items())
    inside = [parameter for block in blocks.values() for parameter in block.parameters()]
    assert len(inside) == len(set(inside))
    assert sum(p.numel() for p in inside) > 0.8 * sum(p.numel() for p in network.parameters())


def test_a_network_without_a_list_of_blocks_has_none() -> None:
    assert blocks_of(timm.create_model("test_resnet")) == {}
