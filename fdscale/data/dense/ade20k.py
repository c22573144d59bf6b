"""ADE20K as it is published (ADEChallengeData2016): an image and a mask of class ids per scene; no torch.

`images/{training,validation}/STEM.jpg`, `annotations/{training,validation}/STEM.png` (8-bit, 0 unlabelled, ids from
1) and `objectInfo150.txt`, the table of class names. Other data sets in this layout are read as well.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.images import BadImage, decode_rgb
from fdscale.data.order import GlobalOrder, Order
from fdscale.data.scan import key_hash

SPLITS = ("training", "validation")
TABLE = "objectInfo150.txt"
IGNORED = 255  # in labels: pixels that teach and count nothing
MOST_CLASSES = 255  # labels 0..254, and 255 is taken
LOOKED_AT = 8  # masks that are read before a start, evenly spread: one wrong conversion spoils all


@dataclass(frozen=True)
class ScenePairs:
    """The scenes of one split in the order of their names: stems in `names`, class names from 0 or None."""

    folder: Path
    split: str
    classes: int
    names: tuple[str, ...]
    class_names: tuple[str, ...] | None

    def __len__(self) -> int:
        return len(self.names)

    def image_path(self, scene: int) -> Path:
        """Path of a scene's image."""
        return self.folder / "images" / self.split / f"{self.names[scene]}.jpg"

    def mask_path(self, scene: int) -> Path:
        """Path of a scene's mask."""
        return self.folder / "annotations" / self.split / f"{self.names[scene]}.png"

    def key(self, scene: int) -> int:
        """The uint64 sample key, which all randomness starts from: a hash of the stem."""
        return key_hash(self.names[scene])

    def fingerprint(self) -> str:
        """SHA-256 over the names and the sizes in bytes of all images and masks: what this run learns from."""
        digest = hashlib.sha256()
        for scene, name in enumerate(self.names):
            sizes = (path.stat().st_size for path in (self.image_path(scene), self.mask_path(scene)))
            digest.update(f"{name} {' '.join(map(str, sizes))}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def fingerprints(self, table: str) -> dict[str, str]:
        """The same by the setting that says where the data lie."""
        return {f"{table}.folder": self.fingerprint()}

    def order(self, global_batch: int, seed: int) -> Order:
        """All scenes, shuffled as one in each epoch."""
        return GlobalOrder(len(self), global_batch, seed)

    def image(self, scene: int) -> Image.Image:
        """A scene's RGB image; raises BadImage where it cannot be decoded.

        An EXIF orientation is not applied: masks are drawn on the pixels as they are stored.
        """
        path = self.image_path(scene)
        try:
            with path.open("rb") as file:
                return decode_rgb(file, str(path))
        except OSError as error:
            raise BadImage(f"{path} ({type(error).__name__}: {error})") from error

    def labels(self, scene: int, size: tuple[int, int]) -> NDArray[np.uint8]:
        """A scene's labels (h, w) from 0, 255 unlabelled; `size` is its image's (w, h).

        Raises BadImage for a mask that cannot be decoded, and UserError for one of another size, of another mode
        than 8-bit single channel, or with an id above `classes`.
        """
        path = self.mask_path(scene)
        ids = _read_mask(path)
        if ids.shape != size[::-1]:
            raise UserError(
                f"mask {path} is {ids.shape[1]} x {ids.shape[0]} pixels, its image {size[0]} x {size[1]}; allowed: the "
                "same size, as it is stored; convert the mask from its original again"
            )
        if ids.max(initial=0) > self.classes:
            wrong = np.unique(ids[ids > self.classes])
            raise UserError(
                f"mask {path} has ids {_few([str(value) for value in wrong])}; allowed: 0 (unlabelled) to "
                f"{self.classes} (classes); set `classes`, or make the masks anew: ids count from 1, and nothing was "
                "subtracted from them"
            )
        labels: NDArray[np.uint8] = ids - np.uint8(1)  # 0 wraps to 255
        return labels


def load_ade20k(folder: str | Path, split: str, classes: int) -> ScenePairs:
    """The scenes of a split, checked by their names, the table of classes and a few of the masks.

    Raises UserError for a missing folder or split, no images, images without masks and the other way round, another
    number of classes than in `objectInfo150.txt` (where there is one), and masks that are not what `labels` allows.
    """
    assert split in SPLITS, split
    assert 1 <= classes <= MOST_CLASSES, classes
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"data set folder {folder} does not exist; give the folder of ADEChallengeData2016")
    stems = {
        name: _stems(folder / name / split, suffix) for name, suffix in (("images", "jpg"), ("annotations", "png"))
    }
    _check_pairs(folder, split, stems["images"], stems["annotations"])
    pairs = ScenePairs(folder, split, classes, tuple(sorted(stems["images"])), _class_names(folder / TABLE, classes))
    for scene in sorted({int(scene) for scene in np.linspace(0, len(pairs) - 1, LOOKED_AT)}):
        _look_at(pairs, scene)
    return pairs


def _stems(folder: Path, suffix: str) -> set[str]:
    if not folder.is_dir():
        raise UserError(
            f"{folder} does not exist; a data set in ADE20K's layout has it: unpack ADEChallengeData2016.zip"
        )
    return {path.stem for path in folder.iterdir() if path.suffix == f".{suffix}"}


def _check_pairs(folder: Path, split: str, images: set[str], masks: set[str]) -> None:
    where = f"{folder / 'images' / split} and {folder / 'annotations' / split}"
    if not images:
        raise UserError(f"{folder / 'images' / split} holds no *.jpg; unpack ADEChallengeData2016.zip again")
    problems = [
        f"{len(alone)} {what}: {_few([f'{stem}.{suffix}' for stem in sorted(alone)])}"
        for alone, what, suffix in (
            (images - masks, "image(s) without annotation", "jpg"),
            (masks - images, "annotation(s) without image", "png"),
        )
        if alone
    ]
    if problems:
        raise UserError(
            f"{where} do not belong together: {'; '.join(problems)}; every STEM.jpg needs its STEM.png: unpack both "
            "again, or remove what is left over"
        )


def _class_names(path: Path, classes: int) -> tuple[str, ...] | None:
    """Names by label from `objectInfo150.txt` (Idx, Ratio, Train, Val, Stuff, Name; tabs between), or None."""
    if not path.exists():
        return None
    names: list[str] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        cells = [cell.strip() for cell in line.split("\t")]
        if len(cells) < 6 or cells[0] != str(len(names) + 1):
            raise UserError(
                f"{path}, line {number}: got {line.strip()!r}, allowed: Idx, Ratio, Train, Val, Stuff, Name with tabs "
                f"between, Idx being {len(names) + 1}; unpack ADEChallengeData2016.zip again"
            )
        names.append(cells[5])
    if len(names) != classes:
        raise UserError(f"classes = {classes}, but {path} names {len(names)}; set `classes` to {len(names)}")
    return tuple(names)


def _look_at(pairs: ScenePairs, scene: int) -> None:
    """Hold one mask against its image's size; what cannot be decoded is counted in training."""
    try:
        pairs.labels(scene, pairs.image(scene).size)
    except BadImage:
        return


def _read_mask(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path, formats=("PNG",)) as mask:
            layout, mode = mask.tile[0][3], mask.mode
            ids = np.array(mask)
    except Exception as error:  # PIL's plugin raises anything on garbage
        raise BadImage(f"{path} ({type(error).__name__}: {error})") from error
    # Fewer bits of grey would be stretched to 0..255, and colours are no ids.
    if layout not in ("L", "P"):
        raise UserError(
            f"mask {path} is a PNG of mode {mode} ({layout}); allowed: 8-bit, one channel (L, or P with ids as "
            "indices); write class ids, not colours"
        )
    return ids


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f", ... ({len(names) - 3} more)" if len(names) > 3 else "")
