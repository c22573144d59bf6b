"""Images over ranks: uneven ones end, and are judged as by one process."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from fdscale.cluster.ranks import Rank
from fdscale.config.errors import UserError
from fdscale.data.dense.batches import DetectImage
from fdscale.downstream.detection.detector import Detections, Detector
from fdscale.downstream.detection.evaluation import as_coco, evaluate_detection
from fdscale.downstream.detection.views import View, views_of
from fdscale.training.engine import Connection, start_engine
from fdscale.training.optim import adamw, parameter_groups
from fdscale.training.partition import divide
from tests.downstream.detection.small import LEAN, design, detector_of, objects_of, student_of

CATEGORY_IDS = (4, 17, 30)
SIZES = [(40, 64), (64, 48), (50, 50), (33, 70)]
VIEWS = partial(views_of, short_side=48, long_side=64, flip=True)
ALONE = Connection(Rank(0, 0, 1, 1, "127.0.0.1", 29500), torch.device("cpu"), None)


def images(ranks: int) -> list[DetectImage]:
    """One image more than ranks, with numbers as a data set has them."""
    draw = torch.Generator().manual_seed(1)
    return [
        DetectImage(torch.randint(256, (3, *size), dtype=torch.uint8, generator=draw), 100 + 7 * number, number)
        for number, size in enumerate(SIZES[: ranks + 1])
    ]


def share(rank: int, ranks: int) -> list[DetectImage]:
    """One rank's images, filled up with padding."""
    padding = DetectImage(torch.zeros(3, 16, 16, dtype=torch.uint8), -1, -1)
    return [*images(ranks)[rank::ranks], padding][:2]


def numbers() -> Any:
    return design(score_threshold=0.15, detections=30)


def annotations(folder: Path, ranks: int) -> Path:
    """What the detector itself finds, in part: an AP that is neither 0 nor 1."""
    detector = detector_of("swin", score_threshold=0.15, detections=30).eval()
    found = []
    for image in images(ranks):
        told = as_coco(detector(VIEWS(image.image)), image.image_id, CATEGORY_IDS)
        found += [{**each, "id": 0, "iscrowd": 0, "area": each["bbox"][2] * each["bbox"][3]} for each in told[1:9:2]]
    found = [{**each, "id": number + 1} for number, each in enumerate(found)]
    described = [
        {"id": image.image_id, "height": image.image.shape[1], "width": image.image.shape[2]} for image in images(ranks)
    ]
    categories = [{"id": number, "name": str(number)} for number in CATEGORY_IDS]
    file = folder / "instances.json"
    file.write_text(json.dumps({"images": described, "annotations": found, "categories": categories}))
    return file


def evaluated(connection: Connection, file: str, ranks: int, lean: bool) -> dict[str, float]:
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": LEAN}
    student = student_of("swin")
    if lean:
        divide(student, config, connection)
    torch.manual_seed(3)
    detector: Any = Detector(student, numbers())
    if lean:
        optimizer = adamw(parameter_groups(detector, 0.05, ()), 1e-3, (0.9, 0.99), 1e-8)
        detector = start_engine(detector, optimizer, config, 1, 0.0)
    detector.eval()
    mine = share(connection.rank.rank, connection.rank.world_size) if lean else images(ranks)
    found = evaluate_detection(detector, mine, Path(file), CATEGORY_IDS, VIEWS, connection)
    if lean:
        detector.destroy()
    return found


def test_uneven_images_are_judged_as_by_one_process(tmp_path: Path, two_ranks: Any) -> None:
    judged_as_by_one_process(tmp_path, two_ranks, 2)


@pytest.mark.prove
def test_three_ranks_judge_as_one_process(tmp_path: Path, fresh_ranks: Any) -> None:
    judged_as_by_one_process(tmp_path, fresh_ranks(3), 3)


def judged_as_by_one_process(folder: Path, ranks: Any, number: int) -> None:
    """Under lean ZeRO-3 one call more on a rank would hang."""
    file = annotations(folder, number)
    expected = evaluated(ALONE, str(file), number, lean=False)
    assert expected.keys() >= {"box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50"}
    assert 0.05 < expected["box_ap"] < 0.95
    found = ranks(evaluated, str(file), number, True)
    assert found == [pytest.approx(expected, abs=1e-6)] * number


def test_annotations_that_cannot_be_read_end_all_ranks(two_ranks: Any) -> None:
    assert two_ranks(refused) == [True, True]


def refused(connection: Connection) -> bool:
    with pytest.raises(UserError, match=r"nowhere\.json: not annotations"):
        evaluate_detection(nothing_found, share(connection.rank.rank, 2), Path("nowhere.json"), (1,), VIEWS, connection)
    return True


def test_a_main_rank_that_cannot_measure_ends_all_ranks(tmp_path: Path, two_ranks: Any) -> None:
    assert two_ranks(unmeasured, str(annotations(tmp_path, 2))) == [True, True]


def unmeasured(connection: Connection, file: str) -> bool:
    """faster-coco-eval as it is when memory ends."""
    import faster_coco_eval

    def out_of_memory(*_: object, **__: object) -> None:
        raise MemoryError("std::bad_alloc")

    mine = share(connection.rank.rank, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faster_coco_eval, "COCOeval_faster", out_of_memory)
        with pytest.raises(UserError, match=r"could not be judged .*bad_alloc"):
            evaluate_detection(nothing_found, mine, Path(file), CATEGORY_IDS, VIEWS, connection)
    return True


def nothing_found(views: list[View]) -> Detections:
    return Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.long), None)


def test_padding_is_looked_at_and_not_counted(tmp_path: Path) -> None:
    file = annotations(tmp_path, 2)
    looked: list[int] = []

    def detect(views: list[View]) -> Detections:
        looked.append(len(views))
        return nothing_found(views)

    found = evaluate_detection(detect, share(1, 2), file, CATEGORY_IDS, VIEWS, ALONE)
    assert looked == [2, 2]
    assert set(found.values()) == {0.0}
    assert "mask_ap" not in found


def test_detections_are_told_as_coco_has_them() -> None:
    (own,) = objects_of((2,))
    masks = [{"size": [4, 4], "counts": "a"}, {"size": [4, 4], "counts": "b"}]
    told = Detections(own.boxes, torch.tensor([0.5, 0.25]), torch.tensor([2, 0]), masks)
    found = as_coco(told, 12, CATEGORY_IDS)
    assert [(each["image_id"], each["category_id"], each["score"]) for each in found] == [(12, 30, 0.5), (12, 4, 0.25)]
    for each, box, mask in zip(found, own.boxes.tolist(), masks, strict=True):
        assert each["bbox"] == pytest.approx([box[0], box[1], box[2] - box[0], box[3] - box[1]])
        assert each["segmentation"] == mask
    json.dumps(found)
