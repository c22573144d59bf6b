"""Attention measured in one pass over images: how far, how widely, how alike heads look, and what maps are made of."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fdscale.config.errors import UserError
from fdscale.diagnostics.attention import Attention
from fdscale.diagnostics.attention_maps import column_share, diagonality, offset_share
from fdscale.diagnostics.attention_sums import AttentionSums
from fdscale.diagnostics.rows import Measurement

UNITS = {
    "attention_distance": "pixels",
    "attention_entropy": "nats",
    "attention_information": "1",
    "attention_on_prefix": "1",
    "head_similarity": "1",
    "attention_diagonality": "1",
    "attention_column_share": "1",
    "attention_offset_share": "1",
}
NOTHING_SEEN = (
    "no block attends from patch to patch as is seen here: a ConvNet, windows other than Swin's, kernels of its own"
)
NOT_SEEN = (
    "attention from patch to patch is not seen in this block: it has none, or over tokens that are no map of the image"
)
ONE_HEAD = "one head alone has no other to be like"
ONE_PATCH = "a window of one patch has no other to look at"

Array = NDArray[np.float64]


class AttentionMeasures:
    """The attention of one network, block by block; its memory does not grow with the images.

    Patch tokens alone count, as queries and as keys: prefix tokens, padding, and keys that a shifted window's mask
    forbids are left out, and rows divided by what remains. Per head and layer, means over queries and images:
    `attention_distance` (Dosovitskiy et al. 2021, figure 7) in pixels of the image that the backbone is given,
    `attention_entropy`, `attention_on_prefix` (what patches gave to prefix tokens); `attention_information`, normalised
    mutual information of query and key (Park et al. 2023, section 3), the mean over regions and images. Per layer:
    `head_similarity`, the mean cosine over pairs of heads; and of the map averaged over images and heads
    `attention_diagonality`, `attention_column_share`, `attention_offset_share` (`attention_maps.py`), means over
    regions. A region is a window, or each part of one that the mask keeps from the others.
    """

    def __init__(self, blocks: int = 0) -> None:
        """`blocks` is the network's number of them, so that rows can tell which ones gave nothing."""
        self._of_network = blocks
        self._blocks: dict[int, AttentionSums] = {}

    def update(self, block: int, attention: Attention) -> None:
        """Add a batch of one block. Raises UserError for maps of another size than before."""
        if block not in self._blocks:
            self._blocks[block] = AttentionSums(attention)
        try:
            self._blocks[block].add(attention)
        except UserError as error:
            raise UserError(f"block {block}: {error}") from error

    def maps(self) -> dict[int, Array]:
        """Of each block, the map (W, n, n) averaged over images and heads; NaN where a window is padded."""
        return {block: _average(sums) for block, sums in sorted(self._blocks.items())}

    def rows(self, model: str) -> list[Measurement]:
        """Every measure of every block; a value that is not a number, or cannot be, is None with a reason.

        So is a row `attention` of a block that gave nothing where others did.
        """
        if not self._blocks:
            return [Measurement(model, name, None, unit, 0, reason=NOTHING_SEEN) for name, unit in UNITS.items()]
        return [
            _row(model, name, value, reason, sums.images, layer, head)
            for layer, sums in sorted(self._blocks.items())
            for name, head, value, reason in (*_per_head(sums), *_per_layer(sums))
        ] + [
            Measurement(model, "attention", None, "", 0, layer, reason=NOT_SEEN)
            for layer in range(self._of_network)
            if layer not in self._blocks
        ]


Told = tuple[str, int | None, float | None, str | None]  # measure, head, value, and why there is none


def _row(
    model: str, name: str, value: float | None, reason: str | None, images: int, layer: int, head: int | None
) -> Measurement:
    if value is not None and not math.isfinite(value):
        value, reason = None, f"layer {layer}: attention is not a number (NaN): look for NaN among the weights up to it"
    return Measurement(model, name, value, UNITS[name], images, layer, head, reason=reason)


def _per_head(sums: AttentionSums) -> Iterator[Told]:
    for name, total in (
        ("attention_distance", sums.distance),
        ("attention_entropy", sums.entropy),
        ("attention_information", sums.information),
        ("attention_on_prefix", sums.on_prefix),
    ):
        reason = ONE_PATCH if name == "attention_information" and not _regions(sums) else None
        if name != "attention_on_prefix" or sums.prefix_tokens:
            for head, value in enumerate((total / sums.images).tolist()):
                yield name, head, None if reason else value, reason


def _per_layer(sums: AttentionSums) -> Iterator[Told]:
    alone = sums.heads == 1
    yield "head_similarity", None, None if alone else float(sums.similarity) / sums.images, ONE_HEAD if alone else None
    regions = _regions(sums)
    for name, values in (
        ("attention_diagonality", [diagonality(average) for average, _ in regions]),
        ("attention_column_share", [column_share(average) for average, _ in regions]),
        ("attention_offset_share", [offset_share(average, positions) for average, positions in regions]),
    ):
        yield name, None, float(np.mean(values)) if regions else None, None if regions else ONE_PATCH


def _regions(sums: AttentionSums) -> list[tuple[Array, Array]]:
    """The averaged map (m, m) of the m >= 2 patches of each region of each window, and their positions (m, 2)."""
    average, positions = (sums.average / sums.images).cpu().numpy(), sums.positions.cpu().double().numpy()
    return [
        (average[window][np.ix_(own, own)], positions[window][own])
        for window, members in enumerate(sums.members.cpu().numpy())
        for own in members.T
        if own.sum() > 1
    ]


def _average(sums: AttentionSums) -> Array:
    patches = sums.patches.cpu().numpy()
    average = (sums.average / sums.images).cpu().numpy()
    average[~(patches[:, :, None] & patches[:, None, :])] = np.nan
    anywhere = patches.any(axis=0)  # but prefix tokens
    return average[:, anywhere][:, :, anywhere]
