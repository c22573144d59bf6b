"""A detector's files: what is read is what was written, and another data set's detector gives what it can."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale.config.errors import UserError
from fdscale.downstream.detection.detector import Detector
from fdscale.downstream.detection.files import Category, load_detector, load_detector_weights, save_detector
from fdscale.downstream.detection.views import views_of
from fdscale.training.engine import Connection, full_state, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide
from tests.downstream.detection.small import LEAN, design, detector_of, objects_of, pixels_of, student_of

CATEGORIES = [Category(1, "person"), Category(7, "train"), Category(90, "toothbrush")]


def saved(folder: Path, kind: str = "swin", ending: str = "", **changes: Any) -> tuple[Detector, Path]:
    detector = detector_of(kind, **changes)
    return detector, save_detector(detector, detector.state_dict(), folder, CATEGORIES, ending)


@pytest.mark.parametrize("kind", ["vit", "swin"])
@pytest.mark.parametrize("cascade", [False, True], ids=["one_stage", "cascade"])
def test_what_is_read_is_what_was_written(kind: str, cascade: bool, tmp_path: Path) -> None:
    changes = {"score_threshold": 0.01, "anchor_ratios": (0.7, 1.4), "suppression": "linear"}
    window = {"window_size": 2} if kind == "swin" else {}
    detector = detector_of(kind, cascade=cascade, **changes, **window)
    detector.backbone.student.mean += 0.1
    file = save_detector(detector, detector.state_dict(), tmp_path, CATEGORIES)
    views = views_of((pixels_of(1)[0] * 255).to(torch.uint8), 50, 60, flip=True)
    expected = detector.eval()(views)
    for path in (tmp_path, file):
        found, categories = load_detector(path)
        assert found.design == detector.design
        assert list(categories) == CATEGORIES
        told = found(views)
        assert len(told.boxes) > 3
        assert all(torch.equal(one, other) for one, other in zip(told[:3], expected[:3], strict=True))
        assert told.masks == expected.masks


def test_the_average_has_files_of_its_own(tmp_path: Path) -> None:
    file = saved(tmp_path, ending="_ema")[1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["detector_ema.json", "detector_ema.safetensors"]
    assert isinstance(load_detector(file)[0], Detector)


@pytest.mark.parametrize(
    ("cascade", "new"),
    [
        (False, {"boxes.stages.0.classes", "boxes.stages.0.offsets", "masks.predictor.mask_fcn_logits"}),
        (True, {*(f"boxes.stages.{stage}.classes" for stage in range(3)), "masks.predictor.mask_fcn_logits"}),
    ],
    ids=["one_stage", "cascade"],
)
def test_another_number_of_classes_leaves_their_predictors_new(
    cascade: bool, new: set[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, file = saved(tmp_path, classes=5, cascade=cascade)
    checked(file, new, caplog, cascade=cascade)


def test_a_file_without_masks_leaves_their_head_new(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, file = saved(tmp_path, masks=False)
    target = detector_of("swin")
    checked(file, {name.rpartition(".")[0] for name in target.state_dict() if name.startswith("masks.")}, caplog)


def test_an_earlier_stages_input_statistics_are_taken_over(tmp_path: Path) -> None:
    source = detector_of("swin", classes=5)
    source.backbone.student.mean += 0.1
    source.backbone.student.std *= 2
    file = save_detector(source, source.state_dict(), tmp_path, CATEGORIES)
    target = detector_of("swin")
    load_detector_weights(target, file)
    for name in ("mean", "std"):
        assert torch.equal(target.backbone.student.get_buffer(name), source.backbone.student.get_buffer(name)), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"window_size": 8}, r"window_size is 4 here, 8 there"),
        ({"pretrained_window_sizes": (8, 8, 8)}, r"coordinates'\) is \[4, 4, 4\] here, \[8, 8, 8\] there"),
        ({"image_size": 32}, r"coordinates'\) is \[4, 4, 4\] here, \[4, 4, 2\] there"),
        ({"image_size": 128}, None),
    ],
)
def test_a_student_that_computes_otherwise_is_refused(
    changes: dict[str, Any], told: str | None, tmp_path: Path
) -> None:
    """The same shapes and other windows or coordinates; an image size that changes neither is none of them."""
    _, file = saved(tmp_path)
    described = json.loads(file.with_suffix(".json").read_text())
    described["geometry"] |= changes
    file.with_suffix(".json").write_text(json.dumps(described))
    target = detector_of("swin")
    if told is None:
        assert load_detector_weights(target, file) == []
        return
    with pytest.raises(UserError, match=told):
        load_detector_weights(target, file)


def test_what_is_there_stays_where_there_is_no_room(tmp_path: Path) -> None:
    detector, file = saved(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "detector.safetensors.new").mkdir()  # nothing can be written there
    detector.backbone.student.mean += 1
    with pytest.raises(UserError, match=r"detector\.safetensors could not be written"):
        save_detector(detector, detector.state_dict(), tmp_path, CATEGORIES)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert isinstance(load_detector(file)[0], Detector)


def checked(file: Path, new: set[str], caplog: pytest.LogCaptureFixture, **changes: Any) -> None:
    """What a detector takes of a file, and keeps of its own."""
    target = detector_of("swin", **changes)
    torch.manual_seed(9)
    with torch.no_grad():
        for weight in target.parameters():
            weight.normal_()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with caplog.at_level(logging.INFO):
        left = load_detector_weights(target, file)
    assert {name.rpartition(".")[0] for name in left} == new
    source = detector_of("swin", **json.loads(file.with_suffix(".json").read_text())["design"])
    for name, value in target.state_dict().items():
        assert torch.equal(value, before[name] if name in left else source.state_dict()[name]), name
    assert all(part in caplog.text for part in new)
    assert f"{len(before) - len(left)} of {len(before)} weights kept" in caplog.text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"channels": 16}, r"of another shape \['fpn\.inner_blocks\.0\.0\.weight \(8, 8, 1, 1\) for \(16, 8, 1, 1\)"),
        ({"cascade": True}, r"missing \['boxes\.stages\.1"),
        ({"masks": False}, r"unexpected \['masks\."),
        ({"classes": 5, "rpn_convolutions": 2}, r"missing \['rpn\.head\.conv\.1"),
    ],
)
def test_what_does_not_fit_is_named(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    target = detector_of("swin", **changes)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    with pytest.raises(UserError, match=told):
        load_detector_weights(target, file)
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    _, file = saved(tmp_path)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="not a readable detector file"):
        load_detector(tmp_path)
    described = json.loads(file.with_suffix(".json").read_text())
    saved(tmp_path)
    no_geometry = {key: value for key, value in described.items() if key != "geometry"}
    for other in (no_geometry, {**described, "design": {**described["design"], "classes": 9}}):
        file.with_suffix(".json").write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"detector\.(json|safetensors): "):
            load_detector(tmp_path)
    for change in ({"design": None}, {"design": {"clases": 3}}, {"categories": [3]}):
        file.with_suffix(".json").write_text(json.dumps({**described, **change}))
        with pytest.raises(UserError, match="its design and categories"):
            load_detector(tmp_path)
    file.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"detector\.json"):
        load_detector(tmp_path)


def loaded_divided(connection: Connection, file: str, folder: str) -> bool:
    """A step from a file's weights, loaded when all is divided; the result is written from the gathered weights."""
    config = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": LEAN}
    student = student_of("swin")
    divide(student, config, connection)
    torch.manual_seed(4)
    detector = Detector(student, design(classes=3))
    left = load_detector_weights(detector, Path(file))
    engine = start_engine(detector, adamw(parameter_groups(detector, 0.05, ()), 0.0, (0.9, 0.99), 1e-8), config, 1, 0.0)
    engine.backward(engine(pixels_of(2), objects_of((2, 1)))["loss"])
    engine.step()
    state = full_state(engine, detector, wanted=connection.rank.is_main)
    connection.on_main(lambda: save_detector(detector, state, Path(folder), CATEGORIES))
    engine.destroy()
    return len(left) == 6


def test_a_divided_detector_takes_another_ones_weights(tmp_path: Path, two_ranks: Any) -> None:
    source, file = saved(tmp_path / "first", classes=5)
    assert two_ranks(loaded_divided, str(file), str(tmp_path / "second")) == [True, True]
    found, _ = load_detector(tmp_path / "second")
    kept = source.state_dict()
    for name, value in found.state_dict().items():
        if value.shape == kept[name].shape and ".classes." not in name and ".offsets." not in name:
            assert torch.equal(value, kept[name]), name
