"""One mutated shard folder indexed, loaded, trained on and verified in a process of its own, and held to account."""

from __future__ import annotations

import io
import json
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from fdscale.config.errors import UserError
from fdscale.data.augment import Augmentation, augment
from fdscale.data.batches import Batch, EvalBatches, TrainBatches
from fdscale.data.images import FORMATS, MOST_PIXELS
from fdscale.data.index import Index, build_index, load_index, read_index
from fdscale.data.info import as_json, info
from fdscale.data.loader import EvalLoader, TrainLoader
from fdscale.data.mixture import Mixture
from fdscale.data.scan import IMAGE_SUFFIXES, key_hash, key_of
from fdscale.data.verify import verify
from tests.data.mutations import Mutated, mutated

MEMORY = 2**30  # bytes of address space that a process may take beyond what it starts with
SECONDS = 60.0
SIZE, SEED = 12, 3
VIEWS = Augmentation((0.2, 1.0), (0.75, 1.33), "bilinear", 0.5)
CPU = torch.device("cpu")

Pixels = dict[int, np.ndarray | None]  # by key: what a sample's image shows, None where it shows nothing


@dataclass(frozen=True)
class Case:
    """What became of one mutated folder: how it ended, in words, and what it took; `wrong` is what should not be."""

    number: int = 0
    done: list[str] = field(default_factory=list)
    ended: str = "wrong"
    told: str = ""
    read: int = 0
    bad: int = 0
    seconds: float = 0.0
    mebibytes: int = 0
    wrong: str | None = None


NOTHING = Case()


def examine_all(numbers: Sequence[int], folder: Path) -> list[Case]:
    """Each of these cases, made in `folder`, in forked processes with bounded memory and time."""
    cases: list[Case] = []
    while len(cases) < len(numbers):
        cases += in_a_process(numbers[len(cases) :], folder)
    return cases


def in_a_process(numbers: Sequence[int], folder: Path) -> list[Case]:
    """The cases that a child of this process examined before it ended; the last of them says so when it should not."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            tell(numbers, folder, writer)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writer)
    cases, ended = lines_of(reader, child)
    if len(cases) < len(numbers):
        cases.append(replace(NOTHING, number=numbers[len(cases)], wrong=ended))
    return cases


def tell(numbers: Sequence[int], folder: Path, writer: int) -> None:
    limit_memory()
    with os.fdopen(writer, "w", buffering=1) as pipe:
        for number in numbers:
            pipe.write(json.dumps(asdict(examine(number, folder / str(number)))) + "\n")


def lines_of(reader: int, child: int) -> tuple[list[Case], str]:
    """The cases that a child tells of, and how it ended; one that says nothing for long is killed."""
    text = b""
    while select.select([reader], [], [], SECONDS)[0]:
        if not (more := os.read(reader, 2**16)):
            break
        text += more
    else:
        os.kill(child, signal.SIGKILL)
    os.close(reader)
    _, status = os.waitpid(child, 0)
    cases = [Case(**json.loads(line)) for line in text.decode().splitlines()]
    return cases, "it hangs" if status == signal.SIGKILL else f"it crashed: status {status}"


def limit_memory() -> None:
    taken = memory("VmSize") * 1024
    resource.setrlimit(resource.RLIMIT_AS, (taken + MEMORY, taken + MEMORY))


def memory(name: str) -> int:
    """KiB of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def examine(number: int, folder: Path) -> Case:
    """Case `number`, made in `folder`; nothing but its index may be written."""
    outside, began = folder / "outside", time.monotonic()
    outside.mkdir(parents=True)
    (outside / "kept.txt").write_text("kept")
    case = mutated(outside / "shards", number)
    before = tree(outside)
    try:
        found = life(outside / "shards", case)
    except Exception:
        found = {"wrong": traceback.format_exc()}
    written = [name for name, _ in tree(outside).items() ^ before.items() if not name.startswith("shards/")]
    written += [path.name for path in Path("/tmp").glob("fdscale-escaped*")]
    if written:
        found["wrong"] = f"written outside its folder: {written}"
    done = case.done + found.get("afterwards", [])
    took = {"seconds": time.monotonic() - began, "mebibytes": memory("VmHWM") // 1024}
    kept = {name: found[name] for name in ("ended", "told", "read", "bad", "wrong") if name in found}
    return replace(NOTHING, number=number, done=done, **took, **kept)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder, by its relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def life(folder: Path, case: Mutated) -> dict[str, Any]:
    """Index, change, load, train, evaluate, verify: how far it went and what was told on the way."""
    try:
        index = build_index(folder, workers=1)
    except UserError as error:
        return refused("refused when indexed", folder, error)
    pixels = accounted(folder, index, case)
    labels = dict(zip(index.samples["key"].tolist(), index.samples["label"].tolist(), strict=True))
    assert set(os.listdir(folder)) == {*(shard.name for shard in index.shards), "index.json", "samples.npy"}
    loaded = load_index(folder) if case.under_the_run else None
    afterwards = [] if case.afterwards is None else [case.afterwards(folder)]
    found = read_all(folder, loaded, pixels, labels)
    return {**found, "afterwards": afterwards, **verified(folder, found, untouched=case.afterwards is None)}


def refused(ended: str, folder: Path, error: UserError) -> dict[str, Any]:
    """Told in one sentence, with the file."""
    named = str(folder) in str(error)
    return {"ended": ended, "told": str(error)} | ({} if named else {"wrong": f"nothing is named: {error}"})


def accounted(folder: Path, index: Index, case: Mutated) -> Pixels:
    """What each sample shows when it is indexed; asserts that the index holds every image that was put there."""
    images = [member for shard in case.members for member in shard if is_image(member.name)]
    plain = {key_hash(key_of(member.name)): member.data for member in images if not member.fields and not member.header}
    held = {int(row["key"]): bytes_of(folder, index, row) for row in index.samples}
    assert len(held) == len(index), "a key twice"
    assert len(held) >= len(plain), f"{len(plain)} images were put there, {len(held)} are indexed"
    if not case.bytes_changed:
        assert plain.items() <= held.items(), "an image is indexed as something else"
    return {key: shown(data) for key, data in held.items()}


def is_image(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in IMAGE_SUFFIXES


def bytes_of(folder: Path, index: Index, row: np.void) -> bytes:
    data = (folder / index.shards[row["shard"]].name).read_bytes()
    return data[row["offset"] : row["offset"] + row["size"]]


def shown(data: bytes) -> np.ndarray | None:
    """The RGB pixels that PIL sees in an image by itself, or None."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MOST_PIXELS:
            return None
        if image.mode == "I;16":
            return np.repeat((np.asarray(image) // 256).astype(np.uint8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))
    except Exception:  # whatever is wrong with it, there is nothing to show
        return None


def read_all(folder: Path, loaded: Index | None, pixels: Pixels, labels: dict[int, int]) -> dict[str, Any]:
    """One epoch of training and one of evaluation; every sample is seen as it was indexed, or named."""
    try:
        index = load_index(folder) if loaded is None else loaded
    except UserError as error:
        return refused("refused when loaded", folder, error)
    assert len(index) == len(pixels)
    try:
        as_json(info(index))
        trained = list(training(index))
        (evaluated,) = EvalLoader(EvalBatches(index, SIZE, "bilinear"), len(index), 0, 1, len(index), 0, CPU)
    except UserError as error:
        return refused("refused when read", folder, error)
    bad = {name.partition(" (")[0] for batch in trained for name in batch.bad}
    assert bad == {name.partition(" (")[0] for name in evaluated.bad}, "training and evaluation name other images"
    seen = rows_of(trained)
    assert len(seen) + len(bad) == len(index), f"{len(index)} samples, {len(seen)} seen, {len(bad)} named"
    for key, (view, label) in seen.items():
        image = pixels[key]
        assert image is not None, f"{key:016x} shows nothing, and was read"
        assert label == labels[key], "another label"
        expected = np.asarray(augment(Image.fromarray(image), key, 0, SEED, SIZE, VIEWS)).transpose(2, 0, 1)
        assert np.array_equal(view, expected), "other pixels"
    return {"ended": "read", "told": "; ".join(sorted(bad)), "read": len(seen), "bad": len(bad), "names": sorted(bad)}


def training(index: Index) -> list[Batch]:
    mixture = Mixture((index,))
    order = mixture.order(len(index), SEED)
    (step,) = TrainLoader(TrainBatches(mixture, SIZE, VIEWS, SEED), order, 0, 1, len(index), 0, CPU).steps(0, 1)
    return step


def rows_of(batches: list[Batch]) -> dict[int, tuple[np.ndarray, int]]:
    keys = [key for batch in batches for key in batch.keys.numpy().view(np.uint64).tolist()]
    views = [view for batch in batches for view in batch.images.numpy()]
    labels = [label for batch in batches for label in batch.labels.tolist()]
    return {key: (view, label) for key, view, label in zip(keys, views, labels, strict=True)}


def verified(folder: Path, found: dict[str, Any], untouched: bool) -> dict[str, Any]:
    """Whether `verify` names what training named, and something where it was refused."""
    try:
        faults = verify(read_index(folder), workers=1).faults
    except UserError as error:
        return {} if found["ended"] == "refused when loaded" else {"wrong": f"verify refuses what is read: {error}"}
    named = {f"{fault.shard}:{fault.member}" for fault in faults if fault.member is not None}
    missed = set(found.get("names", [])) - named
    assert not missed, f"training names {missed}, verify does not"
    assert faults or found["ended"] == "read", f"verify finds nothing, and yet: {found['told']}"
    if untouched:
        assert not named - set(found.get("names", named)), f"verify names more: {named}"
    return {}
