"""CLIP's tower as a student: the network that timm builds of OpenAI's and LAION's files, and of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.importing.importer import import_checkpoint
from fdscale.students.files import load_weights
from fdscale.students.geometry import TimmGeometry, file_geometry
from fdscale.students.student import build_student
from fdscale.teachers.table import CLIP_MEAN

SHAPE = {"patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0}
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def tower(quick: bool) -> torch.nn.Module:
    name = "vit_base_patch16_clip_quickgelu_224" if quick else "vit_base_patch16_clip_224"
    network = timm.create_model(name, num_classes=0, global_pool="", img_size=32, **SHAPE)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return network.eval()


NAMES = (
    *(("cls_token", "class_embedding"), ("pos_embed", "positional_embedding"), ("patch_embed.proj", "conv1")),
    *(("norm_pre", "ln_pre"), ("blocks.", "transformer.resblocks."), ("norm1", "ln_1"), ("norm2", "ln_2")),
    *(
        ("attn.qkv.", "attn.in_proj_"),
        ("attn.proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ),
)


def original(network: torch.nn.Module) -> dict[str, Tensor]:
    """OpenAI's names, a text tower and a projection beside."""
    state = {"visual.proj": torch.zeros(128, 4), "text_projection": torch.zeros(4, 4), "logit_scale": torch.ones(())}
    for name, value in network.state_dict().items():
        renamed = "ln_post" + name.removeprefix("norm") if name in ("norm.weight", "norm.bias") else name
        for timms, theirs in NAMES:
            renamed = renamed.replace(timms, theirs)
        flat = {"cls_token": value.flatten(), "pos_embed": value[0]}.get(name, value)
        state[f"visual.{renamed}"] = flat.contiguous()
    return state


@pytest.mark.parametrize("source", ["OpenAI", "LAION", "timm"])
def test_the_tower_gives_timms_tokens(source: str, tmp_path: Path) -> None:
    network = tower(quick=source != "LAION")
    state = network.state_dict() if source == "timm" else original(network)
    if source == "OpenAI":
        state |= {"input_resolution": torch.tensor(32)}
    save_file(state, tmp_path / "clip.safetensors")
    told = {"OpenAI": [], "LAION": ["activation=gelu"], "timm": ["activation=quickgelu"]}[source]
    report = import_checkpoint(tmp_path / "clip.safetensors", tmp_path / "student", told)
    student = build_student(file_geometry(report.weights), seed=3).eval()
    load_weights(student, report.weights)
    assert student.mean.flatten().tolist() == pytest.approx(CLIP_MEAN)
    with torch.no_grad():
        assert torch.equal(student(PIXELS), network((PIXELS - student.mean) / student.std))


def test_the_activation_is_asked_for_where_the_file_does_not_tell(tmp_path: Path) -> None:
    save_file(original(tower(quick=False)), tmp_path / "clip.safetensors")
    with pytest.raises(UserError, match=r"activation=None, allowed: activation=quickgelu \(OpenAI's weights\) or"):
        import_checkpoint(tmp_path / "clip.safetensors", tmp_path / "student")


def test_a_known_size_has_timms_name_for_it(tmp_path: Path) -> None:
    network = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=0, global_pool="", img_size=32)
    save_file(network.state_dict(), tmp_path / "clip.safetensors")
    report = import_checkpoint(tmp_path / "clip.safetensors", tmp_path / "student", ["activation=quickgelu"])
    assert report.geometry == TimmGeometry("vit_base_patch16_clip_quickgelu_224", 32)
