"""`fdscale diagnose`: networks side by side under every diagnostic; numbers first, then figures and a page of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shlex import quote
from tempfile import TemporaryFile
from typing import Any

import numpy as np
import torch

from fdscale import __version__
from fdscale.config.errors import SettingsError, UserError, attempt, nearest
from fdscale.data.batches import Batch
from fdscale.data.heap import give_back
from fdscale.data.index import Index, load_index
from fdscale.data.progress import progress
from fdscale.data.remote.cache import Cache
from fdscale.diagnostics.cka import KernelAlignment
from fdscale.diagnostics.failing import sentence_of, tried
from fdscale.diagnostics.landscape import first_labelled, loss_landscape
from fdscale.diagnostics.lines import LandscapePlan
from fdscale.diagnostics.models import Asked, asked_models, build_subjects, not_finite
from fdscale.diagnostics.rows import Measurement, read_rows, write_rows
from fdscale.diagnostics.sample import batches_by_size, evenly_spread
from fdscale.diagnostics.selection import Array, images_in
from fdscale.diagnostics.subjects import Subject
from fdscale.diagnostics.watched import ALIGNMENT, LANDSCAPE, PARTS, Watched
from fdscale.students.files import refuse_taken

logger = logging.getLogger(__name__)

NUMBERS, MAPS, ABOUT, FIGURES, PAGE = "measurements.jsonl", "maps.npz", "about.json", "figures", "index.html"


@dataclass(frozen=True)
class Preset:
    """How much is looked at: images as they pass, images that are held for the landscape, and the landscape's plan."""

    images: int
    landscape_images: int
    plan: LandscapePlan

    def of(self, images: int) -> Preset:
        """The same on so many images, of which the landscape takes no more than before."""
        return replace(self, images=images, landscape_images=min(images, self.landscape_images))


PRESETS = {
    "quick": Preset(32, 8, LandscapePlan(directions=3, points=5)),
    "thorough": Preset(256, 64, LandscapePlan(directions=5, points=11, surface=9)),
}


@dataclass(frozen=True)
class Found:
    """What was measured: rows, and of each model the averaged attention map (W, n, n) of each block."""

    rows: list[Measurement]
    maps: Mapping[str, Mapping[int, Array]] = field(default_factory=dict)


def diagnose(
    models: Sequence[str],
    data: str | Path,
    output: Path,
    preset: str = "quick",
    images: int | None = None,
    names: Sequence[str] = (),
    only: Sequence[str] = (),
    batch: int = 16,
    workers: int = 2,
    cache: Cache | None = None,
) -> Found:
    """Diagnose models on a sample of a shard folder; `output` gets the rows, then the maps, figures and the page.

    What a URL gives is fetched into `cache`, as in training. `images` replaces the preset's, `names` are what rows call
    the models, `only` the parts of PARTS that are wanted. Raises SettingsError with all that is wrong with models,
    shards, output and parts, before anything is measured, and UserError where the page cannot be drawn: the numbers
    stay.
    """
    problems = [*_unknown(only, PARTS, "--only"), *_unknown([preset], PRESETS, "--preset"), *_nothing_to_draw_with()]
    problems += [f"--name {name!r}: a model's name is not empty" for name in names if not name.strip()]
    attempt(lambda: _refuse_taken(output), problems)
    asked = attempt(lambda: asked_models(models, names), problems)
    index = attempt(lambda: load_index(data, cache), problems)
    if not problems:
        attempt(lambda: _make_room(output), problems)
    if problems:
        raise SettingsError(problems)
    assert asked is not None
    assert index is not None
    subjects = build_subjects(asked, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    wanted = PRESETS[preset] if images is None else PRESETS[preset].of(images)
    found = measure(subjects, index, wanted, only or PARTS, batch, workers)
    with _written(output):
        write_numbers(found, output, _about(asked, index, preset, found.rows))
    _draw(output)
    return found


def _draw(output: Path) -> None:
    """Draw the page; where that fails, tell how it is drawn again: what was measured is not lost with a figure."""
    try:
        draw_page(output)
    except (Exception, KeyboardInterrupt) as error:
        why = "interrupted" if isinstance(error, KeyboardInterrupt) else sentence_of(error)
        raise UserError(f"{output / PAGE} could not be drawn: {why}; {_drawn_again(output)}") from error


def _drawn_again(folder: Path) -> str:
    code = f"from pathlib import Path; from {__name__} import draw_page; draw_page(Path({str(folder)!r}))"
    return f"what was measured is in {folder / NUMBERS}, and is drawn by: python -c {quote(code)}"


@contextmanager
def _written(output: Path) -> Iterator[None]:
    """What the operating system refuses is a mistake of the user's."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error}; make room, or name another output") from error


def _refuse_taken(output: Path) -> None:
    with _written(output):
        refuse_taken(output)


def _make_room(output: Path) -> None:
    """Make the folder, or accept an empty one, before hours of measuring that could not be written."""
    with _written(output):
        output.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output):
            pass


def measure(
    subjects: Sequence[Subject],
    index: Index,
    preset: Preset,
    parts: Collection[str] = PARTS,
    batch: int = 16,
    workers: int = 2,
) -> Found:
    """Look at one sample of images with all subjects; a part that fails of one leaves its reason, the others go on.

    Raises UserError where no image of the sample can be decoded.
    """
    for subject in subjects:
        if (sentence := not_finite(subject)) is not None:
            logger.warning("%s: %s; what can be measured of it still is", subject.name, sentence)
    watched = [Watched(subject, parts) for subject in subjects]
    alignments = [KernelAlignment(subjects[0].name, subject.name) for subject in subjects]
    held = _look(watched, alignments, index, preset, batch, workers)
    rows = [row for one in watched for row in one.rows()]
    if ALIGNMENT in parts:
        rows += [row for each in zip(watched, alignments, strict=True) for row in _aligned(watched[0], *each)]
    if LANDSCAPE in parts:
        rows += _landscapes(watched, held, preset, batch)
    return Found(rows, {one.subject.name: one.maps() for one in watched})


def _look(
    watched: Sequence[Watched],
    alignments: Sequence[KernelAlignment],
    index: Index,
    preset: Preset,
    batch: int,
    workers: int,
) -> list[dict[int, Batch]]:
    """One pass over the sample; returns the first batches, in which there are labels enough for the landscape."""
    parts, wanted = watched[0].parts, preset.landscape_images if LANDSCAPE in watched[0].parts else 0
    chosen = evenly_spread(len(index), wanted if set(parts) == {LANDSCAPE} else max(preset.images, wanted))
    sizes = [one.subject.image_size for one in watched]
    device = next(watched[0].subject.network.parameters()).device
    held: list[dict[int, Batch]] = []
    labelled, seen = 0, 0
    with progress(len(chosen) * len(watched), 0, "images") as advance:
        for batches in batches_by_size(index, chosen, sizes, batch, workers, device):
            seen += len(batches[sizes[0]].images)
            known = int((batches[sizes[0]].labels >= 0).sum())
            if known and labelled < wanted:
                held.append(batches)
                labelled += known
            for one in watched:
                one.look(batches[one.subject.image_size].images)
                advance(len(batches[sizes[0]].images))
            for one, alignment in zip(watched, alignments, strict=True):
                _align(watched[0], one, alignment)
            give_back()  # the process stays as large as one batch makes it
    if not seen:
        raise UserError(
            f"{index.folder}: none of the {len(chosen):,} images that were to be looked at can be decoded; "
            f"`fdscale shards verify {index.folder}` tells of each"
        )
    return held


def _align(first: Watched, one: Watched, alignment: KernelAlignment) -> None:
    if ALIGNMENT in one.parts and not {ALIGNMENT} & (first.failed.keys() | one.failed.keys()):
        tried(lambda: alignment.update(first.pooled, one.pooled), one.failed, ALIGNMENT)


def _aligned(first: Watched, one: Watched, alignment: KernelAlignment) -> list[Measurement]:
    theirs = one.failed.get(ALIGNMENT)
    reason = first.failed.get(ALIGNMENT) or (theirs and f"{alignment.other}: {theirs}")
    if reason is None:
        return alignment.rows()
    return [Measurement(alignment.model, "cka", None, "CKA", 0, other=alignment.other, reason=reason)]


def _landscapes(
    watched: Sequence[Watched], held: Sequence[dict[int, Batch]], preset: Preset, batch: int
) -> Iterator[Measurement]:
    """The rows of each model's landscape, all of them on the same images."""
    with progress(preset.plan.evaluations * len(watched), 0, "points of landscapes") as advance:
        for one in watched:
            yield from tried(
                partial(_landscape, one, held, preset, batch, lambda: advance(1)), one.failed, LANDSCAPE
            ) or [Measurement(one.subject.name, LANDSCAPE, None, "nats", 0, reason=one.failed[LANDSCAPE])]


def _landscape(
    one: Watched, held: Sequence[dict[int, Batch]], preset: Preset, batch: int, advance: Callable[[], object]
) -> list[Measurement]:
    labelled = first_labelled([batches[one.subject.image_size] for batches in held], preset.landscape_images)
    return loss_landscape(one.subject, labelled, preset.plan, batch, advance)


def write_numbers(found: Found, folder: Path, about: Mapping[str, Any]) -> None:
    """What was measured, as files, from which the figures are drawn: rows first, then maps, and what was asked."""
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(found.rows, folder / NUMBERS)
    maps: dict[str, Any] = {
        f"{model}/{block}": value.astype(np.float32)
        for model, blocks in found.maps.items()
        for block, value in blocks.items()
    }
    np.savez_compressed(folder / MAPS, **maps)
    (folder / ABOUT).write_text(json.dumps(about, indent=2) + "\n")


def read_numbers(folder: Path) -> tuple[Found, dict[str, Any]]:
    """What `write_numbers` left."""
    maps: dict[str, dict[int, Array]] = {}
    with np.load(folder / MAPS) as stored:
        for name in stored.files:
            model, _, block = name.rpartition("/")
            maps.setdefault(model, {})[int(block)] = stored[name]
    return Found(read_rows(folder / NUMBERS), maps), json.loads((folder / ABOUT).read_text())


def draw_page(folder: Path) -> None:
    """Figures and page of the files that `write_numbers` left in a folder."""
    from fdscale.diagnostics.figures import draw
    from fdscale.diagnostics.page import write_page

    found, about = read_numbers(folder)
    pictures = draw(found.rows, found.maps, folder / FIGURES)
    write_page(found.rows, pictures, folder / FIGURES, about["told"], folder / PAGE)


def _about(asked: Sequence[Asked], index: Index, preset: str, rows: Sequence[Measurement]) -> dict[str, Any]:
    """Where the numbers come from, `told` in one sentence; images are counted as they were looked at."""
    passed, held = images_in(rows)
    of = f"of {len(index):,} images of {index.folder}, evenly spread, the same for all"
    landscape = f"; the landscape on {held:,} of them" if held else ""
    told = f"{passed:,} {of}{landscape}" if passed else f"the landscape on {held:,} {of}"
    told = f"{told}; preset {preset}"
    models = {one.name: one.text for one in asked}
    return {"told": told, "models": models, "data": str(index.folder), "preset": preset, "fdscale": __version__}


def _unknown(given: Sequence[str], known: Collection[str], option: str) -> list[str]:
    allowed = ", ".join(known)
    return [f"{option} {name}: allowed: {allowed}{nearest(name, known)}" for name in given if name not in known]


def _nothing_to_draw_with() -> list[str]:
    if find_spec("matplotlib") is not None:
        return []
    return ["figures are drawn by matplotlib, which is not installed: pip install 'fdscale[diagnose]'"]
