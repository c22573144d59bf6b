"""Running sums of one block's attention over images, in fp64 on the device of the weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.diagnostics.attention import Attention

TINY = 1e-300  # a row that gives patches nothing at all stays zeros


class AttentionSums:
    """What is added up of one block, image by image: as large for a million of them as for one.

    Patch tokens alone are queries and keys, and of a masked window those of one region; each row is divided by what it
    gave to them. W windows of up to R regions, H heads, n tokens; `members`, (W, n, R), are the patches of each region.
    `distance` (pixels), `entropy`, `on_prefix`: (H,), sums of the means over an image's queries; `information`: (H,),
    of the means over its regions; `similarity` of the mean over pairs of heads; `average`, (W, n, n), of the
    heads' mean.
    """

    def __init__(self, first: Attention) -> None:
        self.positions, self.prefix_tokens = first.positions, first.prefix_tokens
        self.patches = ~first.positions.isnan().any(dim=-1)  # (W, n)
        self.images, self.heads = 0, first.weights.shape[2]
        places = first.positions.nan_to_num().double()
        regions = torch.zeros_like(self.patches, dtype=torch.long) if first.regions is None else first.regions
        self.members = F.one_hot(regions).bool() & self.patches[..., None]
        self._pairs = self.members.double() @ self.members.double().transpose(1, 2) > 0
        self._distances = torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist") * self._pairs
        zeros = self._distances.new_zeros
        self.distance, self.entropy, self.on_prefix = zeros(self.heads), zeros(self.heads), zeros(self.heads)
        self.information, self.similarity = zeros(self.heads), zeros(())
        self.average = torch.zeros_like(self._distances)

    @torch.no_grad()
    def add(self, attention: Attention) -> None:
        """Add a batch. Raises UserError where its maps are of another size than those before."""
        if attention.weights.shape[1:] != (self.patches.shape[0], self.heads, *self._pairs.shape[1:]):
            raise UserError(
                f"attention over {attention.weights.shape[-1]} tokens in each of {attention.weights.shape[1]} windows "
                f"came after {self.patches.shape[1]} in {self.patches.shape[0]}: give all images in one size"
            )
        for image in attention.weights:
            self._add(image.double())

    def _add(self, image: Tensor) -> None:
        """Add one image's weights (W, H, n, n)."""
        maps = image.masked_fill(~self._pairs[:, None], 0.0)
        maps = maps / maps.sum(dim=-1, keepdim=True).clamp(min=TINY)
        entropies, queries = torch.special.entr(maps).sum(dim=-1), self.patches.sum()
        self.distance += torch.einsum("whij,wij->h", maps, self._distances) / queries
        self.entropy += entropies.sum(dim=(0, 2)) / queries
        given = image[..., : self.prefix_tokens].sum(dim=-1).masked_fill(~self.patches[:, None], 0.0)
        self.on_prefix += given.sum(dim=(0, 2)) / queries
        self.information += self._information(maps, entropies)
        self.similarity += _similarity(maps)
        self.average += maps.mean(dim=1)
        self.images += 1

    def _information(self, maps: Tensor, entropies: Tensor) -> Tensor:
        """I(q; k) / sqrt(H(q) H(k)) of equally likely queries, the mean over regions of two patches or more: (H,)."""
        members = self.members.double()
        counts = members.sum(dim=1)  # (W, R)
        large = counts > 1
        queries = (members @ counts[..., None]).mT.clamp(min=1)  # of each token's region, (W, 1, n)
        of_keys, of_rows = (
            torch.einsum("bhn,bnr->brh", values, members)[large]
            for values in (torch.special.entr(maps.sum(dim=-2) / queries), entropies)
        )
        counts = counts[large][:, None]
        shared = of_keys - of_rows / counts
        normalised = shared / (counts.log() * of_keys).sqrt()
        return normalised.masked_fill(of_keys <= 0, 0.0).mean(dim=0)  # one key for all queries tells nothing


def _similarity(maps: Tensor) -> Tensor:
    """The mean cosine over pairs of heads of (W, H, n, n), each head's maps in one vector."""
    flat = F.normalize(maps.transpose(0, 1).flatten(1), dim=-1, eps=TINY)
    heads = len(flat)
    return ((flat @ flat.T).sum() - flat.square().sum()) / max(heads * (heads - 1), 1)  # of one head nobody asks
