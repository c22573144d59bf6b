from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.dense.ade20k import TABLE, load_ade20k
from fdscale.data.images import BadImage

CLASSES = 8


def test_scenes_are_read_with_names_keys_and_labels(ade20k):
    pairs = load_ade20k(ade20k, "training", CLASSES)
    assert len(pairs) == 12
    assert pairs.names[0] == "ADE_train_00000001"
    assert pairs.class_names == ("sky", "grass", "water", "disc", "square", "triangle", "ring", "star")
    assert len({pairs.key(scene) for scene in range(12)}) == 12
    assert pairs.key(0) == load_ade20k(ade20k, "training", CLASSES).key(0)
    seen = set()
    for scene in range(12):
        image = pairs.image(scene)
        labels = pairs.labels(scene, image.size)
        ids = np.asarray(Image.open(pairs.mask_path(scene)))
        assert image.mode == "RGB"
        assert labels.shape == (image.height, image.width)
        assert np.array_equal(labels[ids > 0], ids[ids > 0] - 1)
        assert (labels[ids == 0] == 255).all()
        seen |= set(np.unique(labels).tolist())
    assert seen == {*range(8), 255}


def test_a_table_as_the_real_one_is_read(own_ade20k):
    (own_ade20k / TABLE).write_text(
        "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
        "1\t0.1576\t11664\t1172\t1\twall\n2\t0.1072\t6046\t612\t1\tbuilding, edifice\n"
        + "".join(f"{number}\t0.01\t5\t6\t0\tthing {number} \n" for number in range(3, 9))
    )
    names = load_ade20k(own_ade20k, "validation", CLASSES).class_names
    assert names[:3] == ("wall", "building, edifice", "thing 3")
    (own_ade20k / TABLE).unlink()
    assert load_ade20k(own_ade20k, "validation", CLASSES).class_names is None


def test_the_fingerprint_follows_names_and_sizes(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", CLASSES)
    before = pairs.fingerprint()
    assert before == load_ade20k(own_ade20k, "training", CLASSES).fingerprint()
    assert before != load_ade20k(own_ade20k, "validation", CLASSES).fingerprint()
    with pairs.mask_path(5).open("ab") as file:
        file.write(b"x")
    assert pairs.fingerprint() != before


def test_folders_that_are_no_such_data_set(own_ade20k, tmp_path):
    with pytest.raises(UserError, match="none does not exist; give the folder of ADEChallengeData2016"):
        load_ade20k(tmp_path / "none", "training", CLASSES)
    (own_ade20k / "annotations" / "training").rename(own_ade20k / "annotations" / "elsewhere")
    with pytest.raises(UserError, match=r"annotations/training does not exist"):
        load_ade20k(own_ade20k, "training", CLASSES)
    for path in (own_ade20k / "images" / "validation").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"images/validation holds no \*\.jpg"):
        load_ade20k(own_ade20k, "validation", CLASSES)


def test_images_and_annotations_belong_together(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", CLASSES)
    for scene in (0, 1, 2, 3):
        pairs.mask_path(scene).unlink()
    pairs.image_path(7).unlink()
    with pytest.raises(
        UserError,
        match=r"4 image\(s\) without annotation: ADE_train_00000001\.jpg, .* \(1 more\); "
        r"1 annotation\(s\) without image: ADE_train_00000008\.png; every STEM",
    ):
        load_ade20k(own_ade20k, "training", CLASSES)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("head\n1\t0\t1\t1\t1\ta\n", r"classes = 8, but .*objectInfo150\.txt names 1; set `classes` to 1"),
        ("head\n1\t0\t1\t1\t1\ta\n3\t0\t1\t1\t1\tb\n", r"objectInfo150\.txt, line 3: got .* Idx being 2"),
        ("head\n1 0 1 1 1 a\n", r"line 2: got '1 0 1 1 1 a', allowed: .* tabs"),
    ],
)
def test_a_table_that_disagrees(own_ade20k, table, message):
    (own_ade20k / TABLE).write_text(table)
    with pytest.raises(UserError, match=message):
        load_ade20k(own_ade20k, "training", CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: Image.fromarray(ids[1:]), r"is 64 x 63 pixels, its image 64 x 64"),
        (lambda ids: Image.fromarray(ids + np.uint8(2)), r"has ids 9, 10; allowed: 0 \(unlabelled\) to 8"),
        (lambda ids: Image.fromarray(ids).convert("RGB"), r"mode RGB \(RGB\); allowed: 8-bit, one channel"),
        (lambda ids: Image.fromarray(ids).convert("1"), r"mode 1 \(1\)"),
        (lambda ids: Image.fromarray(ids.astype(np.uint16)), r"mode I;16"),
    ],
)
def test_masks_are_checked_when_they_are_read_and_a_few_before(own_ade20k, change, message):
    pairs = load_ade20k(own_ade20k, "training", CLASSES)
    path = pairs.mask_path(0)
    ids = np.asarray(Image.open(path)).copy()
    ids[0, 0] = 8
    change(ids).save(path)
    with pytest.raises(UserError, match=f"ADE_train_00000001.png .*{message}"):
        pairs.labels(0, pairs.image(0).size)
    with pytest.raises(UserError, match=message):
        load_ade20k(own_ade20k, "training", CLASSES)


def test_grey_of_fewer_bits_is_refused_and_a_palette_of_eight_read(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", CLASSES)
    path = pairs.mask_path(0)
    ids = np.asarray(Image.open(path)).copy()
    coloured = Image.fromarray(ids)
    coloured.putpalette([7 * number % 256 for number in range(768)])
    coloured.save(path)
    assert Image.open(path).mode == "P"
    assert np.array_equal(pairs.labels(0, (64, 64)), ids - np.uint8(1))
    path.write_bytes(png_of_four_bits(64, 64))
    assert Image.open(path).mode == "L"  # PIL stretches its values to 0..255
    with pytest.raises(UserError, match=r"mode L \(L;4\)"):
        pairs.labels(0, (64, 64))


def png_of_four_bits(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    rows = (b"\0" + b"\x12" * (width // 2)) * height
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_what_cannot_be_decoded_is_named(own_ade20k):
    pairs = load_ade20k(own_ade20k, "training", CLASSES)
    pairs.image_path(3).write_bytes(pairs.image_path(3).read_bytes()[:300])
    pairs.mask_path(4).write_bytes(pairs.mask_path(4).read_bytes()[:60])
    pairs.image_path(5).unlink()
    with pytest.raises(BadImage, match=r"ADE_train_00000004\.jpg \("):
        pairs.image(3)
    with pytest.raises(BadImage, match=r"ADE_train_00000005\.png \("):
        pairs.labels(4, (64, 64))
    with pytest.raises(BadImage, match=r"ADE_train_00000006\.jpg \(FileNotFoundError"):
        pairs.image(5)
