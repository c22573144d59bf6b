"""Activation checkpointing whose kept activations wait in the host's memory (fairscale's)."""

from __future__ import annotations

from torch import nn

from fdscale.blocks import blocks_of
from fdscale.config.errors import UserError


def offload_activations(backbone: nn.Module) -> None:
    """Recompute each block in the backward pass and keep its inputs on the CPU meanwhile; names stay as they are.

    Raises UserError for a network without blocks.
    """
    from fairscale.nn.checkpoint import checkpoint_wrapper

    blocks = blocks_of(backbone)
    if not blocks:
        raise UserError(
            f"student.activation_checkpointing=offload: {type(backbone).__name__} has no list of blocks; use 'blocks' "
            "or 'none'"
        )
    for block in blocks.values():
        checkpoint_wrapper(block, offload_to_cpu=True)  # replaces the block's forward, wraps nothing
