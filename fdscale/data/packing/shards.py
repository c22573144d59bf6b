"""Images of any source into shuffled tar shards with an index, by several processes, going on after a kill."""

from __future__ import annotations

import errno
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fdscale.config.errors import UserError
from fdscale.data.index import Index, load_index, write_index
from fdscale.data.packing.plan import Plan, Record, Work, refuse_taken, write_whole
from fdscale.data.packing.sources import NoImage, Source, as_stored
from fdscale.data.processes import in_processes
from fdscale.data.progress import progress
from fdscale.data.scan import CLASSES_FILE, scan_shard

LEFT_OUT_FILE = "left_out.txt"
MAX_BAD_RATIO = 0.01
MOST_SHARDS = 100_000  # their numbers have five digits, so that they are sorted by name
TOLD = 5  # images left out that the terminal names

LOG = logging.getLogger(__name__)


class ShardJob(NamedTuple):
    """One shard to write: where, its number, and its images in order."""

    work: Work
    number: int
    images: Source


def write_shards(
    source: Source,
    output: Path,
    samples_per_shard: int,
    seed: int | None,
    workers: int = 1,
    max_bad_ratio: float = MAX_BAD_RATIO,
) -> Index:
    """Write the images of a source, shuffled once by `seed` (None: in its order), as shards with an index.

    The same bytes for any number of `workers` (processes). The output appears when it is complete; after a kill the
    same call goes on with the shards that were whole. Raises UserError for an output that holds anything, a source or
    options other than when it began, more images that are none than `max_bad_ratio` allows, and a full disk.
    """
    if samples_per_shard < 1:
        raise UserError(f"samples_per_shard is {samples_per_shard}; allowed: 1 or more")
    output = Path(os.path.abspath(output))
    refuse_taken(output)
    if len(source) > samples_per_shard * MOST_SHARDS:
        fewest = -(-len(source) // MOST_SHARDS)
        raise UserError(
            f"samples_per_shard is {samples_per_shard}; allowed for {len(source):,} images: {fewest} or more"
        )
    plan, work = Plan(len(source), samples_per_shard, seed, source.classes), Work(output)
    with _disk_told(work.folder), work.opened(plan, source):
        records = _write_missing(plan, work, source, workers, max_bad_ratio)
        _write_index(records, work, source)
        work.finish()
    _tell_left_out(_left_out(records, source), output)
    return load_index(output)


def write_shard(job: ShardJob) -> Record:
    """Write one shard and the rows of its index, and take down that it is whole."""
    work, number, images = job
    path, left_out = work.shard_path(number), list[str]()
    with _disk_told(work.folder):
        write_whole(path, lambda file: left_out.extend(_write_tar(file, images)))
        if len(left_out) == len(images):
            path.unlink()
            record = Record(number, 0, 0, "", tuple(left_out))
        else:
            scanned = scan_shard(path, number, None)
            work.write_rows(number, scanned)
            record = Record(number, len(scanned.samples), scanned.bytes, scanned.sha256, tuple(left_out))
        work.write_record(record)
    return record


def _write_missing(plan: Plan, work: Work, source: Source, workers: int, max_bad_ratio: float) -> list[Record]:
    """The records of all shards in order, after those are written that are not whole yet."""
    records = [work.record(number) for number in range(plan.shards)]
    missing = [number for number, record in enumerate(records) if record is None]
    if len(missing) < plan.shards:
        LOG.info("going on: %s of %s shards are whole", f"{plan.shards - len(missing):,}", f"{plan.shards:,}")
    order, size = plan.order(), plan.samples_per_shard
    jobs = (ShardJob(work, n, source.part(order[n * size : (n + 1) * size])) for n in missing)
    done = sum(record.samples + len(record.left_out) for record in records if record is not None)
    left_out = _left_out(records, source)
    _refuse_many(source.left_out, source, max_bad_ratio)
    with progress(len(source), done, "images") as advance, _interrupt_told():
        for record in in_processes(write_shard, jobs, min(workers, len(missing))):
            records[record.number] = record
            advance(record.samples + len(record.left_out))
            left_out += record.left_out
            if len(left_out) >= TOLD:  # the first few are told together
                _refuse_many(left_out, source, max_bad_ratio)
    _refuse_many(left_out, source, max_bad_ratio)
    return [record for record in records if record is not None]


def _write_tar(file: BinaryIO, images: Source) -> Iterator[str]:
    """Write a tar, and give what is left out of it: the same bytes whenever it is written."""
    from webdataset import TarWriter

    # Nothing of the clock; PAX for names of any length. What PIL warns of is training's to tell.
    with TarWriter(file, encoder=False, mtime=0, format="PAX_FORMAT") as writer, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(len(images)):
            sample = images.read(number)
            try:
                stored = as_stored(sample)
            except NoImage as why:
                yield f"{sample.name}: {why}"
                continue
            label = {} if stored.label is None else {"cls": str(stored.label).encode()}
            writer.write({"__key__": stored.key, stored.suffix: stored.data, **label})


def _write_index(records: Sequence[Record], work: Work, source: Source) -> None:
    filled = [record for record in records if record.samples]
    if not filled:
        raise UserError(f"none of {len(source):,} images can be read, the first is {records[0].left_out[0]}")
    scanned = {work.shard_path(record.number).name: work.scanned(record) for record in filled}
    if source.classes is not None:
        (work.shards / CLASSES_FILE).write_text(json.dumps(list(source.classes), indent=1) + "\n", encoding="utf-8")
    if lines := _left_out(records, source):
        (work.shards / LEFT_OUT_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    write_index(work.shards, source.classes, scanned)


def _left_out(records: Sequence[Record | None], source: Source) -> list[str]:
    return [*source.left_out, *(line for record in records if record is not None for line in record.left_out)]


def _refuse_many(left_out: Sequence[str], source: Source, max_bad_ratio: float) -> None:
    total = len(source) + len(source.left_out)
    if len(left_out) > max_bad_ratio * total:
        raise UserError(
            f"{len(left_out):,} of {total:,} images are left out, more than --max-bad-ratio {max_bad_ratio:g} "
            f"allows: {'; '.join(left_out[:TOLD])}; repair them, or go on with a higher --max-bad-ratio"
        )


def _tell_left_out(left_out: Sequence[str], output: Path) -> None:
    if left_out:
        LOG.warning("left out %s images, all named in %s:", f"{len(left_out):,}", output / LEFT_OUT_FILE)
    for line in left_out[:TOLD]:
        LOG.warning("  %s", line)


@contextmanager
def _disk_told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        then = "there is space" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else "it can be written"
        raise UserError(
            f"cannot write to {folder} ({error.strerror or error}); its whole shards are kept: "
            f"once {then}, the same command goes on"
        ) from error


@contextmanager
def _interrupt_told() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        LOG.warning("interrupted; the same command goes on with the shards that are whole")
        raise
