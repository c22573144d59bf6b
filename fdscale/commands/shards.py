"""Commands that make the shards that training reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fdscale.config.errors import UserError
from fdscale.terminal import terminal


def pack(
    source: Annotated[str, typer.Argument(help="An image folder (class sub-folders give labels), or `digits`.")],
    output: Annotated[Path, typer.Argument(help="A new folder for the shards and their index.")],
    samples_per_shard: int = 1000,
    split: Annotated[str, typer.Option(help="Of `digits`: train or test.")] = "train",
    classes_of: Annotated[
        Path | None, typer.Option(help="Of a val folder: its train's shards, by which it is numbered.")
    ] = None,
) -> None:
    """Turn an image folder, or the digits that scikit-learn carries, into shards with an index."""
    from fdscale.data.packing.digits import pack_digits
    from fdscale.data.packing.folder import pack_folder

    if split not in ("train", "test"):
        raise UserError(f"--split {split}: allowed: train, test")
    digits = source == "digits" and not Path(source).exists()
    if digits and classes_of is not None:
        raise UserError("--classes-of: the digits have their own numbers; leave it out")
    index = (
        pack_digits(output, "train" if split == "train" else "test")
        if digits
        else pack_folder(source, output, samples_per_shard, classes_of=classes_of)
    )
    terminal().print(f"{len(index)} samples in {len(index.shards)} shards: {escape(str(output))}")


def index(folder: Annotated[Path, typer.Argument(help="A folder of WebDataset tars.")]) -> None:
    """Index a folder of WebDataset tars, so that training can read them."""
    from fdscale.data.index import build_index

    built = build_index(folder)
    terminal().print(f"{len(built)} samples in {len(built.shards)} shards: {escape(str(folder))}")
