"""How large the activations of the student's residual stream are, stage by stage: what grows before SwinV2-G diverges.

Post-norm blocks of giant networks have been seen to feed activations of 10^4 into their last stages (Swin Transformer
V2, arXiv 2111.09883, section 3.2 and figure 2), which 16-bit arithmetic cannot hold for long.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fdscale.blocks import blocks_of


class Amplitudes:
    """The largest absolute output of the blocks of each stage of a network, seen in steps that are watched.

    A stage is a list of blocks: four in a Swin, one in a ViT. A network without such lists has none.
    """

    def __init__(self, network: nn.Module | None = None) -> None:
        self._watching, self._largest = False, dict[str, Tensor]()
        blocks = {} if network is None else blocks_of(network)
        containers = list(dict.fromkeys(name.rpartition(".")[0] for name in blocks))
        for name, block in blocks.items():
            stage = str(containers.index(name.rpartition(".")[0]))
            block.register_forward_hook(partial(self._see, stage))

    @contextmanager
    def watching(self, wanted: bool) -> Iterator[None]:
        """Look at what passes inside, if it is wanted: each look reads a block's output once more."""
        self._watching, self._largest = wanted, {}  # what a step that was left out had seen is nobody's
        yield
        self._watching = False

    def terms(self) -> dict[str, Tensor]:
        """What was seen since the last call, on the device."""
        seen, self._largest = self._largest, {}
        return {f"residual_amplitude/{stage}": largest for stage, largest in seen.items()}

    @torch.no_grad()
    def _see(self, stage: str, block: nn.Module, inputs: object, output: object) -> None:
        if self._watching and block.training and isinstance(output, Tensor):
            least, most = torch.aminmax(output.detach())  # nothing of the size of the output is allocated
            largest = torch.maximum(most, -least).float()
            self._largest[stage] = torch.maximum(self._largest[stage], largest) if stage in self._largest else largest
