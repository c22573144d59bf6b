"""Mask2Former on a student's maps: scores, losses, and the same step in shapes alone.

The losses are the reference's (arXiv 2112.01527 and its `criterion.py`), by transformers' functions: Hungarian
matching, then cross entropy of the classes (2, of "no object" 0.1), binary cross entropy (5) and dice (5) of the
masks on 12,544 points, three quarters of them the most uncertain ones of three times as many; on the outputs of
every layer and of the queries before the first. Labels become one mask for each class in the image, whole-sized. Three
things differ: everything here is computed in fp32 (as there) whatever autocast is around it, the number of masks
that divides is the micro batch's, not the mean of all ranks' (a micro batch computes the same on any number of ranks,
and ranks exchange nothing), and a micro batch without any labelled pixel has a loss as well, that of "no object".

Ignored pixels, padding among them, belong to no mask, as in the reference: points there count as outside of every
mask, and no class is learned from them. (transformers' functions know no other way.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fdscale.config.errors import UserError
from fdscale.downstream.segmentation.pixels import IGNORED, accuracy

SLOT = "model.pixel_level_module.encoder"  # where transformers' network has its backbone
SKETCHED_OBJECTS = 32  # of an image in shapes alone; ADE20K's have 10.5 classes on average (its paper)

Matches = list[tuple[Tensor, Tensor]]  # of each image: the numbers of queries and of the objects that they match
Match = Callable[[Tensor, Tensor, list[Tensor], list[Tensor]], Matches]  # as transformers' matcher


def scores(model: Any, maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The reference's semantic inference (B, K, *size), fp32: masks weighted by their classes; no probabilities."""
    masks, classes = _predictions(model, maps)
    return _semantic(F.interpolate(masks[-1].float(), size, mode="bilinear", align_corners=False), classes[-1])


def losses(model: Any, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """`loss`, its parts `loss_class`, `loss_mask`, `loss_dice`, and `pixel_accuracy`, at a quarter of the size.

    Labels are (B, H, W), 255 ignored. Points are drawn from torch's global generator.
    """
    objects = [_objects(image) for image in labels]
    masks, classes = _predictions(model, maps)
    return _losses(model, masks, classes, objects, labels, model.criterion.matcher)


def sketched(model: Any, maps: Sequence[Tensor], labels: Tensor) -> dict[str, Tensor]:
    """The same step where values are not known: so many objects in each image, matched by the first queries."""
    count = min(SKETCHED_OBJECTS, model.config.num_queries, model.config.num_labels)
    numbers = torch.arange(count, device=labels.device)
    objects = [(numbers, (image == numbers[:, None, None]).float()) for image in labels]
    masks, classes = _predictions(model, maps)
    return _losses(model, masks, classes, objects, labels, lambda masks, *_: [(numbers, numbers)] * len(masks))


def stop_looking_for_infinities(model: Any) -> None:
    """Leave the pixel decoder's layers in evaluation mode, which they have no dropout to tell from training.

    In training transformers' layers make the host wait for the device, to see whether anything is infinite, and put
    large numbers in its place: hidden from the guard that would leave the step out.
    """
    for layer in model.model.pixel_level_module.decoder.encoder.layers:
        layer.training = False


def _predictions(model: Any, maps: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[Tensor]]:
    """Masks (B, Q, h/4, w/4) and classes (B, Q, K + 1), logits both, of the queries and after each layer."""
    if next(model.class_predictor.parameters()).dtype != torch.float32:
        raise UserError(
            "bf16.enabled, fp16.enabled: Mask2Former counts positions in its weights' type, in which 16 bits are too "
            "few; take torch_autocast in their place"
        )
    features = [features.float() for features in maps]  # positions are counted in their type, too
    decoded = model.model.pixel_level_module.decoder(features)
    found = model.model.transformer_module(
        decoded.multi_scale_features, decoded.mask_features, output_hidden_states=True
    )
    return found.masks_queries_logits, [
        model.class_predictor(states.transpose(0, 1)) for states in found.intermediate_hidden_states
    ]


def _objects(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The classes (n,) of one image's labels (H, W), and the mask of each, fp32 (n, H, W)."""
    present = labels.unique()
    present = present[present != IGNORED]
    return present, (labels == present[:, None, None]).float()


def _losses(
    model: Any,
    masks: Sequence[Tensor],
    classes: Sequence[Tensor],
    objects: list[tuple[Tensor, Tensor]],
    labels: Tensor,
    match: Match,
) -> dict[str, Tensor]:
    kinds, shapes = [kind for kind, _ in objects], [shape for _, shape in objects]
    with _without_autocast(labels.device):
        of_layers = [
            _of_layer(model.criterion, masks[layer].float(), classes[layer].float(), kinds, shapes, match)
            for layer in range(-1, len(masks) - 1)  # the last first, as transformers draws its points
        ]
        weights = model.weight_dict
        parts = {name: torch.stack([found[name] for found in of_layers]).sum() * weights[name] for name in weights}
    seen = _semantic(masks[-1].detach(), classes[-1].detach())
    size = seen.shape[-2:]
    small = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].long()
    return {
        "loss": torch.stack(list(parts.values())).sum(),
        "loss_class": parts["loss_cross_entropy"].detach(),
        "loss_mask": parts["loss_mask"].detach(),
        "loss_dice": parts["loss_dice"].detach(),
        "pixel_accuracy": accuracy(seen, small),
    }


def _of_layer(
    criterion: Any, masks: Tensor, classes: Tensor, kinds: list[Tensor], shapes: list[Tensor], match: Match
) -> dict[str, Tensor]:
    """The losses of one layer's outputs; transformers' own sum over layers may ask other ranks for their masks."""
    matched = match(masks, classes, shapes, kinds)
    count = max(sum(len(kind) for kind in kinds), 1)
    found: dict[str, Tensor] = criterion.loss_masks(masks, shapes, matched, count)
    return {**found, **criterion.loss_labels(classes, kinds, matched)}


def _semantic(masks: Tensor, classes: Tensor) -> Tensor:
    """Masks (B, Q, h, w) and classes (B, Q, K + 1), logits, -> scores (B, K, h, w), fp32."""
    with _without_autocast(masks.device):
        known = classes.float().softmax(dim=-1)[..., :-1]
        return torch.einsum("bqk,bqhw->bkhw", known, masks.float().sigmoid())


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """The meta device has no autocast to leave."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
