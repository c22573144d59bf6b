"""Finished runs, looked at again: who reads the weights, what is refused and when, what is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fdscale.config.errors import UserError
from fdscale.config.recipe import load_recipe, to_toml
from fdscale.data.dense.coco import load_coco
from fdscale.data.dense.scenes import write_ade20k, write_coco
from fdscale.data.images import decode_rgb
from fdscale.downstream.detect import categories_of, design_of
from fdscale.downstream.detection.detector import Detector
from fdscale.downstream.detection.evaluation import as_coco
from fdscale.downstream.detection.files import save_detector
from fdscale.downstream.detection.views import views_of
from fdscale.downstream.evaluate import evaluate
from fdscale.downstream.finished_run import dense_settings
from fdscale.downstream.segment import segmenter_of
from fdscale.downstream.segmentation.files import save_segmenter
from fdscale.planning.networks import geometry_of
from fdscale.students.files import describe_student
from fdscale.students.geometry import ViTGeometry, geometry_to_json
from fdscale.students.student import Student, build_student
from fdscale.training.engine import Connection
from tests.downstream.dense_runs import DETECT, SEGMENT, engine_json

JUDGED = {"segment": "miou", "mask2former": "miou", "detect": "ap/box/all"}
PLAIN = [  # Mask2Former on a ViT: other buffers that no file holds
    *(word for word in SEGMENT if not word.startswith("student.geometry.")),
    "student.name=vit_s16",
    "student.geometry={embed_dim=16,depth=2,num_heads=2}",
    "head.kind=mask2former",
    "head.channels=32",
    "head.queries=7",
    "head.decoder_layers=2",
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a run of each program leaves, its network random; a detector's images show half of what it finds."""
    folder = tmp_path_factory.mktemp("finished")
    write_ade20k(folder / "ade20k", 1, 3, 64)
    write_coco(folder / "coco", 1, 3, 64)
    return {name: finished(name, folder) for name in JUDGED}


def finished(name: str, folder: Path) -> Path:
    run, program = folder / name, "detect" if name == "detect" else "segment"
    run.mkdir()
    notes = folder / "coco" / "annotations" / "instances_val2017.json"
    held_out = [f"eval.images={folder}/coco/val2017", f"eval.annotations={notes}"]
    scenes = [f"eval.folder={folder}/ade20k"]
    words = {"segment": [*SEGMENT, *scenes], "mask2former": [*PLAIN, *scenes], "detect": [*DETECT, *held_out]}[name]
    lean = engine_json(run, "given", 3)
    settings: Any = load_recipe(f"scenes_{program}", [*words, lean, "optim.ema_decay=0"])
    (run / "given.json").rename(run / "deepspeed.json")  # the recipe's own name for it is gone
    (run / "recipe.toml").write_text(to_toml(settings))
    (run / "complete.json").write_text('{"step": 4}')
    student = build_student(geometry_of(settings.student), seed=1)
    describe_student(student, run / "student.safetensors")
    student.mean.add_(0.1)
    (leave_segmenter if program == "segment" else leave_detector)(settings, student, run)
    return run


def leave_segmenter(settings: Any, student: Student, run: Path) -> None:
    torch.manual_seed(3)
    segmenter = segmenter_of(settings, student)
    perturb(segmenter)
    names = [
        line.split("\t")[5] for line in Path(settings.eval.folder, "objectInfo150.txt").read_text().split("\n")[1:9]
    ]
    save_segmenter(segmenter, segmenter.state_dict(), run / "segmenter", names)


def leave_detector(settings: Any, student: Student, run: Path) -> None:
    torch.manual_seed(3)
    detector = Detector(student, design_of(settings)).eval()
    perturb(detector)
    seen = settings.eval
    scenes = load_coco(seen.images, seen.annotations)
    save_detector(detector, detector.state_dict(), run, categories_of(scenes))
    notes = Path(seen.annotations)
    held, found = json.loads(notes.read_text()), []
    fill: Any = tuple(255 * float(value) for value in student.mean.flatten())
    for scene in range(len(scenes)):
        image = torch.from_numpy(as_array(scenes.path(scene))).permute(2, 0, 1)
        told = detector(views_of(image, seen.short_side, seen.long_side, fill=fill))
        found += as_coco(told, scenes.image_id(scene), scenes.category_ids)[:8:2]
    held["annotations"] = [
        {**each, "id": number + 1, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3]}
        for number, each in enumerate(found)
    ]
    notes.write_text(json.dumps(held))


def as_array(path: Path) -> Any:
    with path.open("rb") as file:
        return np.array(decode_rgb(file, str(path)))


@torch.no_grad()
def perturb(network: nn.Module) -> None:
    for parameter in network.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.05)


def of_own_copy(connection: Connection, *folders: str) -> dict[str, float]:
    return evaluate(Path(folders[connection.rank.rank]))


@pytest.mark.parametrize("program", JUDGED)
def test_the_first_rank_alone_reads_the_weights(
    program: str, runs: dict[str, Path], tmp_path: Path, two_ranks: Any, one_rank: Any
) -> None:
    """Under ZeRO-3, with the JSON that the run ran with; the other rank's copy has no weights to be read."""
    other = Path(shutil.copytree(runs[program], tmp_path / "other"))
    for file in other.rglob("*.safetensors"):
        file.write_bytes(b"nothing")
    before = set(runs[program].rglob("*"))
    (expected,) = one_rank(of_own_copy, str(runs[program]))
    assert 0.01 < expected[JUDGED[program]] < 0.99
    for found in two_ranks(of_own_copy, str(runs[program]), str(other)):
        assert found == pytest.approx(expected, abs=0.01)
    assert set(runs[program].rglob("*")) == before  # nothing is written unasked


def to_a_file(_: Connection, run: str, output: str, *overrides: str) -> dict[str, float]:
    return evaluate(Path(run), overrides, output=Path(output))


def test_what_is_asked_for_lies_beside_the_output(runs: dict[str, Path], tmp_path: Path, one_rank: Any) -> None:
    run = Path(shutil.copytree(runs["segment"], tmp_path / "run"))
    (run / "iou.json").write_text("training's")
    output = tmp_path / "not" / "yet" / "found.json"
    (found,) = one_rank(to_a_file, str(run), str(output))
    assert json.loads(output.read_text()) == found
    assert sorted(path.name for path in output.parent.iterdir()) == ["found.json", "iou.json", "overlays"]
    one_rank(to_a_file, str(run), str(run / "found.json"))
    assert (run / "iou.json").read_text() == "training's"
    assert not (run / "overlays").exists()


@pytest.mark.parametrize(
    ("program", "overrides", "told"),
    [
        ("segment", ["eval.folder=nowhere"], r"^eval\.folder: .*nowhere"),
        ("detect", ["eval.annotations=nowhere.json"], r"^eval\.images, eval\.annotations: .*nowhere\.json"),
        ("detect", ["deepspeed=nowhere"], "nowhere"),
    ],
)
def test_wrong_data_are_told_before_ranks_start(
    program: str, overrides: list[str], told: str, runs: dict[str, Path]
) -> None:
    with pytest.raises(UserError, match=told):
        dense_settings(runs[program], overrides)


def test_what_a_run_has_not_is_told_before_ranks_start(runs: dict[str, Path], tmp_path: Path) -> None:
    for run in runs.values():
        with pytest.raises(UserError, match=r"kept no average \(optim\.ema_decay = 0\)"):
            dense_settings(run, [], average=True)
    run = Path(shutil.copytree(runs["segment"], tmp_path / "run"))
    shutil.rmtree(run / "segmenter")
    with pytest.raises(UserError, match=r"segmenter/config\.json is not there"):
        dense_settings(run, [])
    shutil.copytree(runs["segment"], run, dirs_exist_ok=True)
    geometry = geometry_to_json(ViTGeometry(16, 2, 2, patch_size=16, image_size=64))
    described = json.loads((run / "student.json").read_text())
    (run / "student.json").write_text(json.dumps({**described, "geometry": geometry}))
    with pytest.raises(UserError, match=r"eval\.window_size: got 8"):
        dense_settings(run, ["eval.window_size=8"])


def refused(_: Connection, run: str, told: str, *overrides: str) -> bool:
    with pytest.raises(UserError, match=told):
        evaluate(Path(run), overrides)
    return True


def test_images_of_another_data_set_are_refused(runs: dict[str, Path], tmp_path: Path, one_rank: Any) -> None:
    settings: Any = dense_settings(runs["detect"], [])
    held = json.loads(Path(settings.eval.annotations).read_text())
    held["categories"][1]["name"] = "zebra"
    (tmp_path / "other.json").write_text(json.dumps(held))
    one_rank(refused, str(runs["detect"]), "zebra", f"eval.annotations={tmp_path}/other.json")
    scenes: Any = dense_settings(runs["segment"], [])
    other = Path(shutil.copytree(scenes.eval.folder, tmp_path / "ade20k"))
    table = (other / "objectInfo150.txt").read_text().split("\n")
    cells = table[2].split("\t")
    (other / "objectInfo150.txt").write_text("\n".join([*table[:2], "\t".join([*cells[:5], "zebra"]), *table[3:]]))
    one_rank(refused, str(runs["segment"]), "label 1 is 'zebra' there", f"eval.folder={other}")
