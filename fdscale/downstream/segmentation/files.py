"""A segmenter as a folder that transformers' `from_pretrained` loads whole, once `networks.py` is imported."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.segmenter import HEADS, Head, Segmenter

MAPS, MODEL = "backbone.", "model."  # what a segmenter calls the student with its neck, and transformers' network


def save_segmenter(
    segmenter: Segmenter,
    state: Mapping[str, Tensor],
    folder: Path,
    class_names: Sequence[str] | None = None,
    short_side: int = 512,
    long_side: int = 2048,
) -> None:
    """Write configuration, weights and image processor; `state` is the segmenter's full state dict.

    The processor resizes images as evaluation does and leaves pixels in [0, 1]. What an earlier attempt left in
    `folder` is replaced once all of it is written. Raises UserError where there is no room.
    """
    from fdscale.downstream.segmentation.networks import save_network

    config = copy.deepcopy(segmenter.config)
    if class_names is not None:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: number for number, name in enumerate(class_names)}
    named = {_transformers_name(name, segmenter.head): value for name, value in state.items()}
    try:
        with _replaced(folder) as new:
            save_network(config, named, new, short_side, long_side)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written: {error}; make room, then start the same command again"
        ) from error


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` if nothing fails, and is gone otherwise."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        yield new
        if folder.exists():
            os.replace(folder, Path(scratch) / "old")
        os.replace(new, folder)


def load_segmenter(folder: Path, device: str = "cpu") -> Segmenter:
    """The segmenter of a folder, in evaluation mode; on the meta device shapes only, for `divide` to fill.

    Raises UserError for a folder that holds none, or not all of it.
    """
    from fdscale.downstream.segmentation.networks import load_network

    model: Any = load_network(folder, device)
    head: Head = "mask2former" if model.config.model_type == "mask2former" else "upernet"
    return Segmenter(model.get_submodule(HEADS[head].SLOT).network, model, head).eval()


def _transformers_name(name: str, head: Head) -> str:
    if name.startswith(MAPS):
        return f"{HEADS[head].SLOT}.network.{name.removeprefix(MAPS)}"
    return name.removeprefix(MODEL)
