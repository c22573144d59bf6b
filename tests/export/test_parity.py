"""Exported folders, read where fdscale cannot be imported, give what fdscale gives."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fdscale.build.networks import as_pixels
from fdscale.cli import main
from fdscale.export import reader, timm_format, transformers_format
from fdscale.export.finished import finished
from fdscale.export.own_outputs import sizes_of
from fdscale.export.parity import Report, Row, order, prepared
from fdscale.students.geometry import STUDENTS as NAMED
from fdscale.students.geometry import SwinV2Geometry, TimmGeometry, ViTGeometry

VIT = ViTGeometry(embed_dim=32, depth=3, num_heads=4, patch_size=8, image_size=32)
PER_BLOCK = dataclasses.replace(VIT, position_bias="per_block")
SWIN = SwinV2Geometry(16, (2, 2), (1, 2), window_size=4, image_size=32)
EXTRA_NORMS = dataclasses.replace(SWIN, depths=(2, 3), extra_norm_period=3)
OTHER_WINDOWS = dataclasses.replace(SWIN, pretrained_window_sizes=(3, 2))
TIMM_SWIN = {"embed_dim": 16, "depths": (1, 2), "num_heads": (2, 4), "window_size": 4}
BOTH = {  # name: its geometry, and a classifier's norm
    "vit": (VIT, None),
    "vit_per_block": (PER_BLOCK, None),
    "swin_v2": (SWIN, None),
    "swin_v2_extra_norms": (EXTRA_NORMS, None),
    "swin_v2_other_windows": (OTHER_WINDOWS, None),
    "vit_classifier": (PER_BLOCK, "after_pooling"),
    "swin_v2_classifier": (SWIN, "student"),
    "swin_v2_extra_norms_classifier": (EXTRA_NORMS, "student"),
}
TIMM_ALONE = {
    # windows that are wider than the last stages' maps
    "swin_v2_wide_window": (dataclasses.replace(SWIN, window_size=8), None),
    "swin_v2_period_beyond_depth": (dataclasses.replace(SWIN, extra_norm_period=6), None),
    "swin_v2_extra_norms_and_windows": (dataclasses.replace(OTHER_WINDOWS, extra_norm_period=2), None),
    "timm_vit": (TimmGeometry("test_vit", image_size=64), None),
    "timm_vit_classifier": (TimmGeometry("test_vit", image_size=64), "student"),
    "timm_keywords": (TimmGeometry("swin_tiny_patch4_window7_224", 64, TIMM_SWIN), None),
    "timm_convnet_of_another_size": (TimmGeometry("test_convnext.r160_in1k", image_size=64), None),
    "vit_classifier_norm_first": (VIT, "student"),
}
STUDENTS = BOTH | TIMM_ALONE
EXPORTS = [(name, "timm") for name in STUDENTS] + [(name, "transformers") for name in BOTH]

# The parity check's own reader, then each model card's own snippet, in one process that cannot import fdscale.
READER = """
import os, runpy, sys
from pathlib import Path

reader = runpy.run_path(sys.argv[1])
sys.meta_path.insert(0, reader["_NoFdscale"]())
for work in sys.argv[2:]:
    reader["_read"](Path(work))
    os.chdir(Path(work) / "export")
    card = open(f"{Path(work).name}/README.draft.md").read()
    scope = {}
    exec(card.split("```python")[1].split("```")[0], scope)
    Path(work, "snippet").write_text(str(tuple(scope.get("tokens", scope.get("logits")).shape)))
assert "fdscale" not in sys.modules
"""


@pytest.fixture(scope="module")
def exports(tmp_path_factory, completed_run, completed_finetuning):
    """Every student exported in each format and read by one process without fdscale: (name, format) -> what came."""
    place, made = tmp_path_factory.mktemp("exports"), {}
    for name, (geometry, norm) in STUDENTS.items():
        run = place / "runs" / name
        module = completed_run(geometry, run) if norm is None else completed_finetuning(geometry, run, norm)
        sizes = sizes_of(geometry)  # three of them are enough here
        check = prepared(finished(run), place / "prepared" / name, list(dict.fromkeys([*sizes[:2], sizes[-1]])))
        for format in ("timm", "transformers") if name in BOTH else ("timm",):
            made[name, format] = (module, *written(check, format, place / f"{name}-{format}"))
    works = [str(check.work) for _, check, _, _ in made.values()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules")}
    command = [sys.executable, "-I", "-B", "-c", READER, reader.__file__, *works]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    return made


def written(check, format, work):
    """An export without its report, beside the images for its reader: (check, folder, report's maker)."""
    folder = work / "export" / work.name
    folder.mkdir(parents=True)
    for file in check.work.iterdir():
        os.link(file, work / file.name)
    student, check = check.student, dataclasses.replace(check, work=work)
    draft = Report(format, "images", [], [], [], {})
    if format == "timm":
        config = timm_format.write_timm(student, timm_format.timm_network(student), folder)
        timm_format.finish_timm(student, config, draft, folder)
        exact = timm_format.same_everywhere
    else:
        transformers_format.write_transformers(student, folder)
        transformers_format.finish_transformers(student, draft, folder)

        def exact(size):
            return transformers_format.is_exact(student, size)

    (folder / "README.md").rename(folder / "README.draft.md")
    order(work, format, folder)
    return check, folder, exact


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_the_outputs_are_equal_where_fdscale_is_absent(exports, name, format):
    _, check, _, exact = exports[name, format]
    report = check.compare(format, exact)
    expected = load_file(check.work / "expected.safetensors")
    assert all(batch.std() > 0.01 for batch in expected.values())
    assert all(batch[0].sub(batch[1]).abs().max() > 1e-3 * batch.abs().max() for batch in expected.values())
    assert report.problems() == []
    assert all(row.relative <= 2e-6 for row in report.rows if row.exact)
    assert len(report.rows) == (1 if name.startswith("timm") and "convn" not in name else 3)


@pytest.mark.parametrize("name", [name for name, (_, norm) in STUDENTS.items() if norm])
def test_logits_are_those_of_the_classifier_that_was_trained(exports, name):
    classifier, check, _, _ = exports[name, "timm"]
    size = classifier.student.image_size
    images, expected = (load_file(check.work / f"{file}.safetensors") for file in ("images", "expected"))
    with torch.no_grad():
        logits = classifier.logits(as_pixels(images[f"{size}x{size}"]))
    torch.testing.assert_close(expected[f"{size}x{size}"], logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_the_cards_own_snippet_runs(exports, name, format):
    module, check, _, _ = exports[name, format]
    shape = eval((check.work / "snippet").read_text())
    assert shape[-1] == (module.width if STUDENTS[name][1] is None else 10) or shape[1] == module.width


@pytest.mark.parametrize("name", ["vit", "vit_per_block", "swin_v2"])
def test_sizes_that_are_said_to_be_approximate_are(exports, name):
    _, check, _, exact = exports[name, "transformers"]
    rows = check.compare("transformers", exact).rows
    assert {row.exact for row in rows} == {True, False}
    assert all(1e-4 < row.relative < 0.5 for row in rows if not row.exact)


@pytest.mark.parametrize(("name", "format"), EXPORTS)
def test_only_extra_norms_bring_a_model_file(exports, name, format):
    files = {path.name for path in exports[name, format][2].iterdir()}
    own_file = "fd_swin_v2.py" if format == "timm" else "modeling_fd_swin_v2.py"
    processor = set() if format == "timm" else {"preprocessor_config.json"}
    own = {own_file} if name.startswith("swin_v2_extra_norms") else set()
    assert files == {"model.safetensors", "config.json", "parity.json", "README.draft.md"} | own | processor


@pytest.mark.parametrize("name", ["vit", "swin_v2", "vit_classifier"])
def test_timm_puts_a_new_head_on_it_and_knows_the_input(exports, name):
    folder, size = exports[name, "timm"][2], STUDENTS[name][0].image_size
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=7)
    assert model(torch.rand(1, 3, size, size)).shape == (1, 7)
    data = timm.data.resolve_model_data_config(model)
    assert tuple(data["mean"]) == (0.485, 0.456, 0.406)
    assert tuple(data["std"]) == (0.229, 0.224, 0.225)
    assert (data["input_size"], data["interpolation"], data["crop_pct"]) == ((3, size, size), "bicubic", 0.875)


def test_stock_timm_refuses_extra_norms_instead_of_dropping_them(exports):
    with pytest.raises(RuntimeError, match="Unknown model"):
        timm.create_model(f"local-dir:{exports['swin_v2_extra_norms', 'timm'][2]}", pretrained=True)


def test_the_weights_of_a_student_are_not_touched(exports):
    _, check, folder, _ = exports["swin_v2_extra_norms", "timm"]
    assert (folder / "model.safetensors").read_bytes() == check.student.weights.read_bytes()


def test_the_model_card_tells_the_origin_without_anyones_folders(exports):
    card = (exports["vit", "timm"][2] / "README.draft.md").read_text()
    assert "distilled from the features of `clip_vit_b16` (weights `ViT-B-16.pt`)" in card
    assert "300 epochs, global batch 2048, seed 3" in card
    assert "[0.485, 0.456, 0.406]" in card
    assert "| patch_size | 8 |" in card
    assert "/secret" not in card
    card = (exports["vit_classifier", "transformers"][2] / "README.draft.md").read_text()
    assert "A classifier of 10 classes trained with fdscale. `vit_s16`, fine-tuned with labels of 10 classes" in card


def test_the_image_processor_evaluates_as_we_do(exports):
    stored = json.loads((exports["vit", "transformers"][2] / "preprocessor_config.json").read_text())
    assert (stored["size"], stored["crop_size"]) == ({"shortest_edge": 36}, {"height": 32, "width": 32})
    assert stored["resample"] == 3  # bicubic


@pytest.mark.parametrize("change", ["outputs", "missing", "unexpected"])
def test_what_does_not_agree_is_a_problem(exports, tmp_path, change):
    check = exports["swin_v2", "timm"][1]
    for file in check.work.glob("*.safetensors"):
        os.link(file, tmp_path / file.name)
    outputs = load_file(check.work / "outputs.safetensors")
    keys = {"missing": [], "unexpected": []} | ({change: ["norm.weight"]} if change != "outputs" else {})
    if change == "outputs":
        outputs["32x32"][0, 0] += 0.01
        (tmp_path / "outputs.safetensors").unlink()
        save_file(outputs, tmp_path / "outputs.safetensors")
    (tmp_path / "keys.json").write_text(json.dumps(keys))
    (problem,) = dataclasses.replace(check, work=tmp_path).compare("timm", timm_format.same_everywhere).problems()
    told = {"outputs": "outputs at 32x32 differ by", "missing": "1 missing keys (norm.weight)"}
    assert told.get(change, "1 unexpected keys (norm.weight)") in problem


@pytest.mark.parametrize("geometry", [VIT, SWIN, *NAMED.values()])
def test_at_least_five_sizes_fit_a_students_grid(geometry):
    sizes = sizes_of(geometry)
    assert sizes[0] == (geometry.image_size, geometry.image_size)
    assert len(set(sizes)) == len(sizes) == 6
    assert all(side % geometry.stride == 0 and side > 0 for size in sizes for side in size)
    assert sizes[-1][0] != sizes[-1][1]


def test_outputs_that_are_not_numbers_do_not_pass():
    row = Row("64x64", True, float("nan"), float("nan"))
    assert Report("timm", "images", [], [], [row], {}).problems() != []


def test_the_command_writes_the_report_and_shows_it_in_the_card(completed_finetuning, tmp_path, capsys):
    completed_finetuning(VIT, tmp_path / "run", "after_pooling")
    output = tmp_path / "deeper" / "export"
    output.mkdir(parents=True)  # an empty folder is filled
    assert main(["export", str(tmp_path / "run" / "student.safetensors"), "--output", str(output)]) == 0
    assert f"exported to {output}" in capsys.readouterr().out
    report = json.loads((output / "parity.json").read_text())
    assert (report["missing_keys"], report["unexpected_keys"]) == ([], [])
    card = (output / "README.md").read_text()
    assert all(f"| {row['size']} | {row['absolute']:.1e} |" in card for row in report["rows"])
    assert sorted(path.name for path in Path(output).parent.iterdir()) == ["export"]
