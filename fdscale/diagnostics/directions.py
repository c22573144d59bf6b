"""Random directions in the space of a network's weights, and a network that is moved along them and comes back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

TINY = 1e-10  # keeps filters of zeros from a division by zero, as in the published code
Direction = Mapping[str, Tensor]
"""By the names of parameters: how far each moves over a distance of 1. Those that are not in it stay."""


def numbered_direction(network: nn.Module, seed: int, number: int) -> Direction:
    """The direction `number` of a seed: the same one however many others are drawn."""
    words = np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)
    return filter_normalised(network, torch.Generator().manual_seed(int(words[0] >> 1)))


@torch.no_grad()
def filter_normalised(network: nn.Module, generator: torch.Generator) -> Direction:
    """A Gaussian direction, each filter scaled to the norm of the weights that it moves (Li et al. 2018, section 4).

    A filter is what lies under one index of a parameter's first axis: the weights into one neuron, or into one channel
    of a convolution. Vectors do not move, as in the published code: biases, norms, layer scales, and here also what
    has a single number per index, such as SwinV2's temperatures (H, 1, 1). Drawn on the CPU, from `generator` alone.
    """
    return {
        name: _scaled_to(parameter, torch.randn(parameter.shape, generator=generator))
        for name, parameter in network.named_parameters()
        if parameter.ndim > 1 and parameter[0].numel() > 1
    }


def _scaled_to(parameter: Tensor, drawn: Tensor) -> Tensor:
    """`drawn`, each filter with the norm of the parameter's, where the parameter lies, in fp32 or better."""
    weight = parameter.to(torch.promote_types(parameter.dtype, torch.float32))
    drawn = drawn.to(weight)
    lengths, wanted = (values.flatten(1).norm(dim=1) for values in (drawn, weight))
    return drawn * (wanted / (lengths + TINY)).view(-1, *[1] * (drawn.ndim - 1))


@contextmanager
def moving(network: nn.Module, directions: Sequence[Direction]) -> Iterator[Callable[..., None]]:
    """Gives `move(distance, …)`, which puts the weights so far along each direction from where they are now.

    At the end, also after an exception, every weight is what it was, bit for bit. Copies what moves once.
    """
    names = {name for direction in directions for name in direction}
    weights = {name: weight for name, weight in network.named_parameters() if name in names}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}

    @torch.no_grad()
    def move(*distances: float) -> None:
        for name, weight in weights.items():
            steps = zip(directions, distances, strict=True)
            weight.copy_(kept[name] + sum(direction[name] * by for direction, by in steps if name in direction))
        _forget_biases(network)

    try:
        yield move
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
        _forget_biases(network)


def _forget_biases(network: nn.Module) -> None:
    """timm's LeViT and its kin keep attention biases of earlier weights in evaluation mode."""
    for module in network.modules():
        if getattr(module, "attention_bias_cache", None):
            module.attention_bias_cache = {}  # type: ignore[assignment]
