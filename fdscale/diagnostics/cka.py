"""How alike two networks' layers see the same images: centred kernel alignment, from one batch at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fdscale.diagnostics.features import CONSTANT
from fdscale.diagnostics.rows import Measurement

FEWEST = 4  # images of a batch: the unbiased estimator divides by n (n - 3)


class KernelAlignment:
    """Linear CKA between every layer of `model` and every layer of `other`, which may be the same one.

    Minibatch CKA (Nguyen, Raghu, Kornblith 2021, arXiv 2010.15327, equation 3): the unbiased HSIC of each batch (Song
    et al. 2012), averaged over batches, here weighted by their images, then divided: 1 for layers that tell
    images apart in the same way, around 0, on both sides, for those that have nothing in common. Sums are in double
    precision, one for each pair of layers, whatever the images.
    """

    def __init__(self, model: str, other: str) -> None:
        self.model, self.other = model, other
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None
        self._images = 0

    def update(self, layers: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Add a batch: for each layer the mean of each image's patch tokens (B, C), of both models.

        A batch of fewer than four images says nothing and is left out.
        """
        images = len(layers[0])
        if images < FEWEST:
            return
        own, theirs = _centred_kernels(layers), _centred_kernels(others)
        found = _hsic(own, theirs), _hsic_itself(own), _hsic_itself(theirs)
        before = self._sums or tuple(map(torch.zeros_like, found))
        first, second, third = (total + images * value for total, value in zip(before, found, strict=True))
        self._sums = first, second, third
        self._images += images

    def rows(self) -> list[Measurement]:
        """A row `cka` for each pair of layers; one without layers where no batch had four images."""
        if self._sums is None:
            reason = f"CKA needs batches of {FEWEST} images or more"
            return [Measurement(self.model, "cka", None, "CKA", 0, other=self.other, reason=reason)]
        values = _aligned(*self._sums).tolist()
        return [self._row(a, b, value) for a, line in enumerate(values) for b, value in enumerate(line)]

    def _row(self, layer: int, other_layer: int, value: float) -> Measurement:
        known = value == value  # not NaN
        return Measurement(
            self.model,
            "cka",
            value if known else None,
            "CKA",
            self._images,
            layer,
            other=self.other,
            other_layer=other_layer,
            reason=None if known else "a layer does not tell the images apart, or is not finite",
        )


def _aligned(both: Tensor, own: Tensor, theirs: Tensor) -> Tensor:
    """HSIC (L, M) over the roots of each layer's with itself, (L,) and (M,); NaN where one of these is 0."""
    roots = own.sqrt()[:, None] * theirs.sqrt()
    return both / roots.where(roots > 0, torch.nan)


def _centred_kernels(layers: Sequence[Tensor]) -> Tensor:
    """Of features (B, C) of each of L layers: linear kernels (L, B, B), U-centred.

    (Székely and Rizzo 2014, equation 3.2.) Rows sum to 0 without the diagonal, which is 0.
    """
    kernels = torch.stack([_kernel(layer.double()) for layer in layers])
    count = kernels.shape[-1]
    kernels.diagonal(dim1=-2, dim2=-1).zero_()
    sums = kernels.sum(dim=-1)
    total = sums.sum(dim=-1)[:, None, None]
    kernels += total / ((count - 1) * (count - 2)) - (sums[:, :, None] + sums[:, None]) / (count - 2)
    kernels.diagonal(dim1=-2, dim2=-1).zero_()
    return kernels


def _kernel(features: Tensor) -> Tensor:
    """Of features (B, C) the kernel (B, B); 0 where images differ by rounding alone. The mean would be centred away."""
    rows = features - features.mean(dim=0)
    same = rows.square().sum() <= CONSTANT * features.square().sum()
    return torch.zeros_like(rows @ rows.T) if same else rows @ rows.T


def _hsic(own: Tensor, theirs: Tensor) -> Tensor:
    """The unbiased HSIC, (L, M), of U-centred kernels (L, B, B) and (M, B, B): their inner product over n (n - 3)."""
    count = own.shape[-1]
    return own.flatten(1) @ theirs.flatten(1).T / (count * (count - 3))


def _hsic_itself(kernels: Tensor) -> Tensor:
    """The unbiased HSIC of each layer with itself, (L,)."""
    count = kernels.shape[-1]
    return kernels.square().sum(dim=(1, 2)) / (count * (count - 3))
