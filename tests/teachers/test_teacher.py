from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.table import teacher_geometry
from fdscale.teachers.teacher import Float32LayerNorm, Teacher, build_teacher

TINY_VIT = teacher_geometry(
    "dino_vit_b16", overrides={"embed_dim": 16, "depth": 1, "num_heads": 2, "patch_size": 8, "image_size": 32}
)


class Patches(nn.Module):
    """A backbone of one's own: a patch convolution, its map laid out as asked."""

    def __init__(self, layout: str = "tokens") -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)
        self.drop = nn.Dropout(0.5)
        self.layout = layout

    def forward(self, images: Tensor) -> Tensor:
        self.seen = images
        maps = self.drop(self.conv(images))
        if self.layout == "channels_first":
            return maps
        maps = maps.permute(0, 2, 3, 1)
        return maps if self.layout == "channels_last" else maps.flatten(1, 2)


def own_teacher(layout: str = "tokens", norm: nn.Module | None = None, after_norm: bool = True) -> Teacher:
    torch.manual_seed(0)
    return Teacher(
        Patches(layout),
        width=5,
        grid=(4, 4),
        prefix_tokens=0,
        mean=(0.1, 0.2, 0.3),
        std=(0.5, 0.25, 2.0),
        image_size=32,
        final_norm=norm,
        after_norm=after_norm,
    )


@pytest.mark.parametrize("layout", ["channels_last", "channels_first"])
def test_maps_become_tokens_row_by_row(layout: str) -> None:
    pixels = torch.rand(2, 3, 32, 32)
    assert torch.equal(own_teacher(layout)(pixels), own_teacher("tokens")(pixels))


@settings(max_examples=20)
@given(
    mean=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    std=st.lists(st.floats(0.05, 2), min_size=3, max_size=3),
)
def test_pixels_are_normalised_with_the_teachers_statistics(mean: list[float], std: list[float]) -> None:
    teacher = Teacher(
        nn.Identity(),
        width=32,
        grid=(3, 32),
        prefix_tokens=0,
        mean=tuple(mean),
        std=tuple(std),
        image_size=32,
    )
    pixels = torch.rand(2, 3, 32, 32)
    wanted = (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(teacher.prepare(pixels), wanted, atol=2e-5, rtol=1e-5)


def test_another_size_is_resized_and_the_own_size_is_not() -> None:
    teacher, pixels = own_teacher(), torch.rand(2, 3, 48, 40)
    resized = F.interpolate(pixels, (32, 32), mode="bilinear")  # as the official implementation calls it
    assert torch.equal(teacher.prepare(pixels), teacher.prepare(resized))


def test_a_teacher_is_frozen_and_stays_in_eval_mode() -> None:
    teacher = own_teacher(norm=nn.LayerNorm(5))
    wrapped = nn.ModuleList([teacher]).train()
    assert wrapped.training
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    pixels = torch.rand(2, 3, 32, 32, requires_grad=True)
    tokens = teacher(pixels)
    assert torch.equal(tokens, teacher(pixels))
    assert not tokens.requires_grad


def test_tokens_can_be_a_target_of_a_backward_pass() -> None:
    prediction = torch.zeros(1, 16, 5, requires_grad=True)
    F.smooth_l1_loss(prediction, own_teacher()(torch.rand(1, 3, 32, 32))).backward()
    assert prediction.grad is not None


def test_only_weights_are_in_the_state_dict() -> None:
    assert set(own_teacher().state_dict()) == {"backbone.conv.weight", "backbone.conv.bias"}


def test_after_norm_false_leaves_the_final_norm_out() -> None:
    norm, pixels = nn.LayerNorm(5), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        norm.weight.uniform_(), norm.bias.uniform_()
    raw = own_teacher(norm=norm, after_norm=False)(pixels)
    assert torch.equal(raw, own_teacher()(pixels))
    assert torch.equal(own_teacher(norm=norm)(pixels), norm(raw))


def test_half_precision_weights_keep_the_statistics_and_the_final_norm_in_float32() -> None:
    pixels = torch.rand(2, 3, 32, 32)
    full = build_teacher(TINY_VIT, "random")
    half = build_teacher(TINY_VIT, "random", dtype=torch.bfloat16)
    raw = build_teacher(TINY_VIT, "random", dtype=torch.bfloat16, after_norm=False)
    assert half.backbone.patch_embed.proj.weight.dtype == torch.bfloat16
    assert half.final_norm is not None
    assert half.final_norm.weight.dtype == torch.float32
    assert torch.equal(half.scale, full.scale)
    assert half(pixels).dtype == raw(pixels).dtype == torch.float32
    # the norm's input is rounded, its output is not
    assert torch.equal(half(pixels), half.final_norm(raw(pixels)))
    assert not torch.equal(half(pixels), half(pixels).bfloat16().float())


def test_a_cast_of_the_whole_teacher_rounds_no_statistics() -> None:
    teacher, pixels = own_teacher(norm=Float32LayerNorm(5)), torch.rand(1, 3, 32, 32)
    before = teacher.prepare(pixels)
    teacher.to(torch.bfloat16)
    assert teacher.scale.dtype == torch.float32
    assert torch.equal(teacher.prepare(pixels), before.bfloat16())
    assert teacher(pixels).dtype == torch.float32


def test_the_students_autocast_does_not_reach_the_teacher() -> None:
    teacher, pixels = own_teacher(), torch.rand(1, 3, 32, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(pixels)
    assert torch.equal(inside, teacher(pixels))


def test_random_teachers_are_equal_and_leave_the_random_state_alone() -> None:
    torch.manual_seed(5)
    one = build_teacher(TINY_VIT, "random")
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(3), drawn)
    two = build_teacher(TINY_VIT, "random")
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(one(pixels), two(pixels))


def test_a_rounded_norm_is_the_official_half_precision_form() -> None:
    """Method, section 1.4: the norm computes in fp32 and its output is rounded before the whitening."""
    pixels = torch.rand(2, 3, 32, 32)
    exact, rounded = (
        build_teacher(TINY_VIT, "random", dtype=torch.float16, rounded_norm=rounded) for rounded in (False, True)
    )
    assert rounded(pixels).dtype == torch.float32
    assert torch.equal(rounded(pixels), exact(pixels).half().float())
    assert not torch.equal(rounded(pixels), exact(pixels))
    whole = build_teacher(TINY_VIT, "random", rounded_norm=True)
    assert torch.equal(whole(pixels), build_teacher(TINY_VIT, "random")(pixels))


@pytest.mark.parametrize(
    ("name", "settings", "told"),
    [
        ("timm:test_resnet", {"after_norm": False}, r"after_norm=false: test_resnet has no final norm"),
        ("timm:test_resnet", {"rounded_norm": True}, r"rounded_norm=true: test_resnet has no final norm"),
        ("timm:test_vit", {"rounded_norm": True, "after_norm": False}, r"set one of them"),
        ("own", {}, r"fdscale\.train\.distill\(settings, teacher=…\)"),
    ],
)
def test_settings_that_the_network_cannot_follow_are_told(name: str, settings: dict[str, bool], told: str) -> None:
    with pytest.raises(UserError, match=rf"teacher\..*{told}"):
        build_teacher(teacher_geometry(name), "random", **settings)


def test_on_the_meta_device_there_are_shapes_and_no_values() -> None:
    teacher = build_teacher(TINY_VIT, "random", dtype=torch.bfloat16, device="meta")
    assert {value.device.type for value in [*teacher.parameters(), *teacher.buffers()]} == {"meta"}
    assert teacher.backbone.cls_token.dtype == torch.bfloat16
    huge = replace(TINY_VIT, embed_dim=2**20)  # no machine has the memory
    assert build_teacher(huge, "random", device="meta").width == 2**20
    here = build_teacher(TINY_VIT, "random")
    assert {k: v.shape for k, v in teacher.state_dict().items()} == {k: v.shape for k, v in here.state_dict().items()}


def test_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise AssertionError("a teacher was about to be downloaded")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    for name in ("timm:test_vit.r160_in1k", "clip_vit_b16_open_clip", "dinov3_vit_s16"):
        assert build_teacher(teacher_geometry(name), "random", device="meta").backbone is not None
    with pytest.raises(UserError, match=r"no such file: missing\.safetensors"):
        build_teacher(TINY_VIT, "missing.safetensors")
