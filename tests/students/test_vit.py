"""The ViT student starts as the official one and gives all its tokens."""

from __future__ import annotations

import math

import pytest
import torch
from timm.models.beit import Beit
from torch import Tensor

from fdscale.students.geometry import STUDENTS, ViTGeometry
from fdscale.students.vit import build_vit

STD, CUT = 0.02, 0.0108  # of the normal, and of what is left after cutting it at one sigma
GEOMETRY = ViTGeometry(192, 4, 3, patch_size=16, image_size=64)


@pytest.fixture(scope="module")
def vit() -> Beit:
    torch.manual_seed(0)
    return build_vit(GEOMETRY, drop_path=0.0)


def assert_cut_normal(weight: Tensor, divisor: float = 1.0) -> None:
    weight = weight.detach()
    assert float(weight.abs().max()) <= STD / divisor * (1 + 1e-6)
    assert float(weight.abs().max()) > 0.95 * STD / divisor
    assert float(weight.std()) == pytest.approx(CUT / divisor, rel=0.1 if weight.numel() < 1000 else 0.02)


def test_weights_are_cut_at_one_sigma_and_rescaled_by_depth(vit: Beit) -> None:
    assert_cut_normal(vit.patch_embed.proj.weight)
    assert_cut_normal(vit.cls_token)
    for number, block in enumerate(vit.blocks, start=1):
        for layer in (block.attn.qkv, block.mlp.fc1):
            assert_cut_normal(layer.weight)
        for layer in (block.attn.proj, block.mlp.fc2):
            assert_cut_normal(layer.weight, math.sqrt(2 * number))


def test_everything_else_starts_at_its_neutral_value(vit: Beit) -> None:
    parameters = {name: parameter.detach() for name, parameter in vit.named_parameters()}
    zeros = [name for name in parameters if name.endswith(("bias", "bias_table")) or "_bias" in name]
    scales = [name for name in parameters if ".gamma_" in name]
    norms = [name for name in parameters if "norm" in name and name.endswith("weight")]
    assert len(zeros) == 1 + 1 + 4 * 7 + 1  # table, patch convolution, a block's seven, final norm
    assert all(float(parameters[name].abs().max()) == 0 for name in zeros)
    assert len(scales) == 8
    assert all(torch.equal(parameters[name], torch.full((192,), 0.1)) for name in scales)
    assert len(norms) == 9
    assert all(torch.equal(parameters[name], torch.ones(192)) for name in norms)


def test_only_the_query_and_the_value_have_a_bias(vit: Beit) -> None:
    attention = {name for name, _ in vit.blocks[0].attn.named_parameters()}
    assert attention == {"qkv.weight", "q_bias", "v_bias", "proj.weight", "proj.bias"}
    assert float(vit.blocks[0].attn.k_bias.abs().max()) == 0


@pytest.mark.parametrize(("name", "shape"), [("vit_b16", (732, 12)), ("vit_l14", (964, 16))])
def test_one_position_bias_table_serves_all_blocks(name: str, shape: tuple[int, int]) -> None:
    parameters = dict(build_vit(STUDENTS[name], 0.0, "meta").named_parameters())
    tables = [key for key in parameters if "relative_position_bias_table" in key]
    assert tables == ["rel_pos_bias.relative_position_bias_table"]
    assert parameters[tables[0]].shape == shape
    assert "pos_embed" not in parameters


def test_each_block_can_have_a_table_of_its_own() -> None:
    geometry = ViTGeometry(16, 2, 2, patch_size=8, image_size=32, position_bias="per_block")
    parameters = dict(build_vit(geometry, 0.0).named_parameters())
    tables = [key for key in parameters if "relative_position_bias_table" in key]
    assert tables == [f"blocks.{block}.attn.relative_position_bias_table" for block in range(2)]
    assert all(parameters[table].shape == (52, 2) for table in tables)
    assert all(float(parameters[table].detach().abs().max()) == 0 for table in tables)


def test_norms_have_the_official_epsilon(vit: Beit) -> None:
    assert {module.eps for module in vit.modules() if isinstance(module, torch.nn.LayerNorm)} == {1e-6}


def test_each_pair_of_tokens_reads_the_official_row_of_the_table() -> None:
    side, heads = 3, 2
    vit = build_vit(ViTGeometry(8, 1, heads, patch_size=4, image_size=4 * side), 0.0)
    table = vit.rel_pos_bias.relative_position_bias_table
    rows = (2 * side - 1) ** 2 + 3
    assert table.shape == (rows, heads)
    with torch.no_grad():
        table.copy_(torch.arange(rows)[:, None] + torch.tensor([0.0, 1000.0]))
    bias = vit.rel_pos_bias().squeeze(0)
    expected = torch.zeros(1 + side**2, 1 + side**2)
    expected[0, :], expected[:, 0], expected[0, 0] = rows - 3, rows - 2, rows - 1
    for query in range(side**2):
        for key in range(side**2):
            dy, dx = query // side - key // side, query % side - key % side
            expected[1 + query, 1 + key] = (dy + side - 1) * (2 * side - 1) + (dx + side - 1)
    assert torch.equal(bias[0], expected)
    assert torch.equal(bias[1], expected + 1000)


def test_the_shared_bias_reaches_every_block() -> None:
    vit = build_vit(ViTGeometry(16, 3, 2, patch_size=8, image_size=32), 0.0)
    biases = []
    for block in vit.blocks:
        block.attn.register_forward_pre_hook(
            lambda *call: biases.append(call[2]["shared_rel_pos_bias"]), with_kwargs=True
        )
    vit(torch.rand(1, 3, 32, 32))
    assert len(biases) == 3
    assert all(bias is biases[0] for bias in biases)
    assert biases[0].requires_grad


def test_the_output_is_every_token_after_the_final_norm() -> None:
    vit = build_vit(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), 0.0)
    images = torch.randn(2, 3, 32, 32)
    tokens = vit(images)
    assert tokens.shape == (2, 1 + 16, 16)
    assert torch.allclose(tokens.mean(-1), torch.zeros(2, 17), atol=1e-6)
    assert torch.allclose(tokens.std(-1, unbiased=False), torch.ones(2, 17), atol=1e-2)
    with torch.no_grad():
        vit.norm.weight.zero_()
        vit.norm.bias.copy_(torch.arange(16.0))
    assert torch.equal(vit(images), torch.arange(16.0).expand(2, 17, 16))


def test_a_seed_decides_every_weight() -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return build_vit(ViTGeometry(16, 2, 2, patch_size=8, image_size=32), 0.0).state_dict()

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["cls_token"], other["cls_token"])
