"""Commands that make the shards that training reads."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from fdscale.commands.arguments import AllowPipe, CacheFolder, CacheGib, cache_for
from fdscale.config.errors import UserError
from fdscale.terminal import terminal

if TYPE_CHECKING:
    from fdscale.data.index import Index
    from fdscale.data.packing.imagenet import Split

SHOWN = 20  # lines of what is wrong

LOG = logging.getLogger(__name__)


def pack(
    source: Annotated[str, typer.Argument(help="Images: a folder, ImageNet as published, tars; or `digits`.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the shards and their index.")],
    samples_per_shard: Annotated[int, typer.Option(min=1)] = 1000,
    split: Annotated[
        str | None, typer.Option(help="Of a source with both: train (unless named) or val; of `digits`: train or test.")
    ] = None,
    classes_of: Annotated[
        Path | None, typer.Option(help="Of a val folder: its train's shards, by which it is numbered.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the one shuffle.")] = 0,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; else one per core. More help where each read takes long.")
    ] = None,
    max_bad_ratio: Annotated[
        float, typer.Option(min=0, max=1, help="Share of images that may be left out as broken.")
    ] = 0.01,
) -> None:
    """Turn images into shuffled shards with an index: class folders, a flat folder, ImageNet's archives or its Kaggle
    layout, tars of class tars, WebDataset tars, or the digits that scikit-learn carries.

    Stopped or killed, the same command goes on where it was.
    """
    digits = source == "digits" and not Path(source).exists()
    if not digits:
        LOG.info("packing %s", source)  # the imports below take seconds on a busy machine
    from fdscale.data.packing.pack import pack as pack_source
    from fdscale.data.processes import terminated_as_interrupted, usable_cores

    if digits:
        packed = _pack_digits(output, split, classes_of)
    else:
        workers = usable_cores() if workers is None else workers
        with terminated_as_interrupted():
            packed = pack_source(
                source, output, samples_per_shard, seed, _split_of(split), classes_of, workers, max_bad_ratio
            )
    _tell_made(packed, output)


def _pack_digits(output: Path, split: str | None, classes_of: Path | None) -> Index:
    from fdscale.data.packing.digits import pack_digits

    if split not in (None, "train", "test"):
        raise UserError(f"--split {split}: allowed: train, test")
    if classes_of is not None:
        raise UserError("--classes-of: the digits have their own numbers; leave it out")
    return pack_digits(output, "test" if split == "test" else "train")


def _split_of(split: str | None) -> Split | None:
    if split is None or split == "train" or split == "val":
        return cast("Split | None", split)
    raise UserError(f"--split {split}: allowed: train, val")


def index(
    folder: Annotated[Path, typer.Argument(help="A folder of WebDataset tars.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes that read shards; else one per CPU.")] = None,
) -> None:
    """Index a folder of WebDataset tars, so that training can read them."""
    from fdscale.data.index import build_index
    from fdscale.data.processes import terminated_as_interrupted

    with terminated_as_interrupted():
        built = build_index(folder, workers)
    _tell_made(built, folder)


def info(
    where: Annotated[str, typer.Argument(help="A folder of shards with their index, or its URL.")],
    as_json: Annotated[bool, typer.Option("--json", help="For a script.")] = False,
    cache: CacheFolder = None,
    cache_gib: CacheGib = 100.0,
    allow_pipe: AllowPipe = False,
) -> None:
    """Print what a folder of shards holds: samples, bytes, classes, formats and sizes of images, their order."""
    from fdscale.data import info as information
    from fdscale.data.index import load_index

    found = information.info(load_index(where, cache_for(where, cache, cache_gib, allow_pipe)))
    if as_json:
        print(json.dumps(information.as_json(found)))
    else:
        terminal().print(information.info_table(found, where))


def verify(
    where: Annotated[str, typer.Argument(help="A folder of shards with their index, or its URL.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; else one per CPU.")] = None,
    list_: Annotated[Path | None, typer.Option("--list", help="A file for all that is wrong, a line each.")] = None,
    cache: CacheFolder = None,
    cache_gib: CacheGib = 100.0,
    allow_pipe: AllowPipe = False,
) -> None:
    """Read every byte of the shards, decode every image, name whatever is wrong; fails where something is."""
    from fdscale.data.index import load_index, read_index
    from fdscale.data.processes import terminated_as_interrupted
    from fdscale.data.verify import verify as verify_index

    kept = cache_for(where, cache, cache_gib, allow_pipe)
    with terminated_as_interrupted():
        found = verify_index(read_index(Path(where)) if kept is None else load_index(where, kept), workers)
    lines = [str(fault) for fault in found.faults]
    if list_ is not None:
        list_.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for line in lines[:SHOWN]:
        terminal().print(escape(line), soft_wrap=True)
    if len(lines) > SHOWN:
        terminal().print(f"… {len(lines) - SHOWN} more: --list FILE writes them all")
    wrong = (
        [_count(found.bad_samples, "bad image"), _count(found.bad_shards, "bad shard")]
        if lines
        else ["all of them good"]
    )
    if found.unread:
        wrong.append(f"{_count(found.unread, 'image')} not checked")
    terminal().print(f"{_count(found.samples, 'image')} in {_count(found.shards, 'shard')}: {', '.join(wrong)}")
    if lines:
        raise typer.Exit(1)


def _tell_made(made: Index, folder: Path) -> None:
    terminal().print(f"{_count(len(made), 'sample')} in {_count(len(made.shards), 'shard')}: {escape(str(folder))}")


def _count(number: int, what: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
