"""ImageNet as it is published: the archives with their devkit, and the Kaggle download."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from fdscale.config.errors import UserError
from fdscale.data.packing.pack import pack
from tests.data.packing.small import WNIDS, contents, jpeg, packed, tar_bytes

LABELS = (2, 0, 1, 0)  # of the validation images, as places in WNIDS
IDS = {WNIDS[0]: 3, WNIDS[1]: 1, WNIDS[2]: 2}  # ILSVRC2012_IDs: not the order of the WNIDs
VAL = {f"ILSVRC2012_val_{i + 1:08d}": jpeg(500 + i) for i in range(len(LABELS))}
OF_VAL = {f"{WNIDS[label]}/{name}.jpeg": (VAL[name], label) for name, label in zip(VAL, LABELS, strict=True)}


def meta_mat() -> bytes:
    """The devkit's table: leaf classes first, then an inner node; words and children as MATLAB has them."""
    fields = [
        "ILSVRC2012_ID",
        "WNID",
        "words",
        "gloss",
        "num_children",
        "children",
        "wordnet_height",
        "num_train_images",
    ]
    synsets = np.zeros((4, 1), dtype=[(name, object) for name in fields])
    of_id = {number: wnid for wnid, number in IDS.items()} | {4: "n00001740"}
    for row, (number, wnid) in enumerate(sorted(of_id.items())):
        children = np.array([1, 2, 3]) if number == 4 else np.array([])
        count = float(len(children))
        synsets[row, 0] = (float(number), wnid, f"word {number}", "a gloss", count, children, 0.0, 5.0)
    stream = io.BytesIO()
    savemat(stream, {"synsets": synsets})
    return stream.getvalue()


def devkit(ids: str, meta: bytes) -> bytes:
    root = "ILSVRC2012_devkit_t12"
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, data in {
            f"{root}/readme.txt": b"ILSVRC",
            f"{root}/data/meta.mat": meta,
            f"{root}/data/ILSVRC2012_validation_ground_truth.txt": ids.encode(),
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


@pytest.fixture
def archives(tmp_path: Path, class_tars: dict[str, bytes]) -> Path:
    folder = tmp_path / "archives"
    folder.mkdir()
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_bytes(dict(reversed(class_tars.items()))))
    members = {f"{name}.JPEG": data for name, data in VAL.items()}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_bytes(dict(reversed(members.items()))))
    truth = "".join(f"{IDS[WNIDS[label]]}\n" for label in LABELS)
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(devkit(truth, meta_mat()))
    return folder


@pytest.fixture
def kaggle(tmp_path: Path, train_images: dict[str, dict[str, bytes]]) -> Path:
    root = tmp_path / "kaggle"
    images = root / "ILSVRC" / "Data" / "CLS-LOC"
    for wnid, files in train_images.items():
        (images / "train" / wnid).mkdir(parents=True)
        for name, data in files.items():
            (images / "train" / wnid / name).write_bytes(data)
    (images / "val").mkdir()
    (images / "test").mkdir()
    for name, data in VAL.items():
        (images / "val" / f"{name}.JPEG").write_bytes(data)
    (root / "LOC_synset_mapping.txt").write_text("".join(f"{wnid} a fish, or so\n" for wnid in WNIDS))
    rows = [f"{name},{WNIDS[label]} 1 2 3 4 \n" for name, label in zip(VAL, LABELS, strict=True)]
    (root / "LOC_val_solution.csv").write_text("ImageId,PredictionString\n" + "".join(reversed(rows)))
    return root


def test_the_official_archives(archives, train_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    train = pack(archives, tmp_path / "train", 4)
    assert "ImageNet, official archives, train: 17 images of 3 classes in" in caplog.text
    pack(train_folder, tmp_path / "of_folder", 4)
    assert contents(tmp_path / "train") == contents(tmp_path / "of_folder")
    val = pack(archives, tmp_path / "val", 4, split="val")
    assert packed(val) == OF_VAL
    assert val.classes == train.classes == WNIDS


def test_an_archive_by_its_own_name(archives, tmp_path):
    assert packed(pack(archives / "ILSVRC2012_img_val.tar", tmp_path / "val")) == OF_VAL
    with pytest.raises(UserError, match=r"--split train: \S+img_val\.tar is the split val; leave it out"):
        pack(archives / "ILSVRC2012_img_val.tar", tmp_path / "out", split="train")


@pytest.mark.parametrize("given", [".", "ILSVRC", "ILSVRC/Data/CLS-LOC"])
def test_the_kaggle_layout(kaggle, train_folder, tmp_path, given):
    train = pack(kaggle / given, tmp_path / "train", 4)
    pack(train_folder, tmp_path / "of_folder", 4)
    assert contents(tmp_path / "train") == contents(tmp_path / "of_folder")
    val = pack(kaggle / given, tmp_path / "val", 4, split="val")
    assert packed(val) == OF_VAL
    assert val.classes == train.classes == WNIDS


def test_a_split_of_the_kaggle_layout_by_its_own_name(kaggle, tmp_path):
    assert packed(pack(kaggle / "ILSVRC/Data/CLS-LOC/val", tmp_path / "val")) == OF_VAL
    with pytest.raises(UserError, match=r"--split train: .* is the split val"):
        pack(kaggle / "ILSVRC/Data/CLS-LOC/val", tmp_path / "out", split="train")


def test_a_missing_class_moves_no_number(kaggle, tmp_path):
    images = kaggle / "ILSVRC/Data/CLS-LOC/train"
    (images / WNIDS[0]).rename(tmp_path / "away")
    train = pack(kaggle, tmp_path / "train", 4)
    assert (train.classes, set(train.samples["label"].tolist())) == (WNIDS, {1, 2})
    (tmp_path / "away").rename(images / "n99999999")
    with pytest.raises(UserError, match=r"class folders that LOC_synset_mapping\.txt does not know: n99999999"):
        pack(kaggle, tmp_path / "out")


def test_what_kaggle_lacks_is_named(kaggle, tmp_path):
    solution = kaggle / "LOC_val_solution.csv"
    whole = solution.read_text()
    solution.write_text("".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(UserError, match=r"val/ILSVRC2012_val_00000001\.JPEG has no label in \S+LOC_val_solution\.csv"):
        pack(kaggle, tmp_path / "out", split="val")
    solution.write_text(whole.replace("ImageId", "Image"))
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv, line 2: expected ImageId,PredictionString"):
        pack(kaggle, tmp_path / "out", split="val")
    solution.unlink()
    with pytest.raises(UserError, match=r"LOC_val_solution\.csv cannot be read .* the labels of val"):
        pack(kaggle, tmp_path / "out", split="val")
    (kaggle / "LOC_synset_mapping.txt").unlink()
    with pytest.raises(UserError, match=r"LOC_synset_mapping\.txt cannot be read .* the classes"):
        pack(kaggle, tmp_path / "out")


def test_what_the_archives_lack_is_named(archives, tmp_path):
    kit = archives / "ILSVRC2012_devkit_t12.tar.gz"
    whole = kit.read_bytes()

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            pack(archives, tmp_path / "out", split="val")
        return str(caught.value)

    kit.write_bytes(devkit("1\n2\n", meta_mat()))
    assert "ILSVRC2012_val_00000003.JPEG has no label among the 2 of data/ILSVRC2012_validation" in refused()
    kit.write_bytes(devkit("1\n2\n3\n4\n", b"no MATLAB file"))
    assert "devkit_t12.tar.gz: data/meta.mat is not as published" in refused()
    kit.write_bytes(whole[:200])
    assert "is not the development kit as published" in refused()
    kit.unlink()
    assert "devkit_t12.tar.gz does not exist; it holds the labels of ILSVRC2012_img_val.tar" in refused()
    (archives / "ILSVRC2012_img_val.tar").unlink()
    assert "ILSVRC2012_img_val.tar does not exist; put it there, or name the other split" in refused()


def test_labels_without_scipy(archives, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UserError, match=r"meta\.mat in \S+ is read with scipy: pip install scipy"):
        pack(archives, tmp_path / "out", split="val")
