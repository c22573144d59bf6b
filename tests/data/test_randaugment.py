"""RandAugment is timm's as timm sets it up, and the same image wherever it is drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import RandAugment as TimmRandAugment

from fdscale.config.errors import UserError
from fdscale.data.augment import Augmentation, augment
from fdscale.data.batches import TrainBatches
from fdscale.data.draws import Purpose, generator
from fdscale.data.index import build_index, load_index
from fdscale.data.loader import TrainLoader
from fdscale.data.mixture import Mixture
from fdscale.data.order import GlobalOrder
from fdscale.data.randaugment import RandAugment

OFFICIAL = "rand-m9-mstd0.5-inc1"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
BICUBIC = Image.Resampling.BICUBIC


def noise(size: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def timms(size: int) -> TimmRandAugment:
    """What the official implementation gets: colour jitter is asked for, and dropped by timm beside RandAugment."""
    transform = create_transform(
        size, is_training=True, color_jitter=0.4, auto_augment=OFFICIAL, interpolation="bicubic"
    )
    names = [type(step).__name__ for step in transform.transforms]
    assert names[:3] == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "RandAugment"]
    assert "ColorJitter" not in names
    return transform.transforms[2]


@pytest.mark.parametrize("size", [224, 32])
def test_it_is_set_up_as_timms_training_transform_is(size):
    ours, theirs = RandAugment(OFFICIAL, size, IMAGENET_MEAN, BICUBIC).transform, timms(size)
    assert str(ours) == str(theirs)
    assert [vars(op) for op in ours.ops] == [vars(op) for op in theirs.ops]
    assert (ours.num_layers, ours.choice_weights) == (theirs.num_layers, theirs.choice_weights)
    assert ours.ops[0].hparams["translate_const"] == int(size * 0.45)
    assert ours.ops[0].hparams["img_mean"] == (124, 116, 104)


def test_the_same_draw_gives_timms_image():
    ours, theirs = RandAugment(OFFICIAL, 32, IMAGENET_MEAN, BICUBIC), timms(32)
    for key in range(20):
        first, second = generator(3, key, 1, Purpose.RANDAUGMENT).integers(2**32, size=2).tolist()
        random.seed(first)
        np.random.seed(second)
        expected = np.asarray(theirs(noise(32)))
        assert np.array_equal(np.asarray(ours(noise(32), generator(3, key, 1, Purpose.RANDAUGMENT))), expected)


def views(augmentation: Augmentation, count: int = 12) -> list[bytes]:
    return [augment(noise(40), key, 0, 5, 24, augmentation).tobytes() for key in range(count)]


def with_policy(policy: str | None) -> Augmentation:
    drawn = RandAugment(policy, 24, IMAGENET_MEAN, BICUBIC) if policy else None
    return Augmentation((0.2, 1.0), (0.75, 1.33), "bicubic", 0.5, drawn)


def test_it_comes_after_crop_and_flip_with_draws_of_its_own():
    distort = with_policy(OFFICIAL).randaugment
    for key in range(12):
        plain = augment(noise(40), key, 2, 5, 24, with_policy(None))
        expected = np.asarray(distort(plain, generator(5, key, 2, Purpose.RANDAUGMENT)))
        assert np.array_equal(augment(noise(40), key, 2, 5, 24, with_policy(OFFICIAL)), expected)


def test_an_operation_is_used_half_of_the_time():
    plain, distorted = views(with_policy(None)), views(with_policy(OFFICIAL))
    assert 0 < sum(a != b for a, b in zip(plain, distorted, strict=True)) < len(plain)
    assert views(with_policy("rand-m9-n2-p0")) == plain


def test_the_same_images_whatever_rank_worker_and_global_generator(plain_folder):
    build_index(plain_folder)
    index = load_index(plain_folder)

    def images(world_size: int, workers: int, disturbance: int) -> list[bytes]:
        random.seed(disturbance)
        np.random.seed(disturbance)
        order, device = GlobalOrder(len(index), 8, 5), torch.device("cpu")
        loaders = [
            TrainLoader(
                TrainBatches(Mixture((index,)), 24, with_policy(OFFICIAL), 5),
                order,
                rank,
                world_size,
                2,
                workers,
                device,
            )
            for rank in range(world_size)
        ]
        steps = [step for batches in zip(*(loader.steps(2, 4) for loader in loaders), strict=True) for step in batches]
        return [image.numpy().tobytes() for step in steps for batch in step for image in batch.images]

    assert images(1, 0, 0) == images(2, 1, 1) == images(1, 2, 2)


@pytest.mark.parametrize(
    "policy", [OFFICIAL, "rand", "rand-m9-n3-mstd0.5", "rand-mstd1-tweights", "rand-m15-mmax20-p0.3-inc0", "rand-t3aw"]
)
def test_timms_policies_are_taken(policy):
    assert RandAugment(policy, 24, IMAGENET_MEAN, BICUBIC)(noise(24), generator(0, 0, 0, Purpose.VIEW)).size == (24, 24)


@pytest.mark.parametrize(
    "policy",
    ["augmix-m3", "rand-m", "rand-x9", "rand-m9-", "rand-mstd", "rand-tnone", "rand-inc2", "rand-p1.5", "rand-n0"],
)
def test_what_timm_would_refuse_or_read_in_part_is_refused(policy):
    with pytest.raises(UserError, match=rf"augment\.randaugment: got '{policy}', allowed: .*rand-m9-mstd0\.5-inc1"):
        RandAugment(policy, 24, IMAGENET_MEAN, BICUBIC)
