"""A student file carries a student whole, and nothing else is taken for it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fdscale.config.errors import UserError
from fdscale.students.files import load_weights, new_folder, save_student
from fdscale.students.geometry import Geometry, SwinV2Geometry, TimmGeometry, ViTGeometry, file_geometry
from fdscale.students.student import Student, build_student

Perturb = Callable[[nn.Module], None]
SWIN = SwinV2Geometry(16, (1, 2), (2, 4), window_size=4, image_size=32, extra_norm_period=2)
VIT = ViTGeometry(16, 2, 2, patch_size=8, image_size=32)
PER_BLOCK = dataclasses.replace(VIT, position_bias="per_block")
OTHER_WINDOWS = dataclasses.replace(SWIN, pretrained_window_sizes=(3, 2))
BEIT = TimmGeometry("beit_base_patch16_224", 32, {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.5})
PIXELS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def saved(student: Student, folder: Path) -> Path:
    return save_student(student, student.backbone.state_dict(), folder)


@pytest.mark.parametrize(
    "geometry",
    [SWIN, VIT, PER_BLOCK, OTHER_WINDOWS, TimmGeometry("vit_tiny_patch16_224", 32), BEIT],
    ids=["swin_v2", "vit", "per block", "other windows", "timm", "keywords"],
)
def test_a_student_comes_back_as_it_was(geometry: Geometry, tmp_path: Path, perturbed: Perturb) -> None:
    student = build_student(geometry, seed=1).eval()
    perturbed(student)
    path = saved(student, tmp_path / "new" / "folder")
    assert path == tmp_path / "new" / "folder" / "student.safetensors"
    assert file_geometry(path) == geometry
    other = build_student(file_geometry(path), seed=2).eval()
    assert not torch.allclose(other(PIXELS), student(PIXELS))
    load_weights(other, path)
    assert torch.equal(other(PIXELS), student(PIXELS))


def test_what_stands_beside_the_weights(tmp_path: Path) -> None:
    student = Student(build_student(VIT).backbone, 16, (4, 4), 1, 32, VIT, mean=(0.5, 0.25, 0.125), std=(1.0, 2.0, 4.0))
    described = json.loads(saved(student, tmp_path).with_suffix(".json").read_text())
    assert described["geometry"]["family"] == "vit"
    assert (described["mean"], described["std"]) == ([0.5, 0.25, 0.125], [1.0, 2.0, 4.0])


def test_tensors_are_stored_as_they_are(tmp_path: Path) -> None:
    """Such as the counters of batch norms, which are whole numbers; transposed ones are laid out anew."""
    state = {"count": torch.tensor(7), "weight": torch.rand(3, 2).T}
    stored = load_file(save_student(build_student(VIT), state, tmp_path))
    assert (stored["count"].dtype, int(stored["count"])) == (torch.int64, 7)
    assert torch.equal(stored["weight"], state["weight"])


def test_of_a_network_of_ones_own_the_weights_alone_are_written(tmp_path: Path) -> None:
    backbone = nn.Linear(4, 4)
    path = saved(Student(backbone, width=4, grid=(2, 2), prefix_tokens=0, image_size=2), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["student.safetensors"]
    other = Student(nn.Linear(4, 4), width=4, grid=(2, 2), prefix_tokens=0, image_size=2)
    load_weights(other, path)
    assert torch.equal(other.backbone.weight, backbone.weight)


def test_a_shared_table_fills_every_block(tmp_path: Path, perturbed: Perturb) -> None:
    student = build_student(VIT, seed=1).eval()
    perturbed(student)
    path = saved(student, tmp_path)
    fine_tuned = build_student(PER_BLOCK, seed=2).eval()
    load_weights(fine_tuned, path)
    table = student.backbone.rel_pos_bias.relative_position_bias_table
    assert float(table.detach().abs().max()) > 0.01
    for block in fine_tuned.backbone.blocks:
        assert torch.equal(block.attn.relative_position_bias_table, table)
    assert torch.allclose(fine_tuned(PIXELS), student(PIXELS), atol=1e-6)
    with torch.no_grad():  # untied: one learns without the other
        fine_tuned.backbone.blocks[0].attn.relative_position_bias_table.zero_()
    assert torch.equal(fine_tuned.backbone.blocks[1].attn.relative_position_bias_table, table)


@pytest.mark.parametrize(
    ("held", "wanted", "told"),
    [
        (PER_BLOCK, VIT, "missing ['rel_pos_bias.relative_position_bias_table']"),
        (
            dataclasses.replace(VIT, image_size=64),
            PER_BLOCK,
            "of another shape ['blocks.0.attn.relative_position_bias_table'",
        ),
        (dataclasses.replace(VIT, depth=3), PER_BLOCK, "unexpected ['blocks.2.attn.proj.bias'"),
    ],
    ids=["back to a shared one", "another grid", "another depth"],
)
def test_tables_are_copied_and_nothing_else_is_forgiven(
    held: ViTGeometry, wanted: ViTGeometry, told: str, tmp_path: Path
) -> None:
    path = saved(build_student(held), tmp_path)
    with pytest.raises(UserError) as error:
        load_weights(build_student(wanted), path)
    assert told in str(error.value)


def test_the_input_normalisation_comes_with_the_weights(tmp_path: Path) -> None:
    half = Student(build_student(VIT).backbone, 16, (4, 4), 1, 32, VIT, mean=(0.5, 0.5, 0.5), std=(0.5, 0.25, 0.5))
    student = build_student(VIT)
    load_weights(student, saved(half, tmp_path))
    assert student.mean.shape == student.std.shape == (1, 3, 1, 1)
    assert student.mean.flatten().tolist() == [0.5, 0.5, 0.5]
    assert student.std.flatten().tolist() == [0.5, 0.25, 0.5]


def test_a_source_is_told_beside_the_weights(tmp_path: Path) -> None:
    student = build_student(VIT)
    path = save_student(student, student.backbone.state_dict(), tmp_path, {"file": "a.pth", "sha256": "0"})
    assert json.loads(path.with_suffix(".json").read_text())["source"] == {"file": "a.pth", "sha256": "0"}
    assert file_geometry(path) == VIT


def test_a_new_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    output = tmp_path / "deeper" / "output"
    with pytest.raises(FileNotFoundError), new_folder(output) as folder:
        (folder / "file").rename(folder / "half")
    assert list(output.parent.iterdir()) == []
    output.mkdir()
    with new_folder(output) as folder:
        (folder / "whole").touch()
        assert not (output / "whole").exists()
    assert [path.name for path in output.iterdir()] == ["whole"]
    assert list(output.parent.iterdir()) == [output]
    with pytest.raises(UserError, match="output: exists and is not an empty folder"), new_folder(output):
        pytest.fail("it was taken")


def changed(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = load_file(path)
    change(state)
    save_file(state, path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda state: state.pop("cls_token"), "missing ['cls_token'], unexpected [], of another shape []"),
        (lambda state: state.update(head=torch.ones(3)), "missing [], unexpected ['head'], of another shape []"),
        (lambda state: state.update(cls_token=torch.ones(1, 1, 8)), "unexpected [], of another shape ['cls_token']"),
        (
            lambda state: [state.update({f"encoder.{name}": state.pop(name)}) for name in list(state)],
            "missing ['blocks.0.attn.proj.bias', 'blocks.0.attn.proj.weight', 'blocks.0.attn.q_bias'], "
            "unexpected ['encoder.blocks.0.attn.proj.bias', ",
        ),
    ],
    ids=["missing", "unexpected", "shape", "prefix"],
)
def test_other_weights_are_refused_and_the_student_stays(
    change: Callable[[dict[str, Tensor]], object], told: str, tmp_path: Path
) -> None:
    path = saved(build_student(VIT, seed=1), tmp_path)
    changed(path, change)
    student = build_student(VIT, seed=2)
    before = {name: tensor.clone() for name, tensor in student.backbone.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(student, path)
    assert str(error.value).startswith(f"{path}: not the weights of this student: ")
    assert told in str(error.value)
    assert str(error.value).endswith("its geometry is in student.json")
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.backbone.state_dict().items())


@pytest.mark.parametrize("harm", ["absent", "empty", "cut", "another format"])
def test_a_damaged_file_is_refused_by_its_path(harm: str, tmp_path: Path) -> None:
    path = saved(build_student(VIT), tmp_path)
    content = path.read_bytes()
    if harm == "absent":
        path.unlink()
    else:
        path.write_bytes({"empty": b"", "cut": content[:-10], "another format": b"PK\x03\x04" * 50}[harm])
    with pytest.raises(UserError, match=r"student\.safetensors: not a readable student file: "):
        load_weights(build_student(VIT), path)
