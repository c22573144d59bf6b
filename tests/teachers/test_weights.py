from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.teachers.table import Value, teacher_geometry
from fdscale.teachers.teacher import Teacher, build_teacher
from fdscale.teachers.weights import read_checkpoint, read_state_dict


def built(name: str, path: Path, geometry: dict[str, Value], key: str | None = None) -> Teacher:
    return build_teacher(teacher_geometry(name, str(path), overrides=geometry), str(path), checkpoint_key=key)


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
        teacher = built("clip_vit_b16", path, clip.geometry)
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
    teacher = built(name, path, dino.geometry, key)
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
    by_default = built("esvit_swin_b", path, esvit.geometry)
    chosen = built("esvit_swin_b", path, esvit.geometry, "teacher")
    assert torch.equal(by_default.final_norm.weight, esvit.state["norm.weight"])
    assert torch.equal(chosen.final_norm.weight, esvit.state["norm.weight"] + 1)
    with pytest.raises(UserError, match="no 'ema'; allowed: 'student', 'teacher'"):
        read_state_dict(path, "ema")


def test_numbers_that_are_not_finite_are_told(dino, tmp_path: Path) -> None:
    path, broken = tmp_path / "broken.pth", dino.state["norm.weight"].clone()
    broken[3] = float("nan")
    torch.save({**dino.state, "norm.weight": broken}, path)
    with pytest.raises(UserError, match=r"1 not finite \(norm\.weight\)"):
        built("dino_vit_b16", path, dino.geometry)


def test_missing_unexpected_and_misshapen_keys_are_told(dino, tmp_path: Path) -> None:
    state = dict(dino.state)
    for key in ("norm.weight", "norm.bias", "pos_embed", "blocks.0.norm1.weight"):
        del state[key]
    state["extra.weight"] = torch.ones(1)
    state["blocks.1.norm1.weight"] = torch.ones(49)
    path = tmp_path / "broken.pth"
    torch.save(state, path)
    with pytest.raises(UserError, match=r"broken\.pth does not fit") as error:
        built("dino_vit_b16", path, dino.geometry)
    for told in (
        "4 missing (",
        "and 1 more",
        "1 unexpected (extra.weight)",
        "1 of another shape (blocks.1.norm1.weight (49,) where the network has (48,))",
        "; the file is of a plain ViT, as the network: set teacher.geometry to the file's shape",
    ):
        assert told in str(error.value)


FAMILIES = {
    "ln_pre.weight": "CLIP: set teacher.name to clip_vit_b32 or clip_vit_b16",
    "layers.0.blocks.0.attn.relative_position_bias_table": "Swin v1: set teacher.name to esvit_swin_b",
    "blocks.0.ls1.gamma": "DINOv2: set teacher.name to dinov2_vit_s14 or",
    "blocks.0.attn.q_bias": "EVA-CLIP: set teacher.name to eva02_clip_l14 or",
    "blocks.0.attn.q_proj.bias": "EVA-CLIP: set teacher.name to eva02_clip_l14 or",
    "blocks.0.attn.qkv.weight": "SigLIP 2, a ViT without cls_token: set teacher.name to siglip2_vit_b16 or",
    "encoder.patch_embed.proj.weight": "feature distillation or SimMIM: run `fdscale import`",
    "layers.0.blocks.0.attn.logit_scale": "Swin V2: run `fdscale import`",
    "rel_pos_bias.relative_position_bias_table": "BEiT: run `fdscale import`",
    "blocks.0.attn.relative_position_bias_table": "BEiT: run `fdscale import`",
    "stages.0.blocks.0.conv_dw.weight": "no known family: rename its keys to timm's and set teacher.name to timm:NAME",
}


@pytest.mark.parametrize("key", FAMILIES)
def test_another_familys_file_is_told_by_its_keys(key: str, dino, tmp_path: Path) -> None:
    torch.save({key: torch.ones(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError) as error:
        built("dino_vit_b16", tmp_path / "other.pth", dino.geometry)
    where = f"teacher.weights: {tmp_path}/other.pth does not fit timm's vit_base_patch16_224.dino: "
    assert str(error.value).startswith(where)
    assert "missing (cls_token, pos_embed, patch_embed.proj.weight and 2" in str(error.value)
    assert key in str(error.value)
    assert f"; the file is of {FAMILIES[key]}" in str(error.value)


@pytest.mark.parametrize(
    ("file", "into", "told"),
    [
        ("clip", "dino_vit_b16", "of CLIP: set teacher.name to clip_vit_b32 or clip_vit_b16 or"),
        ("esvit", "dino_vit_b16", "of Swin v1: set teacher.name to esvit_swin_b"),
        ("dino", "clip_vit_b16", "of a plain ViT: set teacher.name to dino_vit_s16 or"),
        ("dino", "clip_vit_b16_open_clip", "of a plain ViT: set teacher.name to dino_vit_s16 or"),
        ("dino", "dinov3_vit_l16", "of a plain ViT: set teacher.name to dino_vit_s16 or"),
    ],
)
def test_the_wrong_family_is_recognised(
    file: str, into: str, told: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    torch.save(request.getfixturevalue(file).state, tmp_path / "file.pth")
    shape = {"embed_dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "image_size": 32}
    with pytest.raises(UserError, match="does not fit") as error:
        built(into, tmp_path / "file.pth", shape)
    assert told in str(error.value)


def test_the_teachers_of_the_files_width_are_named(tmp_path: Path) -> None:
    stem = {"visual.class_embedding": torch.ones(1024), "visual.conv1.weight": torch.ones(1024, 3, 14, 14)}
    torch.save({**stem, "visual.ln_pre.weight": torch.ones(1024)}, tmp_path / "ViT-L-14.pt")
    with pytest.raises(UserError, match=r"of CLIP: set teacher.name to clip_vit_l14 or \w+ or laion_clip_vit_l14$"):
        built("dino_vit_b16", tmp_path / "ViT-L-14.pt", {"depth": 1})


def test_half_a_state_dict_is_told_as_such(dino, tmp_path: Path) -> None:
    torch.save({key: value for key, value in dino.state.items() if "blocks.1" not in key}, tmp_path / "half.pth")
    with pytest.raises(UserError, match=r"12 missing \(blocks\.1\.norm1\.weight, .*not the same keys: fetch it again"):
        built("dino_vit_b16", tmp_path / "half.pth", dino.geometry)


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


def test_a_truncated_file_of_each_kind(clip, tmp_path: Path) -> None:
    save_file(clip.state, tmp_path / "a.safetensors")
    torchscript(clip.state, tmp_path / "a.pt")
    torch.save(clip.state, tmp_path / "a.pth")
    np.savez(tmp_path / "a.npz", **clip.state)
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt", tmp_path / "a.pth", tmp_path / "a.npz"):
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(UserError, match=rf"{path.name} cannot be read .*truncated: fetch it again"):
            read_checkpoint(path)


def test_an_npz_keeps_googles_bfloat16_and_runs_nothing(tmp_path: Path) -> None:
    values = torch.tensor([[1.5, -2.0], [0.25, 3.0]])
    halves = values.bfloat16().view(torch.int16).numpy().view("V2")
    np.savez(tmp_path / "flax.npz", half=halves, single=values.numpy(), scalar=np.float32(2))
    back = read_checkpoint(tmp_path / "flax.npz")
    assert back["half"].dtype == torch.bfloat16
    assert torch.equal(back["half"].float(), values)
    assert torch.equal(back["single"], values)
    assert back["scalar"].shape == ()
    np.savez(tmp_path / "objects.npz", tree=np.array([Path()], dtype=object))
    with pytest.raises(UserError, match=r"objects\.npz cannot be read \(ValueError: Object arrays"):
        read_checkpoint(tmp_path / "objects.npz")
