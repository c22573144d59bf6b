"""One model under all diagnostics that look at images as they pass: one that fails is left out, the others go on."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from fdscale.blocks import blocks_of
from fdscale.build.networks import as_pixels
from fdscale.diagnostics.attention import Attention, watching_attention
from fdscale.diagnostics.attention_measures import AttentionMeasures
from fdscale.diagnostics.failing import FAILURES, reason_of, tried
from fdscale.diagnostics.features import FeatureMeasures, watching_tokens
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.selection import Array
from fdscale.diagnostics.subjects import Subject

ATTENTION, FEATURES, ALIGNMENT, LANDSCAPE = "attention", "features", "alignment", "landscape"
PARTS = (ATTENTION, FEATURES, ALIGNMENT, LANDSCAPE)


class Watched:
    """A subject, and what the images that it has seen add up to; memory is the same for any number of them.

    `failed` holds the parts that cannot be measured of it, and why. `pooled` are the patch tokens' means of the last
    batch in each layer (B, C), the network's output last, for comparisons with other subjects.
    """

    def __init__(self, subject: Subject, parts: Collection[str]) -> None:
        self.subject, self.parts = subject, parts
        self.failed: dict[str, str] = {}
        self.pooled: list[Tensor] = []
        self._attention, self._features = AttentionMeasures(len(blocks_of(subject.backbone))), FeatureMeasures()
        self._images = 0

    @torch.no_grad()
    def look(self, images: Tensor) -> None:
        """One forward of images uint8 (B, 3, H, W)."""
        self.pooled = []
        self._images += len(images)
        if not {ATTENTION, FEATURES, ALIGNMENT} & set(self.parts) - self.failed.keys():
            return
        try:
            self._forward(as_pixels(images))
        except FAILURES as error:
            self.failed |= dict.fromkeys((ATTENTION, FEATURES, ALIGNMENT), f"its forward fails: {reason_of(error)}")

    def _forward(self, pixels: Tensor) -> None:
        with watching_tokens(self.subject, self._see_tokens):
            if ATTENTION not in self.parts or ATTENTION in self.failed:
                self.subject.tokens(pixels)
                return
            with watching_attention(self.subject, self._see_attention):
                self.subject.tokens(pixels)

    def _see_attention(self, block: int, attention: Attention) -> None:
        tried(lambda: self._attention.update(block, attention), self.failed, ATTENTION)

    def _see_tokens(self, layer: int, tokens: Tensor) -> None:
        if FEATURES in self.parts:
            tried(lambda: self._features.update(layer, tokens), self.failed, FEATURES)
        if ALIGNMENT in self.parts:
            self.pooled.append(tokens.double().mean(dim=1))

    def rows(self) -> list[Measurement]:
        """The rows of attention, before them the side of its images, and of features; a reason for each that failed."""
        name = self.subject.name
        measured: list[Measurement] = []
        if ATTENTION in self.parts:  # distances are in its pixels
            measured.append(Measurement(name, "image_side", self.subject.image_size, "pixels", self._images))
        for part, rows in {ATTENTION: self._attention.rows, FEATURES: self._features.rows}.items():
            if part in self.parts:
                measured += tried(lambda rows=rows: rows(name), self.failed, part) or []  # type: ignore[misc]
        told = {part: self.failed[part] for part in (ATTENTION, FEATURES) if part in self.parts and part in self.failed}
        return measured + [
            Measurement(name, part, None, "", self._images, reason=reason) for part, reason in told.items()
        ]

    def maps(self) -> dict[int, Array]:
        """The averaged attention map (W, n, n) of each block, where attention was measured."""
        if ATTENTION in self.failed or ATTENTION not in self.parts:
            return {}
        return self._attention.maps()
