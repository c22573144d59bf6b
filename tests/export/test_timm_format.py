from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from fdscale.config.errors import UserError
from fdscale.export.timm_format import export_timm
from fdscale.students.geometry import ViTGeometry

VIT = ViTGeometry(embed_dim=32, depth=3, num_heads=4, patch_size=8, image_size=32)


@pytest.fixture
def run(tmp_path, completed_run):
    completed_run(VIT, tmp_path / "run")
    return tmp_path / "run"


def refused(source: Path, output: Path) -> str:
    """The error's text, after checking that nothing was written."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        export_timm(source, output)
    assert sorted(output.parent.rglob("*")) == before
    return str(error.value)


def test_an_output_that_holds_something_is_refused(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    assert "taken: exists and is not an empty folder" in refused(run, tmp_path / "taken")
    (tmp_path / "file").touch()
    assert "file: exists and is not an empty folder" in refused(run, tmp_path / "file")


@pytest.mark.parametrize("missing", ["complete.json", "student.safetensors"])
def test_a_run_that_is_not_complete_is_refused(run, tmp_path, missing):
    (run / missing).unlink()
    assert "not a completed run" in refused(run, tmp_path / "export")


def test_a_source_that_is_not_there_is_refused(tmp_path):
    assert "no such run directory" in refused(tmp_path / "nowhere", tmp_path / "export")


def test_keys_that_are_not_the_networks_are_refused(run, tmp_path):
    state = load_file(run / "student.safetensors")
    state["blocks.9.norm1.weight"] = state.pop("blocks.0.norm1.weight")
    state["norm.weight"] = state["norm.weight"][:8].clone()
    save_file(state, run / "student.safetensors")
    text = refused(run, tmp_path / "export")
    assert "1 missing (blocks.0.norm1.weight)" in text
    assert "1 unexpected (blocks.9.norm1.weight)" in text
    assert "1 of another shape (norm.weight)" in text


def test_a_file_that_is_no_safetensors_is_refused(run, tmp_path):
    (run / "student.safetensors").write_bytes(b"not weights")
    assert "not a readable student file" in refused(run, tmp_path / "export")
