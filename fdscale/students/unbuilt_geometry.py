"""Geometries of networks that only tell their shape once they are built: timm's, and one's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

OWN = "own"  # as student.name: the network is given by a Python call


@dataclass(frozen=True)
class TimmGeometry:
    """Any network that timm builds by name; width and grid are known once it is built.

    `arguments` are keywords of timm's class for it, such as a Beit's `embed_dim` or `use_abs_pos_emb`; sequences
    are tuples.
    """

    name: str
    image_size: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict, hash=False)

    family: ClassVar[str] = "timm"
    width: ClassVar[None] = None
    grid: ClassVar[None] = None
    stride: ClassVar[None] = None
    prefix_tokens: ClassVar[None] = None
    blocks: ClassVar[None] = None

    def parameters(self) -> None:
        """Unknown without building the network."""
        return None

    def flops(self) -> None:
        """Unknown without building the network."""
        return None

    def problems(self) -> list[str]:
        """None that can be told without building the network."""
        return []


@dataclass(frozen=True)
class OwnGeometry:
    """A network of one's own, given by a Python call: nothing is known of it beforehand, nothing is stored."""

    family: ClassVar[str] = OWN
    image_size: ClassVar[None] = None
    width: ClassVar[None] = None
    grid: ClassVar[None] = None
    stride: ClassVar[None] = None
    prefix_tokens: ClassVar[None] = None

    def parameters(self) -> None:
        """Unknown."""
        return None

    def flops(self) -> None:
        """Unknown."""
        return None
