"""The backbone of dense tasks: shapes at any size, the student's own features, gradients, divided weights."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.downstream.backbone import Backbone
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry
from fdscale.students.student import Student, build_student, set_activation_checkpointing
from fdscale.tokens import as_tokens
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide

VIT = ViTGeometry(32, 6, 4, patch_size=16, image_size=64)
PER_BLOCK = dataclasses.replace(VIT, position_bias="per_block")
SWIN = SwinV2Geometry(8, (1, 2, 1, 1), (1, 2, 4, 8), window_size=4, image_size=64, extra_norm_period=2)
SMALL = {"depth": 4, "embed_dim": 32, "num_heads": 2}
KINDS: dict[str, tuple[Geometry, dict[str, Any]]] = {
    "vit": (VIT, {}),
    "vit_layers": (VIT, {"plain": "layers"}),
    "vit_per_block": (
        dataclasses.replace(VIT, position_bias="per_block"),
        {"plain": "layers", "indices": (0, 1, 2, 4)},
    ),
    "vit_patch_14": (dataclasses.replace(VIT, patch_size=14, image_size=56), {}),
    "swin": (SWIN, {}),
    "swin_window": (SWIN, {"window_size": 8}),
    "timm_vit": (TimmGeometry("vit_tiny_patch16_224", 32, {**SMALL, "dynamic_img_size": True}), {}),
    "timm_beit": (TimmGeometry("beit_base_patch16_224", 32, SMALL), {}),
    "timm_swin": (TimmGeometry("swinv2_cr_tiny_224", 64, {"depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}), {}),
    "timm_convnet": (TimmGeometry("test_convnext", 32), {}),
}
SIZES = [(64, 64), (96, 160), (100, 75), (33, 50)]
LEAN = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_max_live_parameters": 0,
    "stage3_max_reuse_distance": 0,
}
Perturbed = Callable[[Geometry], Student]


def perturb(module: nn.Module) -> None:
    """Away from the start, where SwinV2's blocks are almost the identity."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def pixels(rows: int, height: int, width: int, seed: int = 5) -> Tensor:
    return torch.rand(rows, 3, height, width, generator=torch.Generator().manual_seed(seed))


def backbone_of(kind: str, drop_path: float = 0.0, mode: str = "none") -> Backbone:
    return built(*KINDS[kind], drop_path, mode)


def built(
    geometry: Geometry,
    arguments: dict[str, Any],
    drop_path: float,
    mode: str,
    before: Callable[[Student], object] = lambda student: None,
) -> Backbone:
    student = build_student(geometry, drop_path, seed=1)
    perturb(student)
    before(student)
    torch.manual_seed(3)
    backbone = Backbone(student, pyramid_channels=8, **arguments)
    set_activation_checkpointing(student, mode)
    return backbone


@pytest.mark.parametrize("kind", KINDS)
def test_any_image_gives_a_cell_for_every_stride_begun(kind: str) -> None:
    backbone = backbone_of(kind).eval()
    assert backbone.strides == ((4, 8) if kind == "timm_swin" else (4, 8, 16, 32))
    for height, width in SIZES:
        with torch.no_grad():
            maps = backbone(pixels(2, height, width))
        sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in backbone.strides]
        expected = [(2, channels, *size) for channels, size in zip(backbone.channels, sizes, strict=True)]
        assert [tuple(level.shape) for level in maps] == expected
        assert all(level.is_contiguous() and level.isfinite().all() for level in maps)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter(kind: str) -> None:
    backbone = backbone_of(kind)
    sum(level.square().sum() for level in backbone(pixels(2, 50, 60))).backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("kind", ["swin", "vit_layers", "vit_patch_14"])
def test_the_last_map_is_the_students_own(kind: str, perturbed: Perturbed) -> None:
    """At the size it was built for: SwinV2's after the norm, a ViT's before the norm that is dropped."""
    geometry, arguments = KINDS[kind]
    student = perturbed(geometry)
    given = pixels(2, student.image_size, student.image_size)
    network: Any = student.backbone
    norm, expected = network.norm, student(given)[:, student.prefix_tokens :]
    backbone = Backbone(student, **arguments)
    if kind == "swin":
        found = as_tokens(backbone(given)[-1], student.width)
    else:
        found = norm(as_tokens(network((given - student.mean) / student.std)[-1], student.width))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_patch_of_14_sees_16_pixels(perturbed: Perturbed) -> None:
    backbone = Backbone(perturbed(KINDS["vit_patch_14"][0])).eval()
    seen: list[Tensor] = []
    backbone.student.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    backbone(torch.full((1, 3, 40, 64), 0.25))
    assert seen[0].shape == (1, 3, 42, 56)  # 3 x 4 patches
    inside = (0.25 - backbone.student.mean) / backbone.student.std
    torch.testing.assert_close(seen[0][:, :, :28], inside.expand(1, 3, 28, 56))


def gradients(kind: str, mode: str) -> dict[str, Tensor]:
    backbone = backbone_of(kind, drop_path=0.5, mode=mode)
    draws = torch.rand(backbone.student.drop_path_sites, 3, generator=torch.Generator().manual_seed(7))
    sum(level.square().mean() for level in backbone(pixels(3, 40, 70), draws)).backward()
    return {name: p.grad for name, p in backbone.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["vit", "vit_per_block", "swin", "timm_swin"])
def test_recomputed_activations_change_no_bit(kind: str) -> None:
    kept, recomputed = gradients(kind, "none"), gradients(kind, "blocks")
    assert kept.keys() == recomputed.keys()
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


@pytest.mark.parametrize("kind", ["vit_layers", "swin"])
def test_offloaded_activations_change_no_more_than_an_order_of_sums(kind: str) -> None:
    """A layer's map and the next block both give its output a gradient; fairscale's blocks sum theirs first."""
    kept, offloaded = gradients(kind, "none"), gradients(kind, "offload")
    assert kept.keys() == offloaded.keys()
    for name in kept:
        torch.testing.assert_close(offloaded[name], kept[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_drop_path_reads_the_rows_of_its_images(kind: str) -> None:
    backbone, given = backbone_of(kind, drop_path=0.5), pixels(3, 40, 70)
    draws = torch.rand(backbone.student.drop_path_sites, 3, generator=torch.Generator().manual_seed(7))
    together = backbone(given, draws)
    for row in range(3):
        alone = backbone(given[row : row + 1], draws[:, row : row + 1])
        for one, all_three in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], all_three[row], rtol=0, atol=1e-4)
    assert not torch.allclose(together[-1], backbone(given, draws.flip(1))[-1], atol=1e-2)


@pytest.mark.parametrize("kind", ["vit", "vit_per_block", "swin", "timm_swin"])
def test_layers_are_the_students_and_the_necks_is_the_heads(kind: str) -> None:
    backbone = backbone_of(kind)
    ids = backbone.layer_ids()
    assert list(ids) == [name for name, _ in backbone.named_parameters()]
    theirs = {f"student.backbone.{name}": layer for name, layer in backbone.student.layer_ids().items()}
    assert theirs.items() <= ids.items()
    assert {layer for name, layer in ids.items() if name.startswith("neck.")} == {backbone.layers}
    assert min(ids.values()) == 0


def test_a_copy_is_a_backbone_of_its_own() -> None:
    for kind in ("vit", "vit_per_block"):
        backbone = backbone_of(kind).eval()
        twin, given = copy.deepcopy(backbone), pixels(1, 40, 70)
        before = twin(given)
        perturb(backbone)
        backbone(pixels(1, 64, 32))
        assert all(torch.equal(a, b) for a, b in zip(twin(given), before, strict=True))


def test_a_network_without_maps_is_refused() -> None:
    student = Student(nn.Conv2d(3, 8, 8, 8), width=8, grid=(4, 4), prefix_tokens=0, image_size=32)
    with pytest.raises(UserError, match=r"Conv2d cannot be the backbone of a dense task: .*forward_intermediates"):
        Backbone(student)


@pytest.mark.parametrize("indices", [(0, 1, 2), (0, 2, 1, 3), (0, 1, 1, 3), (0, 1, 2, 6), (-1, 0, 1, 2)])
def test_layers_that_cannot_be_are_refused(indices: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"indices=\[.*\]: allowed are 4 of 0 to 5, in rising order"):
        Backbone(build_student(VIT), plain="layers", indices=indices)


DIVIDED: dict[str, tuple[Geometry, dict[str, Any]]] = {
    "vit": (ViTGeometry(16, 2, 2, patch_size=16, image_size=64), {}),
    "swin": (SwinV2Geometry(8, (1, 2), (1, 2), window_size=4, image_size=32, extra_norm_period=2), {}),
}


class Dense(nn.Module):
    """A loss over all maps, for an engine."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, draws: Tensor) -> Tensor:
        total: Any = sum((level.float() - 1).square().mean() for level in self.backbone(images, draws))
        return total


def trained(connection: Connection, kind: str, bias: str, lean: bool) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps at two sizes, other ones on each rank, and the gradients of the first; blocks recomputed.

    Lean: the student is divided before it becomes a backbone, and nothing stays resident.
    """
    from deepspeed.utils import safe_get_full_grad

    geometry, arguments = DIVIDED[kind]
    if bias:
        geometry = dataclasses.replace(geometry, position_bias=bias)  # type: ignore[type-var]
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": LEAN if lean else {"stage": 0}}
    divided = partial(divide, deepspeed_json=config, connection=connection)
    module = Dense(built(geometry, arguments, 0.3, "blocks", divided if lean else lambda student: None))
    optimizer = adamw(parameter_groups(module, 0.05, ()), 1e-3, (0.9, 0.99), 1e-8)
    engine, rank = start_engine(module, optimizer, config, 1, 1.0), connection.rank.rank
    losses: list[float] = []
    found: dict[str, Tensor] = {}
    for height, width in ((50, 70), (64, 32)):
        draws = torch.rand(module.backbone.student.drop_path_sites, 2, generator=torch.Generator().manual_seed(rank))
        loss = engine(pixels(2, height + 9 * rank, width, seed=rank), draws)
        engine.backward(loss)
        found = found or {name: safe_get_full_grad(p).clone() for name, p in module.named_parameters()}
        engine.step()
        losses.append(float(loss.detach()))
    assert not lean or not list(module.backbone.ds_external_parameters()), "read outside a call of their owner"
    engine.destroy()
    return losses, found


@pytest.mark.parametrize(("kind", "bias"), [("vit", "shared"), ("vit", "per_block"), ("swin", "")])
def test_divided_weights_learn_the_same(kind: str, bias: str, two_ranks: Any) -> None:
    whole, divided = (two_ranks(trained, kind, bias, lean) for lean in (False, True))
    for (losses, found), (expected, theirs) in zip(divided, whole, strict=True):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert found.keys() == theirs.keys()
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
