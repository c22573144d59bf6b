from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fdscale.config.errors import UserError
from fdscale.export.timm_format import export_timm
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry

GEOMETRIES = {
    "vit": ViTGeometry(embed_dim=32, depth=3, num_heads=4, patch_size=8, image_size=32),
    "swin_v2": SwinV2Geometry(16, (2, 2, 2, 2), (1, 2, 4, 8), window_size=4, image_size=64),
    # windows that are wider than the last stages' maps
    "swin_v2_wide_window": SwinV2Geometry(16, (2, 2), (1, 2), window_size=16, image_size=64),
    "swin_v2_extra_norms": SwinV2Geometry(
        16, (2, 2, 6, 2), (1, 2, 4, 8), window_size=4, image_size=64, extra_norm_period=3
    ),
    "swin_v2_period_beyond_depth": SwinV2Geometry(
        16, (2, 2), (1, 2), window_size=4, image_size=32, extra_norm_period=6
    ),
    "vit_per_block": ViTGeometry(32, 3, 4, patch_size=8, image_size=32, position_bias="per_block"),
    "swin_v2_other_windows": SwinV2Geometry(16, (2, 2), (1, 2), 4, 64, pretrained_window_sizes=(3, 2)),
    "swin_v2_extra_norms_and_windows": SwinV2Geometry(
        16, (2, 2), (1, 2), 4, 64, extra_norm_period=2, pretrained_window_sizes=(3, 2)
    ),
    "timm_vit": TimmGeometry("test_vit", image_size=64),
    "timm_keywords": TimmGeometry(
        "swin_tiny_patch4_window7_224",
        64,
        {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4},
    ),
    "timm_convnet_of_another_size": TimmGeometry("test_convnext", image_size=64),
    "timm_convnext": TimmGeometry("test_convnext.r160_in1k"),
}

# Runs each model card's own snippet, then the saved images through its model; fdscale cannot be imported.
READER = """
import sys

class NoFdscale:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "fdscale":
            raise ImportError("fdscale is not installed here")

sys.meta_path.insert(0, NoFdscale())
import torch
from safetensors.torch import load_file, save_file

for name in sys.argv[1:]:
    card = open(f"{name}/README.md").read()
    scope = {}
    exec(card.split("```python")[1].split("```")[0], scope)
    call = scope["model"] if "= model(" in card else scope["model"].forward_features
    with torch.no_grad():
        tokens = call(load_file(f"{name}.images")["images"])
    save_file({"tokens": tokens.contiguous(), "of_snippet": scope["tokens"].contiguous()}, f"{name}.tokens")
assert "fdscale" not in sys.modules
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory, completed_run):
    """Every geometry exported and read by one process without fdscale: name -> (folder, expected tokens)."""
    place = tmp_path_factory.mktemp("exports")
    expected = {}
    for name, geometry in GEOMETRIES.items():
        student = completed_run(geometry, place / "runs" / name)
        config = json.loads((export_timm(place / "runs" / name, place / name) / "config.json").read_text())
        pixels = torch.rand(2, *config["pretrained_cfg"]["input_size"])
        with torch.no_grad():
            expected[name] = student(pixels)
        save_file({"images": (pixels - student.mean) / student.std}, place / f"{name}.images")
    command = [sys.executable, "-I", "-B", "-c", READER, *GEOMETRIES]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    return {name: (place / name, tokens) for name, tokens in expected.items()}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_the_tokens_are_equal_where_fdscale_is_absent(exports, name):
    folder, expected = exports[name]
    tokens = load_file(folder.with_suffix(".tokens"))["tokens"]
    if tokens.ndim == 4:  # a map, channels last or (convnets) first
        channels_last = tokens.shape[-1] == expected.shape[-1]
        tokens = tokens.flatten(1, 2) if channels_last else tokens.flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    assert expected[0].sub(expected[1]).abs().max() > 0.01
    torch.testing.assert_close(tokens, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_only_extra_norms_bring_a_model_file(exports, name):
    files = {path.name for path in exports[name][0].iterdir()}
    own_file = {"fd_swin_v2.py"} if name.startswith("swin_v2_extra_norms") else set()
    assert files == {"model.safetensors", "config.json", "README.md"} | own_file


@pytest.mark.parametrize("name", ["vit", "swin_v2"])
def test_timm_puts_a_new_head_on_it_and_knows_the_input(exports, name):
    model = timm.create_model(f"local-dir:{exports[name][0]}", pretrained=True, num_classes=10)
    size = GEOMETRIES[name].image_size
    assert model(torch.rand(1, 3, size, size)).shape == (1, 10)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == (
        (3, size, size),
        "bicubic",
        0.875,
    )


def test_stock_timm_refuses_extra_norms_instead_of_dropping_them(exports):
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{exports['swin_v2_extra_norms'][0]}", pretrained=True)


def test_the_weights_are_not_touched(exports):
    folder, _ = exports["swin_v2_extra_norms"]
    run = folder.parent / "runs" / folder.name
    assert (folder / "model.safetensors").read_bytes() == (run / "student.safetensors").read_bytes()


def test_the_model_card_tells_the_origin_without_anyones_folders(exports):
    card = (exports["vit"][0] / "README.md").read_text()
    assert "distilled from the features of `clip_vit_b16` (weights `ViT-B-16.pt`)" in card
    assert "300 epochs, global batch 2048, seed 3" in card
    assert "[0.485, 0.456, 0.406]" in card
    assert "| patch_size | 8 |" in card
    assert "/secret" not in card


@pytest.fixture
def run(tmp_path, completed_run):
    completed_run(GEOMETRIES["vit"], tmp_path / "run")
    return tmp_path / "run"


def refused(source: Path, output: Path) -> str:
    """The error's text, after checking that nothing was written."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        export_timm(source, output)
    assert sorted(output.parent.rglob("*")) == before
    return str(error.value)


def test_a_student_file_on_its_own_will_do(run):
    (run / "recipe.toml").unlink()
    (run / "complete.json").unlink()
    folder = export_timm(run / "student.safetensors", run / "deeper" / "export")
    assert "recipe was not found" in (folder / "README.md").read_text()


def test_an_empty_output_folder_is_filled(run):
    (run / "export").mkdir()
    assert (export_timm(run, run / "export") / "config.json").is_file()


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
