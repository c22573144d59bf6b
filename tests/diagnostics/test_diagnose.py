"""`fdscale diagnose` on real shards and tiny networks of each kind, alone and side by side, whole and broken."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fdscale.cli import main
from fdscale.config.errors import SettingsError
from fdscale.data.index import load_index
from fdscale.diagnostics import diagnose as module
from fdscale.diagnostics.diagnose import Found, Preset, diagnose, draw_page, measure, read_numbers, write_numbers
from fdscale.diagnostics.lines import LandscapePlan
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject
from fdscale.students.geometry import ViTGeometry
from fdscale.students.student import Student, build_student
from tests.diagnostics.networks import subject_of

Saved = Callable[..., Student]
TIMM = "timm:test_vit=random"
ATTENTION = {"attention_distance", "attention_entropy", "attention_information", "head_similarity"}
MAPS = {"attention_diagonality", "attention_column_share", "attention_offset_share"}
FEATURES, LANDSCAPE = {"feature_rank", "token_similarity"}, {"landscape_loss", "landscape_accuracy", "sharpness"}
EVERYTHING = ATTENTION | MAPS | FEATURES | LANDSCAPE
TINY = Preset(10, 6, LandscapePlan(directions=2, points=3))


def measured(rows: Sequence[Measurement], model: str) -> set[str]:
    return {row.measure for row in rows if row.model == model and row.value is not None}


def look(digits: Path, *subjects: Subject, preset: Preset = TINY, only: Sequence[str] = module.PARTS) -> Found:
    return measure(subjects, load_index(digits), preset, only, batch=5, workers=0)


@pytest.fixture(scope="module")
def folder(digits: Path, saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command leaves of a run with a classifier, of a SwinV2's file, and of a timm network."""
    runs = tmp_path_factory.mktemp("runs")
    saved(runs / "tuned", "beit", classes=10)
    saved(runs / "swin", "swin_v2")
    models = [str(runs / "tuned"), str(runs / "swin" / "student.safetensors"), TIMM]
    output = runs / "output"
    asked = [
        *models,
        "--data",
        str(digits),
        "--output",
        str(output),
        "--images",
        "10",
        "--batch",
        "5",
        "--workers",
        "0",
    ]
    assert main(["diagnose", *asked]) == 0
    return output


def test_every_kind_of_model_is_measured_in_full(folder: Path) -> None:
    found, about = read_numbers(folder)
    assert list(about["models"]) == ["tuned", "swin", "test_vit (random)"]
    for model in about["models"]:
        assert measured(found.rows, model) >= EVERYTHING
    assert {row.images for row in found.rows} == {10, 8}  # as they pass, of the landscape
    assert {(row.model, row.other) for row in found.rows if row.measure == "cka"} == {
        ("tuned", "tuned"),
        ("tuned", "swin"),
        ("tuned", "test_vit (random)"),
    }
    assert [row for row in found.rows if row.value is None] == []


def test_every_number_is_json(folder: Path) -> None:
    lines = (folder / "measurements.jsonl").read_text().splitlines()
    assert all(json.loads(line, parse_constant=pytest.fail) for line in lines)


def test_shards_behind_a_url_are_fetched_and_seen_alike(digits: Path, tmp_path: Path) -> None:
    found = []
    for number, data in enumerate([[str(digits)], [digits.as_uri(), "--cache", str(tmp_path / "cache")]]):
        output = tmp_path / str(number)
        asked = [TIMM, "--data", *data, "--output", str(output), "--images", "4", "--workers", "0"]
        assert main(["diagnose", *asked, "--only", "features"]) == 0
        found.append((output / "measurements.jsonl").read_bytes())
    assert found[0] == found[1]


def test_the_figures_and_the_page_are_there(folder: Path) -> None:
    names = {path.stem for path in (folder / "figures").iterdir()}
    assert names == {
        "attention_distance",
        "head_similarity",
        "attention_maps",
        "attention_shape",
        "attention_information",
        "landscape",
        "features",
        "alignment",
    }
    page = (folder / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(names)
    assert "10 of 449 images of" in page
    assert "the landscape on 8 of them" in page
    assert all(f"<td>{head}</td>" in page for head in ("its own head", "head fitted to these images"))
    drawn = (folder / "figures" / "landscape.svg").read_text()
    assert all(f"<!-- {name} -->" in drawn for name in ("tuned (its own head)", "swin (head fitted to these images)"))


def test_the_page_is_drawn_from_the_files_alone(digits: Path, tmp_path: Path) -> None:
    write_numbers(look(digits, subject_of("beit"), only=["features"]), tmp_path / "first", {"told": "ten images"})
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for name in ("first", "second"):
        draw_page(tmp_path / name)
    first, second = ((tmp_path / name / "index.html").read_text() for name in ("first", "second"))
    assert first == second
    assert "ten images" in first


def test_rows_and_maps_are_read_back(tmp_path: Path, digits: Path) -> None:
    found = look(digits, subject_of("swin_v2"), only=["attention"])
    write_numbers(found, tmp_path, {})
    again, _ = read_numbers(tmp_path)
    assert again.rows == found.rows
    for block, value in found.maps["swin_v2"].items():
        assert np.allclose(again.maps["swin_v2"][block], value, atol=1e-7)


def test_the_same_images_give_the_same_rows(digits: Path) -> None:
    first, again = (look(digits, subject_of("beit"), subject_of("swin_v2")) for _ in range(2))
    assert first.rows == again.rows


def test_models_side_by_side_measure_as_they_do_alone(digits: Path) -> None:
    """One of another image size reads its own images, and takes nothing from the others'."""
    larger = build_student(ViTGeometry(16, 2, 2, patch_size=8, image_size=48)).eval().requires_grad_(False)
    first, second = subject_of("beit"), Subject("larger", larger)
    together = look(digits, first, second, only=["attention", "features", "landscape"])
    alone = [row for each in (first, second) for row in look(digits, each, only=["attention", "features"]).rows]
    assert [row for row in together.rows if row.measure in ATTENTION | MAPS | FEATURES] == [
        row for row in alone if row.measure in ATTENTION | MAPS | FEATURES
    ]


def test_a_model_is_aligned_with_its_twin_layer_by_layer(digits: Path) -> None:
    found = look(digits, subject_of("beit"), Subject("twin", subject_of("beit").network), only=["alignment"])
    diagonal = [row.value for row in found.rows if row.other == "twin" and row.layer == row.other_layer]
    assert len(diagonal) == 4
    assert diagonal == pytest.approx([1.0] * 4, abs=1e-9)


def test_parts_that_are_not_wanted_are_not_measured(digits: Path) -> None:
    assert {row.measure for row in look(digits, subject_of("beit"), only=["features"]).rows} == FEATURES
    landscape = look(digits, subject_of("beit"), only=["landscape"])
    assert {row.measure for row in landscape.rows} == LANDSCAPE | {"loss_rise"}
    assert landscape.maps == {"beit": {}}


def test_no_more_is_held_than_the_landscape_needs(digits: Path) -> None:
    watched = [module.Watched(subject_of("beit"), ("attention", "landscape"))]
    held = module._look(watched, [module.KernelAlignment("beit", "beit")], load_index(digits), TINY, 2, 0)
    assert [len(batches[32].images) for batches in held] == [2, 2, 2]


def test_broken_weights_leave_reasons_and_what_can_be_measured(digits: Path, caplog: pytest.LogCaptureFixture) -> None:
    broken = Subject("broken", subject_of("beit").network)
    with torch.no_grad():
        broken.backbone.get_parameter("blocks.1.mlp.fc1.weight")[0, 0] = float("nan")
    with caplog.at_level("WARNING", "fdscale"):
        found = look(digits, broken, subject_of("swin_v2"))
    assert "broken: 1 of its weights are NaN or infinite, the first in backbone.blocks.1.mlp.fc1.weight" in caplog.text
    entropy = {
        row.layer: row.value for row in found.rows if (row.model, row.measure) == ("broken", "attention_entropy")
    }
    assert entropy[0] is not None  # what comes before the broken weight
    assert entropy[2] is None
    assert all(row.value is None or np.isfinite(row.value) for row in found.rows)
    assert all(row.reason for row in found.rows if row.value is None)
    assert [row.reason for row in found.rows if (row.model, row.measure) == ("broken", "landscape")]
    assert measured(found.rows, "swin_v2") >= EVERYTHING


class Fragile(nn.Module):
    """A backbone that takes no more than four images."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = subject_of("beit").backbone

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if len(images) > 4:
            raise TypeError("four images\nat most")
        return self.whole(images)


def test_a_forward_that_fails_leaves_its_reason_and_the_other_models_go_on(digits: Path) -> None:
    fragile = Student(Fragile(), 32, (4, 4), 1, 32).eval().requires_grad_(False)
    found = look(digits, Subject("fragile", fragile), subject_of("beit"))
    assert [(row.measure, row.reason) for row in found.rows if row.model == "fragile" and row.other is None] == [
        ("image_side", None),
        ("attention", "its forward fails: four images at most"),
        ("features", "its forward fails: four images at most"),
        ("landscape", "four images at most"),
    ]
    assert [row.reason for row in found.rows if row.measure == "cka"] == ["its forward fails: four images at most"] * 2
    assert measured(found.rows, "beit") >= EVERYTHING
    assert found.maps["fragile"] == {}


def test_a_mistake_of_our_own_does_not_pass_for_the_network_s(digits: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fdscale.diagnostics.watched.FeatureMeasures.update", None)
    found = look(digits, subject_of("beit"), only=["attention", "features"])
    (row,) = [row for row in found.rows if row.reason]
    assert row.measure == "features"
    assert re.match(r"TypeError at fdscale/diagnostics/watched.py:\d+, which was not foreseen: ", str(row.reason))
    assert measured(found.rows, "beit") >= ATTENTION | MAPS


def test_one_image_leaves_out_what_needs_more(digits: Path) -> None:
    found = look(digits, subject_of("beit"), preset=TINY.of(1))
    assert measured(found.rows, "beit") >= ATTENTION | MAPS | FEATURES
    (row,) = [row for row in found.rows if row.measure == "cka"]
    assert row.value is None
    assert "4 images" in str(row.reason)
    assert {row.images for row in found.rows if row.value is not None} == {1}


def test_without_labels_everything_but_the_landscape_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import io
    import tarfile

    from PIL import Image

    from fdscale.data.index import build_index

    shards = tmp_path / "shards"
    shards.mkdir()
    with tarfile.open(shards / "only.tar", "w") as tar:
        for number in range(6):
            stream = io.BytesIO()
            noise = np.random.default_rng(number).integers(0, 256, (30 + number, 50, 3), dtype=np.uint8)
            Image.fromarray(noise).save(stream, "png")
            info = tarfile.TarInfo(f"{number}.png")
            info.size = len(stream.getvalue())
            tar.addfile(info, io.BytesIO(stream.getvalue()))
    build_index(shards)
    output = ["--data", str(shards), "--output", str(tmp_path / "out"), "--workers", "0"]
    assert main(["diagnose", TIMM, "timm:test_resnet=random", *output]) == 0
    told = capsys.readouterr().out
    assert "landscape not measured: the loss landscape needs labels" in told
    assert "test_resnet (random): attention_distance" in told
    assert "no block attends" in told
    rows = read_numbers(tmp_path / "out")[0].rows
    assert measured(rows, "test_vit (random)") >= ATTENTION | MAPS | FEATURES
    assert measured(rows, "test_resnet (random)") >= FEATURES


def test_all_mistakes_are_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(SettingsError) as caught:
        diagnose(["vit_b61"], tmp_path / "none", tmp_path / "taken", "quik", only=["landscap", "attention"])
    told = caught.value.problems
    wanted = [
        "--only landscap: allowed: attention, features, alignment, landscape; did you mean 'landscape'?",
        "--preset quik: allowed: quick, thorough; did you mean 'quick'?",
        "taken: exists and is not an empty folder",
        "did you mean 'vit_b16'?",
        "none",
    ]
    assert len(told) == len(wanted)
    assert [text for text, problem in zip(wanted, told, strict=True) if text not in problem] == []
    assert sorted(tmp_path.iterdir()) == [tmp_path / "taken"]


def test_matplotlib_is_asked_for_where_it_is_missing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from fdscale.cli import main\n"
        f"sys.exit(main(['diagnose', '{TIMM}', '--data', 'none', '--output', 'out']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "matplotlib, which is not installed: pip install 'fdscale[diagnose]'" in ended.stderr
    assert "none" in ended.stderr
    assert list(tmp_path.iterdir()) == []
