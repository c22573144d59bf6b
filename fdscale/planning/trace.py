"""What one micro batch does to memory, moment by moment: `activations` records it, `replay` reads it; torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["forward", "forward_end", "backward", "backward_end", "gradient"]


@dataclass(frozen=True)
class Moment:
    """A module begins or ends a pass, or a weight's gradient is complete; `index` is the module's or the weight's.

    `live` bytes of inputs and activations are there now, `peak` at most until the next moment. Gradients of weights
    are not among them: how long they live is the engine's affair.
    """

    kind: Kind
    index: int
    live: int
    peak: int


@dataclass(frozen=True)
class TracedModule:
    """A module by its class's name: the weights that it uses itself, and those of everything inside it, by index.

    `parent` is the index of the module around it, -1 where that is the outermost.
    """

    name: str
    own: tuple[int, ...]
    inside: tuple[int, ...]
    parent: int = -1


@dataclass(frozen=True)
class Trace:
    """One micro batch of what is trained: its moments, its modules, the elements of its trained tensors.

    `groups`: the optimizer's parameter group of each tensor. `batch`: bytes of the inputs. FLOPs count two for a
    multiply-accumulate; those of the backward pass hold what is recomputed. `offloaded` bytes wait in the host's
    memory between the passes.
    """

    moments: tuple[Moment, ...]
    modules: tuple[TracedModule, ...]
    weights: tuple[int, ...]
    groups: tuple[int, ...]
    batch: int
    forward_flops: int
    backward_flops: int
    offloaded: int = 0

    @property
    def peak(self) -> int:
        """Bytes of inputs and activations when there are most of them."""
        return max((moment.peak for moment in self.moments), default=0)

    @property
    def parameters(self) -> int:
        return sum(self.weights)
