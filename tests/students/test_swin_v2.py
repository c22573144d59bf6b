"""SwinV2: timm's numbers, the published extra norms, the paper's start, logits in fp32."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fdscale.students.swin_v2 import SwinV2

Perturb = Callable[[nn.Module], None]
# two stages, shifted windows of 4 on 16x16 and 8x8 maps
TINY: dict[str, Any] = {"img_size": 64, "embed_dim": 16, "depths": (2, 4), "num_heads": (2, 4), "window_size": 4}
OTHER_WINDOWS: dict[str, Any] = {"pretrained_window_sizes": (3, 2)}
EXACT = 1e-5
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(5))


def tiny(**changes: Any) -> SwinV2:
    torch.manual_seed(0)
    return SwinV2(**{**TINY, **changes})


def stock(own: SwinV2, **changes: Any) -> SwinTransformerV2:
    """timm's network with the same weights, the extra norms left out."""
    like = SwinTransformerV2(num_classes=0, global_pool="", drop_path_rate=0.0, **{**TINY, **changes})
    weights = {name: tensor for name, tensor in own.state_dict().items() if ".enorm." not in name}
    like.load_state_dict(weights, strict=True)
    return like.eval()


@pytest.mark.parametrize(
    "changes",
    [{}, {"window_size": 16}, {"window_size": 2}, {"patch_size": 8}, {"mlp_ratio": 2.0}, OTHER_WINDOWS],
    ids=["shifted", "one window", "many windows", "patch 8", "narrow mlp", "pretrained windows"],
)
@torch.no_grad()
def test_tokens_equal_timms(changes: dict[str, Any], perturbed: Perturb) -> None:
    own = tiny(**changes).eval()
    perturbed(own)
    found, expected = own(IMAGES), stock(own, **changes)(IMAGES)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) < EXACT
    assert float((found[0] - found[1]).abs().max()) > 0.1  # the images are told apart


@torch.no_grad()
def test_a_window_that_covered_its_map_shifts_on_a_larger_one_as_timms(perturbed: Perturb) -> None:
    own = tiny(window_size=8).eval()
    perturbed(own)
    like, larger = stock(own, window_size=8), IMAGES.repeat(1, 1, 2, 2)
    for network in (own, like):
        network.set_input_size((128, 128), window_size=8)
    assert any(own.layers[1].blocks[1].shift_size)
    assert float((own(larger) - like(larger)).abs().max()) < EXACT


def test_gradients_equal_timms(perturbed: Perturb) -> None:
    own = tiny().eval()
    perturbed(own)
    like = stock(own)
    for network in (own, like):
        network(IMAGES).square().mean().backward()
    theirs = dict(like.named_parameters())
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-7), name


@torch.no_grad()
def test_extra_norms_follow_every_kth_block_of_a_stage(perturbed: Perturb) -> None:
    own = tiny(depths=(3, 5), extra_norm_period=2).eval()
    perturbed(own)
    norms = {
        name: module for name, module in own.named_modules() if name.endswith("enorm") and list(module.parameters())
    }
    assert list(norms) == ["layers.0.blocks.1.enorm", "layers.1.blocks.1.enorm", "layers.1.blocks.3.enorm"]
    assert {norm.eps for norm in norms.values()} == {1e-5}
    like = stock(own, depths=(3, 5))
    for name, norm in norms.items():
        block = like.get_submodule(name.removesuffix(".enorm"))
        block.register_forward_hook(
            lambda module, inputs, output, norm=norm: F.layer_norm(output, output.shape[-1:], norm.weight, norm.bias)
        )
    found = own(IMAGES)
    assert float((found - like(IMAGES)).abs().max()) < EXACT
    assert float((found - stock(own, depths=(3, 5))(IMAGES)).abs().max()) > 0.1


def blocks_of(network: SwinV2) -> list[Any]:
    return [block for stage in network.layers for block in stage.blocks]


@torch.no_grad()
def test_the_papers_initialisation() -> None:
    network = tiny(embed_dim=64, extra_norm_period=2)
    for number, block in enumerate(blocks_of(network), start=1):
        for layer in (block.attn.proj, block.mlp.fc2):
            assert float(layer.weight.std()) == pytest.approx(0.02 / math.sqrt(2 * number), rel=0.05)
        for layer in (block.attn.qkv, block.mlp.fc1, block.attn.cpb_mlp[0], block.attn.cpb_mlp[2]):
            assert float(layer.weight.std()) == pytest.approx(0.02, rel=0.1)
        for norm in (block.norm1, block.norm2):
            assert torch.equal(norm.weight, torch.full_like(norm.weight, 1e-5))
        assert torch.equal(block.attn.logit_scale, torch.full((block.num_heads, 1, 1), math.log(10)))
        if not isinstance(block.enorm, nn.Identity):
            assert torch.equal(block.enorm.weight, torch.ones_like(block.enorm.weight))
    assert float(network.patch_embed.proj.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(network.layers[1].downsample.reduction.weight.std()) == pytest.approx(0.02, rel=0.05)
    for norm in (network.norm, network.patch_embed.norm, network.layers[1].downsample.norm):
        assert torch.equal(norm.weight, torch.ones_like(norm.weight))
    biases = {name: value for name, value in network.named_parameters() if name.endswith("bias")}
    assert len(biases) == 3 + 1 + 6 * 8 + 3  # norms and patch convolution, eight a block, extra norms
    assert all(float(value.detach().abs().max()) == 0 for value in biases.values())


def test_no_weight_is_an_outlier() -> None:
    weights = [module.weight for module in tiny(embed_dim=128).modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    assert sum(weight.numel() for weight in weights) > 1_000_000
    assert max(float(weight.detach().abs().max()) for weight in weights) < 0.02 * 6


@torch.no_grad()
def test_a_fresh_network_is_almost_the_identity_on_its_main_branch() -> None:
    block = blocks_of(tiny())[0]
    tokens = torch.randn(1, 16, 16, 16)
    assert 0 < float((block(tokens) - tokens).abs().max()) < 1e-3


def test_residual_norms_pass_the_gradient_on() -> None:
    network = tiny()
    network(IMAGES).square().sum().backward()
    assert all(float(block.mlp.fc1.weight.grad.abs().max()) > 0 for block in blocks_of(network))


def test_the_state_dict_holds_parameters_alone() -> None:
    network = tiny(extra_norm_period=2)
    assert set(network.state_dict()) == {name for name, _ in network.named_parameters()}
    assert {name.rsplit(".", 1)[1] for name, _ in network.named_buffers()} >= {
        "relative_coords_table", "relative_position_index", "k_bias"
    }  # fmt: skip
    assert all(bool(buffer.float().isfinite().all()) for buffer in network.buffers())


def test_pretrained_windows_normalise_the_coordinates() -> None:
    network = tiny(pretrained_window_sizes=(3, 0))
    first, last = (blocks_of(network)[index].attn.relative_coords_table for index in (0, -1))
    assert float(first.max()) == pytest.approx(math.log2(8 * 3 / 2 + 1) / 3)
    assert float(last.max()) == pytest.approx(math.log2(8 + 1) / 3)
    assert torch.equal(last, blocks_of(tiny())[-1].attn.relative_coords_table)


@pytest.mark.parametrize(("image", "window"), [(64, 4), (64, 16), (32, 8)])
def test_buffers_are_those_of_a_network_that_never_was_on_the_meta_device(image: int, window: int) -> None:
    changes = {"img_size": image, "window_size": window}
    own = tiny(**changes)
    theirs = dict(stock(own, **changes).named_buffers())
    mine = dict(own.named_buffers())
    assert mine.keys() == {name for name in theirs if not name.endswith("attn_mask")}  # made once for all blocks
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_a_window_shrinks_to_its_map_and_is_not_shifted_there() -> None:
    blocks = blocks_of(tiny(depths=(2, 2), window_size=16, img_size=64))
    assert [(block.window_size, block.shift_size) for block in blocks] == [((16, 16), (0, 0))] * 2 + [
        ((8, 8), (0, 0))
    ] * 2
    shifted = blocks_of(tiny())
    assert [block.shift_size for block in shifted] == [(0, 0), (2, 2)] * 3


@torch.no_grad()
def test_a_window_that_was_not_shifted_is_on_a_larger_map(perturbed: Perturb) -> None:
    small = tiny(img_size=32).eval()
    perturbed(small)
    small.set_input_size(img_size=(64, 64), window_size=4)
    assert float((small(IMAGES) - stock(small)(IMAGES)).abs().max()) < EXACT


@torch.no_grad()
def test_the_position_bias_is_between_0_and_16_and_depends_on_the_offset_alone(perturbed: Perturb) -> None:
    attention = blocks_of(tiny())[0].attn
    perturbed(attention)
    bias = attention.position_bias()
    assert bias.shape == (2, 16, 16)
    assert 0 < float(bias.min()) < float(bias.max()) < 16
    assert torch.equal(bias[:, 0, 1], bias[:, 5, 6])  # one step to the right
    assert torch.equal(bias[:, 0, 4], bias[:, 11, 15])  # one step down
    assert not torch.equal(bias[:, 0, 1], bias[:, 1, 0])


FLASH = "_scaled_dot_product_flash_attention_for_cpu"


class Products(TorchDispatchMode):
    """Types of what each batched matrix product, softmax and fused attention is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("bmm", "softmax", FLASH):
            self.seen.append((name, (kwargs["attn_mask"] if name == FLASH else args[0]).dtype))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def types_of(network: SwinV2, images: Tensor) -> tuple[list[tuple[str, torch.dtype]], Tensor]:
    with Products() as products:
        tokens = network(images)
    return products.seen, tokens


def attention_in(dtype: torch.dtype) -> list[tuple[str, torch.dtype]]:
    """Logits and softmax in fp32, the weighted sum of values in `dtype`."""
    return [("bmm", torch.float32), ("softmax", torch.float32), ("bmm", dtype)]


FUSED = [(FLASH, torch.float32)]  # its bias; torch keeps its logits in fp32


def test_logits_stay_fp32_under_autocast(perturbed: Perturb) -> None:
    network = tiny()
    perturbed(network)
    exact = types_of(network, IMAGES)[1]
    with torch.autocast("cpu", torch.bfloat16):
        seen, tokens = types_of(network, IMAGES)
        fused, in_evaluation = types_of(network.eval(), IMAGES)
        assert blocks_of(network)[0].attn.position_bias().dtype is torch.float32
    assert (seen, fused) == (attention_in(torch.bfloat16) * 6, FUSED * 6)
    for found in (tokens, in_evaluation):
        assert 0 < float((found.float() - exact).abs().mean()) < 0.05


def test_the_position_bias_is_the_same_under_autocast(perturbed: Perturb) -> None:
    attention = blocks_of(tiny())[0].attn
    perturbed(attention)
    exact = attention.position_bias()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention.position_bias(), exact)


def test_bf16_parameters_with_fp32_buffers_stay_close_to_fp32(perturbed: Perturb) -> None:
    """The engine casts parameters alone (bf16.enabled): coordinates stay as they are."""
    network = tiny(extra_norm_period=2)
    perturbed(network)
    exact = types_of(network, IMAGES)[1]
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16()
    assert blocks_of(network)[0].attn.relative_coords_table.dtype is torch.float32
    seen, tokens = types_of(network, IMAGES.bfloat16())
    assert tokens.dtype is torch.bfloat16
    assert seen == attention_in(torch.bfloat16) * 6
    assert 0 < float((tokens.float() - exact).abs().mean()) < 0.05


def test_the_temperature_is_clamped() -> None:
    network = tiny().eval()
    with torch.no_grad():
        results = []
        for scale in (math.log(100.0), 50.0):
            for block in blocks_of(network):
                block.attn.logit_scale.fill_(scale)
                block.norm1.weight.fill_(1.0)
            results.append(network(IMAGES))
    assert torch.equal(*results)


def test_activation_checkpointing_changes_nothing(perturbed: Perturb) -> None:
    gradients = []
    for checkpointing in (False, True):
        network = tiny(extra_norm_period=2)
        perturbed(network)
        network.set_grad_checkpointing(checkpointing)
        counted = []
        blocks_of(network)[0].attn.register_forward_hook(lambda *call, counted=counted: counted.append(1))
        network(IMAGES).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in network.named_parameters()})
        assert len(counted) == (2 if checkpointing else 1)  # computed again in the backward pass
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_the_meta_device_holds_no_bytes() -> None:
    network = SwinV2(**TINY, device="meta")
    assert all(parameter.is_meta for parameter in network.parameters())
    assert {name: p.shape for name, p in network.named_parameters()} == {
        name: p.shape for name, p in tiny().named_parameters()
    }
