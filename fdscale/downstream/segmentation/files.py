"""A segmenter as a folder that transformers' `from_pretrained` loads whole, once `networks.py` is imported."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

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

    The processor resizes images as evaluation does and leaves pixels in [0, 1].
    """
    from fdscale.downstream.segmentation.networks import save_network

    config = copy.deepcopy(segmenter.config)
    if class_names is not None:
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: number for number, name in enumerate(class_names)}
    named = {_transformers_name(name, segmenter.head): value for name, value in state.items()}
    save_network(config, named, folder, short_side, long_side)


def load_segmenter(folder: Path) -> Segmenter:
    """The segmenter of a folder, in evaluation mode."""
    from fdscale.downstream.segmentation.networks import load_network

    model: Any = load_network(folder)
    head: Head = "mask2former" if model.config.model_type == "mask2former" else "upernet"
    return Segmenter(model.get_submodule(HEADS[head].SLOT).network, model, head).eval()


def _transformers_name(name: str, head: Head) -> str:
    if name.startswith(MAPS):
        return f"{HEADS[head].SLOT}.network.{name.removeprefix(MAPS)}"
    return name.removeprefix(MODEL)
