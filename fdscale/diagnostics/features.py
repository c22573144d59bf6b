"""What a network's features are like, block by block: the dimensions they fill, how alike the tokens of an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fdscale.blocks import blocks_of
from fdscale.diagnostics.rows import Measurement
from fdscale.diagnostics.subjects import Subject

CONSTANT = 1e-13  # of the tokens' own square: a smaller variance is what fp32 rounds
NOT_FINITE = "the tokens are not finite"


@contextmanager
def watching_tokens(subject: Subject, seen: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `seen(layer, patch tokens (B, N, C))` during each forward, block by block, and for the network's output.

    Layers count the members of `blocks_of(subject.backbone)` from 0 in the order of depth; the output, after the final
    norm, is the one after the last block. Maps become tokens row by row, prefix tokens are left out. The forward
    itself is unchanged, and nothing is held back of it: a layer's tokens are gone once they were seen.
    """
    blocks = list(blocks_of(subject.backbone).values())
    with ExitStack() as watched:
        for layer, module in enumerate([*blocks, subject.network]):
            hook = module.register_forward_hook(partial(_hand_over, subject, layer, seen))
            watched.callback(hook.remove)
        yield


def _hand_over(
    subject: Subject, layer: int, seen: Callable[[int, Tensor], None], module: nn.Module, _: object, output: object
) -> None:
    parts = output if isinstance(output, tuple | list) else [output]
    # timm's TNT also gives the pixels inside of each patch, B * N rows; MViT the map's size, which is no tensor
    features = min((part for part in parts if isinstance(part, Tensor)), key=len).detach()
    seen(layer, _patches(_tokens_of(features, module), subject))


def _tokens_of(features: Tensor, block: nn.Module) -> Tensor:
    """Tokens (B, N, C) as they are, or of a square map (B, h, w, C) or (B, C, h, w) row by row.

    Of a map with as many channels as rows only its block can tell: convolutions take the channels first.
    """
    if features.ndim != 4:
        return features
    _, first, second, third = features.shape
    if first == second == third:
        channels_last = not any(isinstance(module, nn.Conv2d) for module in block.modules())
    else:
        channels_last = first == second
    return (features if channels_last else features.permute(0, 2, 3, 1)).flatten(1, 2)


def _patches(tokens: Tensor, subject: Subject) -> Tensor:
    """Without prefix tokens; blocks before a late CLS token (CaiT, XCiT) have none, and as many tokens as patches."""
    height, width = subject.network.grid
    return tokens if tokens.shape[1] == height * width else tokens[:, subject.prefix_tokens :]


class FeatureMeasures:
    """The rank and the likeness of one network's patch tokens in each layer, over any number of images.

    `feature_rank` is RankMe (Garrido et al. 2023, arXiv 2210.02885, equation 1, without its epsilon): the exponential
    of the entropy of the normalised singular values of the patch tokens of all images together, here centred: from 1
    (all on a line) to C (spread evenly). `token_similarity` is the mean cosine of two different patch tokens of an
    image, averaged over images.

    Sums are in double precision. A layer holds the covariance of its C channels, 8 C^2 bytes, whatever the images: a
    sixth of a transformer block's weights in fp32.
    """

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}

    def update(self, layer: int, tokens: Tensor) -> None:
        """Add the patch tokens (B, N, C) of a batch."""
        tokens = tokens.double()
        if layer not in self._layers:
            self._layers[layer] = _Layer(tokens)
        self._layers[layer].update(tokens)

    def rows(self, model: str) -> list[Measurement]:
        """Two rows for each layer; where one has no value, with the reason."""
        return [row for layer, sums in sorted(self._layers.items()) for row in sums.rows(model, layer)]


class _Layer:
    """Sums over the tokens of one layer, fp64; `first` tokens (B, N, C) say where its values lie."""

    def __init__(self, first: Tensor) -> None:
        # subtracted from all: what has a large mean would lose its variance to rounding
        self.origin = first.mean(dim=(0, 1))
        self.sum = torch.zeros_like(self.origin)
        self.products = self.origin.new_zeros(len(self.origin), len(self.origin))
        self.similarity = self.origin.new_zeros(())
        self.images = self.tokens = 0

    def update(self, tokens: Tensor) -> None:
        rows = (tokens - self.origin).flatten(0, 1)
        self.sum += rows.sum(dim=0)
        self.products.addmm_(rows.T, rows)
        self.similarity += _similarity(tokens).sum()
        self.images += len(tokens)
        self.tokens += len(rows)

    def rows(self, model: str, layer: int) -> list[Measurement]:
        rank, why_none = self._rank()
        likeness, why_not = self._likeness()
        return [
            Measurement(model, "feature_rank", rank, "dimensions", self.images, layer, reason=why_none),
            Measurement(model, "token_similarity", likeness, "cosine", self.images, layer, reason=why_not),
        ]

    def _rank(self) -> tuple[float | None, str | None]:
        mean = self.sum / self.tokens
        covariance = self.products / self.tokens - torch.outer(mean, mean)
        if not covariance.isfinite().all():
            return None, NOT_FINITE
        variances = torch.linalg.eigvalsh(covariance)  # ascending
        if variances[-1] <= CONSTANT * (self.origin + mean).square().sum():
            return None, "all tokens are the same"
        return effective_rank(variances), None

    def _likeness(self) -> tuple[float | None, str | None]:
        mean = float(self.similarity) / self.images
        if not math.isfinite(mean):
            return None, "an image has one token" if self.sum.isfinite().all() else NOT_FINITE
        return mean, None


def effective_rank(variances: Tensor) -> float:
    """The exponential of the entropy of the normalised standard deviations, of variances (C,) that are not all 0."""
    rounding = variances.max() * len(variances) * torch.finfo(variances.dtype).eps
    deviations = torch.where(variances > rounding, variances, 0).sqrt()
    shares = deviations / deviations.sum()
    return float(torch.special.entr(shares).sum().exp())


def _similarity(tokens: Tensor) -> Tensor:
    """The mean cosine of two different tokens, (B,), of tokens (B, N, C); NaN where N is 1.

    All pairs at once: their sum is the square of the sum of the normalised tokens, less each with itself.
    """
    units = F.normalize(tokens, dim=-1)
    pairs = units.sum(dim=1).square().sum(dim=-1) - units.square().sum(dim=(1, 2))
    count = tokens.shape[1]
    return pairs / (count * (count - 1) or math.nan)
