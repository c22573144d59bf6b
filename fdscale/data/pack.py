"""Image folders, and the UCI digits that scikit-learn carries, into tar shards with an index."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from webdataset import TarWriter

from fdscale.config.errors import UserError
from fdscale.data.images import FORMATS
from fdscale.data.index import INDEX_FILE, Index, build_index, load_index
from fdscale.data.scan import CLASSES_FILE, IMAGE_SUFFIXES

# These become PNG; IMAGE_SUFFIXES keep their bytes.
REENCODED_SUFFIXES = ("bmp", "gif", "pgm", "ppm", "tif", "tiff")
REENCODED_FORMATS = ("BMP", "GIF", "PPM", "TIFF")
DIGIT_SHARDS = 4
DIGIT_SIZE = 32


class Sample(NamedTuple):
    """One image to write: its key, its encoded bytes with their suffix, and its class number."""

    key: str
    suffix: str
    data: bytes
    label: int | None


def pack_folder(
    source: str | Path, output: str | Path, samples_per_shard: int, seed: int = 0, classes_of: str | Path | None = None
) -> Index:
    """Pack an image folder into `output` (new or empty).

    Class sub-folders give labels, sorted by name or numbered as in the shards `classes_of`; a flat folder none. Images
    are shuffled once by `seed`, so that reading shards in sequence still mixes the classes. Raises UserError for a
    source without images, images beside class folders, class folders that `classes_of` does not know, a link that
    leaves the source, two images of one key, and an output that holds anything.
    """
    source = Path(source).resolve()
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}; allowed: 1 or more")
    files = _image_files(source)
    classes = _class_names(source, files)
    if classes_of is not None:
        classes = _numbered_as(Path(classes_of), classes, source)
    keys = {file: _key(file.relative_to(source)) for file in files}
    _refuse_same_keys(keys)
    shuffled = [files[i] for i in np.random.Generator(np.random.Philox(seed)).permutation(len(files))]
    samples = (_read_sample(file, keys[file], source, classes) for file in shuffled)
    return _write_folder(samples, Path(output), samples_per_shard, classes)


def pack_digits(output: str | Path, split: Literal["train", "test"]) -> Index:
    """Pack the UCI handwritten digits (8x8, 10 classes) as 32x32 RGB PNGs: every 4th is test, the rest train.

    1,348 or 449 images in 4 shards. Raises UserError where scikit-learn, which carries them, is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError('the digits come with scikit-learn: pip install "fdscale[demo]"') from error
    assert split in ("train", "test"), split
    values, labels = load_digits(return_X_y=True)
    chosen = [i for i in range(len(values)) if (i % 4 == 3) == (split == "test")]
    samples = (Sample(f"digit-{i:04d}", "png", _digit_png(values[i]), int(labels[i])) for i in chosen)
    classes = [str(digit) for digit in range(10)]
    return _write_folder(samples, Path(output), -(-len(chosen) // DIGIT_SHARDS), classes)


def _image_files(source: Path) -> list[Path]:
    if not source.is_dir():
        raise UserError(f"image folder {source} does not exist; give a folder of images or of class folders")
    files = sorted(_walk(source))
    images = [file for file in files if _suffix(file) in IMAGE_SUFFIXES + REENCODED_SUFFIXES]
    if not images:
        allowed = ", ".join(IMAGE_SUFFIXES + REENCODED_SUFFIXES)
        raise UserError(f"image folder {source} holds no image among {len(files)} files; allowed: {allowed}")
    if len(images) < len(files):
        logging.getLogger(__name__).warning("%s: %d files are no images", source, len(files) - len(images))
    return images


def _walk(source: Path) -> Iterator[Path]:
    for folder, folders, names in os.walk(source, followlinks=False):
        for name in folders:
            if (path := Path(folder, name)).is_symlink():
                raise UserError(f"{path} is a link to {path.resolve()}; allowed: real folders in {source}")
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not (path := Path(folder, name)).resolve().is_relative_to(source):
                raise UserError(f"{path} leads out of {source} to {path.resolve()}; copy it, or remove it")
            if path.is_file() and not name.startswith("."):
                yield path


def _class_names(source: Path, files: Sequence[Path]) -> list[str] | None:
    flat = [file for file in files if file.parent == source]
    if len(flat) == len(files):
        return None
    if flat:
        raise UserError(
            f"{source} holds {len(flat)} images itself and {len(files) - len(flat)} in sub-folders; "
            "allowed: all in class folders (labels), or all directly in it (no labels)"
        )
    return sorted({file.relative_to(source).parts[0] for file in files})


def _numbered_as(shards: Path, found: Sequence[str] | None, source: Path) -> list[str]:
    """The class names of other shards, in their order; the log tells those of which `source` has no folder."""
    known = load_index(shards).classes
    if known is None or found is None:
        what = f"shards {shards} name no classes" if known is None else f"{source} has no class folders"
        raise UserError(f"{what}; without --classes-of, class folders are numbered by name and flat ones not at all")
    if unknown := [name for name in found if name not in set(known)]:
        listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise UserError(f"{source} has class folders that {shards} does not know: {listed}; remove or rename them")
    if missing := [name for name in known if name not in set(found)]:
        listed = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        logging.getLogger(__name__).warning("%s: no images of %s; the other classes keep their numbers", source, listed)
    return list(known)


def _key(relative: Path) -> str:
    """Path without suffix; WebDataset ends a key at the base name's first dot: others become underscores."""
    return relative.with_name(relative.stem.replace(".", "_")).as_posix()


def _refuse_same_keys(keys: dict[Path, str]) -> None:
    key, count = Counter(keys.values()).most_common(1)[0]
    if count > 1:
        names = [str(file) for file, other in keys.items() if other == key]
        raise UserError(f"{' and '.join(names[:2])} would both have the key {key!r}; rename one")


def _suffix(file: Path) -> str:
    return file.suffix[1:].lower()


def _read_sample(file: Path, key: str, source: Path, classes: Sequence[str] | None) -> Sample:
    label = None if classes is None else classes.index(file.relative_to(source).parts[0])
    if _suffix(file) in IMAGE_SUFFIXES:
        return Sample(key, _suffix(file), file.read_bytes(), label)
    try:
        with Image.open(file, formats=FORMATS + REENCODED_FORMATS) as image:
            return Sample(key, "png", _png(image), label)
    except Exception as error:  # PIL's plugins raise anything on garbage
        raise UserError(f"{file} cannot be decoded ({error}); repair or remove it") from error


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.convert("RGB").save(stream, "png")
    return stream.getvalue()


def _digit_png(values: np.ndarray) -> bytes:
    """Ink 0..16 of 64 pixels to a PNG."""
    grey = np.rint(values.reshape(8, 8) * (255 / 16)).astype(np.uint8)
    return _png(Image.fromarray(grey).resize((DIGIT_SIZE, DIGIT_SIZE), Image.Resampling.BICUBIC))


def _write_folder(
    samples: Iterable[Sample], output: Path, samples_per_shard: int, classes: Sequence[str] | None
) -> Index:
    """Shards and index in a temporary neighbour, renamed when whole: a kill leaves no half-packed folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        what = "already holds shards" if (output / INDEX_FILE).exists() else "is not an empty folder"
        raise UserError(f"output {output} {what}; nothing was written: name a new folder, or remove it first")
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        _write_shards(iter(samples), temporary, samples_per_shard)
        if classes is not None:
            (temporary / CLASSES_FILE).write_text(json.dumps(list(classes), indent=1) + "\n", encoding="utf-8")
        build_index(temporary)
        temporary.chmod(0o755)  # mkdtemp makes it private
        os.replace(temporary, output)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return load_index(output)


def _write_shards(samples: Iterator[Sample], folder: Path, samples_per_shard: int) -> None:
    number = 0
    while chunk := list(islice(samples, samples_per_shard)):
        with (folder / f"shard-{number:05d}.tar").open("wb") as file, _tar_writer(file) as writer:
            for sample in chunk:
                label = {} if sample.label is None else {"cls": str(sample.label).encode()}
                writer.write({"__key__": sample.key, sample.suffix: sample.data, **label})
        number += 1


def _tar_writer(file: io.BufferedWriter) -> TarWriter:
    """Nothing of the clock, so that packing twice gives the same bytes; PAX for names of any length."""
    return TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT")
