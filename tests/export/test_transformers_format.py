from __future__ import annotations

from pathlib import Path

import pytest

from fdscale.config.errors import UserError
from fdscale.export import transformers_format
from fdscale.export.finished import finished
from fdscale.export.transformers_format import export_transformers, is_exact
from fdscale.students.geometry import STUDENTS, SwinV2Geometry, TimmGeometry, ViTGeometry

VIT = ViTGeometry(embed_dim=32, depth=3, num_heads=4, patch_size=8, image_size=32)
SWIN = SwinV2Geometry(16, (2, 2), (1, 2), window_size=4, image_size=32)


def refused(source: Path, output: Path) -> str:
    with pytest.raises(UserError) as error:
        export_transformers(source, output)
    assert not output.exists()
    return str(error.value)


def test_a_timm_student_is_sent_to_timm(completed_run, tmp_path):
    completed_run(TimmGeometry("test_vit", image_size=64), tmp_path / "run")
    assert "no network for a timm student; use --format timm" in refused(tmp_path / "run", tmp_path / "export")


def test_a_vit_whose_norm_comes_before_the_mean_is_sent_to_timm(completed_finetuning, tmp_path):
    completed_finetuning(VIT, tmp_path / "run", "student")
    assert "norm after the pooling alone; use --format timm" in refused(tmp_path / "run", tmp_path / "export")


def test_a_swin_with_a_new_norm_fits_nowhere(completed_finetuning, tmp_path):
    completed_finetuning(SWIN, tmp_path / "run", "after_pooling")
    assert "has no counterpart in timm or transformers" in refused(tmp_path / "run", tmp_path / "export")


def test_without_transformers_it_says_how_to_install_it(completed_run, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers_format, "find_spec", lambda name: None)
    assert "pip install 'fdscale[transformers]', or --format timm" in refused(tmp_path, tmp_path / "export")


def test_the_average_has_its_own_classifier(completed_finetuning, tmp_path):
    run = tmp_path / "run"
    completed_finetuning(SWIN, run, "student")
    for file in list(run.iterdir()):
        (run / f"{file.stem}_ema{file.suffix}").write_bytes(file.read_bytes())
    head = finished(run / "student_ema.safetensors").head
    assert head is not None
    assert (head.weights.name, head.classes, head.new_norm) == ("classifier_ema.safetensors", 10, False)


def test_a_file_that_is_no_classifier_is_told(completed_run, tmp_path):
    completed_run(SWIN, tmp_path / "run")
    weights = tmp_path / "run" / "student.safetensors"
    (tmp_path / "run" / "classifier.safetensors").write_bytes(weights.read_bytes())
    assert "it has no head.weight; take it away" in refused(tmp_path / "run", tmp_path / "export")


@pytest.mark.parametrize(
    ("window", "exact", "approximate"),
    [
        (8, [(256, 256), (128, 128), (192, 192), (384, 384), (512, 512)], [(288, 288), (320, 320), (256, 320)]),
        (16, [(256, 256), (512, 512), (128, 128)], [(288, 288), (576, 576), (512, 256)]),
        (7, [(224, 224), (448, 448)], [(320, 320), (256, 256)]),  # an odd window's halves are never equal
    ],
)
def test_a_swin_is_exact_where_the_order_of_shift_and_padding_makes_no_difference(
    completed_run, tmp_path, window, exact, approximate
):
    completed_run(SWIN, tmp_path / "run")
    student = finished(tmp_path / "run")
    image_size = 224 if window == 7 else 256
    object.__setattr__(student, "geometry", SwinV2Geometry(96, (2, 2, 6, 2), (3, 6, 12, 24), window, image_size))
    assert [size for size in exact + approximate if is_exact(student, size)] == exact
    object.__setattr__(student, "geometry", STUDENTS["swinv2_g"])
    assert all(is_exact(student, size) for size in exact + approximate)
