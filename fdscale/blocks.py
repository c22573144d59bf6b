"""The blocks of any network: what is recomputed, offloaded or gathered as one."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

CONTAINERS = ("blocks", "resblocks")  # timm's name and ours, open_clip's


def blocks_of(network: nn.Module) -> dict[str, nn.Module]:
    """The members of every list called `blocks` or `resblocks`, by dotted name; empty where there is none."""
    return {
        f"{name}.{index}": block
        for name, module in network.named_modules()
        if name.rpartition(".")[2] in CONTAINERS
        for index, block in module.named_children()
    }
