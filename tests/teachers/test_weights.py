from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.teacher import build_teacher
from fdscale.teachers.weights import read_checkpoint, read_state_dict


def torchscript(state: dict[str, Tensor], path: Path) -> Path:
    """A TorchScript archive of modules that carry `state`, as OpenAI publishes CLIP."""

    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return images

    root = Root()
    for name, value in state.items():
        *parents, leaf = name.split(".")
        module: nn.Module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(leaf, nn.Parameter(value, requires_grad=False))
    torch.jit.trace(root, torch.ones(1)).save(str(path))
    return path


@pytest.mark.parametrize("layout", ["torchscript", "half", "plain", "safetensors", "wrapped"])
def test_clip_files(
    layout: str, clip, tmp_path: Path, caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder
) -> None:
    state = {**clip.state, "text_projection": torch.ones(2, 2), "logit_scale": torch.tensor(1.0)}
    path = tmp_path / ("clip.safetensors" if layout == "safetensors" else "clip.pt")
    match layout:
        case "torchscript":
            torchscript(state, path)
        case "safetensors":
            save_file(state, path)
        case "half":
            torch.save({k: v.half() for k, v in state.items()}, path)
        case "wrapped":
            torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, path)
        case _:
            torch.save(state, path)
    with caplog.at_level(logging.WARNING):
        teacher = build_teacher("clip_vit_b16", str(path), geometry_overrides=clip.geometry)
    assert (f"{path} is a TorchScript archive" in caplog.text) == (layout == "torchscript")
    wanted = clip.state["visual.ln_post.weight"]
    assert torch.equal(teacher.final_norm.weight, wanted.half().float() if layout == "half" else wanted)


@pytest.mark.parametrize("layout", ["bare", "safetensors", "teacher", "student", "deit"])
def test_vit_files(layout: str, dino, tmp_path: Path) -> None:
    state, path = dino.state, tmp_path / "vit.pth"
    other = {f"module.backbone.{k}": torch.zeros_like(v) for k, v in state.items()}
    own = {f"module.backbone.{k}": v for k, v in state.items()} | {"module.head.last.weight": torch.ones(2)}
    key = None
    match layout:
        case "bare":
            torch.save(state, path)
        case "safetensors":
            path = path.with_suffix(".safetensors")
            save_file(state, path)
        case "teacher":  # the table's choice for DINO, as its own evaluation
            torch.save({"student": other, "teacher": own, "epoch": 1}, path)
        case "student":
            key = "student"
            torch.save({"student": own, "teacher": other}, path)
        case "deit":
            torch.save({"model": {**state, "head.weight": torch.ones(2, 48), "head.bias": torch.ones(2)}}, path)
    name = "deit_b16" if layout == "deit" else "dino_vit_b16"
    teacher = build_teacher(name, str(path), geometry_overrides=dino.geometry, checkpoint_key=key)
    assert torch.equal(teacher.final_norm.weight, state["norm.weight"])


def test_esvit_takes_the_student_by_default(esvit, tmp_path: Path) -> None:
    own = {f"module.{k}": v for k, v in esvit.state.items()}
    heads = {"module.head.mlp.0.weight": torch.ones(2), "module.head_dense.mlp.0.weight": torch.ones(2)}
    files = {
        "student": {**own, **heads},
        "teacher": {k: v + 1 if v.is_floating_point() else v for k, v in own.items()} | heads,
    }
    path = tmp_path / "esvit.pth"
    torch.save(files, path)
    by_default = build_teacher("esvit_swin_b", str(path), geometry_overrides=esvit.geometry)
    chosen = build_teacher("esvit_swin_b", str(path), geometry_overrides=esvit.geometry, checkpoint_key="teacher")
    assert torch.equal(by_default.final_norm.weight, esvit.state["norm.weight"])
    assert torch.equal(chosen.final_norm.weight, esvit.state["norm.weight"] + 1)
    with pytest.raises(UserError, match="no 'ema'; allowed: 'student', 'teacher'"):
        read_state_dict(path, "ema")


def test_missing_unexpected_and_misshapen_keys_are_told(dino, tmp_path: Path) -> None:
    state = dict(dino.state)
    for key in ("norm.weight", "norm.bias", "cls_token", "blocks.0.norm1.weight"):
        del state[key]
    state["extra.weight"] = torch.ones(1)
    state["blocks.1.norm1.weight"] = torch.ones(49)
    path = tmp_path / "broken.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=r"broken\.pth does not fit") as error:
        build_teacher("dino_vit_b16", str(path), geometry_overrides=dino.geometry)
    for told in (
        "4 missing (",
        "and 1 more",
        "1 unexpected (extra.weight)",
        "1 of another shape (blocks.1.norm1.weight (49,) where the network has (48,))",
        "It looks like a ViT in timm's names",
    ):
        assert told in str(error.value)


@pytest.mark.parametrize(
    ("file", "into", "told"),
    [
        ("clip", "dino_vit_b16", "looks like CLIP: set teacher.name to clip_vit_b16"),
        ("esvit", "dino_vit_b16", "looks like a Swin v1: set teacher.name to esvit_swin_b"),
        ("dino", "clip_vit_b16", "looks like a ViT"),
    ],
)
def test_the_wrong_family_is_recognised(
    file: str, into: str, told: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    torch.save(request.getfixturevalue(file).state, tmp_path / "file.pth")
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32}
    with pytest.raises(UserError, match="does not fit") as error:
        build_teacher(into, str(tmp_path / "file.pth"), geometry_overrides=shape)
    assert told in str(error.value)


def test_files_that_are_none_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path / "absent.pth")
    with pytest.raises(UserError, match="no such file"):
        read_checkpoint(tmp_path)
    for name in ("empty.pth", "empty.safetensors"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name} cannot be read"):
            read_checkpoint(tmp_path / name)
    (tmp_path / "text.pth").write_text("<html>not found</html>")
    with pytest.raises(UserError, match="cannot be read"):
        read_checkpoint(tmp_path / "text.pth")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(UserError, match=r"placeholder of torch\.nn.*save state_dict\(\) instead"):
        read_state_dict(tmp_path / "module.pth", "teacher")


def test_a_truncated_safetensors_and_torchscript_file(clip, tmp_path: Path) -> None:
    save_file(clip.state, tmp_path / "a.safetensors")
    torchscript(clip.state, tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(UserError, match="cannot be read"):
            read_checkpoint(path)
