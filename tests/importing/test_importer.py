"""Every layout becomes the network that wrote it, to the last tensor; anything else is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.export.finished import finished
from fdscale.export.model_card import timm_card
from fdscale.export.parity import Report
from fdscale.export.timm_format import timm_network, write_timm
from fdscale.importing.importer import ImportReport, import_checkpoint
from fdscale.students.files import load_weights
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry, file_geometry
from fdscale.students.student import Student, build_student
from fdscale.students.swin_v2 import SwinV2

Checkpoint = Callable[..., Path]
BEIT_TIMM = "beit_base_patch16_224"


def imported(report: ImportReport) -> Student:
    student = build_student(file_geometry(report.weights)).eval()
    load_weights(student, report.weights)
    return student


@torch.no_grad()
def assert_same_tokens(report: ImportReport, network: nn.Module, images: Tensor) -> Student:
    """The imported student's tokens are those of timm's network with the checkpoint's weights."""
    student = imported(report)
    expected = network.forward_features(images)
    found = student.backbone(images)
    assert float((expected[0] - expected[1]).abs().max()) > 0.1
    assert float((found - expected.reshape(found.shape)).abs().max()) <= 1e-6
    return student


def simmim(state: dict[str, Tensor], layouts: Any, width: int) -> dict[str, Tensor]:
    """SimMIM's module: the encoder with its mask token, and a decoder to pixels."""
    state = {key: value for key, value in state.items() if not key.startswith("head.")}
    decoder = {"decoder.0.weight": torch.rand(48, width, 1, 1), "decoder.0.bias": torch.rand(48)}
    return layouts.wrapped({**state, "mask_token": torch.rand(1, 1, 16)}) | decoder


def test_simmims_swin_v2(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.swin_v2()
    file = checkpoint(simmim(layouts.original_swin(network, rpe=True), layouts, 32))
    report = import_checkpoint(file, tmp_path / "out")
    assert report.geometry == SwinV2Geometry(16, (2, 2), (2, 4), window_size=4, image_size=64)
    assert report.family == "SimMIM SwinV2"
    assert report.left_behind == {
        "optimizer": 2, "epoch": 1, "config": 1, "decoder": 2, "mask token": 1, "buffer": 4 * 2 + 2,
    }  # fmt: skip
    assert_same_tokens(report, network, layouts.images)


@pytest.mark.parametrize(
    ("changes", "geometry"),
    [
        ({}, SwinV2Geometry(16, (2, 2), (2, 4), window_size=4, image_size=64)),
        (
            {"pretrained_window_sizes": (3, 3)},
            SwinV2Geometry(16, (2, 2), (2, 4), window_size=4, image_size=64, pretrained_window_sizes=(3, 3)),
        ),
        (  # as SwinV2-B/L 12to16: the last stage's window shrinks to its map, in pre-training too
            {"window_size": 16, "pretrained_window_sizes": (12, 6)},
            SwinV2Geometry(16, (2, 2), (2, 4), window_size=16, image_size=64, pretrained_window_sizes=(12, 6)),
        ),
        ({"mlp_ratio": 2.5, "img_size": 128}, SwinV2Geometry(16, (2, 2), (2, 4), 4, 128, mlp_ratio=2.5)),
        (  # only the last window shrinks: one block a stage has no mask
            {"depths": (1, 1), "window_size": 16, "img_size": 64},
            SwinV2Geometry(16, (1, 1), (2, 4), window_size=16, image_size=64),
        ),
    ],
    ids=["plain", "3to4", "shrunk", "wide", "no masks"],
)
def test_microsofts_swin_v2(
    changes: dict[str, Any], geometry: SwinV2Geometry, layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network = layouts.swin_v2(**changes)
    report = import_checkpoint(checkpoint(layouts.original_swin(network)), tmp_path / "out")
    assert (report.geometry, report.family) == (geometry, "SwinV2")
    assert report.left_behind["head"] == 2
    size = geometry.image_size
    assert_same_tokens(report, network, torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))


def test_extra_norms_have_a_period(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = SwinV2(64, 16, (2, 6), (2, 4), 4, extra_norm_period=3).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    state = layouts.original_swin(network, rpe=True)
    assert {key for key in state if "enorm.weight" in key} == {f"layers.1.blocks.{b}.enorm.weight" for b in (2, 5)}
    report = import_checkpoint(checkpoint(layouts.wrapped(state)), tmp_path / "out")
    assert report.geometry == SwinV2Geometry(16, (2, 6), (2, 4), 4, 64, extra_norm_period=3)
    assert_same_tokens(report, network, layouts.images)


def test_extra_norms_without_a_period_are_refused(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = layouts.original_swin(SwinV2(64, 16, (2, 6), (2, 4), 4, extra_norm_period=3))
    state["layers.1.blocks.3.enorm.weight"] = torch.ones(32)
    assert "extra norms after layers.1.blocks.2, layers.1.blocks.3, layers.1.blocks.5" in refused(
        checkpoint(state), tmp_path
    )


@pytest.mark.parametrize("wrapper", ["", "SimMIM"])
@pytest.mark.parametrize(("image_size", "window"), [(64, 4), (64, 16), (32, 8)])
def test_swin_v1(
    wrapper: str, image_size: int, window: int, layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network = layouts.swin(img_size=image_size, window_size=window)
    state = layouts.original_swin(network)
    report = import_checkpoint(checkpoint(simmim(state, layouts, 32) if wrapper else state), tmp_path / "out")
    assert report.family == f"{wrapper} Swin".strip()
    numbers = {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "patch_size": 4, "mlp_ratio": 4.0}
    assert report.geometry == TimmGeometry(
        "swin_base_patch4_window7_224", image_size, {**numbers, "window_size": min(window, image_size // 4)}
    )
    images = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    assert_same_tokens(report, network, images)


def test_pretrained_beit(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.vit(use_shared_rel_pos_bias=True)
    state = layouts.original_vit(network) | {
        "mask_token": torch.rand(1, 1, 32), "lm_head.weight": torch.rand(9, 32), "lm_head.bias": torch.rand(9),
    }  # fmt: skip
    report = import_checkpoint(checkpoint(state, beit=True), tmp_path / "out")
    assert report.geometry == ViTGeometry(32, 3, 4, patch_size=16, image_size=64)
    assert report.family == "BEiT"
    assert report.left_behind == {"optimizer": 2, "epoch": 1, "args": 1, "buffer": 1, "mask token": 1, "head": 2}
    assert [note.partition(",")[0] for note in report.notes] == ["normalised with mean and std 0.5"]
    student = assert_same_tokens(report, network, layouts.images)
    assert student.mean.flatten().tolist() == student.std.flatten().tolist() == [0.5, 0.5, 0.5]


def test_fine_tuned_beit_has_a_table_per_block_and_its_norm_after_the_pooling(
    layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network = layouts.vit(use_rel_pos_bias=True, global_pool="avg", num_classes=5)
    state = layouts.original_vit(network)
    assert {"fc_norm.weight", "head.weight"} <= state.keys()
    assert "norm.weight" not in state
    report = import_checkpoint(checkpoint(state, beit=True), tmp_path / "out", ["normalisation=imagenet"])
    assert report.geometry == ViTGeometry(32, 3, 4, patch_size=16, image_size=64, position_bias="per_block")
    assert len(report.notes) == 1
    assert "fc_norm" in report.notes[0]
    network.norm = network.fc_norm  # of every token, where timm's network norms their mean
    assert imported(report).mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert_same_tokens(report, network, layouts.images)


@pytest.mark.parametrize("bias", ["use_shared_rel_pos_bias", "use_rel_pos_bias"])
def test_absolute_positions_make_it_timms(bias: str, layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.vit(use_abs_pos_emb=True, **{bias: True})
    report = import_checkpoint(checkpoint(layouts.original_vit(network)), tmp_path / "out")
    assert isinstance(report.geometry, TimmGeometry)
    assert (report.geometry.name, report.geometry.image_size) == (BEIT_TIMM, 64)
    assert report.geometry.arguments["use_abs_pos_emb"] is True
    student = assert_same_tokens(report, network, layouts.images)
    # the checkpoint is of Swin's code base, whose networks see ImageNet's statistics; timm's Beit has others
    assert student.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])


def test_heads_that_no_table_tells_are_asked_for(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.vit(use_abs_pos_emb=True)
    file = checkpoint(layouts.original_vit(network))
    assert "its tensors do not tell num_heads; add num_heads=…" in refused(file, tmp_path)
    report = import_checkpoint(file, tmp_path / "out", ["num_heads=4"])
    assert_same_tokens(report, network, layouts.images)


def test_simmims_vit(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.vit(use_shared_rel_pos_bias=True, mlp_ratio=120 / 32, patch_size=8)
    report = import_checkpoint(checkpoint(simmim(layouts.original_vit(network), layouts, 32)), tmp_path / "out")
    assert report.geometry == ViTGeometry(32, 3, 4, patch_size=8, image_size=64, mlp_ratio=3.75)
    assert (report.family, report.notes) == ("SimMIM ViT", ())
    assert_same_tokens(report, network, layouts.images)


def test_windows_that_no_buffer_tells_are_asked_for_at_once(
    layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network = layouts.swin_v2()
    buffers = ("relative_coords_table", "relative_position_index", "attn_mask")
    state = {key: value for key, value in layouts.original_swin(network).items() if not key.endswith(buffers)}
    file = checkpoint(state)
    assert "do not tell window_size and image_size; add window_size=… image_size=… as it was" in refused(file, tmp_path)
    report = import_checkpoint(file, tmp_path / "out", ["window_size=4", "image_size=64"])
    assert [note.partition(":")[0] for note in report.notes] == ["it holds no coordinates of the position bias"]
    assert_same_tokens(report, network, layouts.images)


def test_pretraining_windows_can_be_said_where_no_table_tells_them(
    layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    network = layouts.swin_v2(pretrained_window_sizes=(3, 3))
    state = {key: value for key, value in layouts.original_swin(network).items() if "relative_coords" not in key}
    file = checkpoint(state)
    assert "one whole number per stage" in refused(file, tmp_path, "pretrained_window_sizes=3")
    report = import_checkpoint(file, tmp_path / "out", ["pretrained_window_sizes=[3, 3]"])
    assert report.notes == ()
    assert_same_tokens(report, network, layouts.images)


def refused(file: Path, tmp_path: Path, *overrides: str) -> str:
    """The error's text, after checking that nothing was written."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        import_checkpoint(file, tmp_path / "out", overrides)
    assert sorted(tmp_path.rglob("*")) == before
    assert str(error.value).startswith(str(file))
    return str(error.value)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("window_size=8", "window_size=8 was given, but its tensors say 4; leave it out"),
        ("image_size=128", "image_size=128 was given, but its tensors say 64; leave it out"),
        ("window_size=x", "got window_size='x', allowed: a whole number"),
        ("window_size=true", "got window_size=True, allowed: a whole number"),
        ("windowsize=4", "nothing is called windowsize there; did you mean 'window_size'?"),
        ("pretrained_window_sizes=[3, 3]", "was given, its tables say [4, 4]"),
        ("normalisation=half", "got normalisation='half', allowed: imagenet, inception, clip"),
    ],
)
def test_overrides_that_are_wrong_or_contradict_the_file(
    override: str, told: str, layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    assert told in refused(checkpoint(layouts.original_swin(layouts.swin_v2())), tmp_path, override)


@pytest.mark.parametrize("override", ["window_size", "window_size=", "8"])
def test_an_override_is_a_pair(override: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="write key=value, such as window_size=8"):
        import_checkpoint(tmp_path / "x.pth", tmp_path / "out", [override])


def test_the_report_reads_as_a_few_lines(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = checkpoint(layouts.original_vit(layouts.vit(use_shared_rel_pos_bias=True)), beit=True)
    first, taken, behind, note = str(import_checkpoint(file, tmp_path / "out")).split("\n")
    assert first == f"BEiT -> {tmp_path / 'out' / 'student.safetensors'}"
    assert taken.startswith("taken: 51 tensors, ViTGeometry(embed_dim=32, depth=3, ")
    assert behind == "left behind: optimizer 2, epoch 1, args 1, buffer 1"
    assert note.startswith("note: normalised with mean and std 0.5")


def test_coordinates_of_another_kind_are_refused(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = layouts.original_swin(layouts.swin_v2())
    for key in [key for key in state if key.endswith("relative_coords_table")]:
        state[key] = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 7)] * 2, indexing="ij"), dim=-1)[None]
    assert "is no table of SwinV2's log-spaced coordinates" in refused(checkpoint(state), tmp_path)


def test_masks_of_another_map_are_refused(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = layouts.original_swin(layouts.swin_v2())
    state["layers.1.blocks.1.attn_mask"] = torch.zeros(9, 16, 16)
    assert "do not fit stage 1, whose 8x8 map has windows of 4 and masks (9, 16, 16)" in refused(
        checkpoint(state), tmp_path
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: s.pop("norm.weight"), "1 missing (norm.weight)"),
        (lambda s: [s.pop(k) for k in list(s) if k.startswith("layers.1.")], "of another shape (norm.bias (32,), not"),
        (
            lambda s: [s.pop(k) for k in list(s) if k.startswith("layers.1.blocks.0.mlp")],
            "4 missing (layers.1.blocks.0.mlp.fc1.bias, layers.1.blocks.0.mlp.fc1.weight, "
            "layers.1.blocks.0.mlp.fc2.bias and 1 more); nothing was written",
        ),
        (lambda s: s.update(absolute_pos_embed=torch.ones(1, 256, 16)), "1 unexpected (absolute_pos_embed)"),
        (lambda s: s.update({"layers.0.blocks.0.mlp.norm.weight": torch.ones(64)}), "1 unexpected (layers.0.blocks.0."),
        (
            lambda s: s.update({"norm.weight": torch.ones(16)}),
            "1 of another shape (norm.weight (16,), not (32,))",
        ),
        (
            lambda s: s.update({"norm.weight": torch.ones(32).int(), "norm.bias": torch.full((32,), torch.inf)}),
            "2 not of finite floating-point numbers (norm.",
        ),
        (lambda s: s.pop("layers.1.blocks.0.attn.logit_scale"), "1 missing (layers.1.blocks.0.attn.logit_scale)"),
        (lambda s: s.update({"patch_embed.proj.weight": torch.ones(3)}), "(patch_embed.proj.weight (3,), not of 4"),
    ],
)  # fmt: skip
def test_a_half_or_foreign_state_dict_is_refused_with_its_first_keys(
    change: Callable[[dict[str, Tensor]], object], told: str, layouts: Any, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    state = layouts.original_swin(layouts.swin_v2())
    change(state)
    assert told in refused(checkpoint(state), tmp_path)


def test_all_kinds_are_listed_at_once(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    state = layouts.original_vit(layouts.vit(use_shared_rel_pos_bias=True))
    state = {key.replace("gamma", "layer_scale") if "blocks.1" in key else key: value for key, value in state.items()}
    state["cls_token"] = torch.ones(1, 2, 32)
    text = refused(checkpoint(layouts.wrapped(state)), tmp_path)
    assert (
        "is not a whole checkpoint of the ViT that it looks like: 2 missing (blocks.1.gamma_1, blocks.1.gamma_2)"
        in text
    )
    assert "2 unexpected (blocks.1.layer_scale_1, blocks.1.layer_scale_2)" in text
    assert "1 of another shape (cls_token (1, 2, 32), not (1, 1, 32))" in text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"model": {"cls_token": torch.ones(1), "blocks.0.attn.qkv.weight": torch.ones(1),
                    "blocks.0.attn.qkv.bias": torch.ones(1)}}, "its first keys are cls_token, blocks.0.attn.qkv"),
        ({"visual.proj": torch.ones(1), "visual.conv1.weight": torch.ones(1)}, "are visual.proj, visual.conv1.weight"),
        ({"student": {"a": torch.ones(1)}, "teacher": {}, "epoch": 3}, "holds no tensors but student, teacher, epoch"),
        ([1, 2], "holds no state dict but [1, 2]"),
        ({"model": {}}, "holds no tensors but"),
    ],
    ids=["deit", "clip", "esvit", "list", "empty"],
)  # fmt: skip
def test_other_files_are_refused(content: Any, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pth")
    text = refused(tmp_path / "other.pth", tmp_path)
    assert told in text
    assert "feature distillation, SimMIM, Swin, SwinV2, BEiT and CLIP" in text


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.95])
def test_a_truncated_download_is_refused(kept: float, layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    file = checkpoint(layouts.original_swin(layouts.swin_v2()))
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert "cannot be read" in refused(file, tmp_path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert "no such file" in refused(tmp_path / "nowhere.pth", tmp_path)


def test_a_taken_output_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").touch()
    with pytest.raises(UserError, match="out: exists and is not an empty folder"):
        import_checkpoint(tmp_path / "nowhere.pth", tmp_path / "out")


def test_tensors_that_share_memory_are_stored_apart(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.vit(use_rel_pos_bias=True)
    state = layouts.original_vit(network)
    tables = [key for key in state if key.endswith("bias_table")]
    state |= dict.fromkeys(tables, state[tables[0]])
    report = import_checkpoint(checkpoint(state), tmp_path / "out")
    stored = load_file(report.weights)
    assert all(torch.equal(stored[key], state[tables[0]]) for key in tables)


def test_a_safetensors_file_and_timms_own_names_will_do(layouts: Any, tmp_path: Path) -> None:
    network = layouts.swin_v2()
    buffers = {name: value for name, value in network.named_buffers() if not name.endswith("k_bias")}
    state = {key: value for key, value in network.state_dict().items() if not key.startswith("head.")}
    save_file({key: value.contiguous() for key, value in (state | buffers).items()}, tmp_path / "model.safetensors")
    report = import_checkpoint(tmp_path / "model.safetensors", tmp_path / "out")
    assert_same_tokens(report, network, layouts.images)


def test_what_was_imported_can_be_exported(layouts: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    network = layouts.swin_v2(pretrained_window_sizes=(3, 3))
    report = import_checkpoint(checkpoint(layouts.original_swin(network)), tmp_path / "out")
    student, folder = finished(report.weights.parent), tmp_path / "export"
    folder.mkdir()
    config = write_timm(student, timm_network(student), folder)
    card = timm_card(student, config, Report("timm", "", [], [], [], {}), folder.name)
    assert "brought into timm's names by fdscale and trained by others" in card
    assert "feature-distillation" not in card
    with torch.no_grad():
        again = timm.create_model(f"local-dir:{folder}", pretrained=True).eval().forward_features(layouts.images)
        assert float((again - network.forward_features(layouts.images)).abs().max()) <= 1e-6
    assert json.loads((folder / "config.json").read_text())["model_args"]["pretrained_window_sizes"] == [3, 3]
