from __future__ import annotations

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as rle
from PIL import Image
from torch.utils.data import DataLoader

from fdscale.config.errors import UserError
from fdscale.data.batches import PADDING, Request
from fdscale.data.dense.ade20k import load_ade20k
from fdscale.data.dense.batches import DetectEval, DetectTrain, SegmentEval, SegmentTrain
from fdscale.data.dense.coco import CocoScenes, load_coco
from fdscale.data.dense.crops import Cropping
from fdscale.data.dense.jitter import Jitter

CROPPING, JITTER = Cropping(48, 64, 256), Jitter(64)


def request(*samples: int, view: int = 0) -> Request:
    return Request(np.array(samples), np.full(len(samples), view), slice(4, 4 + len(samples)))


def scenes_of(folder, masks: bool = True, split: str = "train2017") -> CocoScenes:
    return load_coco(folder / split, folder / "annotations" / f"instances_{split}.json", masks)


def test_segment_batches(ade20k):
    pairs = load_ade20k(ade20k, "training", 8)
    data = SegmentTrain(pairs, CROPPING, seed=5)
    batch = data[request(3, 0, 7)]
    assert len(data) == 12
    assert batch.images.shape == (3, 3, 48, 48)
    assert batch.labels.shape == (3, 48, 48)
    assert batch.images.dtype == batch.labels.dtype == torch.uint8
    assert batch.keys.numpy().view(np.uint64).tolist() == [pairs.key(sample) for sample in (3, 0, 7)]
    assert (batch.rows, batch.bad) == (slice(4, 7), [])
    alone = data[request(7)]
    assert torch.equal(alone.images[0], batch.images[2])
    assert torch.equal(alone.labels[0], batch.labels[2])
    assert not torch.equal(data[request(7, view=1)].images, alone.images)
    assert torch.equal(batch.to(torch.device("cpu")).images, batch.images)
    data.close()


def test_detect_batches(coco):
    scenes = scenes_of(coco).trainable()
    data = DetectTrain(scenes, JITTER, seed=5)
    batch = data[request(2, 0, 5)]
    assert batch.images.shape == (3, 3, 64, 64)
    assert batch.keys.tolist() == [scenes.image_id(sample) for sample in (2, 0, 5)]
    for own in batch.objects:
        count = len(own.labels)
        assert (own.boxes.shape, own.boxes.dtype) == ((count, 4), torch.float32)
        assert (own.masks.shape, own.masks.dtype) == ((count, 64, 64), torch.uint8)
        assert own.labels.dtype == torch.int64
        assert ((own.labels >= 0) & (own.labels < 5)).all()
    assert sum(len(own.labels) for own in batch.objects) > 0
    alone = data[request(0)].to(torch.device("cpu"))
    assert torch.equal(alone.objects[0].masks, batch.objects[1].masks)
    assert torch.equal(alone.objects[0].boxes, batch.objects[1].boxes)
    assert not torch.equal(data[request(0, view=1)].images, alone.images)
    boxes_only = DetectTrain(scenes_of(coco, masks=False).trainable(), JITTER, seed=5)[request(0)]
    assert boxes_only.objects[0].masks is None
    assert torch.equal(boxes_only.images, alone.images)


def test_evaluation_gives_images_as_they_are_stored_and_padding(ade20k, coco):
    pairs, scenes = load_ade20k(ade20k, "validation", 8), scenes_of(coco, split="val2017")
    for number in range(5):
        image = SegmentEval(pairs)[request(number)]
        stored = np.asarray(Image.open(pairs.image_path(number)))
        assert np.array_equal(image.image.permute(1, 2, 0).numpy(), stored)
        ids = np.asarray(Image.open(pairs.mask_path(number)))
        assert np.array_equal(image.labels.numpy(), (ids.astype(int) - 1) % 256)
        assert (image.number, image.valid, image.bad) == (number, True, [])
        found = DetectEval(scenes)[request(number)]
        assert (found.number, found.image_id, found.valid) == (number, scenes.image_id(number), True)
        assert found.image.shape == (3, scenes.scenes["height"][number], scenes.scenes["width"][number])
    blank, none = SegmentEval(pairs)[request(PADDING)], DetectEval(scenes)[request(PADDING)]
    assert blank.image.shape == none.image.shape == (3, 32, 32)
    assert (blank.labels == 255).all()
    assert not blank.valid
    assert not none.valid
    assert none.image_id == PADDING
    assert torch.equal(blank.to(torch.device("cpu")).labels, blank.labels)
    assert none.to(torch.device("cpu")).image_id == PADDING


def test_bad_images_are_replaced_in_training_and_left_out_in_evaluation(own_ade20k, own_coco):
    pairs, scenes = load_ade20k(own_ade20k, "training", 8), scenes_of(own_coco).trainable()
    pairs.image_path(3).write_bytes(b"no image")
    pairs.mask_path(4).write_bytes(b"no mask")
    scenes.path(len(scenes) - 1).write_bytes(b"no image")
    data = SegmentTrain(pairs, CROPPING, seed=5)
    batch, good = data[request(3, 4)], data[request(5)]
    assert torch.equal(batch.images[0], good.images[0])
    assert torch.equal(batch.labels[1], good.labels[0])
    assert batch.keys.tolist() == good.keys.tolist() * 2
    assert [name.split(" ")[0].rsplit("/")[-1] for name in batch.bad] == [
        "ADE_train_00000004.jpg",
        "ADE_train_00000005.png",
    ]
    detect = DetectTrain(scenes, JITTER, seed=5)
    last, first = detect[request(len(scenes) - 1)], detect[request(0)]
    assert torch.equal(last.images, first.images)
    assert torch.equal(last.objects[0].boxes, first.objects[0].boxes)
    assert last.keys.tolist() == first.keys.tolist()
    assert len(last.bad) == 1
    seen = SegmentEval(pairs)[request(3)], SegmentEval(pairs)[request(4)], DetectEval(scenes)[request(len(scenes) - 1)]
    assert [image.valid for image in seen] == [False] * 3
    assert [len(image.bad) for image in seen] == [1] * 3


def test_nothing_but_bad_images_ends_in_an_error(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", 8)
    for scene in range(len(pairs)):
        pairs.image_path(scene).write_bytes(b"")
    with pytest.raises(UserError, match=r"no image can be decoded in .* \(training\) from .*00000002\.jpg .*tried 12"):
        SegmentTrain(pairs, CROPPING, seed=5)[request(1)]


def as_it_is(batch):
    return batch


def test_a_wrong_mask_met_by_a_worker_ends_in_its_sentence(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", 8)
    Image.new("L", (64, 64), 77).save(pairs.mask_path(0))
    loader = DataLoader(
        SegmentTrain(pairs, CROPPING, seed=5),
        batch_size=None,
        sampler=[request(1), request(0)],
        num_workers=1,
        collate_fn=as_it_is,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    assert next(batches).labels.shape == (1, 48, 48)
    with pytest.raises(UserError) as error:
        next(batches)
    sentence = str(error.value).rpartition("UserError: ")[2].strip()
    assert sentence.startswith(f"mask {pairs.mask_path(0)} has ids 77; allowed: 0 (unlabelled) to 8")


def test_masks_that_take_all_memory_are_named_with_the_image(coco, monkeypatch):
    def decode(_):
        raise MemoryError("std::bad_alloc")

    monkeypatch.setattr(rle, "decode", decode)
    with pytest.raises(UserError, match=r"instances_train2017\.json, image id 9: a segmentation cannot .*MemoryError"):
        DetectTrain(scenes_of(coco).trainable(), JITTER, seed=5)[request(0)]
